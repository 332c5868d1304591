#include <fmt/format.h>
#include <fmt/ranges.h>
#include <rarefy/pruning/latency.h>
#include <rarefy/pruning/structured.h>

#include <algorithm>
#include <cmath>

#include "diagnosis.h"
#include "patterns.h"
#include "reference.h"

namespace rarefy::pruning {
namespace {

constexpr int64_t kMostAttempts = 32;

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
  // What was pinned on the way counts as never having been there; what earlier steps removed counts as removed.
  auto baseline = make_baseline(*structure_, parameter_shapes(*graph_));
  if (step_ > 0) {
    baseline.counts = baseline_->counts;
    baseline.counts.channels = 0;
    for (auto& [name, units] : baseline.units) {
      const auto before = std::find_if(baseline_->units.begin(), baseline_->units.end(),
                                       [&, &name = name](const auto& group) { return group.first == name; });
      units = before == baseline_->units.end() ? units : before->second;
      baseline.counts.channels += units;
    }
  }
  baseline_ = std::move(baseline);
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
  std::optional<Culprit> culprit;
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
