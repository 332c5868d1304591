#pragma once

#include <ATen/core/Tensor.h>
#include <rarefy/export.h>
#include <rarefy/graph/graph.h>
#include <rarefy/ops/sparse_linear.h>
#include <torch/nn/module.h>

#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

// Sparse execution of linear layers, where a measurement on this machine says that it is faster.
namespace rarefy::pruning {

struct RAREFY_API SparsifyOptions {
  double gain = 1.1;            // a sparse layer must be this many times as fast as the dense one, >= 1
  double seconds = 0.05;        // to measure each form of each layer for, > 0
  double least_sparsity = 0.5;  // layers with fewer zeros are not measured, in [0, 1]
  /// Heights and widths of the blocks that are tried; 1 x 1 is single weights.
  std::vector<std::pair<int64_t, int64_t>> blocks = {{1, 1}, {4, 4}, {16, 1}, {1, 16}};

  /// Throws c10::ValueError when a field is out of range.
  void validate() const;
};

/// What became of one linear layer.
struct RAREFY_API SparsifiedLayer {
  std::string name;
  int64_t elements = 0;
  double sparsity = 0;                // zeros / elements of the weight
  std::vector<int64_t> samples = {};  // rows of the inputs that the model gave it, call by call
  bool sparse = false;
  std::pair<int64_t, int64_t> block{0, 0};  // of the fastest form that was measured; 0 without a measurement
  double dense_milliseconds = 0;            // of its calls together; 0 where it was not measured
  double sparse_milliseconds = 0;           // of the fastest form
  std::string reason;                       // why it is sparse, or stays dense
};

struct RAREFY_API SparsifyReport {
  std::vector<SparsifiedLayer> layers;

  /// How many layers are sparse.
  int64_t sparse() const;
  /// A table with one line per layer.
  std::string to_string() const;
  std::string to_html() const;
};

/// The rows of the input of every linear operator, by the name of the parameter that is its weight.
RAREFY_API std::map<std::string, std::vector<int64_t>> linear_samples(const graph::Graph& graph);

/// Measures a linear layer with inputs of `samples` rows, dense and sparse in turn. Fills in everything but the name, and
/// returns the sparse weight where it is to be used. `weight` is [out, in].
RAREFY_API std::optional<ops::SparseWeight> choose_sparse(SparsifiedLayer& layer, const at::Tensor& weight,
                                                          const at::Tensor& bias, const SparsifyOptions& options = {});

/// Makes the linear layers of a model sparse that run faster so: rarefy::nn::Linear switches where it is; a torch::nn::Linear
/// that only Sequentials, ModuleLists and ModuleDicts hold becomes a rarefy::nn::SparseLinear. For inference: a backward pass
/// throws. What stays dense is in the report, with the reason.
///   forward  runs the model on inputs of the size that it will be used with, and returns its outputs:
///            [&] { return std::vector{net->forward(x)}; }
/// Finish pruning first (finalize()): a layer with a pruner's mask stays dense.
/// Throws c10::ValueError for options out of range, and passes on what `forward` throws; the model is then as it was.
RAREFY_API SparsifyReport sparsify(torch::nn::Module& model, const std::function<std::vector<at::Tensor>()>& forward,
                                   const std::vector<at::Tensor>& inputs, const SparsifyOptions& options = {});

/// Makes all sparse layers of a model dense again, with the same weights bit for bit (-0 becomes +0): SparseLinear becomes
/// torch::nn::Linear, rarefy::nn::Linear switches back. Returns how many they were. Throws c10::ValueError, with the model
/// unchanged, for a SparseLinear that is a typed member.
RAREFY_API int64_t to_dense(torch::nn::Module& model);

}  // namespace rarefy::pruning
