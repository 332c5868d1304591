// Which layers of a model become sparse, before it changes; and the change, which can be undone.
#pragma once

#include <rarefy/nn/linear.h>
#include <rarefy/pruning/sparsify.h>

#include <memory>
#include <vector>

#include "nn/slots.h"

namespace rarefy::pruning {

/// The value that another is a view of all elements of, such as the weight of weight.t(); itself otherwise.
int64_t whole_of(const graph::Graph& graph, int64_t value);

class SparsifyPlan {
 public:
  /// Runs the model, and measures its linear layers. See sparsify().
  SparsifyPlan(torch::nn::Module& model, const std::function<std::vector<at::Tensor>()>& forward,
               const std::vector<at::Tensor>& inputs, const SparsifyOptions& options);
  /// For a recording of the model.
  SparsifyPlan(torch::nn::Module& model, const graph::Graph& graph, const SparsifyOptions& options);

  void apply() const;
  /// Puts the same modules and parameters back.
  void undo() const;
  const SparsifyReport& report() const { return report_; }

 private:
  struct Change {
    std::shared_ptr<torch::nn::Module> module;
    std::shared_ptr<nn::LinearImpl> own;  // of rarefy, which switches where it is; null otherwise
    at::Tensor weight, bias;
    std::vector<nn::Slot> slots;
    ops::SparseWeight sparse;
  };

  std::vector<Change> changes_;
  SparsifyReport report_;
};

}  // namespace rarefy::pruning
