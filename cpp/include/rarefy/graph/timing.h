#pragma once

#include <c10/core/Device.h>
#include <rarefy/export.h>
#include <rarefy/graph/graph.h>

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

// Wall-clock times on this machine, of a whole call and of the operators inside of it.
namespace rarefy::graph {

struct RAREFY_API TimingOptions {
  double seconds = 0.5;           // measure at least this long, > 0
  int64_t runs = 7;               // and at least this often, > 0
  int64_t warmup = 3;             // calls before, which are not counted, >= 0
  c10::Device device = at::kCPU;  // whose queued work a call ends with
  /// Seconds of a clock that only goes forward; unset: the steady clock.
  std::function<double()> clock = nullptr;

  /// Throws c10::ValueError when a field is out of range.
  void validate() const;
};

/// How long a call takes.
struct RAREFY_API Timing {
  double milliseconds = 0;  // the median
  double spread = 0;        // distance between the quartiles over the median
  int64_t runs = 0;
  int64_t threads = 0;  // of torch, inside an operator

  /// "12.3 ms (median of 41, quartiles 2.1 % apart, 2 threads)".
  std::string to_string() const;
};

/// The time of a call: the median of as many runs as the options ask for, after a warm-up.
RAREFY_API Timing measure(const std::function<void()>& call, const TimingOptions& options = {});

/// The milliseconds of every node of a recording, each the median over several runs of the `forward` that was recorded.
/// A composite operator has the time of what ran inside of it too. Throws c10::ValueError when `forward` calls other
/// operators than those recorded.
RAREFY_API std::vector<double> time_nodes(const Graph& graph, const std::function<void()>& forward,
                                          const TimingOptions& options = {});

}  // namespace rarefy::graph
