#pragma once

#include <torch/nn/module.h>
#include <torch/types.h>

#include <concepts>
#include <functional>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

namespace rarefy::distillation {

/// A std::shared_ptr to a torch::nn module, or a holder made by TORCH_MODULE, whose forward maps a tensor to a tensor.
template <typename M>
concept ModuleLike = requires(M& module, const torch::Tensor& x) {
  { module->forward(x) } -> std::convertible_to<torch::Tensor>;
  { module->modules() } -> std::convertible_to<std::vector<std::shared_ptr<torch::nn::Module>>>;
};

/// A model as the trainer sees it: a function from inputs to logits, and a switch between training and evaluation.
struct Model {
  using Forward = std::function<torch::Tensor(const torch::Tensor&)>;
  using Restore = std::function<void()>;

  Forward forward;
  /// Puts the model in training (true) or evaluation mode; returns what puts every module back as it was. May be empty:
  /// the model has no modes.
  std::function<Restore(bool)> enter_mode;

  explicit Model(Forward function, std::function<Restore(bool)> mode = {})
      : forward(std::move(function)), enter_mode(std::move(mode)) {}

  /// Any callable from a tensor to a tensor; it has no modes.
  template <typename F>
    requires(!ModuleLike<F> && !std::same_as<F, Model> &&
             std::is_invocable_r_v<torch::Tensor, F&, const torch::Tensor&>)
  Model(F function) : forward(std::move(function)) {}  // NOLINT(google-explicit-constructor): reads as the model itself

  /// A torch::nn module, shared with the caller.
  template <ModuleLike M>
  Model(M module)  // NOLINT(google-explicit-constructor)
      : forward([module](const torch::Tensor& x) mutable -> torch::Tensor { return module->forward(x); }),
        enter_mode([module](bool training) mutable -> Restore {
          auto modules = module->modules();
          std::vector<bool> flags;
          for (const auto& part : modules) {
            flags.push_back(part->is_training());
          }
          module->train(training);
          return [modules = std::move(modules), flags = std::move(flags)] {
            // Parents come before their children here, and train() reaches down: every own flag is set last.
            for (size_t i = 0; i < modules.size(); ++i) {
              modules[i]->train(flags[i]);
            }
          };
        }) {}
};

}  // namespace rarefy::distillation
