#pragma once

#include <rarefy/export.h>
#include <rarefy/pruning/structure.h>
#include <rarefy/pruning/surgery.h>

#include <map>
#include <string>
#include <vector>

namespace torch::nn {
class Module;
}

namespace rarefy::pruning {

/// Of each module, by path: the attributes that were changed and their values as JSON text.
using Attributes = std::map<std::string, std::map<std::string, std::string>>;

/// The cuts of per-channel fake quantizers (scale, zero point, range) that follow from those of the weights given.
RAREFY_API std::vector<Cut> quantizer_cuts(const torch::nn::Module& model, const std::vector<Cut>& cuts);

/// Makes the options of the modules that `surgery` has cut agree with the shapes of their tensors: Linear, Bilinear,
/// convolutions, transposed ones, batch, instance, layer and group norm, Embedding, EmbeddingBag, PReLU, RNN, LSTM, GRU and
/// their cells, MultiheadAttention, and the layers of rarefy::nn. `surgery` brings the options back when it is rolled back;
/// the modules must live until then.
///
/// Groups of a convolution lie one after the other in dimension 0 of its weight, those of a group norm in its channels: a
/// group that has lost all of its slices is gone, and the others must keep equally many. Heads of an attention likewise, in
/// the columns of its output projection.
///
/// Returns what was changed, under the names that Python has for it. Throws c10::ValueError for shapes that no options
/// describe: groups of different sizes, layers of a recurrent network with different hidden sizes, attention whose heads do
/// not add up to its width or have lost channels (torch::nn::MultiheadAttention computes its scale from the width); a converted layer of
/// rarefy::nn.
RAREFY_API Attributes resize_modules(torch::nn::Module& model, Surgery& surgery);

}  // namespace rarefy::pruning
