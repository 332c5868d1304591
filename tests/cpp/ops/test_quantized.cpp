#include <rarefy/ops/fake_quantize.h>
#include <rarefy/ops/quantized.h>
#include <torch/torch.h>

#include <atomic>
#include <thread>
#include <vector>

#include "catch.h"

namespace {

using Catch::Matchers::ContainsSubstring;
namespace ops = rarefy::ops;

ops::ByteGrid grid(double scale, int64_t zero_point, int64_t qmin, int64_t qmax) {
  return {torch::full({1}, scale), torch::full({1}, zero_point, torch::kInt), qmin, qmax};
}

/// The bytes of x on a grid, by the operator of training.
torch::Tensor bytes(const torch::Tensor& x, const ops::ByteGrid& g) {
  const auto q = ops::quantize(x, g.scale, g.zero_point, std::nullopt, g.qmin, g.qmax);
  return (q.to(torch::kInt) + (g.qmin < 0 ? 128 : 0)).to(torch::kByte);
}

torch::Tensor weight_bytes(at::IntArrayRef sizes) { return torch::randint(-127, 128, sizes).to(torch::kChar); }

}  // namespace

TEST_CASE("bytes in and out of a linear layer are those of its floats", "[quantized]") {
  torch::manual_seed(0);
  const auto x = torch::randn({3, 5, 40});
  const auto w = weight_bytes({24, 40});
  const auto w_scale = torch::rand({24}) * 0.01 + 0.001;
  const auto bias = torch::randn({24});
  for (const auto& in : {grid(0.02, 121, 0, 255), grid(0.03, -9, -128, 127), grid(0.5, 3, -8, 7)}) {
    for (const auto& out : {grid(0.05, 101, 0, 255), grid(0.03, -7, -128, 127), grid(0.5, 7, 0, 15)}) {
      for (const bool relu : {false, true}) {
        const auto y = ops::quantized_linear(x, w, w_scale, bias, in, relu);
        REQUIRE(torch::equal(ops::quantized_linear(bytes(x, in), w, w_scale, bias, in, relu), y));
        REQUIRE(torch::equal(ops::quantized_linear(bytes(x, in), w, w_scale, bias, in, relu, out), bytes(y, out)));
      }
    }
  }
}

TEST_CASE("padding of bytes is the zero point's", "[quantized]") {
  torch::manual_seed(1);
  const auto x = torch::randn({2, 8, 9, 7});
  const auto w = weight_bytes({6, 4, 3, 2});
  const auto w_scale = torch::full({1}, 0.01);
  const auto in = grid(0.02, -5, -128, 127), out = grid(0.05, 100, 0, 255);
  const std::vector<int64_t> stride{2, 1}, padding{1, 2, 0, 1}, dilation{1, 1};
  const auto y = ops::quantized_conv(x, w, w_scale, std::nullopt, in, stride, padding, dilation, 2);
  const auto x_hat = ops::fake_quantize(x, in.scale, in.zero_point, std::nullopt, in.qmin, in.qmax);
  const auto padded = torch::constant_pad_nd(x_hat.to(torch::kDouble), {0, 1, 1, 2});
  const auto expected =
      torch::conv2d(padded, w.to(torch::kDouble) * 0.01, {}, stride, std::vector<int64_t>{0, 0}, dilation, 2);
  REQUIRE(torch::allclose(y.to(torch::kDouble), expected, 1e-5, 1e-5));
  const auto q =
      ops::quantized_conv(bytes(x, in), w, w_scale, std::nullopt, in, stride, padding, dilation, 2, false, out);
  REQUIRE(torch::equal(q, bytes(y, out)));
}

TEST_CASE("an addition of bytes is that of the values they stand for", "[quantized]") {
  torch::manual_seed(2);
  const auto a_grid = grid(0.02, 121, 0, 255), b_grid = grid(0.05, -3, -128, 127), out = grid(0.04, 90, 0, 255);
  const auto a = bytes(torch::randn({2, 3, 37}), a_grid), b = bytes(torch::randn({3, 1}), b_grid);
  const auto sum = ops::requantize(a, a_grid) + ops::requantize(b, b_grid);
  REQUIRE(torch::equal(ops::quantized_add(a, b, a_grid, b_grid), sum));
  REQUIRE(torch::equal(ops::quantized_add(a, b, a_grid, b_grid, true), torch::relu(sum)));
  REQUIRE(torch::equal(ops::quantized_add(a, b, a_grid, b_grid, true, out), bytes(torch::relu(sum), out)));
  REQUIRE(torch::equal(ops::requantize(a, a_grid, out), bytes(ops::requantize(a, a_grid), out)));
}

TEST_CASE("a weight is packed once, again when it was written to, and let go with its tensor", "[quantized]") {
  ops::clear_packed_weights();
  const auto in = grid(0.02, 121, 0, 255);
  const auto x = torch::randn({4, 16}), scale = torch::full({1}, 0.01);
  {
    auto w = weight_bytes({8, 16});
    const auto run = [&] { return ops::quantized_linear(x, w, scale, std::nullopt, in); };
    const auto y = run();
    REQUIRE(torch::equal(run(), y));
    REQUIRE(ops::packed_weight_count() == 1);
    w.neg_();
    REQUIRE(torch::equal(run(), -y));
    REQUIRE(ops::packed_weight_count() == 1);
    std::atomic<int> wrong{0};
    std::vector<std::thread> threads;
    ops::clear_packed_weights();
    for (int i = 0; i < 4; ++i) {
      threads.emplace_back([&] { wrong += torch::equal(run(), -y) ? 0 : 1; });
    }
    for (auto& thread : threads) {
      thread.join();
    }
    REQUIRE(wrong == 0);
    REQUIRE(ops::packed_weight_count() == 1);
  }
  REQUIRE(ops::packed_weight_count() == 0);
}

TEST_CASE("arguments that do not fit are named", "[quantized]") {
  const auto in = grid(0.02, 121, 0, 255);
  const auto x = torch::randn({4, 16}), w = weight_bytes({8, 16}), scale = torch::ones({8});
  REQUIRE_THROWS_WITH(
      ops::quantized_linear(x.to(torch::kInt), w, scale, std::nullopt, in),
      ContainsSubstring("[quantized_linear] input must be floating point, or uint8 on its grid, got Int"));
  REQUIRE_THROWS_WITH(ops::quantized_linear(x, w, torch::ones({3}), std::nullopt, in),
                      ContainsSubstring("[quantized_linear] weight_scale must have 1 or 8 elements, got shape [3]"));
  REQUIRE_THROWS_WITH(ops::quantized_linear(x, w, scale, std::nullopt, grid(0.02, 300, 0, 255)),
                      ContainsSubstring("[quantized_linear] input_zero_point must be within [0, 255], got 300"));
  REQUIRE_THROWS_WITH(ops::quantized_linear(x, w, scale, std::nullopt, grid(-1, 3, 0, 255)),
                      ContainsSubstring("[quantized_linear] input_scale must be finite and positive, got -1"));
}
