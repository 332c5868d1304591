#pragma once

#include <rarefy/export.h>
#include <rarefy/quantization/observer.h>
#include <rarefy/quantization/scheme.h>
#include <torch/nn/cloneable.h>
#include <torch/nn/pimpl.h>

#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>

namespace rarefy::quantization {

/// What an observer that chooses its range at the end (chooses_at_end) keeps of a stream, in memory that does not grow.
///
/// Buffers: hist (int64 [rows, bins]), hist_min and hist_max (float32 [rows]), see rarefy/ops/histogram.h; or batch_min and
/// batch_max (float32 [batches, rows]) and batches (int64 [3]), see ops::record_ranges.
class RAREFY_API RangeStatisticsImpl : public torch::nn::Cloneable<RangeStatisticsImpl> {
 public:
  using AllReduce = std::function<void(torch::Tensor&)>;
  using AllGather = std::function<std::vector<torch::Tensor>(const torch::Tensor&)>;

  /// rows: one per index of the scheme's axis, or 1.
  RangeStatisticsImpl(Observer observer, int64_t rows);
  void reset() override;

  /// Counts a batch; one that is not finite goes to `skipped` alone.
  void observe(const torch::Tensor& x, std::optional<int64_t> axis, torch::Tensor& skipped);
  /// The range of each row, (+inf, -inf) where nothing was seen.
  std::pair<torch::Tensor, torch::Tensor> choose(const Scheme& scheme) const;

  void clear();
  /// The buffers by name, themselves.
  std::map<std::string, torch::Tensor> tensors() const;
  /// Adds what another one with the same observer has seen.
  void add(const std::map<std::string, torch::Tensor>& other);

  /// Counts the batches of all processes as one batch. A batch that is not finite adds nothing, and to every process's
  /// `skipped`. `max` and `sum` reduce a tensor over the processes in place.
  void observe_over_processes(const torch::Tensor& x, std::optional<int64_t> axis, torch::Tensor& skipped,
                              const AllReduce& max, const AllReduce& sum);
  /// Becomes the statistics of all processes together.
  void merge_over_processes(const AllReduce& max, const AllReduce& sum, const AllGather& gather);

  Observer observer;
  /// Undefined unless the observer has them.
  torch::Tensor hist, hist_min, hist_max, batch_min, batch_max, batches;

 private:
  void add_over_processes(const torch::Tensor& counts, const torch::Tensor& low, const torch::Tensor& high,
                          const AllReduce& sum);

  int64_t rows_;
};
TORCH_MODULE(RangeStatistics);

}  // namespace rarefy::quantization
