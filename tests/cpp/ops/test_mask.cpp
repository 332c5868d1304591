#include <rarefy/rarefy.h>
#include <torch/torch.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "catch.h"

namespace ops = rarefy::ops;
using Catch::Matchers::ContainsSubstring;

namespace {

std::vector<bool> unpack(const at::Tensor& mask, int64_t elements) {
  std::vector<bool> kept;
  for (int64_t i = 0; i < elements; ++i) {
    kept.push_back((mask.data_ptr<uint8_t>()[i / 8] >> (i % 8) & 1) != 0);
  }
  return kept;
}

/// The first round(sparsity * total) of a stable ascending sort by magnitude are pruned.
std::vector<bool> reference(const at::TensorList& weights, double sparsity) {
  std::vector<double> magnitude;
  for (const auto& weight : weights) {
    const auto flat = weight.to(at::kDouble).contiguous().flatten();
    for (int64_t i = 0; i < flat.numel(); ++i) {
      magnitude.push_back(std::fabs(flat.data_ptr<double>()[i]));
    }
  }
  std::vector<size_t> order(magnitude.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return magnitude[a] < magnitude[b]; });
  std::vector<bool> kept(magnitude.size(), true);
  const auto count = static_cast<size_t>(std::nearbyint(sparsity * static_cast<double>(magnitude.size())));
  for (size_t k = 0; k < count; ++k) {
    kept[order[k]] = false;
  }
  return kept;
}

}  // namespace

TEST_CASE("magnitude_mask prunes what a stable sort puts first", "[mask]") {
  torch::manual_seed(1);
  for (const auto dtype : {at::kFloat, at::kDouble, at::kBFloat16, at::kHalf}) {
    const std::vector<at::Tensor> weights{at::randn({217, 256}).to(dtype), at::randn({5, 4, 3, 160}).to(dtype),
                                          at::randn({1, 1296}).to(dtype), at::empty({0, 3}, dtype),
                                          at::randn({40, 64}).to(dtype).t()};
    for (const double sparsity : {0.0, 0.1, 0.5, 0.905, 0.99999}) {
      const auto masks = ops::magnitude_mask(weights, sparsity);
      std::vector<bool> kept;
      for (size_t i = 0; i < weights.size(); ++i) {
        REQUIRE(masks[i].numel() == (weights[i].numel() + 63) / 64 * 8);
        const auto part = unpack(masks[i], weights[i].numel());
        kept.insert(kept.end(), part.begin(), part.end());
      }
      REQUIRE(kept == reference(weights, sparsity));
    }
  }
}

TEST_CASE("magnitude_mask grows existing masks", "[mask]") {
  torch::manual_seed(2);
  const auto first = at::randn({1000}), second = at::randn({77});
  const std::vector<at::Tensor> before{first, second};
  const auto masks = ops::magnitude_mask(before, 0.4);
  const std::vector<at::Tensor> after{at::randn({1000}), at::randn({77})};  // other magnitudes: the masks must hold
  const auto grown = ops::magnitude_mask(after, 0.6, at::TensorList(masks));
  int64_t pruned = 0;
  for (size_t i = 0; i < masks.size(); ++i) {
    REQUIRE(at::equal(at::bitwise_and(grown[i], masks[i]), grown[i]));
    pruned += ops::pruned_count(grown[i], after[i].numel());
  }
  REQUIRE(pruned == 646);  // round(0.6 * 1077)
  const auto same = ops::magnitude_mask(after, 0.2, at::TensorList(masks));
  REQUIRE(at::equal(same[0], masks[0]));
  REQUIRE(at::equal(same[1], masks[1]));
}

TEST_CASE("apply_mask_ works on channels-last weights", "[mask]") {
  torch::manual_seed(3);
  const auto x = at::randn({8, 5, 3, 3});
  auto dense = x.clone();
  auto last = x.contiguous(at::MemoryFormat::ChannelsLast);
  const auto mask = ops::magnitude_mask({x}, 0.7)[0];
  ops::apply_mask_(dense, mask);
  ops::apply_mask_(last, mask);
  REQUIRE(at::equal(dense, last));
  REQUIRE(last.is_contiguous(at::MemoryFormat::ChannelsLast));
  REQUIRE(dense.count_nonzero().item<int64_t>() == 108);
}

TEST_CASE("full_mask keeps everything and has zero padding", "[mask]") {
  for (const int64_t n : {0, 1, 7, 8, 63, 64, 65, 129}) {
    const auto mask = ops::full_mask(at::empty({n}));
    REQUIRE(at::equal(mask, n == 0 ? mask : ops::magnitude_mask({at::ones({n})}, 0.0)[0]));
    REQUIRE(ops::pruned_count(mask, n) == 0);
  }
}

TEST_CASE("mask operators name the rule and the value", "[mask]") {
  auto x = at::ones({65});
  const auto mask = at::zeros({8}, at::kByte);
  REQUIRE_THROWS_WITH(ops::magnitude_mask({x}, 1.0),
                      ContainsSubstring("[magnitude_mask] sparsity must be in [0, 1), got 1"));
  REQUIRE_THROWS_WITH(ops::magnitude_mask(std::vector<at::Tensor>{}, 0.5),
                      ContainsSubstring("[magnitude_mask] needs at least one weight, got none"));
  REQUIRE_THROWS_WITH(ops::apply_mask_(x, mask),
                      ContainsSubstring("[apply_mask_] mask must hold 16 bytes for 65 elements, got 8"));
  REQUIRE_THROWS_WITH(ops::pruned_count(mask, 65),
                      ContainsSubstring("[pruned_count] mask must hold 16 bytes for 65 elements, got 8"));
  x[3] = std::nan("");
  REQUIRE_THROWS_WITH(ops::magnitude_mask({at::ones({2}), x}, 0.5),
                      ContainsSubstring("got NaN in tensor 1 at flat index 3"));
}
