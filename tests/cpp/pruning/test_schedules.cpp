#include <rarefy/pruning/regrowth.h>
#include <rarefy/pruning/schedule.h>

#include <cmath>
#include <numbers>

#include "catch.h"

using namespace rarefy::pruning;
using Catch::Matchers::ContainsSubstring;

namespace {

std::vector<int64_t> updates_of(const Schedule& schedule, int64_t steps) {
  std::vector<int64_t> out;
  for (int64_t t = 0; t <= steps; ++t) {
    if (updates_at(schedule, t)) {
      out.push_back(t);
    }
  }
  return out;
}

CustomSchedule custom(CustomSchedule::Function function, std::vector<int64_t> updates, bool regrow = false) {
  return {std::make_shared<const CustomSchedule::Function>(std::move(function)), std::move(updates), regrow};
}

}  // namespace

TEST_CASE("rising schedules are their formulas", "[pruning][schedules]") {
  const double a = 0.2, b = 0.9;
  for (int64_t t = 100; t < 1100; t += 7) {
    const double x = static_cast<double>(t - 100) / 1000.0;
    const auto near = [&](const Schedule& schedule, double expected) {
      return std::abs(sparsity_at(schedule, t, b) - expected) < 1e-14;
    };
    REQUIRE(near(LinearSchedule{100, 1100, 30, a}, a + (b - a) * x));
    REQUIRE(near(PolynomialSchedule{100, 1100, 30, a, 2.5}, b + (a - b) * std::pow(1 - x, 2.5)));
    REQUIRE(near(CosineSchedule{100, 1100, 30, a}, b + (a - b) * (1 + std::cos(std::numbers::pi * x)) / 2));
    REQUIRE(near(ExponentialSchedule{100, 1100, 30, a}, 1 - std::pow(1 - a, 1 - x) * std::pow(1 - b, x)));
  }
  for (const Schedule& schedule : {Schedule(LinearSchedule{2, 17, 4, a}), Schedule(PolynomialSchedule{2, 17, 4, a}),
                                   Schedule(CosineSchedule{2, 17, 4, a}), Schedule(ExponentialSchedule{2, 17, 4, a})}) {
    REQUIRE(updates_of(schedule, 30) == std::vector<int64_t>{2, 6, 10, 14, 17});
    REQUIRE(last_update(schedule) == 17);
    REQUIRE(sparsity_at(schedule, 1, b) == 0.0);
    REQUIRE(sparsity_at(schedule, 17, b) == b);
    REQUIRE(!releases_at(schedule, 6));
  }
}

TEST_CASE("cycles are cut at whole steps, begin dense and end at the target", "[pruning][schedules]") {
  const CyclicSchedule schedule{.begin = 2, .end = 19, .cycles = 3, .every = 2};
  REQUIRE(updates_of(schedule, 30) == std::vector<int64_t>{3, 5, 7, 8, 10, 12, 13, 14, 16, 18, 19});
  for (const int64_t first : {3, 8, 14}) {
    REQUIRE(schedule.releases_at(first));
    REQUIRE(schedule.sparsity_at(first, 0.8) == 0.0);
  }
  for (const int64_t last : {7, 13, 19}) {
    REQUIRE(!schedule.releases_at(last));
    REQUIRE(schedule.sparsity_at(last, 0.8) == 0.8);
  }
  // Every cut of every length, against the definition of the cuts.
  for (int64_t length = 2; length < 40; ++length) {
    for (int64_t cycles = 1; length / cycles >= 2; ++cycles) {
      const CyclicSchedule cut{.begin = 5, .end = 5 + length, .cycles = cycles};
      for (int64_t c = 0; c < cycles; ++c) {
        REQUIRE(cut.releases_at(5 + c * length / cycles + 1));
        REQUIRE(cut.sparsity_at(5 + (c + 1) * length / cycles, 0.7) == 0.7);
      }
    }
  }
}

TEST_CASE("AC/DC takes turns and ends sparse", "[pruning][schedules]") {
  REQUIRE(updates_of(ACDC{2, 20, 3, 2}, 40) == std::vector<int64_t>{2, 5, 7, 10, 12, 15, 17});  // 20 would be dense
  REQUIRE(updates_of(ACDC{2, 21, 3, 2}, 40) == std::vector<int64_t>{2, 5, 7, 10, 12, 15, 17, 20, 21});
  REQUIRE(updates_of(ACDC{2, 19, 3, 2}, 40) == std::vector<int64_t>{2, 5, 7, 10, 12, 15, 17});
  for (int64_t end = 3; end < 40; ++end) {
    const ACDC schedule{2, end, 3, 2};
    const auto updates = updates_of(schedule, 60);
    REQUIRE(schedule.last_update() == updates.back());
    for (size_t i = 0; i < updates.size(); ++i) {
      REQUIRE(schedule.sparsity_at(updates[i], 0.7) == (i % 2 == 0 ? 0.7 : 0.0));
    }
    REQUIRE(updates.size() % 2 == 1);
  }
}

TEST_CASE("Iterative goes back in its training schedule", "[pruning][schedules]") {
  const Iterative schedule{.rounds = 3, .steps_per_round = 10, .rewind = Rewind::weights, .rewind_to = 4};
  REQUIRE(updates_of(schedule, 60) == std::vector<int64_t>{10, 16, 22});
  REQUIRE(schedule.last_update() == 22);
  REQUIRE(std::abs(schedule.sparsity_at(10, 0.875) - 0.5) < 1e-15);
  REQUIRE(schedule.sparsity_at(22, 0.875) == 0.875);
  REQUIRE(schedule.training_step(9) == 9);
  REQUIRE(schedule.training_step(10) == 4);
  REQUIRE(schedule.training_step(15) == 9);
  REQUIRE(schedule.training_step(16) == 4);
  REQUIRE(schedule.training_step(28) == 10);
  const Iterative forward{.rounds = 2, .steps_per_round = 10};
  REQUIRE(updates_of(forward, 60) == std::vector<int64_t>{10, 20});
  REQUIRE(forward.training_step(25) == 25);
}

TEST_CASE("custom schedules end at the target", "[pruning][schedules]") {
  const auto schedule = custom([](int64_t step) { return static_cast<double>(step) / 10.0; }, {2, 5, 7});
  REQUIRE(updates_of(schedule, 20) == std::vector<int64_t>{2, 5, 7});
  REQUIRE(schedule.sparsity_at(5, 0.65) == 0.5);
  REQUIRE(schedule.sparsity_at(7, 0.65) == 0.65);
  REQUIRE(schedule == schedule);
  REQUIRE(schedule != custom([](int64_t) { return 0.5; }, {2, 5, 7}));
  REQUIRE(releases_at(custom([](int64_t) { return 0.5; }, {2, 5}, true), 5));
  REQUIRE_THROWS_WITH(custom([](int64_t) { return -0.5; }, {2, 5}).sparsity_at(2, 0.5),
                      ContainsSubstring("must give a sparsity in [0, 1), got -0.5 at step 2"));
}

TEST_CASE("regrowth has its own steps", "[pruning][schedules]") {
  const RigL rigl{.begin = 10, .end = 110, .every = 20, .fraction = 0.4};
  const SET set{.begin = 10, .end = 110, .every = 20, .fraction = 0.4, .decay = Decay::linear};
  for (int64_t t = 0; t < 130; ++t) {
    REQUIRE(rigl.updates_at(t) == (t == 30 || t == 50 || t == 70 || t == 90));
    REQUIRE(set.updates_at(t) == rigl.updates_at(t));
  }
  REQUIRE(std::abs(rigl.fraction_at(60) - 0.2) < 1e-15);
  REQUIRE(std::abs(set.fraction_at(60) - 0.2) < 1e-15);
  REQUIRE(set.to_string() == "SET(begin=10, end=110, every=20, fraction=0.4, decay='linear', seed=0)");
  REQUIRE(rigl.to_string() == "RigL(begin=10, end=110, every=20, fraction=0.4, decay='cosine')");
}

TEST_CASE("schedules out of range are refused", "[pruning][schedules]") {
  const auto refused = [](const auto& value, const char* message) {
    REQUIRE_THROWS_WITH(value.validate(), ContainsSubstring(message));
  };
  refused(ConstantSchedule{-1}, "[ConstantSchedule] begin must not be negative, got -1");
  refused(LinearSchedule{.begin = 5, .end = 5}, "[LinearSchedule] end must be larger than begin");
  refused(CosineSchedule{.every = 0}, "[CosineSchedule] every must be positive, got 0");
  refused(ExponentialSchedule{.initial = 1.0}, "[ExponentialSchedule] initial must be in [0, 1), got 1");
  refused(PolynomialSchedule{.power = 0.0}, "[PolynomialSchedule] power must be positive and finite, got 0");
  refused(CyclicSchedule{.end = 5, .cycles = 3}, "a cycle must have 2 or more steps, got 5 steps for 3 cycles");
  refused(ACDC{.sparse = 0}, "[ACDC] sparse must be positive, got 0");
  refused(Iterative{.rounds = 0}, "[Iterative] rounds must be positive, got 0");
  refused(Iterative{.steps_per_round = 5, .rewind = Rewind::weights, .rewind_to = 5},
          "rewind_to must be in [0, 5), got 5");
  refused(Iterative{.steps_per_round = 5, .rewind_to = 2}, "must be 0 when nothing is rewound, got 2");
  refused(CustomSchedule{nullptr, {1}}, "[CustomSchedule] function must be given, got none");
  refused(custom([](int64_t) { return 0.5; }, {3, 2}), "not negative and ascending, got [3, 2]");
  refused(SET{.fraction = 1.5}, "[SET] fraction must be in (0, 1], got 1.5");
  refused(RigL{.begin = 4, .end = 4}, "[RigL] end must be larger than begin");
  refused(StraightThrough{.end = 0}, "[StraightThrough] end must be positive, got 0");
  REQUIRE_THROWS_WITH(parse_rewind("bias"),
                      ContainsSubstring("must be 'weights', 'learning_rate' or 'none', got 'bias'"));
  REQUIRE_THROWS_WITH(parse_decay("fast"), ContainsSubstring("must be 'constant', 'linear' or 'cosine', got 'fast'"));
  for (const auto& name_of : {"none", "weights", "learning_rate"}) {
    REQUIRE(std::string(name(parse_rewind(name_of))) == name_of);
  }
}
