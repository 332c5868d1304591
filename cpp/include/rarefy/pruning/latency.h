#pragma once

#include <ATen/core/Tensor.h>
#include <rarefy/export.h>
#include <rarefy/pruning/latency_table.h>

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

// Choosing widths for a time in milliseconds.
namespace rarefy::pruning {

/// The widths of each group that are worth having while the others are full, ascending: each is faster than the next one
/// by more than noise. The full width is always among them.
RAREFY_API std::vector<Widths> useful_widths(const LatencyTable& table);

/// The least time that the table predicts for any widths.
RAREFY_API double fastest(const LatencyTable& table, const std::vector<at::Tensor>& scores);

/// The widths that lose least importance among those whose predicted time is at most `target` milliseconds: the group and
/// width that loses least per millisecond goes first, and what turned out not to be needed is given back at the end.
///   scores  of each group: importance of each unit; undefined for a group to leave alone
/// Throws c10::ValueError when the target is not positive or cannot be reached, saying what can, and for scores that do
/// not fit the groups or are not finite.
RAREFY_API Widths widths_for_latency(const LatencyTable& table, const std::vector<at::Tensor>& scores, double target);

/// One attempt at a target: what the table was asked for, what it predicted, and what the pruned model took.
struct RAREFY_API LatencyTry {
  Widths widths;
  double asked = 0, predicted = 0, measured = 0;  // milliseconds
};

struct RAREFY_API LatencyResult {
  Widths widths;                                // of the best try
  double target = 0, measured = 0, before = 0;  // milliseconds
  int64_t threads = 0;
  std::vector<LatencyTry> tries;

  /// "asked for 10 ms, measured 9.7 ms on 2 threads (19.8 ms before), 2 tries".
  std::string to_string() const;
};

/// Widths whose measured time is `target` milliseconds at most, and not far below: chooses widths by the table, lets
/// `measure_pruned` prune to them and measure, and corrects what it asks the table for by what the tries before predicted and took, until the time
/// is within `tolerance` below the target or `tries` are used up. The last widths that were tried need not be those that
/// are returned; a model that is fast enough already is not tried at all. Throws c10::ValueError when no try came within 10 % of the target, saying the fastest time measured.
RAREFY_API LatencyResult reach_latency(const LatencyTable& table, const std::vector<at::Tensor>& scores, double target,
                                       const std::function<double(const Widths&)>& measure_pruned, int64_t tries = 5,
                                       double tolerance = 0.05);

}  // namespace rarefy::pruning
