#include <rarefy/rarefy.h>
#include <torch/torch.h>

#include <cmath>
#include <limits>
#include <vector>

#include "catch.h"

// The reference is a plain loop over logical indices; the exhaustive comparison is tests/python/test_learned_scale.py.

namespace {

using Catch::Matchers::ContainsSubstring;
namespace ops = rarefy::ops;

void check(const torch::Tensor& x, std::optional<int64_t> axis, int64_t qmin, int64_t qmax, double gradient_scale) {
  const int64_t channels = axis.has_value() ? x.size(*axis) : 1;
  auto scale = torch::pow(10, torch::rand({channels}) * 2 - 1).requires_grad_();
  const auto zero_point = torch::randint(qmin, qmax + 1, {channels}, torch::kInt);
  auto leaf = x.detach().requires_grad_();
  const auto upstream = torch::rand(x.sizes()) + 0.5;
  const auto y = ops::fake_quantize_learned(leaf, scale, zero_point, axis, qmin, qmax, gradient_scale);
  REQUIRE(torch::equal(y, ops::fake_quantize(x, scale.detach(), zero_point, axis, qmin, qmax)));
  y.backward(upstream);

  int64_t inner = 1;
  for (int64_t d = axis.value_or(x.dim() - 1) + 1; d < x.dim(); ++d) {
    inner *= x.size(d);
  }
  const auto x_flat = x.contiguous().view(-1), g_flat = upstream.view(-1);
  const auto dx_flat = leaf.grad().contiguous().view(-1);
  std::vector<double> sums(static_cast<size_t>(channels)), sizes(static_cast<size_t>(channels));
  int64_t wrong = 0;
  for (int64_t i = 0; i < x.numel(); ++i) {
    const int64_t channel = i / inner % channels;
    const float ratio = x_flat[i].item<float>() / scale[channel].item<float>(), g = g_flat[i].item<float>();
    const auto zero = static_cast<float>(zero_point[channel].item<int32_t>());
    const float q = std::nearbyint(ratio) + zero;
    const auto low = static_cast<float>(qmin), high = static_cast<float>(qmax);
    const bool inside = q >= low && q <= high;
    const double t = inside ? double{std::nearbyint(ratio)} - double{ratio} : double{(q < low ? low : high) - zero};
    sums[static_cast<size_t>(channel)] += gradient_scale * double{g} * t;
    sizes[static_cast<size_t>(channel)] += std::abs(gradient_scale * double{g} * t);
    wrong += dx_flat[i].item<float>() != (inside ? g : 0.0f);
  }
  REQUIRE(wrong == 0);
  for (int64_t c = 0; c < channels; ++c) {
    const auto i = static_cast<size_t>(c);
    REQUIRE(std::abs(scale.grad()[c].item<double>() - sums[i]) <= 1e-6 * sizes[i]);
  }
}

}  // namespace

TEST_CASE("fake_quantize_learned and its gradients equal plain loops", "[ops][learned_scale]") {
  torch::manual_seed(2);
  for (const auto& [qmin, qmax] : std::vector<std::pair<int64_t, int64_t>>{{-128, 127}, {0, 15}, {-2, 1}}) {
    const auto x = torch::randn({3, 4, 3, 37}) * 20;
    check(x, std::nullopt, qmin, qmax, 1.0);
    for (int64_t axis = 0; axis < 4; ++axis) {
      check(x, axis, qmin, qmax, 0.25);
      check(x.contiguous(torch::MemoryFormat::ChannelsLast), axis, qmin, qmax, -3.0);
    }
  }
}

TEST_CASE("the gradient of a learned scale: a stated example, infinity, NaN", "[ops][learned_scale]") {
  constexpr float infinity = std::numeric_limits<float>::infinity();
  constexpr float nan = std::numeric_limits<float>::quiet_NaN();
  // Quotients 0.25 and 1.75; clamped to 3 and -4; NaN, which adds nothing.
  const auto x = torch::tensor({0.5f, 3.5f, infinity, -18.0f, nan});
  const auto grad = torch::tensor({1.0f, 10.0f, 100.0f, 1000.0f, infinity});
  const auto [dx, dscale] = ops::fake_quantize_learned_backward(
      grad, x, torch::full({1}, 2.0), torch::zeros({1}, torch::kInt), std::nullopt, -4, 3, 0.5);
  REQUIRE(torch::equal(dx, torch::tensor({1.0f, 10.0f, 0.0f, 0.0f, 0.0f})));
  REQUIRE(dscale.item<float>() == 0.5f * (-0.25f + 2.5f + 300.0f - 4000.0f));
}

TEST_CASE("the gradient of a learned scale does not depend on the number of threads", "[ops][learned_scale]") {
  const int before = at::get_num_threads();
  const auto x = torch::randn({300, 700}), grad = torch::randn({300, 700});
  std::vector<torch::Tensor> results;
  for (const int threads : {1, 2, 3}) {
    at::set_num_threads(threads);
    results.push_back(std::get<1>(ops::fake_quantize_learned_backward(
        grad, x, torch::full({1}, 0.01), torch::zeros({1}, torch::kInt), std::nullopt, -128, 127, 1.0)));
  }
  at::set_num_threads(before);
  REQUIRE(torch::equal(results[0], results[1]));
  REQUIRE(torch::equal(results[0], results[2]));
}

TEST_CASE("errors of fake_quantize_learned have their C++ types", "[ops][learned_scale]") {
  const auto x = torch::ones({4, 3}), one = torch::ones({1}), zero = torch::zeros({1}, torch::kInt);
  const auto call = [&](const torch::Tensor& scale, std::optional<int64_t> axis, double gradient_scale) {
    return ops::fake_quantize_learned(x, scale, zero, axis, -128, 127, gradient_scale);
  };
  REQUIRE_THROWS_AS(call(one, 2, 1.0), c10::IndexError);
  REQUIRE_THROWS_AS(call(one.to(torch::kDouble), std::nullopt, 1.0), c10::TypeError);
  REQUIRE_THROWS_AS(call(-one, std::nullopt, 1.0), c10::ValueError);
  REQUIRE_THROWS_WITH(call(one, std::nullopt, std::nan("")),
                      ContainsSubstring("[fake_quantize_learned] gradient_scale must be finite, got nan"));
  const auto leaf = torch::ones({3}).requires_grad_();
  const auto y = ops::fake_quantize_learned(leaf, one, zero, std::nullopt, -128, 127, 1.0);
  REQUIRE_THROWS_AS(torch::autograd::grad({y.sum()}, {leaf}, {}, std::nullopt, /*create_graph=*/true),
                    c10::NotImplementedError);
}
