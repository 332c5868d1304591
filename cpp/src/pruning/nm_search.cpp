#include "pruning/nm_search.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <numeric>
#include <unordered_map>
#include <utility>

#include "pruning/nm_excess_simd.h"

#if !defined(INTRA_OP_PARALLEL)
#error "at::parallel_for is a template in torch's header: without -fopenmp here it runs on one thread, silently"
#endif

namespace rarefy::pruning {
namespace {

constexpr int64_t kMostUnits = 1024;     // that are compared with each other at once
constexpr int64_t kRounds = 2;           // of dividing more units than that among pools, another way each time
constexpr int64_t kFewestLines = 32;     // of a weight that gains are estimated on
constexpr int64_t kMostFailures = 1000;  // exchanges in a row that were estimated to gain and did not
constexpr double kLeastGain = 1e-9;      // of what is kept: rounding of sums is no gain

/// splitmix64: the same numbers everywhere, which those of <random>'s distributions are not.
class Random64 {
 public:
  explicit Random64(uint64_t seed) : state_(seed) {}
  int64_t below(int64_t n) {
    state_ += 0x9e3779b97f4a7c15u;
    uint64_t z = state_;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return static_cast<int64_t>((z ^ (z >> 31)) % static_cast<uint64_t>(n));
  }

 private:
  uint64_t state_;
};

/// The sum of the n largest of `values`, and the n-th largest (0 when there are fewer: whatever comes is kept).
std::pair<float, float> largest_of(float* values, int64_t size, int64_t n) {
  if (size < n) {
    return {std::accumulate(values, values + size, 0.0f), 0.0f};
  }
  std::partial_sort(values, values + n, values + size, std::greater<>());
  return {std::accumulate(values, values + n, 0.0f), values[n - 1]};
}

/// One place of each unit in one weight, and the lines that gains are estimated on.
struct View {
  NMWeight* weight;
  std::vector<int64_t> place;  // of each slot of the pool
  std::vector<int64_t> lines;  // sampled
  std::vector<float> values;   // [lines, units of the pool]: of each unit, wherever it is now
};

/// Exchanges among a pool of units. A slot is where a unit of the pool was in the beginning.
class Pool {
 public:
  Pool(const std::vector<UnitPlaces>& where, std::vector<int32_t>& order, std::vector<int32_t> slots, double effort)
      : order_(order), slots_(std::move(slots)), size_(static_cast<int64_t>(slots_.size())), effort_(effort) {
    unit_.resize(slots_.size());
    std::iota(unit_.begin(), unit_.end(), 0);
    for (const auto& units : where) {
      all_lines_ += units.each * units.weight->lines();
    }
    const double whole = static_cast<double>(size_) * static_cast<double>(size_) * static_cast<double>(all_lines_);
    const double share = std::min(1.0, effort / 8 / std::max(whole, 1.0));
    for (const auto& units : where) {
      for (int64_t k = 0; k < units.each; ++k) {
        views_.push_back(make_view(units, k, share));
        lines_ += static_cast<int64_t>(views_.back().lines.size());
      }
    }
    find_neighbours();
    for (const auto& units : where) {
      least_ += kLeastGain * units.weight->kept();
    }
  }

  void run(int64_t escapes, Random64& random) {
    gains_.resize(static_cast<size_t>(size_ * size_));
    base_.resize(static_cast<size_t>(size_));
    best_.resize(static_cast<size_t>(size_));
    version_.assign(static_cast<size_t>(size_), 0);
    std::vector<int64_t> all(static_cast<size_t>(size_));
    std::iota(all.begin(), all.end(), 0);
    update(all);
    climb();
    for (int64_t escape = 0; escape < escapes && effort_ > 0; ++escape) {
      log_.clear();
      double lead = 0.0;  // over the best order that is known
      std::vector<int64_t> touched;
      for (int64_t k = 0; k < kEscapeSwaps; ++k) {
        const int64_t a = random.below(size_), b = random.below(size_);
        if (kind_[static_cast<size_t>(a)] != kind_[static_cast<size_t>(b)]) {
          lead += exchange(a, b);
          touched.insert(touched.end(), {a, b});
        }
      }
      if (touched.empty()) {
        return;
      }
      update(with_neighbours(touched));
      lead += climb();
      if (lead > least_) {
        continue;  // a better order
      }
      touched.clear();
      while (!log_.empty()) {
        const auto [a, b] = log_.back();
        exchange(a, b);
        log_.resize(log_.size() - 2);  // the exchange back, and the one that it undid
        touched.insert(touched.end(), {a, b});
      }
      update(with_neighbours(touched));
    }
  }

 private:
  static constexpr int64_t kEscapeSwaps = 3;

  struct Best {
    double gain = 0.0;
    int64_t slot = -1;
  };

  View make_view(const UnitPlaces& units, int64_t k, double share) const {
    View view{units.weight, {}, {}, {}};
    for (const auto slot : slots_) {
      view.place.push_back(units.places[static_cast<size_t>(slot * units.each + k)]);
    }
    const int64_t lines = units.weight->lines();
    const auto wanted = static_cast<int64_t>(std::ceil(static_cast<double>(lines) * share));
    const int64_t taken = std::min(lines, std::max(wanted, kFewestLines));
    for (int64_t i = 0; i < taken; ++i) {
      view.lines.push_back(i * lines / taken);
    }
    view.values.resize(static_cast<size_t>(taken * size_));
    for (int64_t slot = 0; slot < size_; ++slot) {
      const float* column = units.weight->column(view.place[static_cast<size_t>(slot)]);
      for (int64_t i = 0; i < taken; ++i) {
        view.values[static_cast<size_t>(i * size_ + slot)] = column[view.lines[static_cast<size_t>(i)]];
      }
    }
    return view;
  }

  /// Slots whose places share stripes, and the slots that share all of them: exchanging those changes nothing.
  void find_neighbours() {
    std::map<std::pair<const NMWeight*, int64_t>, std::vector<int64_t>> in_stripe;
    std::map<std::vector<int64_t>, int64_t> kinds;
    kind_.resize(static_cast<size_t>(size_));
    neighbours_.resize(static_cast<size_t>(size_));
    for (int64_t slot = 0; slot < size_; ++slot) {
      std::vector<int64_t> stripes;
      for (const auto& view : views_) {
        const int64_t stripe = view.weight->stripe_of(view.place[static_cast<size_t>(slot)]);
        stripes.push_back(stripe);
        in_stripe[{view.weight, stripe}].push_back(slot);
      }
      kind_[static_cast<size_t>(slot)] = kinds.try_emplace(stripes, static_cast<int64_t>(kinds.size())).first->second;
    }
    for (const auto& [stripe, slots] : in_stripe) {
      for (const int64_t slot : slots) {
        auto& mine = neighbours_[static_cast<size_t>(slot)];
        mine.insert(mine.end(), slots.begin(), slots.end());
      }
    }
    for (auto& mine : neighbours_) {
      std::sort(mine.begin(), mine.end());
      mine.erase(std::unique(mine.begin(), mine.end()), mine.end());
    }
  }

  std::vector<int64_t> with_neighbours(const std::vector<int64_t>& slots) const {
    std::vector<int64_t> out;
    for (const int64_t slot : slots) {
      const auto& more = neighbours_[static_cast<size_t>(slot)];
      out.insert(out.end(), more.begin(), more.end());
    }
    std::sort(out.begin(), out.end());
    out.erase(std::unique(out.begin(), out.end()), out.end());
    return out;
  }

  /// What a slot would keep with each unit of the pool in it, less what its stripes keep now. Without the slot's own
  /// unit, a stripe keeps the n largest of a line; another magnitude adds what it has above the smallest of those.
  void compute_row(int64_t slot) {
    float* row = gains_.data() + slot * size_;
    std::fill(row, row + size_, 0.0f);
    double base = 0.0;
    std::vector<float> others;
    for (const auto& view : views_) {
      const NMWeight& weight = *view.weight;
      const int64_t place = view.place[static_cast<size_t>(slot)], stripe = weight.stripe_of(place);
      const int64_t begin = stripe * weight.pattern().m;
      const int64_t end = std::min(weight.places(), begin + weight.pattern().m);
      const float* mine = weight.column(place);
      for (size_t i = 0; i < view.lines.size(); ++i) {
        const int64_t line = view.lines[i];
        others.clear();
        for (int64_t p = begin; p < end; ++p) {
          if (p != place) {
            others.push_back(weight.column(p)[line]);
          }
        }
        const float threshold =
            largest_of(others.data(), static_cast<int64_t>(others.size()), weight.pattern().n).second;
        base -= std::max(0.0f, mine[line] - threshold);
        RAREFY_ISA_CALL(add_excess, view.values.data() + static_cast<int64_t>(i) * size_, threshold, row, size_);
      }
    }
    base_[static_cast<size_t>(slot)] = base;
    ++version_[static_cast<size_t>(slot)];
  }

  double estimate(int64_t a, int64_t b) const {
    return base_[static_cast<size_t>(a)] + base_[static_cast<size_t>(b)] +
           static_cast<double>(gains_[static_cast<size_t>(a * size_ + unit_[static_cast<size_t>(b)])]) +
           static_cast<double>(gains_[static_cast<size_t>(b * size_ + unit_[static_cast<size_t>(a)])]);
  }

  bool is_rejected(int64_t a, int64_t b) const {
    const auto found = rejected_.find(std::min(a, b) * size_ + std::max(a, b));
    return found != rejected_.end() &&
           found->second == version_[static_cast<size_t>(a)] + version_[static_cast<size_t>(b)];
  }

  void offer(int64_t a, int64_t b) {
    auto& best = best_[static_cast<size_t>(a)];
    if (kind_[static_cast<size_t>(a)] == kind_[static_cast<size_t>(b)]) {
      return;
    }
    const double gain = estimate(a, b);
    if (gain > best.gain && !is_rejected(a, b)) {
      best = {gain, b};
    }
  }

  void find_best(int64_t slot) {
    best_[static_cast<size_t>(slot)] = {};
    for (int64_t other = 0; other < size_; ++other) {
      offer(slot, other);
    }
  }

  /// Brings rows up to date, and then the best partner of every slot.
  void update(const std::vector<int64_t>& slots) {
    effort_ -= static_cast<double>(slots.size()) * static_cast<double>(size_) * static_cast<double>(lines_);
    std::vector<char> changed(static_cast<size_t>(size_), 0);
    for (const int64_t slot : slots) {
      changed[static_cast<size_t>(slot)] = 1;
    }
    const auto share = [&](int64_t n, int64_t work, const auto& body) {
      at::parallel_for(0, n, std::max<int64_t>(1, 100000 / std::max<int64_t>(1, work)), body);
    };
    share(static_cast<int64_t>(slots.size()), size_ * lines_, [&](int64_t first, int64_t last) {
      for (int64_t k = first; k < last; ++k) {
        compute_row(slots[static_cast<size_t>(k)]);
      }
    });
    share(size_, static_cast<int64_t>(slots.size()), [&](int64_t first, int64_t last) {
      for (int64_t slot = first; slot < last; ++slot) {
        const int64_t partner = best_[static_cast<size_t>(slot)].slot;
        if (changed[static_cast<size_t>(slot)] || (partner >= 0 && changed[static_cast<size_t>(partner)])) {
          find_best(slot);
        } else {
          for (const int64_t other : slots) {
            offer(slot, other);
          }
        }
      }
    });
  }

  /// Exchanges the units of two slots in all weights, and returns what is kept more. Rows are not brought up to date.
  double exchange(int64_t a, int64_t b) {
    std::vector<std::pair<NMWeight*, int64_t>> stripes;
    for (const auto& view : views_) {
      for (const int64_t slot : {a, b}) {
        stripes.emplace_back(view.weight, view.weight->stripe_of(view.place[static_cast<size_t>(slot)]));
      }
    }
    std::sort(stripes.begin(), stripes.end());
    stripes.erase(std::unique(stripes.begin(), stripes.end()), stripes.end());
    const auto kept = [&] {
      double sum = 0.0;
      for (const auto& [weight, stripe] : stripes) {
        sum += weight->kept(stripe);
      }
      return sum;
    };
    const double before = kept();
    for (const auto& view : views_) {
      view.weight->exchange(view.place[static_cast<size_t>(a)], view.place[static_cast<size_t>(b)]);
    }
    std::swap(unit_[static_cast<size_t>(a)], unit_[static_cast<size_t>(b)]);
    std::swap(order_[static_cast<size_t>(slots_[static_cast<size_t>(a)])],
              order_[static_cast<size_t>(slots_[static_cast<size_t>(b)])]);
    log_.emplace_back(a, b);
    return kept() - before;
  }

  /// Exchanges the pair of the largest gain until none is left, and returns what was gained.
  double climb() {
    double gained = 0.0;
    int64_t failures = 0;
    while (effort_ > 0 && failures < kMostFailures) {
      int64_t a = 0;
      for (int64_t slot = 1; slot < size_; ++slot) {
        a = best_[static_cast<size_t>(slot)].gain > best_[static_cast<size_t>(a)].gain ? slot : a;
      }
      const auto [gain, b] = best_[static_cast<size_t>(a)];
      if (b < 0 || gain <= least_) {
        return gained;
      }
      const double exact = exchange(a, b);
      if (exact > least_) {
        gained += exact;
        failures = 0;
        update(with_neighbours({a, b}));
        continue;
      }
      exchange(a, b);  // estimated on a sample, or with units that have several places in a stripe
      log_.resize(log_.size() - 2);
      ++failures;
      effort_ -= 16.0 * static_cast<double>(all_lines_);
      rejected_[std::min(a, b) * size_ + std::max(a, b)] =
          version_[static_cast<size_t>(a)] + version_[static_cast<size_t>(b)];
      find_best(a);
      find_best(b);
    }
    return gained;
  }

  std::vector<int32_t>& order_;
  std::vector<int32_t> slots_;
  int64_t size_;
  double effort_;
  double least_ = 0.0;     // what counts as a gain
  int64_t lines_ = 0;      // of all views
  int64_t all_lines_ = 0;  // of which they are a sample
  std::vector<View> views_;
  std::vector<int64_t> unit_;  // of each slot: the slot that its unit had in the beginning
  std::vector<int64_t> kind_;
  std::vector<std::vector<int64_t>> neighbours_;
  std::vector<float> gains_;  // [slot, unit]
  std::vector<double> base_;
  std::vector<Best> best_;
  std::vector<int64_t> version_;                   // of each row; only grows
  std::unordered_map<int64_t, int64_t> rejected_;  // pairs by the sum of their rows' versions
  std::vector<std::pair<int64_t, int64_t>> log_;
};

}  // namespace

std::vector<int32_t> search_order(const std::vector<UnitPlaces>& where, int64_t units, const SearchOptions& options) {
  std::vector<int32_t> order(static_cast<size_t>(units));
  std::iota(order.begin(), order.end(), 0);
  Random64 random(options.seed);
  const int64_t pools = (units + kMostUnits - 1) / kMostUnits, rounds = pools > 1 ? kRounds : 1;
  for (int64_t round = 0; round < rounds; ++round) {
    std::vector<int32_t> places(static_cast<size_t>(units));
    std::iota(places.begin(), places.end(), 0);
    for (int64_t i = units - 1; i > 0 && pools > 1; --i) {
      std::swap(places[static_cast<size_t>(i)], places[static_cast<size_t>(random.below(i + 1))]);
    }
    for (int64_t pool = 0; pool < pools; ++pool) {
      std::vector<int32_t> mine(places.begin() + pool * units / pools, places.begin() + (pool + 1) * units / pools);
      std::sort(mine.begin(), mine.end());
      Pool(where, order, std::move(mine), options.effort / static_cast<double>(pools * rounds))
          .run(options.escapes, random);
    }
  }
  return order;
}

}  // namespace rarefy::pruning
