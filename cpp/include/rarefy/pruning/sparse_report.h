#pragma once

#include <rarefy/graph/graph.h>
#include <rarefy/pruning/sparse_file.h>
#include <rarefy/pruning/sparsify.h>

#include <cstdint>
#include <functional>
#include <string>
#include <utility>
#include <vector>

// What the zeros of a model are worth: bytes on disk, multiply-accumulates, and measured time. Three columns, since none follows
// from another: nine of ten weights at zero save no millisecond where the dense kernel is faster.
namespace rarefy::pruning {

struct RAREFY_API SparseReport {
  SparseFileReport file;       // what save_sparse() would write
  int64_t macs = 0;            // multiply-accumulates of the run that was given
  int64_t effective_macs = 0;  // of those, with a weight that is not zero
  double dense_milliseconds = 0;
  double sparse_milliseconds = 0;  // with the linear layers sparse that are faster so; both times in turn, the least
  SparsifyReport layers;

  std::string to_string() const;
  std::string to_html() const;
};

/// The multiply-accumulates of a recorded run whose weight is not zero: of an operator that has a parameter (or the buffer of a
/// converted layer) as its weight, the share of the elements that are not zero; of other operators, all.
RAREFY_API int64_t effective_macs(const graph::Graph& graph);

/// Milliseconds of two calls, each the least of its runs; they take turns for `seconds` at least, so that a busy machine is the
/// same for both. Short calls are repeated.
RAREFY_API std::pair<double, double> compare_times(const std::function<void()>& first,
                                                   const std::function<void()>& second, double seconds);

/// Measures a model, which is the same afterwards, its parameters the same tensors.
///   forward  runs the model and returns its outputs: [&] { return std::vector{net->forward(x)}; }
///   seconds  to time the whole model for
/// Throws as sparsify() does.
RAREFY_API SparseReport measure_sparse(torch::nn::Module& model,
                                       const std::function<std::vector<at::Tensor>()>& forward,
                                       const std::vector<at::Tensor>& inputs, const SparsifyOptions& options = {},
                                       double seconds = 0.5);

}  // namespace rarefy::pruning
