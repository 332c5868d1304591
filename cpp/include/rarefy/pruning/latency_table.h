#pragma once

#include <rarefy/export.h>
#include <rarefy/graph/timing.h>
#include <rarefy/pruning/structure.h>

#include <cstdint>
#include <functional>
#include <string>
#include <utility>
#include <vector>

// How the time of a model depends on the widths of its groups, measured on this machine. Time is not proportional to
// multiply-accumulates: a 3x3 convolution takes as long with 52 channels as with 64, and a quarter with 32.
namespace rarefy::pruning {

/// How many units each group keeps.
using Widths = std::vector<int64_t>;

struct RAREFY_API LatencyOptions {
  double seconds = 30;   // about how long to measure operators at other widths, > 0
  int64_t points = 16;   // the most widths to measure per group, >= 2
  int64_t round_to = 1;  // the slices of a group that stay are multiples of this, or all, > 0
  double noise = 0.03;   // of an operator's time: what is no faster than by this share is not faster, in [0, 1)
  Widths smallest;       // of each group: the fewest units to keep; empty: 1
  graph::TimingOptions timing = {};
  /// The milliseconds of a convolution or linear layer with other numbers of output and input channels; unset: measured.
  std::function<double(const graph::Node& node, int64_t outputs, int64_t inputs)> time_operator = nullptr;
  /// Called with the share of the work that is done, in [0, 1].
  std::function<void(double done)> progress = nullptr;

  /// Throws c10::ValueError when a field is out of range.
  void validate() const;
};

/// The slices of a dimension: how many, and how many of them each group has.
struct RAREFY_API Axis {
  int64_t size = 1;
  std::vector<std::pair<int32_t, int64_t>> groups;

  /// The slices that are left.
  int64_t size_at(const Widths& widths, const Widths& full) const;
};

/// The time of one operator as a function of the widths.
struct RAREFY_API OperatorTime {
  int64_t node = -1;
  double milliseconds = 0;  // in the model, at full width

  // A convolution or linear layer: measured at a grid of output and input channels, relative to full width, row by row.
  // Between the points: linear.
  Axis output, input;
  std::vector<int64_t> outputs, inputs;
  std::vector<double> relative;

  // Any other operator: a fixed cost of the call, and for the rest the product over the factors of the share of
  // elements that is left. A factor has the share of each group; what is missing to 1 always stays.
  std::vector<std::vector<std::pair<int32_t, double>>> factors;
};

struct RAREFY_API LatencyTable {
  Widths units;                // of each group, at full width
  std::vector<Widths> widths;  // that each group may have, ascending, the last one full
  std::vector<OperatorTime> operators;
  double whole = 0;     // milliseconds of the model at full width
  double rest = 0;      // of them, what no operator explains
  double scale = 1;     // by which operators are faster in the whole than one by one; at most 1
  double call = 0;      // milliseconds that the call of any operator takes
  double noise = 0.03;  // as in the options
  int64_t threads = 0;

  /// Milliseconds of the model at these widths.
  double predict(const Widths& widths) const;
  /// Milliseconds of one operator at these widths.
  double predict(const OperatorTime& time, const Widths& widths) const;
};

/// Measures the time of a model and how it depends on its groups' widths.
///   forward  what was recorded; run several times
/// Throws c10::ValueError when `smallest` does not fit the groups, and what time_nodes() throws.
RAREFY_API LatencyTable measure_latency(const graph::Graph& graph, const Structure& structure,
                                        const std::function<void()>& forward, const LatencyOptions& options = {});

/// The same from known times: `whole` of the model, and of every node, as time_nodes() gives them, in milliseconds.
RAREFY_API LatencyTable measure_latency(const graph::Graph& graph, const Structure& structure, double whole,
                                        const std::vector<double>& node_times, const LatencyOptions& options = {});

}  // namespace rarefy::pruning
