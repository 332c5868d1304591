#include <rarefy/ops/mask.h>
#include <rarefy/pruning/mask_choice.h>
#include <torch/torch.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "catch.h"

using namespace rarefy::pruning;
namespace ops = rarefy::ops;
using Catch::Matchers::ContainsSubstring;

namespace {

int64_t pruned(const Candidate& candidate, const at::Tensor& mask) {
  return ops::pruned_count(mask, candidate.value.numel());
}

at::Tensor kept(const Candidate& candidate, const at::Tensor& mask) {
  return ops::unpack_mask(mask, candidate.value.sizes());
}

std::vector<Candidate> layers() {
  torch::manual_seed(3);
  return {{"conv.weight", at::randn({8, 12, 3, 3}), {}, {}},
          {"fc.weight", at::randn({16, 20}) * 2, {}, {}},
          {"head.weight", at::randn({10, 16}).to(at::kBFloat16), {}, {}}};
}

}  // namespace

TEST_CASE("choose_masks prunes the exact number of elements in every scope", "[mask]") {
  const auto candidates = layers();
  for (const double sparsity : {0.0, 0.123, 0.5, 0.9, 0.999}) {
    const int64_t total = 8 * 12 * 9 + 16 * 20 + 10 * 16;
    for (const auto scope : {Scope::global, Scope::erk}) {
      const auto masks = choose_masks(candidates, {.sparsity = sparsity, .scope = scope});
      int64_t count = 0;
      for (size_t i = 0; i < candidates.size(); ++i) {
        count += pruned(candidates[i], masks[i]);
      }
      REQUIRE(count == static_cast<int64_t>(std::nearbyint(sparsity * total)));
    }
    const auto masks = choose_masks(candidates, {.sparsity = sparsity, .scope = Scope::local});
    for (size_t i = 0; i < candidates.size(); ++i) {
      const auto expected = std::nearbyint(sparsity * static_cast<double>(candidates[i].value.numel()));
      REQUIRE(pruned(candidates[i], masks[i]) == static_cast<int64_t>(expected));
    }
  }
}

TEST_CASE("choose_masks prunes whole units of the lowest mean score", "[mask]") {
  const auto value = at::arange(24, at::kFloat).view({4, 6});  // rows and columns ascend
  const std::vector<Candidate> one{{"w", value, {}, {}}};
  const auto mask_of = [&](const Pattern& pattern) {
    return kept(one[0], choose_masks(one, {.sparsity = 0.5, .pattern = pattern})[0]);
  };
  auto rows = at::ones({4, 6}, at::kBool);
  rows.slice(0, 0, 2).fill_(false);
  REQUIRE(at::equal(mask_of(Row{}), rows));
  REQUIRE(at::equal(mask_of(Head{2}), rows));
  auto columns = at::ones({4, 6}, at::kBool);
  columns.slice(1, 0, 3).fill_(false);
  REQUIRE(at::equal(mask_of(Column{}), columns));
  REQUIRE(at::equal(mask_of(Block{2, 3}), rows));
  REQUIRE(at::equal(mask_of(Block{4, 1}), columns));
  const auto negated = at::neg(value);
  const auto by_score = choose_masks({{"w", value, negated, {}}}, {.sparsity = 0.5, .pattern = Row{}});
  REQUIRE(at::equal(kept(one[0], by_score[0]), rows.flip(0)));

  // Rows of six are a block of four and one of two; by their means they go as 4, 2, 4, ... elements. Of 24 * 0.34 = 8.16
  // wanted, 10 is nearer than 6.
  const auto blocks = choose_masks(one, {.sparsity = 0.34, .pattern = Block{1, 4}});
  REQUIRE(pruned(one[0], blocks[0]) == 10);
}

TEST_CASE("choose_masks makes N:M masks along the input channels, gradually", "[mask]") {
  torch::manual_seed(4);
  std::vector<Candidate> one{{"w", at::randn({6, 10, 3, 3}), {}, {}}};
  for (const double sparsity : {0.1, 0.25, 0.4}) {
    const auto mask = choose_masks(one, {.sparsity = sparsity, .pattern = NM{2, 4}})[0];
    REQUIRE(pruned(one[0], mask) == static_cast<int64_t>(std::nearbyint(sparsity / 0.5 * (6 * 9 * 4))));
    one[0].mask = mask;  // what is pruned stays pruned
  }
  const auto mask = choose_masks(one, {.sparsity = 0.5, .pattern = NM{2, 4}})[0];
  const auto per_group = kept(one[0], mask).slice(1, 0, 8).reshape({6, 2, 4, 9}).sum(2);
  REQUIRE(per_group.eq(2).all().item<bool>());
  REQUIRE(kept(one[0], mask).slice(1, 8).all().item<bool>());  // a group of two keeps both
  REQUIRE(at::equal(ops::nm_mask(one[0].value, 2, 4),
                    choose_masks(one, {.sparsity = 0.5, .pattern = NM{2, 4}, .regrow = true})[0]));
}

TEST_CASE("erk_counts keep every layer's density in proportion", "[mask]") {
  const std::vector<std::vector<int64_t>> sizes{{64, 3, 3, 3}, {128, 64, 3, 3}, {10, 128}};
  const auto counts = erk_counts(sizes, 0.8);
  const int64_t total = 1728 + 73728 + 1280;
  REQUIRE(std::accumulate(counts.begin(), counts.end(), int64_t{0}) ==
          static_cast<int64_t>(std::nearbyint(0.8 * total)));
  const double first = (1728.0 - static_cast<double>(counts[0])) / (64 + 3 + 3 + 3);
  const double second = (73728.0 - static_cast<double>(counts[1])) / (128 + 64 + 3 + 3);
  const bool is_dense = counts[0] == 0;
  REQUIRE((is_dense || std::fabs(first - second) < 0.1));
  REQUIRE_THROWS_WITH(erk_counts(sizes, 1.0), ContainsSubstring("[erk_counts] sparsity must be in [0, 1), got 1"));
}

TEST_CASE("score_mask sorts numbers of either sign", "[mask]") {
  const auto scores = at::tensor({0.5f, -2.0f, -0.0f, 0.0f, -INFINITY, 3.0f, -2.0f, INFINITY});
  const auto mask = ops::score_mask(scores, 0.5)[0];
  const std::vector<bool> expected{true, false, false, true, false, true, false, true};
  for (int64_t i = 0; i < 8; ++i) {
    REQUIRE(ops::unpack_mask(mask, {8})[i].item<bool>() == expected[static_cast<size_t>(i)]);
  }
  REQUIRE(at::equal(ops::pack_mask(ops::unpack_mask(mask, {8})), mask));
}

TEST_CASE("patterns parse, print and compare", "[mask]") {
  for (const Pattern& pattern : {Pattern(Unstructured{}), Pattern(NM{1, 4}), Pattern(Block{16, 8}), Pattern(Row{}),
                                 Pattern(Column{}), Pattern(Filter{}), Pattern(Head{32})}) {
    REQUIRE(parse_pattern(short_name(pattern)) == pattern);
  }
  REQUIRE(parse_pattern("2:4") == Pattern(NM{2, 4}));
  REQUIRE(NM{2, 4}.to_string() == "NM(n=2, m=4)");
  REQUIRE(implied_sparsity(NM{1, 4}) == 0.75);
  REQUIRE(!implied_sparsity(Row{}).has_value());
  REQUIRE(misfit(NM{2, 4}, {16, 3, 3, 3}) ==
          "NM(n=2, m=4) needs 4 or more input features or channels (dimension 1), got shape [16, 3, 3, 3]");
  REQUIRE(misfit(NM{2, 4}, {16, 8}).empty());
}

TEST_CASE("choose_masks refuses what it cannot do and changes nothing", "[mask]") {
  auto candidates = layers();
  const auto message = [&](const MaskChoice& choice) {
    try {
      choose_masks(candidates, choice);
    } catch (const c10::ValueError& error) {
      return std::string(error.what_without_backtrace());
    }
    return std::string();
  };
  REQUIRE_THAT(message({.sparsity = 1.0}), ContainsSubstring("[MaskChoice] sparsity must be in [0, 1), got 1"));
  REQUIRE_THAT(message({.pattern = NM{4, 4}}), ContainsSubstring("[NM] must have 1 <= n < m, got n 4 and m 4"));
  REQUIRE_THAT(message({.sparsity = 0.8, .pattern = NM{2, 4}}), ContainsSubstring("at most 1 - n / m = 0.5 for 2:4"));
  REQUIRE_THAT(message({.pattern = Block{17, 1}}),
               ContainsSubstring("'conv.weight' cannot have the pattern: Block(rows=17, columns=1) needs a matrix"));
  REQUIRE_THAT(message({.layers = {{"nothing", 0.5}}}), ContainsSubstring("layers: 'nothing' matches no weight"));
  candidates[1].value[2][3] = NAN;
  REQUIRE_THAT(message({}), ContainsSubstring("weights must not be NaN, got 1 NaN in 'fc.weight', the first at flat "
                                              "index 43"));
  REQUIRE_THROWS_WITH(parse_scope("layer"), ContainsSubstring("scope must be 'local', 'global' or 'erk', got 'layer'"));
}
