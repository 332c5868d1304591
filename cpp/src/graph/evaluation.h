#pragma once

#include <torch/nn/module.h>

#include <utility>
#include <vector>

namespace rarefy::graph {

/// Evaluation mode of a module and all inside of it, for as long as this lives.
class Evaluation {
 public:
  explicit Evaluation(torch::nn::Module& model) : model_(model), training_(model.is_training()) {
    for (const auto& module : model.modules(/*include_self=*/false)) {
      modes_.emplace_back(module, module->is_training());
    }
    model.eval();
  }
  Evaluation(const Evaluation&) = delete;
  Evaluation& operator=(const Evaluation&) = delete;
  ~Evaluation() {
    // train() reaches what is inside too: the outer modules come first.
    model_.train(training_);
    for (const auto& [module, training] : modes_) {
      if (module->is_training() != training) {
        module->train(training);
      }
    }
  }

 private:
  torch::nn::Module& model_;
  bool training_;
  std::vector<std::pair<std::shared_ptr<torch::nn::Module>, bool>> modes_;
};

}  // namespace rarefy::graph
