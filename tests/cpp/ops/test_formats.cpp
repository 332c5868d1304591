#include <rarefy/ops/accumulator.h>
#include <rarefy/ops/formats.h>
#include <rarefy/ops/weight_formats.h>
#include <torch/torch.h>

#include <cmath>

#include "catch.h"

using namespace rarefy::ops;
using Catch::Matchers::ContainsSubstring;

namespace {

/// Every number of a minifloat by its codes: those that are not negative.
std::vector<double> numbers_of(int e, int m, int bias, bool has_nan) {
  std::vector<double> numbers;
  for (int code = 0; code < (1 << (e + m)) - (has_nan ? 1 : 0); ++code) {
    const int exponent = code >> m, mantissa = code % (1 << m);
    const double significand = static_cast<double>(mantissa) / (1 << m) + (exponent > 0 ? 1.0 : 0.0);
    numbers.push_back(std::ldexp(significand, std::max(exponent, 1) - bias));
  }
  return numbers;
}

double nearest(double y, const std::vector<double>& numbers) {
  size_t best = 0;
  for (size_t i = 1; i < numbers.size(); ++i) {
    const double now = std::abs(std::abs(y) - numbers[i]), before = std::abs(std::abs(y) - numbers[best]);
    if (now < before || (now == before && i % 2 == 0)) {
      best = i;
    }
  }
  return std::copysign(numbers[best], y);
}

}  // namespace

TEST_CASE("cast_minifloat takes the nearest number", "[formats]") {
  torch::manual_seed(0);
  const struct {
    int e, m, bias;
    const char* specials;
  } shapes[] = {{4, 3, 7, "nan"}, {2, 3, 1, "none"}, {3, 2, 3, "none"}, {2, 1, 1, "none"}};
  for (const auto& [e, m, bias, specials] : shapes) {
    const auto numbers = numbers_of(e, m, bias, std::string(specials) == "nan");
    for (const auto type : {torch::kFloat32, torch::kFloat64}) {
      const auto x = (torch::randn({500}, type) * 4).round() / 8;
      const auto y = cast_minifloat(x, torch::ones({1}), std::nullopt, {}, e, m, bias, specials);
      for (int64_t i = 0; i < x.numel(); ++i) {
        REQUIRE(y[i].item<double>() == nearest(x[i].item<double>(), numbers));
      }
    }
  }
}

TEST_CASE("groups and tokens have scales of their own", "[formats]") {
  torch::manual_seed(1);
  const auto x = torch::randn({5, 10});
  const auto [scale, zero_point] = group_qparams(x, -1, {c10::SymInt(4)}, 0, 15, false);
  REQUIRE(scale.sizes() == torch::IntArrayRef({5, 3}));
  const auto y = fake_quantize_group(x, scale, zero_point, -1, {c10::SymInt(4)}, 0, 15);
  REQUIRE(torch::equal(y, fake_quantize_dynamic(x, -1, {c10::SymInt(4)}, 0, 15, false)));
  for (int64_t r = 0; r < 5; ++r) {
    for (int64_t c = 0; c < 10; ++c) {
      const auto s = scale[r][c / 4].item<float>();
      const auto z = static_cast<float>(zero_point[r][c / 4].item<int>());
      const float q = std::min(std::max(std::nearbyint(x[r][c].item<float>() / s) + z, 0.0f), 15.0f);
      REQUIRE(y[r][c].item<float>() == (q - z) * s);
    }
  }
  const auto token = fake_quantize_dynamic(x, -1, {c10::SymInt(-1)}, -128, 127, true);
  REQUIRE(((token - x).abs() <= x.abs().amax(1, true) / 127 / 2 * 1.0001).all().item<bool>());
}

TEST_CASE("MX blocks share powers of two", "[formats]") {
  const auto x = torch::tensor({{448.0f, 3.0f, -0.4f, 1000.0f}, {0.0f, 0.0f, 0.0f, 0.0f}});
  const auto scale = mx_scale(x, "e4m3", 2);
  REQUIRE(torch::equal(scale, torch::tensor({{1.0f, 2.0f}, {1.0f, 1.0f}})));
  REQUIRE(torch::equal(fake_quantize_mx(x, "e4m3", 2),
                       torch::tensor({{448.0f, 3.0f, -0.40625f, 896.0f}, {0.0f, 0.0f, 0.0f, 0.0f}})));
  REQUIRE_THROWS_WITH(fake_quantize_mx(torch::ones({2, 0}), "e4m3"),
                      ContainsSubstring("[fake_quantize_mx] the axis of blocks must not be empty"));
}

TEST_CASE("gradients are clipped or pass", "[formats]") {
  auto x = torch::tensor({0.3f, 9.0f, -7.4f}, torch::requires_grad());
  const auto scale = torch::ones({1});
  const auto zero_point = torch::zeros({1}, torch::kInt32);
  fake_quantize_group(x, scale, zero_point, std::nullopt, {}, -8, 7).sum().backward();
  REQUIRE(torch::equal(x.grad(), torch::tensor({1.0f, 0.0f, 1.0f})));
  x.mutable_grad() = torch::Tensor();
  fake_quantize_mx(x, "e2m1", 3).sum().backward();
  REQUIRE(torch::equal(x.grad(), torch::ones({3})));
}

TEST_CASE("weights are clustered, made ternary and bounded", "[formats]") {
  const auto w = torch::tensor({-1.0f, -0.9f, 0.1f, 2.0f, 2.2f});
  const auto codebook = kmeans_codebook(w, 3);
  REQUIRE(torch::allclose(codebook, torch::tensor({-0.95f, 0.1f, 2.1f})));
  REQUIRE(torch::equal(codebook_indices(w, codebook, std::nullopt), torch::tensor({0, 0, 1, 2, 2}, torch::kUInt8)));
  REQUIRE(torch::allclose(fake_quantize_ternary(w), torch::tensor({-1.525f, -1.525f, 0.0f, 1.525f, 1.525f})));
  REQUIRE(torch::allclose(fake_quantize_binary(w, std::nullopt), torch::tensor({-1.24f, -1.24f, 1.24f, 1.24f, 1.24f})));
  const auto q = fake_quantize_a2q(torch::full({1, 100}, 50.0f), torch::ones({1}), 0, -128, 127, 16, 8, false);
  check_accumulator(q.to(torch::kInt8), 0, 0, 255, 16);
  REQUIRE_THROWS_WITH(check_accumulator(torch::full({1, 100}, 50, torch::kInt8), 0, 0, 255, 16),
                      ContainsSubstring("[check_accumulator] sums must be within 16 bits"));
}
