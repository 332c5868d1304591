#include <rarefy/rarefy.h>
#include <torch/torch.h>

#include <limits>

#include "catch.h"

using namespace rarefy::pruning;
using Catch::Matchers::ContainsSubstring;

namespace {

std::vector<int32_t> indices(int32_t count) {
  std::vector<int32_t> out;
  for (int32_t i = 0; i < count; ++i) {
    out.push_back(i);
  }
  return out;
}

/// 3 -> 10 -> 8 -> 2, each hidden layer a group; scores rise with the index, those of the second are far lower.
struct Chain {
  Structure structure;
  Shapes shapes{{"a", {10, 3}}, {"b", {8, 10}}, {"c", {2, 8}}};
  std::vector<GroupScore> scores{{1.0 + at::arange(10, at::kDouble), ""},
                                 {0.01 + 0.01 * at::arange(8, at::kDouble), ""}};

  Chain() {
    structure.groups = {{"a", 10, {{"a", -1, 0, Role::output, indices(10)}, {"b", -1, 1, Role::input, indices(10)}}},
                        {"b", 8, {{"b", -1, 0, Role::output, indices(8)}, {"c", -1, 1, Role::input, indices(8)}}}};
    const auto axis = [](int32_t group, int32_t size) {
      std::vector<std::pair<int32_t, int32_t>> out;
      for (int32_t i = 0; i < size; ++i) {
        out.emplace_back(group, i);
      }
      return out;
    };
    structure.costs = {{-1, 3, {axis(0, 10)}}, {-1, 1, {axis(0, 10), axis(1, 8)}}, {-1, 2, {axis(1, 8)}}};
  }
};

}  // namespace

TEST_CASE("counts", "[choice]") {
  const Chain chain;
  CHECK(count(chain.structure, chain.shapes) == Counts{18, 30 + 80 + 16, 30 + 80 + 16});
  const Removal removal{{0, 4, 9}, {7}};
  CHECK(count(chain.structure, chain.shapes, removal) == Counts{14, 21 + 49 + 14, 21 + 49 + 14});
  CHECK(parameter_count(chain.structure, chain.shapes, removal) == 84);
  CHECK(mac_count(chain.structure, removal) == 84);
  CHECK_THROWS_AS(mac_count(chain.structure, {{10}, {}}), c10::IndexError);
  CHECK_THROWS_AS(mac_count(chain.structure, {{}}), c10::ValueError);
}

TEST_CASE("scopes", "[choice]") {
  const Chain chain;
  const auto global = choose(chain.structure, chain.shapes, chain.scores, {.target = Channels{0.5}});
  CHECK(global.removal == Removal{{0, 1}, {0, 1, 2, 3, 4, 5, 6}});
  const auto local =
      choose(chain.structure, chain.shapes, chain.scores, {.target = Channels{0.5}, .scope = UnitScope::local});
  CHECK(local.removal == Removal{{0, 1, 2, 3, 4}, {0, 1, 2, 3}});
  CHECK(local.achieved() == 0.5);
  CHECK(local.channels_removed() == 0.5);
  CHECK(local.after == count(chain.structure, chain.shapes, local.removal));
}

TEST_CASE("targets", "[choice]") {
  const Chain chain;
  for (const Target& target : {Target(Parameters{0.5}), Target(Macs{0.5})}) {
    const auto choice =
        choose(chain.structure, chain.shapes, chain.scores, {.target = target, .scope = UnitScope::local});
    CHECK(choice.achieved() == Approx(0.5).margin(0.05));
  }
  CHECK(std::get<Macs>(at_step(Macs{0.6}, 1, 3)).fraction == Approx(0.2));
}

TEST_CASE("rounding, limits and reasons", "[choice]") {
  const Chain chain;
  const auto choice =
      choose(chain.structure, chain.shapes, chain.scores,
             {.target = Channels{0.5}, .scope = UnitScope::local, .round_to = 4, .limits = {{"b", 0.25}}});
  CHECK(choice.groups[0].removed == 6);
  CHECK(choice.groups[1].removed == 0);
  CHECK_THAT(choice.groups[1].reason, ContainsSubstring("limit 0.25 of 'b' allows 2 of 8 units"));
  CHECK_THROWS_WITH(
      choose(chain.structure, chain.shapes, chain.scores,
             {.target = Channels{0.5}, .scope = UnitScope::local, .limits = {{"b", 0.0}}, .strict = true}),
      ContainsSubstring("b: limit 0 of 'b' allows 0 of 8 units"));
  const auto widths = choose_widths(chain.structure, chain.shapes, chain.scores, {10, 3});
  CHECK(widths.removal == Removal{{}, {0, 1, 2, 3, 4}});
}

TEST_CASE("fractions out of range", "[choice]") {
  const Chain chain;
  for (const double fraction : {1.0, -0.1, std::numeric_limits<double>::quiet_NaN()}) {
    CHECK_THROWS_AS(choose(chain.structure, chain.shapes, chain.scores, {.target = Macs{fraction}}), c10::ValueError);
  }
  CHECK_THROWS_WITH(choose(chain.structure, chain.shapes, chain.scores, {.limits = {{"d", 0.5}}}),
                    ContainsSubstring("got 'd'"));
}
