#include <ATen/core/grad_mode.h>
#include <fmt/format.h>
#include <rarefy/graph/cost.h>
#include <rarefy/graph/record.h>
#include <rarefy/pruning/sparse_report.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <map>

#include "graph/evaluation.h"
#include "html.h"
#include "pruning/sparsify_plan.h"

namespace rarefy::pruning {
namespace {

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

/// What a machine needs when nothing disturbs it: other work on it can only add to a time, by a hundred times for one that is
/// longer than its share of the processor.
double least(const std::vector<double>& times) { return *std::min_element(times.begin(), times.end()); }

/// The part of a weight's elements that are not zero.
double density(const at::Tensor& weight) {
  return static_cast<double>(weight.count_nonzero().item<int64_t>()) / static_cast<double>(weight.numel());
}

struct Line {
  const char* what;
  std::string dense, sparse;
  double ratio;
};

std::vector<Line> lines(const SparseReport& report) {
  const auto ratio = [](double part, double whole) { return whole > 0 ? part / whole : 1.0; };
  return {{"bytes on disk", std::to_string(report.file.dense_bytes), std::to_string(report.file.bytes),
           report.file.ratio()},
          {"MACs", std::to_string(report.macs), std::to_string(report.effective_macs),
           ratio(static_cast<double>(report.effective_macs), static_cast<double>(report.macs))},
          {"milliseconds", fmt::format("{:.4g}", report.dense_milliseconds),
           fmt::format("{:.4g}", report.sparse_milliseconds),
           ratio(report.sparse_milliseconds, report.dense_milliseconds)}};
}

/// Puts the dense layers back, by an exception too.
class Applied {
 public:
  explicit Applied(const SparsifyPlan& plan) : plan_(plan) { plan_.apply(); }
  Applied(const Applied&) = delete;
  Applied& operator=(const Applied&) = delete;
  ~Applied() { plan_.undo(); }

 private:
  const SparsifyPlan& plan_;
};

}  // namespace

int64_t effective_macs(const graph::Graph& graph) {
  const auto costs = graph::count_costs(graph);
  std::map<int64_t, double> densities;  // by value
  double total = 0;
  for (const auto& [id, cost] : costs.operators) {
    if (cost.macs == 0) {
      continue;
    }
    double part = 1.0;
    const auto& node = graph.nodes.at(static_cast<size_t>(id));
    for (size_t i = 0; i < node.input_values.size(); ++i) {
      const int64_t input = node.input(i);
      if (input < 0) {
        continue;
      }
      const auto& value = graph.values.at(static_cast<size_t>(whole_of(graph, input)));
      const bool is_weight = value.origin == graph::Origin::parameter || value.origin == graph::Origin::buffer;
      if (is_weight && value.sizes.size() >= 2 && value.numel() > 0 && value.tensor.defined()) {
        const auto [position, is_new] = densities.emplace(input, 0.0);
        if (is_new) {
          position->second = density(value.tensor);
        }
        part = position->second;
        break;
      }
    }
    total += part * static_cast<double>(cost.macs);
  }
  return static_cast<int64_t>(std::llround(total));
}

std::pair<double, double> compare_times(const std::function<void()>& first, const std::function<void()>& second,
                                        double seconds) {
  constexpr double kShortest = 1e-4;  // of a measurement; shorter calls are repeated
  constexpr size_t kRounds = 7;
  TORCH_CHECK_VALUE(seconds > 0, "[compare_times] seconds must be positive, got ", seconds);
  const at::NoGradGuard no_grad;
  first();  // brings memory and caches
  second();
  const double begin = now();
  first();
  second();
  const double once = now() - begin;
  const auto repeats = static_cast<int64_t>(std::clamp(2 * kShortest / std::max(once, 1e-9), 1.0, 1000.0));
  const auto timed = [&](const auto& call) {
    const double start = now();
    for (int64_t i = 0; i < repeats; ++i) {
      call();
    }
    return 1e3 * (now() - start) / static_cast<double>(repeats);
  };
  std::vector<double> a, b;
  while (a.size() < kRounds || now() - begin < seconds) {
    if (a.size() % 2 == 0) {
      a.push_back(timed(first));
      b.push_back(timed(second));
    } else {
      b.push_back(timed(second));
      a.push_back(timed(first));
    }
  }
  return {least(a), least(b)};
}

SparseReport measure_sparse(torch::nn::Module& model, const std::function<std::vector<at::Tensor>()>& forward,
                            const std::vector<at::Tensor>& inputs, const SparsifyOptions& options, double seconds) {
  const auto graph = graph::record(model, forward, inputs);
  const graph::Evaluation evaluation(model);
  SparseReport report;
  report.file = sparse_size(model);
  report.macs = graph::count_costs(graph).total.macs;
  report.effective_macs = effective_macs(graph);
  const SparsifyPlan plan(model, graph, options);
  report.layers = plan.report();
  // The two models take turns in rounds, since one model is both.
  const at::NoGradGuard no_grad;
  const double begin = now();
  std::vector<double> dense, sparse;
  const auto timed = [&](std::vector<double>& out) {
    forward();  // the first run after a change of layers brings them into the caches
    const double start = now();
    forward();
    out.push_back(1e3 * (now() - start));
  };
  while (dense.size() < 7 || now() - begin < seconds) {
    timed(dense);
    const Applied applied(plan);
    timed(sparse);
  }
  report.dense_milliseconds = least(dense);
  report.sparse_milliseconds = report.layers.sparse() == 0 ? report.dense_milliseconds : least(sparse);
  return report;
}

std::string SparseReport::to_string() const {
  std::string out = fmt::format("{:<14}  {:>14}  {:>14}  {:>7}\n", "", "dense", "sparse", "ratio");
  for (const auto& line : lines(*this)) {
    out += fmt::format("{:<14}  {:>14}  {:>14}  {:>7.4f}\n", line.what, line.dense, line.sparse, line.ratio);
  }
  return out + layers.to_string();
}

std::string SparseReport::to_html() const {
  std::string out = "<table><tr><th></th><th>dense</th><th>sparse</th><th>ratio</th></tr>";
  for (const auto& line : lines(*this)) {
    out += fmt::format("<tr><td>{}</td><td>{}</td><td>{}</td><td>{:.4f}</td></tr>", line.what, line.dense, line.sparse,
                       line.ratio);
  }
  return out + "</table>" + layers.to_html();
}

}  // namespace rarefy::pruning
