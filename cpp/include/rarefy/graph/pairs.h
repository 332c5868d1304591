#pragma once

#include <rarefy/export.h>
#include <rarefy/graph/graph.h>

#include <cstdint>
#include <string>
#include <vector>

namespace rarefy::graph {

/// A convolution or linear layer and the batch normalization that alone reads its result:
///   norm(conv(x)) = scale * (conv(x) - mean) / sqrt(variance + eps) + shift,
/// which one layer of weight * scale / sqrt(variance + eps) computes too. Names are those of parameters and buffers of
/// the model, empty for what is absent.
struct RAREFY_API ConvBnPair {
  int64_t conv = -1;  // nodes
  int64_t norm = -1;
  std::string weight, bias;    // of the convolution or linear layer
  std::string scale, shift;    // of the normalization
  std::string mean, variance;  // its running statistics
  int64_t output_dim = 0;      // of the weight: one slice per output channel (and group, when transposed)
  double eps = 0;
};

/// The pairs of a recording, in order of their running. A pair has weights that no other operator reads, a normalization
/// in evaluation mode with running statistics, along the layer's output channels, and nothing else that reads or changes
/// what is between them.
RAREFY_API std::vector<ConvBnPair> conv_bn_pairs(const Graph& graph);

}  // namespace rarefy::graph
