#include <ATen/ops/isfinite.h>
#include <ATen/ops/sort.h>
#include <c10/util/Exception.h>
#include <fmt/format.h>
#include <rarefy/pruning/latency.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <set>

namespace rarefy::pruning {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kClose = 0.1;   // of the target: a time that is farther above it does not reach it
constexpr double kNudge = 0.02;  // by which to ask for more or less when the same widths come again
constexpr int kNudges = 10;

/// For each group, the operators whose time it changes.
std::vector<std::vector<size_t>> operators_of_groups(const LatencyTable& table) {
  std::vector<std::set<size_t>> found(table.units.size());
  for (size_t i = 0; i < table.operators.size(); ++i) {
    const auto& time = table.operators[i];
    for (const auto* axis : {&time.output, &time.input}) {
      for (const auto& [group, slices] : axis->groups) {
        found[static_cast<size_t>(group)].insert(i);
      }
    }
    for (const auto& shares : time.factors) {
      for (const auto& [group, share] : shares) {
        found[static_cast<size_t>(group)].insert(i);
      }
    }
  }
  std::vector<std::vector<size_t>> out;
  for (const auto& operators : found) {
    out.emplace_back(operators.begin(), operators.end());
  }
  return out;
}

/// The importance that a group loses at each width: of its least important units.
class Loss {
 public:
  Loss(const at::Tensor& scores, int64_t units, size_t group) : units_(units) {
    if (!scores.defined()) {
      return;
    }
    TORCH_CHECK_VALUE(scores.dim() == 1 && scores.size(0) == units, "[widths_for_latency] the scores of group ", group,
                      " must have shape [", units, "] (one per unit), got ", scores.sizes());
    const auto sorted = std::get<0>(scores.to(at::kCPU, at::kDouble).sort());
    TORCH_CHECK_VALUE(at::isfinite(sorted).all().item<bool>(), "[widths_for_latency] the scores of group ", group,
                      " must be finite, got ", sorted[units - 1].item<double>());
    sums_.push_back(0);
    for (int64_t i = 0; i < units; ++i) {
      sums_.push_back(sums_.back() + sorted.data_ptr<double>()[i]);
    }
  }

  bool may_change() const { return !sums_.empty(); }
  double at(int64_t width) const { return sums_.empty() ? 0.0 : sums_[static_cast<size_t>(units_ - width)]; }

 private:
  int64_t units_;
  std::vector<double> sums_;
};

std::vector<Loss> losses(const LatencyTable& table, const std::vector<at::Tensor>& scores) {
  TORCH_CHECK_VALUE(scores.size() == table.units.size(), "[widths_for_latency] there must be scores for each of the ",
                    table.units.size(), " groups, got ", scores.size());
  std::vector<Loss> out;
  for (size_t g = 0; g < scores.size(); ++g) {
    out.emplace_back(scores[g], table.units[g], g);
  }
  return out;
}

/// The state of a search: widths and the time that the table predicts for them.
class Search {
 public:
  Search(const LatencyTable& table, const std::vector<Loss>& losses)
      : widths(table.units),
        time(table.predict(table.units)),
        table_(&table),
        losses_(&losses),
        operators_(operators_of_groups(table)),
        useful_(useful_widths(table)) {
    for (size_t g = 0; g < useful_.size(); ++g) {
      if (!losses[g].may_change()) {
        useful_[g] = {table.units[g]};
      }
    }
  }

  /// Narrows groups until the time is `target` at most; false when no width is left to give up.
  bool narrow(double target) {
    while (time > target) {
      double best = kInfinity, best_saved = 0;
      size_t best_group = 0;
      int64_t best_width = 0;
      for (size_t g = 0; g < widths.size(); ++g) {
        for (auto width : useful_[g]) {
          if (width >= widths[g]) {
            break;
          }
          const auto [before, after] = times_of(g, width);
          const double saved = before - after;
          if (saved <= table_->noise * before) {
            continue;
          }
          const double price = ((*losses_)[g].at(width) - (*losses_)[g].at(widths[g])) / saved;
          if (price < best || (price == best && saved > best_saved)) {
            best = price, best_saved = saved, best_group = g, best_width = width;
          }
        }
      }
      if (best_saved > 0) {
        set(best_group, best_width);
      } else if (!narrow_all()) {
        return false;
      }
    }
    return true;
  }

  /// Gives width back where the time stays `target` at most, what saves most importance per millisecond first.
  void widen(double target) {
    while (true) {
      double best = -kInfinity;
      size_t best_group = 0;
      int64_t best_width = 0;
      for (size_t g = 0; g < widths.size(); ++g) {
        for (auto width : useful_[g]) {
          if (width <= widths[g]) {
            continue;
          }
          const auto [before, after] = times_of(g, width);
          if (time + (after - before) > target) {
            continue;
          }
          const double gain = (*losses_)[g].at(widths[g]) - (*losses_)[g].at(width);
          const double worth = after <= before ? kInfinity : gain / (after - before);
          if (worth > best) {
            best = worth, best_group = g, best_width = width;
          }
        }
      }
      if (best_width == 0) {
        return;
      }
      set(best_group, best_width);
    }
  }

  void move_to(const Widths& there) {
    widths = there;
    time = table_->predict(widths);
  }

  /// The next useful width of every group that has one; false when none has.
  bool narrow_all() {
    bool changed = false;
    for (size_t g = 0; g < widths.size(); ++g) {
      const auto at = std::lower_bound(useful_[g].begin(), useful_[g].end(), widths[g]);
      if (at != useful_[g].begin()) {
        set(g, *(at - 1));
        changed = true;
      }
    }
    return changed;
  }

  Widths widths;
  double time;

 private:
  /// Milliseconds of the operators of a group, now and at another width.
  std::pair<double, double> times_of(size_t group, int64_t width) {
    const int64_t now = widths[group];
    double before = 0, after = 0;
    for (auto i : operators_[group]) {
      before += table_->predict(table_->operators[i], widths);
    }
    widths[group] = width;
    for (auto i : operators_[group]) {
      after += table_->predict(table_->operators[i], widths);
    }
    widths[group] = now;
    return {table_->scale * before, table_->scale * after};
  }

  void set(size_t group, int64_t width) {
    widths[group] = width;
    time = table_->predict(widths);
  }

  const LatencyTable* table_;
  const std::vector<Loss>* losses_;
  std::vector<std::vector<size_t>> operators_;
  std::vector<Widths> useful_;
};

/// The fastest state that narrowing reaches, for lack of a target that it could stop at.
Search fastest_state(const LatencyTable& table, const std::vector<Loss>& losses) {
  Search search(table, losses);
  Widths best = search.widths;
  double least = search.time;
  while (search.narrow_all()) {
    if (search.time < least) {
      best = search.widths;
      least = search.time;
    }
  }
  search.move_to(best);
  return search;
}

void check_target(double target) {
  TORCH_CHECK_VALUE(std::isfinite(target) && target > 0,
                    "[widths_for_latency] target must be positive milliseconds, got ", target);
}

/// How bad a time is: close below the target is best, then close above it, then far below.
double miss(double time, double target) {
  const double far = std::abs(time - target) / target;
  if (far <= kClose) {
    return time <= target ? far : kClose + far;
  }
  return time <= target ? 2 * kClose + far : 2 + far;
}

bool tried(const LatencyResult& result, const Widths& widths) {
  return std::any_of(result.tries.begin(), result.tries.end(),
                     [&](const LatencyTry& one) { return one.widths == widths; });
}

/// What the table should predict for a model that takes `aim` milliseconds: on the line between the two tries whose times
/// enclose the aim, one of which may be the whole model; beyond the fastest try on the line from the whole model to it.
double prediction_for(double aim, const LatencyResult& result) {
  const std::pair<double, double> whole{result.before, result.before};  // predicted, measured
  auto above = whole;                                                   // the fastest try that is too slow
  std::optional<std::pair<double, double>> below;                       // the slowest one that is not
  for (const auto& one : result.tries) {
    if (one.measured >= aim && one.measured < above.second) {
      above = {one.predicted, one.measured};
    }
    if (one.measured < aim && (!below || one.measured > below->second)) {
      below = {one.predicted, one.measured};
    }
  }
  const auto near = below ? *below : above, far = below ? above : whole;
  const double slope = (far.first - near.first) / (far.second - near.second);
  // Noise can make narrower widths look slower; then a smaller step in the right direction.
  if (!std::isfinite(slope) || slope <= 0) {
    const auto& last = result.tries.back();
    return last.predicted * (last.measured > aim ? 0.9 : 1.1);
  }
  return std::max(0.0, near.first + slope * (aim - near.second));
}

/// Widths for a target; the fastest ones when it cannot be reached.
Search search_widths(const LatencyTable& table, const std::vector<Loss>& losses, double target) {
  Search search(table, losses);
  if (!search.narrow(target)) {
    Search best = fastest_state(table, losses);
    return search.time < best.time ? search : best;
  }
  search.widen(target);
  return search;
}

}  // namespace

std::vector<Widths> useful_widths(const LatencyTable& table) {
  const auto operators = operators_of_groups(table);
  std::vector<Widths> out;
  for (size_t g = 0; g < table.units.size(); ++g) {
    Widths at = table.units;
    const auto time = [&](int64_t width) {
      at[g] = width;
      double sum = 0;
      for (auto i : operators[g]) {
        sum += table.predict(table.operators[i], at);
      }
      return sum;
    };
    Widths useful = {table.units[g]};
    double last = time(table.units[g]);
    for (auto width = table.widths[g].rbegin(); width != table.widths[g].rend(); ++width) {
      const double now = time(*width);
      if (now < last - table.noise * last) {
        useful.push_back(*width);
        last = now;
      }
    }
    std::reverse(useful.begin(), useful.end());
    out.push_back(std::move(useful));
  }
  return out;
}

double fastest(const LatencyTable& table, const std::vector<at::Tensor>& scores) {
  const auto loss = losses(table, scores);
  return search_widths(table, loss, 0.0).time;
}

Widths widths_for_latency(const LatencyTable& table, const std::vector<at::Tensor>& scores, double target) {
  check_target(target);
  const auto loss = losses(table, scores);
  auto search = search_widths(table, loss, target);
  TORCH_CHECK_VALUE(search.time <= target, "[widths_for_latency] target must be reachable, got ", target,
                    " ms; the fastest widths are estimated at ", search.time, " ms of ", table.whole, " ms now, on ",
                    table.threads, " threads");
  return search.widths;
}

std::string LatencyResult::to_string() const {
  return fmt::format("asked for {:.4g} ms, measured {:.4g} ms on {} thread{} ({:.4g} ms before), {} tr{}", target,
                     measured, threads, threads == 1 ? "" : "s", before, tries.size(), tries.size() == 1 ? "y" : "ies");
}

LatencyResult reach_latency(const LatencyTable& table, const std::vector<at::Tensor>& scores, double target,
                            const std::function<double(const Widths&)>& measure_pruned, int64_t tries,
                            double tolerance) {
  check_target(target);
  TORCH_CHECK_VALUE(tries > 0, "[reach_latency] tries must be positive, got ", tries);
  TORCH_CHECK_VALUE(tolerance > 0 && tolerance < 1, "[reach_latency] tolerance must be in (0, 1), got ", tolerance);
  const auto loss = losses(table, scores);
  LatencyResult result;
  result.target = target;
  result.before = table.whole;
  result.threads = table.threads;
  if (table.whole <= target) {
    result.widths = table.units;
    result.measured = table.whole;
    return result;
  }
  double asked = target * (1 - tolerance / 2);
  const LatencyTry* best = nullptr;
  result.tries.reserve(static_cast<size_t>(tries));
  while (static_cast<int64_t>(result.tries.size()) < tries) {
    auto search = search_widths(table, loss, asked);
    // Widths come in steps: what was tried already is left in the direction in which the target lies.
    for (int nudges = 0; nudges < kNudges && tried(result, search.widths); ++nudges) {
      asked *= result.tries.back().measured > target ? 1 - kNudge : 1 + kNudge;
      search = search_widths(table, loss, asked);
    }
    if (tried(result, search.widths)) {
      break;
    }
    const double measured = measure_pruned(search.widths);
    TORCH_CHECK_VALUE(measured > 0, "[reach_latency] measure_pruned must return positive milliseconds, got ", measured);
    result.tries.push_back({search.widths, asked, search.time, measured});
    if (!best || miss(measured, target) < miss(best->measured, target)) {
      best = &result.tries.back();
    }
    if (measured <= target && measured >= (1 - tolerance) * target) {
      break;
    }
    asked = prediction_for(target * (1 - tolerance / 2), result);
  }
  TORCH_CHECK_VALUE(best->measured <= (1 + kClose) * target, "[reach_latency] target must be reachable, got ", target,
                    " ms; the fastest of ", result.tries.size(), " tries took ", best->measured, " ms of ", table.whole,
                    " ms before, on ", table.threads, " threads");
  result.widths = best->widths;
  result.measured = best->measured;
  return result;
}

}  // namespace rarefy::pruning
