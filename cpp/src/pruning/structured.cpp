#include <ATen/Functions.h>
#include <ATen/core/grad_mode.h>
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <rarefy/pruning/latency.h>
#include <rarefy/pruning/structured.h>

#include <algorithm>
#include <cmath>
#include <set>

#include "patterns.h"
#include "propagation.h"
#include "reference.h"

namespace rarefy::pruning {
namespace {

constexpr int64_t kMostAttempts = 32;

/// The operators that the model's own code called, in order.
std::vector<int64_t> called(const graph::Graph& graph) {
  std::vector<int64_t> out;
  for (size_t i = 0; i < graph.nodes.size(); ++i) {
    if (graph.nodes[i].parent < 0) {
      out.push_back(static_cast<int64_t>(i));
    }
  }
  return out;
}

std::string sizes_text(const std::vector<int64_t>& sizes) { return fmt::format("[{}]", fmt::join(sizes, ", ")); }

/// Of x[a:b] and x[i] along channels: what is wrong with the numbers that the pruned model used; empty when nothing is.
std::string wrong_place(const graph::Graph& before, const graph::Node& node, const RemovedView& removed,
                        const graph::Node& now) {
  const bool slice = node.op.name == "aten::slice", select = node.op.name == "aten::select";
  if ((!slice && !select) || node.input(0) < 0 || !node.inputs[1].isInt()) {
    return "";
  }
  const auto& sizes = before.values[node.input(0)].sizes;
  const auto wrap = [](int64_t value, int64_t size) { return value < 0 ? value + size : std::min(value, size); };
  const int64_t dim = wrap(node.inputs[1].toInt(), static_cast<int64_t>(sizes.size()));
  const auto* places = removed.along(node.input(0), dim);
  if (!places) {
    return "";
  }
  for (size_t i = 2; i < (slice ? 4u : 3u); ++i) {
    const int64_t default_value = i == 2 ? 0 : sizes[dim];
    const int64_t was = node.inputs[i].isInt() ? wrap(node.inputs[i].toInt(), sizes[dim]) : default_value;
    const auto size_now = static_cast<int64_t>(places->kept.size());
    const int64_t is = now.inputs[i].isInt() ? wrap(now.inputs[i].toInt(), size_now) : (i == 2 ? 0 : size_now);
    const int64_t wanted = std::lower_bound(places->kept.begin(), places->kept.end(), was) - places->kept.begin();
    if (is != wanted) {
      return fmt::format("holds a number of its own: it takes from {} where the channels that are left need {}", is,
                         wanted);
    }
  }
  return "";
}

/// The first operator that did something else than the recording and the removal let expect, and what.
std::optional<std::pair<int64_t, std::string>> find_culprit(const graph::Graph& before, const RemovedView& removed,
                                                            const Recording& after) {
  const auto expected = called(before), found = called(after.graph);
  for (size_t i = 0; i < expected.size(); ++i) {
    const auto& node = before.nodes[expected[i]];
    if (i >= found.size()) {
      return std::pair(expected[i], "cannot run on fewer channels: " + after.failure);
    }
    const auto& now = after.graph.nodes[found[i]];
    if (now.op != node.op) {
      return std::pair(expected[i], fmt::format("is not reached: the model calls {} instead", now.op.name));
    }
    if (const auto moved = wrong_place(before, node, removed, now); !moved.empty()) {
      return std::pair(expected[i], moved);
    }
    const bool last = i + 1 == found.size();
    for (size_t k = 0; k < node.outputs.size(); ++k) {
      if (node.outputs[k] < 0) {
        continue;
      }
      if (k >= now.outputs.size()) {
        return last && !after.failure.empty()
                   ? std::pair(expected[i], "fails on fewer channels: " + after.failure)
                   : std::pair(expected[i],
                               fmt::format("gives {} results in place of {}", now.outputs.size(), node.outputs.size()));
      }
      const auto wanted = removed.sizes(node.outputs[k]);
      const auto& sizes = after.graph.values[now.outputs[k]].sizes;
      if (wanted != sizes) {
        return std::pair(expected[i],
                         fmt::format("holds a size of its own: it gives {} where the channels that are left "
                                     "need {}",
                                     sizes_text(sizes), sizes_text(wanted)));
      }
    }
  }
  return std::nullopt;
}

double tolerance_of(at::ScalarType dtype) {
  switch (dtype) {
    case at::kDouble:
      return 1e-9;
    case at::kHalf:
    case at::kBFloat16:
      return 0.05;
    default:
      return 1e-4;
  }
}

struct Comparison {
  double difference = 0;  // relative, the largest
  double allowed = 0;     // for the output where it is largest in proportion
  std::string failure;
};

Comparison compare(const std::vector<at::Tensor>& expected, const std::vector<at::Tensor>& found, double tolerance) {
  Comparison out;
  double worst = -1;
  if (expected.size() != found.size()) {
    out.failure = fmt::format("it returns {} tensors in place of {}", found.size(), expected.size());
    return out;
  }
  for (size_t i = 0; i < expected.size(); ++i) {
    const auto &a = expected[i], &b = found[i];
    if (a.sizes() != b.sizes()) {
      out.failure = fmt::format("output {} has shape {} in place of {}", i, sizes_text(b.sizes().vec()),
                                sizes_text(a.sizes().vec()));
      return out;
    }
    if (!a.is_floating_point() || a.numel() == 0) {
      continue;
    }
    const auto x = a.to(at::kDouble), y = b.to(at::kDouble);
    const auto same = x.eq(y).logical_or(x.isnan().logical_and(y.isnan()));
    const auto finite = at::isfinite(x);
    const double largest = at::where(finite, x.abs(), at::zeros({}, x.options())).max().item<double>();
    const double error = at::where(same, at::zeros({}, x.options()), (x - y).abs()).max().item<double>();
    const double relative = largest > 0 ? error / largest : error;
    const double allowed = tolerance > 0 ? tolerance : tolerance_of(a.scalar_type());
    if (!(relative <= allowed)) {
      out.failure =
          fmt::format("output {} differs by {:.3g} of its largest value, more than {:.3g}", i, relative, allowed);
      out.difference = relative;
      return out;
    }
    if (relative / allowed > worst) {
      worst = relative / allowed;
      out.difference = relative;
      out.allowed = allowed;
    }
  }
  return out;
}

/// The operator whose result depends on how many channels there are, though nothing about its sizes says so: a division by
/// x.size(1), a scale read from a value. Where it has no channels of its own any more, those that were summed before it.
std::optional<std::pair<int64_t, std::string>> find_difference(const graph::Graph& graph, const Structure& structure,
                                                               const RemovedView& removed, bool fold,
                                                               const graph::Graph& after) {
  const int64_t first = first_difference(graph, removed, fold, after, 1e-3);
  if (first < 0) {
    return std::nullopt;
  }
  std::vector<int64_t> producer(graph.values.size(), -1);
  for (auto index : graph.schedule) {
    if (index > first) {
      break;
    }
    for (auto id : graph.nodes[index].outputs) {
      if (id >= 0) {
        producer[id] = index;
      }
    }
  }
  std::vector<int64_t> todo{first};
  std::set<int64_t> seen;
  while (!todo.empty()) {
    const int64_t index = todo.front();
    todo.erase(todo.begin());
    if (index < 0 || !seen.insert(index).second) {
      continue;
    }
    for (const auto& ids : graph.nodes[index].input_values) {
      for (auto id : ids) {
        if (id >= 0 && removed.any(id)) {
          return std::pair(index, fmt::format("feeds {}, whose result depends on how many channels there are",
                                              graph.nodes[first].describe()));
        }
      }
    }
    for (const auto& ids : graph.nodes[index].input_values) {
      for (auto id : ids) {
        if (id >= 0 && structure.provenance->depends_on_input[id]) {
          todo.push_back(producer[id]);
        }
      }
    }
  }
  return std::nullopt;
}

/// Sizes in the arguments of operators that must follow, and those that stay.
std::vector<Resize> find_resizes(const graph::Graph& graph, const RemovedView& removed) {
  std::vector<Resize> out;
  for (auto index : called(graph)) {
    const auto& node = graph.nodes[index];
    bool flows = true;
    const auto add = [&](int64_t before, int64_t after) {
      out.push_back({index, node.module, node.source, "", before, after, flows});
    };
    for (auto id : node.outputs) {
      if (id < 0) {
        continue;
      }
      flows = removed.any(id);
      const auto now = removed.sizes(id);
      const auto& sizes = graph.values[id].sizes;
      for (size_t d = 0; d < sizes.size(); ++d) {
        // What stays is said too: 4 heads of width 4 become 3 of width 4.
        for (const auto& argument : node.inputs) {
          const bool held =
              (argument.isInt() && argument.toInt() == sizes[d]) || (argument.isIntList() && [&] {
                const auto values = argument.toIntVector();
                return std::any_of(values.begin(), values.end(), [&](int64_t v) { return v == sizes[d] || v == -1; });
              }());
          if (held) {
            add(sizes[d], now[d]);
            break;
          }
        }
      }
    }
    flows = true;
    if (node.op.name == "aten::slice" && node.inputs.size() > 3 && node.input(0) >= 0) {
      // x[a:b] along channels: both ends move by what is removed before them.
      const int64_t rank = static_cast<int64_t>(graph.values[node.input(0)].sizes.size());
      const int64_t dim = node.inputs[1].toInt() < 0 ? node.inputs[1].toInt() + rank : node.inputs[1].toInt();
      if (const auto* places = removed.along(node.input(0), dim)) {
        for (size_t i : {2, 3}) {
          if (node.inputs[i].isInt() && node.inputs[i].toInt() > 0 &&
              node.inputs[i].toInt() <= graph.values[node.input(0)].sizes[dim]) {
            const int64_t end = node.inputs[i].toInt();
            const auto after = std::lower_bound(places->kept.begin(), places->kept.end(), end) - places->kept.begin();
            if (after != end) {
              add(end, after);
            }
          }
        }
      }
    }
  }
  return out;
}

/// A try at a latency ended with an operator that did not follow.
struct PinnedOnTheWay : std::exception {
  const char* what() const noexcept override { return "an operator was pinned"; }
};

}  // namespace

void StructuredOptions::validate() const {
  if (latency_ms) {
    TORCH_CHECK_VALUE(std::isfinite(*latency_ms) && *latency_ms > 0,
                      "[StructuredPruner] latency_ms must be a positive number of milliseconds, got ", *latency_ms);
    TORCH_CHECK_VALUE(steps == 1, "[StructuredPruner] steps must be 1 with latency_ms, got ", steps);
  }
  choice.validate();
  importance.validate();
  TORCH_CHECK_VALUE(steps >= 1, "[StructuredPruner] steps must be at least 1, got ", steps);
  TORCH_CHECK_VALUE(tolerance >= 0, "[StructuredPruner] tolerance must not be negative, got ", tolerance);
}

StructuredTransaction::StructuredTransaction(PrunableModel model, StructuredOptions options)
    : model_(std::move(model)), options_(std::move(options)) {
  options_.validate();
  real_ = options_.latency_ms.has_value();  // operators are timed one by one
  pins_.tensors = model_.pinned;
  std::vector<std::string> names;
  for (const auto& tensor : model_.tensors()) {
    names.push_back(tensor.name);
  }
  for (const auto& pattern : options_.ignore) {
    bool any = false;
    for (const auto& name : names) {
      if (matches_tree(pattern, name)) {
        any = true;
        pins_.tensors.emplace_back(name, "ignored by '" + pattern + "'");
      }
    }
    TORCH_CHECK_VALUE(any, "[StructuredPruner] ignore: '", pattern,
                      "' matches no parameter, buffer or module of the model");
  }
}

const graph::Graph& StructuredTransaction::recording() {
  if (!graph_) {
    auto recording = model_.record(!real_);
    if (!recording.failure.empty() && !real_) {
      real_ = true;  // on zeros in place of values it may fail where it does not on values
      recording = model_.record(false);
    }
    TORCH_CHECK_VALUE(recording.failure.empty(),
                      "[StructuredPruner] the model must run on its example inputs: ", recording.failure);
    graph_ = std::move(recording.graph);
  }
  return *graph_;
}

void StructuredTransaction::refresh() {
  structure_ = find_structure(recording(), pins_);
  if (!baseline_) {
    baseline_ = make_baseline(*structure_, parameter_shapes(*graph_));
  }
}

const Structure& StructuredTransaction::structure() {
  if (!structure_) {
    refresh();
  }
  return *structure_;
}

Choice StructuredTransaction::choose_units(const std::vector<GroupScore>& scores) {
  auto options = options_.choice;
  options.target = at_step(options.target, std::min(step_ + 1, options_.steps), options_.steps);
  return choose(*structure_, parameter_shapes(*graph_), scores, options, baseline_);
}

StructuredReport StructuredTransaction::make_report(const Choice& choice) const {
  StructuredReport report;
  report.asked = options_.latency_ms ? fmt::format("latency {:.4g} ms", *options_.latency_ms)
                                     : std::visit([](const auto& target) { return target.to_string(); },
                                                  choice.target ? *choice.target : options_.choice.target);
  report.achieved = choice.achieved();
  report.before = choice.before;
  report.after = choice.after;
  report.groups = choice.groups;
  report.pinned = structure_->pinned;
  report.cuts = cuts(*structure_, choice.removal);
  report.step = step_;
  report.steps = options_.steps;
  for (const auto& [node, why] : pins_.nodes) {
    report.notes.push_back(graph_->nodes[node].describe() + " " + why);
  }
  return report;
}

StructuredReport StructuredTransaction::preview() {
  refresh();
  TORCH_CHECK_VALUE(!options_.latency_ms,
                    "[StructuredPruner.preview] a latency is known by pruning only: call prune()");
  return make_report(choose_units(model_.score(*structure_)));
}

bool StructuredTransaction::attempt(const Choice& choice, StructuredReport& report) {
  TORCH_CHECK(++attempts_ <= kMostAttempts, "[StructuredPruner.prune] gave up after ", kMostAttempts,
              " attempts; the last operators that did not follow: ", fmt::format("{}", fmt::join(report.notes, "; ")));
  const RemovedView removed(*graph_, *structure_, choice.removal);
  Plan plan;
  plan.cuts = report.cuts;
  plan.resizes = find_resizes(*graph_, removed);
  plan.cautious = cautious_;
  auto reference = run_reference(*graph_, removed, options_.fold_constants);
  plan.folds = reference.folds;
  report.folds = std::move(reference.folds);
  model_.apply(plan);
  std::optional<std::pair<int64_t, std::string>> culprit;
  std::string failure;
  try {
    const auto after = model_.record(false);
    failure = after.failure;
    if (failure.empty()) {
      std::vector<at::Tensor> found;
      for (auto id : after.graph.outputs) {
        found.push_back(after.graph.values[id].tensor);
      }
      auto comparison = compare(reference.outputs, found, options_.tolerance);
      failure = comparison.failure;
      report.difference = comparison.difference;
    }
    if (!failure.empty()) {
      culprit = find_culprit(*graph_, removed, after);
    }
    if (!failure.empty() && !culprit && real_ && cautious_ && after.failure.empty()) {
      culprit = find_difference(*graph_, *structure_, removed, options_.fold_constants, after.graph);
    }
  } catch (...) {
    model_.rollback();
    throw;
  }
  if (failure.empty()) {
    return true;
  }
  model_.rollback();
  if (!real_) {
    // The model may have looked at values that the first recording left out.
    real_ = true;
    graph_.reset();
    return false;
  }
  if (!culprit && !cautious_) {
    // A size that followed may have been a factor too (hidden ** -0.5).
    cautious_ = true;
    return false;
  }
  if (culprit) {
    const bool again = std::any_of(pins_.nodes.begin(), pins_.nodes.end(),
                                   [&](const auto& pin) { return pin.first == culprit->first; });
    TORCH_CHECK(!again,
                "[StructuredPruner.prune] the model was rolled back: ", graph_->nodes[culprit->first].describe(), " ",
                culprit->second, ", even with its channels kept");
    pins_.nodes.push_back(*culprit);
    return false;
  }
  TORCH_CHECK(false,
              "[StructuredPruner.prune] the model was rolled back: what is left does not compute what the model "
              "computes without the removed channels: ",
              failure);
}

StructuredReport StructuredTransaction::prune() {
  TORCH_CHECK_VALUE(step_ < options_.steps, "[StructuredPruner.prune] all ", options_.steps, " steps are done");
  graph_.reset();
  attempts_ = 0;
  while (true) {  // until an attempt succeeds or throws
    refresh();
    const auto scores = model_.score(*structure_);
    if (options_.latency_ms) {
      return prune_to_latency(scores);
    }
    const auto choice = choose_units(scores);
    auto report = make_report(choice);
    report.step = step_ + 1;
    if (!report.cuts.empty()) {
      if (!attempt(choice, report)) {
        continue;
      }
      model_.commit();
    }
    report.attempts = attempts_;
    report.pruned = true;
    ++step_;
    graph_.reset();
    structure_.reset();
    return report;
  }
}

StructuredReport StructuredTransaction::prune_to_latency(const std::vector<GroupScore>& first_scores) {
  auto scores = first_scores;
  const auto tensors_of = [](const std::vector<GroupScore>& all) {
    std::vector<at::Tensor> out;
    for (const auto& score : all) {
      out.push_back(score.values);
    }
    return out;
  };
  while (true) {
    LatencyOptions options;
    options.round_to = options_.choice.round_to;
    options.smallest.assign(structure_->groups.size(), 1);
    for (size_t g = 0; g < structure_->groups.size(); ++g) {
      options.smallest[g] = std::min(structure_->groups[g].units, std::max<int64_t>(1, options_.choice.min_width));
    }
    for (const auto& [pattern, limit] : options_.choice.limits) {
      for (size_t g = 0; g < structure_->groups.size(); ++g) {
        const auto& group = structure_->groups[g];
        const bool named =
            std::any_of(group.members.begin(), group.members.end(), [&, &pattern = pattern](const Member& member) {
              return member.role != Role::input && matches_parameter(pattern, member.tensor);
            });
        if (named) {
          options.smallest[g] =
              std::max(options.smallest[g],
                       group.units - static_cast<int64_t>(std::floor(limit * static_cast<double>(group.units))));
        }
      }
    }
    const auto table = measure_latency(*graph_, *structure_, model_.run, options);
    const auto try_widths = [&](const Widths& widths, bool keep) {
      const auto choice = choose_widths(*structure_, parameter_shapes(*graph_), scores, widths, std::nullopt);
      auto report = make_report(choice);
      if (!report.cuts.empty() && !attempt(choice, report)) {
        throw PinnedOnTheWay();
      }
      const auto time = graph::measure(model_.run);
      report.latency_before_ms = table.whole;
      report.latency_after_ms = time.milliseconds;
      report.achieved = time.milliseconds;
      if (!keep && !report.cuts.empty()) {
        model_.rollback();
      }
      return report;
    };
    LatencyResult result;
    try {
      result = reach_latency(table, tensors_of(scores), *options_.latency_ms,
                             [&](const Widths& widths) { return try_widths(widths, false).latency_after_ms; });
      auto report = try_widths(result.widths, true);
      if (!report.cuts.empty()) {
        model_.commit();
      }
      report.notes.push_back(result.to_string());
      report.attempts = attempts_;
      report.pruned = true;
      report.step = ++step_;
      graph_.reset();
      structure_.reset();
      return report;
    } catch (const PinnedOnTheWay&) {
      // The groups are others now: measure and choose anew.
    }
    refresh();
    scores = model_.score(*structure_);
  }
}

}  // namespace rarefy::pruning
