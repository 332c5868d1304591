// Layers of torch::nn in containers whose children can be replaced, and their twins of rarefy::nn.
#pragma once

#include <rarefy/nn/quantizable.h>
#include <torch/nn/modules/container/any.h>

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace rarefy::quantization {

/// A layer of torch::nn that could have a twin.
struct FloatLayer {
  std::string name;
  std::string kind;    // "Linear", ...
  std::string reason;  // why it has no twin; empty when it can have one
  std::string bn;      // name of the batch normalization that folds into it; empty without
  bool relu = false;   // the ReLU after it becomes part of it

  /// Makes the twin, over the same parameters. Changes nothing in the model.
  std::function<std::shared_ptr<nn::Quantizable>()> make;
  /// The same without what follows the layer: no batch normalization, no ReLU.
  std::function<std::shared_ptr<nn::Quantizable>()> make_alone;
  /// Puts the twin that `make` or `make_alone` gave into the model.
  std::function<void()> insert;
};

/// The layers of torch::nn::{Linear, Conv1d, Conv2d, Conv3d, Embedding} below `model`, in the order of named_modules.
std::vector<FloatLayer> float_layers(torch::nn::Module& model);

/// Puts a SpentBatchNorm in the place of every batch normalization that has become part of an integer weight.
void remove_spent_batch_norms(torch::nn::Module& model);

/// Why a SpentBatchNorm cannot take the place of the module called `name`; unset when it can.
std::optional<std::string> why_not_removable(torch::nn::Module& model, const std::string& name);
/// Puts a SpentBatchNorm in the place of the module called `name`.
void remove_batch_norm(torch::nn::Module& model, const std::string& name);
/// Puts an Identity in the place of each ReLU that, in a Sequential, follows a layer with a ReLU of its own.
void remove_fused_relus(torch::nn::Module& model);
/// Puts in the place of each torch::nn::MaxPool2d of a Sequential one that takes bytes too.
void replace_max_pools(torch::nn::Module& model);
/// Whether such a pooling runs on this thread.
bool in_max_pool_of_bytes();

}  // namespace rarefy::quantization
