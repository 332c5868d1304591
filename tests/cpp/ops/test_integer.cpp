#include <rarefy/ops/integer.h>
#include <rarefy/rarefy.h>
#include <torch/torch.h>

#include <cstdint>
#include <limits>
#include <optional>
#include <vector>

#include "catch.h"

// References are plain loops; the exhaustive comparison is tests/python/test_integer*.py.

namespace {

using Catch::Matchers::ContainsSubstring;
namespace ops = rarefy::ops;

ops::IntegerGrids grids(int64_t channels) {
  return {torch::full({1}, 0.02f),
          torch::full({1}, 90, torch::kInt),
          0,
          255,
          torch::linspace(0.005f, 0.02f, channels),
          torch::zeros({channels}, torch::kInt),
          -127,
          127};
}

/// q - zero_point, as int64.
torch::Tensor integers(const torch::Tensor& x, const torch::Tensor& scale, const torch::Tensor& zero_point,
                       std::optional<int64_t> axis, int64_t qmin, int64_t qmax) {
  return ops::quantize(x, scale, zero_point, axis, qmin, qmax).to(torch::kLong) - zero_point[0].item<int64_t>();
}

}  // namespace

TEST_CASE("integer_linear sums exactly", "[integer]") {
  torch::manual_seed(0);
  const auto g = grids(5);
  const auto x = torch::randn({4, 3, 9}), weight = torch::randn({5, 9}), bias = torch::randn({5});
  const auto y = ops::integer_linear(x, weight, bias, g, false);
  const auto q_x = integers(x, g.x_scale, g.x_zero_point, std::nullopt, 0, 255).view({12, 9});
  const auto q_w = integers(weight, g.w_scale, g.w_zero_point, 0, -127, 127);
  REQUIRE(y.sizes().vec() == std::vector<int64_t>{4, 3, 5});
  for (int64_t m = 0; m < 12; ++m) {
    for (int64_t o = 0; o < 5; ++o) {
      int64_t sum = 0;
      for (int64_t k = 0; k < 9; ++k) {
        sum += q_x[m][k].item<int64_t>() * q_w[o][k].item<int64_t>();
      }
      const float scale = g.x_scale[0].item<float>() * g.w_scale[o].item<float>();
      const float scaled = static_cast<float>(sum) * scale;
      CHECK(y.view({12, 5})[m][o].item<float>() == scaled + bias[o].item<float>());
    }
  }
  CHECK(torch::equal(ops::integer_linear(x, weight.t().contiguous(), bias, g, true), y));
  CHECK(torch::equal(ops::integer_linear(x, weight, bias, g, false, {.relu = true}), torch::relu(y)));
  CHECK(torch::equal(ops::integer_linear(x, weight, bias, g, false, {.dtype = torch::kBFloat16}),
                     y.to(torch::kBFloat16)));
}

TEST_CASE("integer_conv agrees with the convolution of fake-quantized tensors", "[integer]") {
  torch::manual_seed(0);
  const auto g = grids(6);
  const std::vector<int64_t> ones = {1, 1}, twos = {2, 2};
  for (const int64_t groups : {1, 2}) {
    for (const int64_t size : {3, 9}) {  // matrix products, oneDNN's convolution
      auto x = torch::randn({1, 4, size, size}).requires_grad_();
      auto weight = torch::randn({6, 4 / groups, 3, 3}).requires_grad_();
      auto multiplier = torch::linspace(-1.5f, 1.5f, 6);
      const auto view = multiplier.view({6, 1, 1, 1});
      const auto y = ops::integer_conv(x, weight, multiplier, std::nullopt, g, twos, ones, ones, groups);
      const auto x_hat = ops::fake_quantize(x, g.x_scale, g.x_zero_point, std::nullopt, 0, 255);
      const auto w_hat = ops::fake_quantize(weight * view, g.w_scale, g.w_zero_point, 0, -127, 127) / view;
      const auto expected = torch::conv2d(x_hat, w_hat, {}, twos, ones, ones, groups);
      CHECK(torch::allclose(y, expected, 1e-5, 1e-5));
      const auto upstream = torch::randn_like(y);
      const auto got = torch::autograd::grad({y}, {x, weight}, {upstream});
      const auto wanted = torch::autograd::grad({expected}, {x, weight}, {upstream});
      for (size_t i = 0; i < got.size(); ++i) {
        CHECK(torch::allclose(got[i], wanted[i], 1e-4, 1e-4));
      }
    }
  }
}

TEST_CASE("a NaN reaches every result of an integer layer", "[integer]") {
  const auto g = grids(5);
  auto x = torch::randn({4, 9});
  x[2][3] = std::numeric_limits<float>::quiet_NaN();
  CHECK(
      ops::integer_linear(x, torch::randn({5, 9}), std::nullopt, g, false, {.relu = true}).isnan().all().item<bool>());
}

TEST_CASE("integer layers refuse what does not fit", "[integer]") {
  auto g = grids(5);
  const auto x = torch::randn({4, 9}), weight = torch::randn({5, 9});
  CHECK_THROWS_WITH(ops::integer_linear(x, torch::randn({5, 8}), std::nullopt, g, false),
                    ContainsSubstring("[integer_linear] input must have 8 features in its last dimension, got shape"));
  CHECK_THROWS_AS(ops::integer_linear(x.to(torch::kInt), weight, std::nullopt, g, false), c10::TypeError);
  CHECK_THROWS_WITH(ops::integer_linear(torch::ones({1, 65794}), torch::ones({5, 65794}), std::nullopt, g, false),
                    ContainsSubstring("an int32 sum must have at most 65793 products of bytes, got 65794"));
  g.w_zero_point = torch::ones({5}, torch::kInt);
  CHECK_THROWS_WITH(ops::integer_linear(x, weight, std::nullopt, g, false),
                    ContainsSubstring("[integer_linear] w_zero_point must be 0, got 1 at index 0"));
  const std::vector<int64_t> one = {1};
  CHECK_THROWS_WITH(ops::integer_conv(torch::ones({1, 2, 3}), torch::ones({5, 2, 4}), std::nullopt, std::nullopt,
                                      grids(5), one, {0}, one, 1),
                    ContainsSubstring("[integer_conv] the padded input must hold a window of 4 along axis 2, got 3"));
}
