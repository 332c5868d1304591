#include <rarefy/rarefy.h>
#include <torch/torch.h>

#include <cmath>
#include <limits>
#include <vector>

#include "catch.h"

// References are plain loops over logical indices; the exhaustive comparison is tests/python/test_fake_quantize.py.

namespace {

using Catch::Matchers::ContainsSubstring;
namespace ops = rarefy::ops;

struct Parameters {
  torch::Tensor scale;
  torch::Tensor zero_point;
};

Parameters parameters(int64_t count, int64_t qmin, int64_t qmax) {
  return {torch::pow(10, torch::rand({count}) * 3 - 2), torch::randint(qmin, qmax + 1, {count}, torch::kInt)};
}

/// Calls body(x, scale, zero_point, flat logical index) for every element.
template <typename Body>
void for_each(const torch::Tensor& x, const Parameters& p, std::optional<int64_t> axis, const Body& body) {
  const auto flat = x.contiguous().view(-1);
  int64_t inner = 1, channels = 1;
  if (axis.has_value()) {
    for (int64_t d = *axis + 1; d < x.dim(); ++d) {
      inner *= x.size(d);
    }
    channels = x.size(*axis);
  }
  for (int64_t i = 0; i < flat.numel(); ++i) {
    const int64_t c = i / inner % channels;
    body(flat[i].item<float>(), p.scale[c].item<float>(), static_cast<float>(p.zero_point[c].item<int32_t>()), i);
  }
}

void check(const torch::Tensor& x, std::optional<int64_t> axis, int64_t qmin, int64_t qmax) {
  const auto p = parameters(axis.has_value() ? x.size(*axis) : 1, qmin, qmax);
  auto leaf = x.detach().requires_grad_();
  const auto y = ops::fake_quantize(leaf, p.scale, p.zero_point, axis, qmin, qmax);
  const auto upstream = torch::rand(x.sizes()) + 2;
  y.backward(upstream);
  const auto q = ops::quantize(x, p.scale, p.zero_point, axis, qmin, qmax);
  REQUIRE(y.strides() == x.strides());

  const auto y_flat = y.detach().contiguous().view(-1), q_flat = q.contiguous().view(-1).to(torch::kInt);
  const auto grad_flat = leaf.grad().contiguous().view(-1), upstream_flat = upstream.view(-1);
  int64_t wrong = 0;
  for_each(x, p, axis, [&](float value, float scale, float zero_point, int64_t i) {
    const float index = std::nearbyint(value / scale) + zero_point;
    const float low = static_cast<float>(qmin), high = static_cast<float>(qmax);
    const float clamped = index < low ? low : index > high ? high : index;
    wrong += y_flat[i].item<float>() != (clamped - zero_point) * scale;
    wrong += q_flat[i].item<int>() != static_cast<int>(clamped);
    wrong += grad_flat[i].item<float>() != (index == clamped ? upstream_flat[i].item<float>() : 0.0f);
  });
  REQUIRE(wrong == 0);
}

struct Observer {
  torch::Tensor min_val = torch::full({1}, std::numeric_limits<float>::infinity());
  torch::Tensor max_val = torch::full({1}, -std::numeric_limits<float>::infinity());
  torch::Tensor scale = torch::ones({1});
  torch::Tensor zero_point = torch::zeros({1}, torch::kInt);
  torch::Tensor skipped = torch::zeros({1}, torch::kLong);

  void observe(const torch::Tensor& x, std::optional<double> constant) {
    ops::observe(x, min_val, max_val, scale, zero_point, skipped, std::nullopt, constant, 0, 255, false);
  }
};

}  // namespace

TEST_CASE("fake_quantize, quantize and the gradient equal plain loops", "[ops][fake_quantize]") {
  torch::manual_seed(1);
  for (const auto& [qmin, qmax] : std::vector<std::pair<int64_t, int64_t>>{{-128, 127}, {0, 255}, {-2, 1}, {0, 15}}) {
    const auto x = torch::randn({5, 4, 3, 37}) * 20;
    check(x, std::nullopt, qmin, qmax);
    for (int64_t axis = 0; axis < 4; ++axis) {
      check(x, axis, qmin, qmax);
      check(x.contiguous(torch::MemoryFormat::ChannelsLast), axis, qmin, qmax);
      check(x.permute({3, 0, 1, 2}), axis, qmin, qmax);
    }
  }
}

TEST_CASE("fake_quantize of empty and zero-dimensional tensors", "[ops][fake_quantize]") {
  const auto scale = torch::full({1}, 0.5), zero_point = torch::zeros({1}, torch::kInt);
  REQUIRE(ops::fake_quantize(torch::empty({0, 3}), scale, zero_point, std::nullopt, -128, 127).sizes() ==
          torch::IntArrayRef({0, 3}));
  const auto y = ops::fake_quantize(torch::tensor(0.7f), scale, zero_point, std::nullopt, -128, 127);
  REQUIRE(y.dim() == 0);
  REQUIRE(y.item<float>() == 0.5f);
}

TEST_CASE("instruction sets agree", "[ops][fake_quantize]") {
  const auto before = rarefy::instruction_set();
  const auto x = torch::randn({7, 33, 50}) * 10;
  const auto p = parameters(33, -128, 127);
  std::vector<torch::Tensor> results;
  for (const char* name : {"plain", "avx2", "avx512"}) {
    try {
      rarefy::set_instruction_set(name);
    } catch (const c10::ValueError&) {  // this processor does not have it
      continue;
    }
    results.push_back(ops::fake_quantize(x, p.scale, p.zero_point, 1, -128, 127));
  }
  rarefy::set_instruction_set(before);
  for (const auto& result : results) {
    REQUIRE(torch::equal(result, results.front()));
  }
}

TEST_CASE("results do not depend on the number of threads", "[ops][fake_quantize]") {
  const int before = at::get_num_threads();
  const auto x = torch::randn({3, 70000});
  std::vector<torch::Tensor> results;
  for (const int threads : {1, 2, 3}) {
    at::set_num_threads(threads);
    Observer observer;
    results.push_back(ops::observe_fake_quantize(x, observer.min_val, observer.max_val, observer.scale,
                                                 observer.zero_point, observer.skipped, std::nullopt, std::nullopt, 0,
                                                 255, false));
  }
  at::set_num_threads(before);
  REQUIRE(torch::equal(results[0], results[1]));
  REQUIRE(torch::equal(results[0], results[2]));
}

TEST_CASE("observe: running, averaging and latest range", "[ops][observe]") {
  const auto first = torch::tensor({-1.0f, 3.0f}), second = torch::tensor({-2.0f, 2.0f});
  Observer running, averaging, latest;
  for (const auto& x : {first, second}) {
    running.observe(x, std::nullopt);
    averaging.observe(x, 0.25);
    latest.observe(x, 1.0);
  }
  REQUIRE(running.min_val.item<float>() == -2.0f);
  REQUIRE(running.max_val.item<float>() == 3.0f);
  REQUIRE(averaging.min_val.item<float>() == -1.25f);
  REQUIRE(averaging.max_val.item<float>() == 2.75f);
  REQUIRE(latest.min_val.item<float>() == -2.0f);
  REQUIRE(latest.max_val.item<float>() == 2.0f);
  REQUIRE(latest.scale.item<float>() == static_cast<float>(4.0 / 255));
  REQUIRE(latest.zero_point.item<int>() == 127);  // 2 / float(4 / 255) is just below 127.5
}

TEST_CASE("observe: a batch that is not finite is counted and leaves the range alone", "[ops][observe]") {
  Observer observer;
  observer.observe(torch::tensor({-1.0f, 3.0f}), std::nullopt);
  const auto before = torch::cat({observer.min_val, observer.max_val, observer.scale, observer.zero_point});
  auto bad = torch::zeros({100});
  bad[77] = std::numeric_limits<float>::quiet_NaN();
  observer.observe(bad, std::nullopt);
  bad[77] = std::numeric_limits<float>::infinity();
  observer.observe(bad, 0.5);
  REQUIRE(observer.skipped.item<int64_t>() == 2);
  REQUIRE_THROWS_WITH(observer.observe(torch::empty({0, 3}), std::nullopt),
                      ContainsSubstring("[observe] input must not be empty, got shape [0, 3]"));
  REQUIRE(torch::equal(before, torch::cat({observer.min_val, observer.max_val, observer.scale, observer.zero_point})));
  Observer fresh;
  fresh.scale.fill_(7.0f);
  fresh.observe(bad, std::nullopt);
  REQUIRE(fresh.scale.item<float>() == 1.0f);
  REQUIRE(fresh.max_val.item<float>() == -std::numeric_limits<float>::infinity());
  fresh.observe(torch::ones({3}), 0.01);
  REQUIRE(fresh.max_val.item<float>() == 1.0f);
}

TEST_CASE("choose_qparams: both formulas", "[ops][choose_qparams]") {
  const auto low = torch::tensor({-1.0f, 2.0f, 0.0f, -3.0f}), high = torch::tensor({3.0f, 5.0f, 0.0f, -1.0f});
  const auto [scale, zero_point] = ops::choose_qparams(low, high, 0, 255, false);
  REQUIRE(torch::equal(scale, torch::tensor({static_cast<float>(4.0 / 255), static_cast<float>(5.0 / 255), 1.0f,
                                             static_cast<float>(3.0 / 255)})));
  REQUIRE(torch::equal(zero_point, torch::tensor({64, 0, 0, 255}, torch::kInt)));
  const auto [symmetric, zero] = ops::choose_qparams(low, high, -128, 127, true);
  REQUIRE(torch::equal(symmetric, torch::tensor({static_cast<float>(3.0 / 127), static_cast<float>(5.0 / 127), 1.0f,
                                                 static_cast<float>(3.0 / 127)})));
  REQUIRE(torch::equal(zero, torch::zeros({4}, torch::kInt)));
}

TEST_CASE("errors have their C++ types", "[ops][fake_quantize]") {
  const auto x = torch::ones({4, 3}), one = torch::ones({1}), zero = torch::zeros({1}, torch::kInt);
  REQUIRE_THROWS_AS(ops::fake_quantize(x, one, zero, 2, -128, 127), c10::IndexError);
  REQUIRE_THROWS_AS(ops::fake_quantize(x.to(torch::kInt), one, zero, std::nullopt, -128, 127), c10::TypeError);
  REQUIRE_THROWS_AS(ops::fake_quantize(x, -one, zero, std::nullopt, -128, 127), c10::ValueError);
  REQUIRE_THROWS_WITH(
      ops::fake_quantize(x, one, zero, 0, -128, 127),
      ContainsSubstring("[fake_quantize] scale must have shape [4] (one per index of axis 0), got [1]"));
}

TEST_CASE("memory of large results is reused and can be given back", "[ops][allocate]") {
  rarefy::release_cached_memory();
  const auto x = torch::randn({300, 1000}), one = torch::ones({1}), zero = torch::zeros({1}, torch::kInt);
  const void* first = ops::fake_quantize(x, one, zero, std::nullopt, -128, 127).const_data_ptr();
  const auto kept = ops::fake_quantize(x, one, zero, std::nullopt, -128, 127);
  REQUIRE(kept.const_data_ptr() == first);  // freed, then taken again
  REQUIRE(ops::fake_quantize(x, one, zero, std::nullopt, -128, 127).const_data_ptr() != first);  // in use
  REQUIRE(rarefy::release_cached_memory() >= x.nbytes());
  REQUIRE(rarefy::release_cached_memory() == 0);
  REQUIRE(torch::equal(kept, ops::fake_quantize(x, one, zero, std::nullopt, -128, 127)));
}
