#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <ATen/record_function.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <c10/util/Exception.h>
#include <fmt/format.h>
#include <rarefy/graph/timing.h>

#include <algorithm>
#include <chrono>
#include <memory>

namespace rarefy::graph {
namespace {

double steady_seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

/// The clock of the options, read after the work that the device has in its queue.
class Clock {
 public:
  explicit Clock(const TimingOptions& options)
      : device_(options.device), now_(options.clock ? options.clock : steady_seconds) {}

  double operator()() const {
    if (device_.type() != at::kCPU && device_.type() != at::kMeta) {
      c10::impl::VirtualGuardImpl(device_.type()).getStream(device_).synchronize();
    }
    return now_();
  }

 private:
  c10::Device device_;
  std::function<double()> now_;
};

double quantile(const std::vector<double>& sorted, double q) {
  const double position = q * static_cast<double>(sorted.size() - 1);
  const auto below = static_cast<size_t>(position);
  const size_t above = std::min(below + 1, sorted.size() - 1);
  return sorted[below] + (position - static_cast<double>(below)) * (sorted[above] - sorted[below]);
}

/// Adds up the time of each operator that runs on this thread, in the order of their start.
class Stopwatch {
 public:
  Stopwatch(const Graph& graph, const Clock& clock)
      : graph_(graph), clock_(clock), seconds_(graph.nodes.size(), 0.0), samples_(graph.nodes.size()) {}

  /// Where the time of the operator that starts now goes; nullptr when it is not the one that was recorded.
  double* start(const c10::OperatorName& op) {
    if (next_ < graph_.nodes.size() && graph_.nodes[next_].op == op) {
      return &seconds_[next_++];
    }
    matches_ = false;
    return nullptr;
  }

  double now() const { return clock_(); }

  void end_run(bool counted) {
    TORCH_CHECK_VALUE(matches_ && next_ == graph_.nodes.size(),
                      "[time_nodes] forward must call the operators that were recorded, got ",
                      matches_ ? "fewer of them" : "others", " after ", next_, " of ", graph_.nodes.size());
    for (size_t i = 0; counted && i < seconds_.size(); ++i) {
      samples_[i].push_back(seconds_[i]);
    }
    next_ = 0;
  }

  std::vector<double> median_milliseconds() {
    std::vector<double> out;
    for (auto& samples : samples_) {
      std::sort(samples.begin(), samples.end());
      out.push_back(1e3 * quantile(samples, 0.5));
    }
    return out;
  }

 private:
  const Graph& graph_;
  const Clock& clock_;
  std::vector<double> seconds_;
  std::vector<std::vector<double>> samples_;
  size_t next_ = 0;
  bool matches_ = true;
};

thread_local Stopwatch* current = nullptr;

struct Started : at::ObserverContext {
  double* seconds = nullptr;
  double at = 0;
};

std::unique_ptr<at::ObserverContext> on_start(const at::RecordFunction& fn) {
  const auto op = fn.operator_name();
  if (!current || !op) {
    return nullptr;
  }
  auto started = std::make_unique<Started>();
  started->seconds = current->start(*op);
  started->at = current->now();
  return started;
}

void on_end(const at::RecordFunction&, at::ObserverContext* context) {
  const auto* started = static_cast<Started*>(context);
  if (current && started && started->seconds) {
    *started->seconds = current->now() - started->at;
  }
}

/// Attaches a stopwatch to this thread for as long as it lives.
class Attached {
 public:
  explicit Attached(Stopwatch& stopwatch) {
    TORCH_CHECK_VALUE(current == nullptr, "[time_nodes] must not be called while another one runs on this thread");
    handle_ =
        at::addThreadLocalCallback(at::RecordFunctionCallback(on_start, on_end).scopes({at::RecordScope::FUNCTION}));
    current = &stopwatch;
  }
  Attached(const Attached&) = delete;
  Attached& operator=(const Attached&) = delete;
  ~Attached() {
    current = nullptr;
    at::removeCallback(handle_);
  }

 private:
  at::CallbackHandle handle_ = 0;
};

/// Calls `run(counted)` as often as the options say.
template <typename Run>
int64_t repeat(const TimingOptions& options, const Clock& clock, const Run& run) {
  for (int64_t i = 0; i < options.warmup; ++i) {
    run(false);
  }
  const double begin = clock();
  int64_t runs = 0;
  while (runs < options.runs || clock() - begin < options.seconds) {
    run(true);
    ++runs;
  }
  return runs;
}

}  // namespace

void TimingOptions::validate() const {
  TORCH_CHECK_VALUE(seconds > 0, "[TimingOptions] seconds must be positive, got ", seconds);
  TORCH_CHECK_VALUE(runs > 0, "[TimingOptions] runs must be positive, got ", runs);
  TORCH_CHECK_VALUE(warmup >= 0, "[TimingOptions] warmup must not be negative, got ", warmup);
}

std::string Timing::to_string() const {
  return fmt::format("{:.4g} ms (median of {}, quartiles {:.1f} % apart, {} thread{})", milliseconds, runs,
                     100 * spread, threads, threads == 1 ? "" : "s");
}

Timing measure(const std::function<void()>& call, const TimingOptions& options) {
  options.validate();
  const at::NoGradGuard no_grad;
  const Clock clock(options);
  std::vector<double> seconds;
  Timing timing;
  timing.runs = repeat(options, clock, [&](bool counted) {
    const double start = clock();
    call();
    const double elapsed = clock() - start;
    if (counted) {
      seconds.push_back(elapsed);
    }
  });
  std::sort(seconds.begin(), seconds.end());
  const double median = quantile(seconds, 0.5);
  timing.milliseconds = 1e3 * median;
  timing.spread = median > 0 ? (quantile(seconds, 0.75) - quantile(seconds, 0.25)) / median : 0.0;
  timing.threads = at::get_num_threads();
  return timing;
}

std::vector<double> time_nodes(const Graph& graph, const std::function<void()>& forward, const TimingOptions& options) {
  options.validate();
  const at::NoGradGuard no_grad;
  const Clock clock(options);
  Stopwatch stopwatch(graph, clock);
  repeat(options, clock, [&](bool counted) {
    {
      const Attached attached(stopwatch);
      forward();
    }
    stopwatch.end_run(counted);
  });
  return stopwatch.median_milliseconds();
}

}  // namespace rarefy::graph
