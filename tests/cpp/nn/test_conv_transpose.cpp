#include <rarefy/rarefy.h>
#include <torch/torch.h>

#include "catch.h"

using namespace rarefy::quantization;
namespace rnn = rarefy::nn;
using Catch::Matchers::ContainsSubstring;

namespace {

std::string message_of(const std::function<void()>& body) {
  try {
    body();
  } catch (const c10::Error& e) {
    return e.what_without_backtrace();
  }
  return "nothing was thrown";
}

/// The weight on its grid, with the scale of each channel of each group found by loops.
torch::Tensor weight_on_grid(const torch::Tensor& weight, const FakeQuantizerImpl& q, int64_t groups) {
  auto out = weight.detach().clone();
  const auto per_in = weight.size(0) / groups, per_out = weight.size(1);
  for (int64_t i = 0; i < weight.size(0); ++i) {
    for (int64_t o = 0; o < per_out; ++o) {
      const auto scale = q.scale[i / per_in * per_out + o];
      out[i][o] = (weight.detach()[i][o] / scale).round().clamp(-127, 127) * scale;
    }
  }
  return out;
}

torch::Tensor input_on_grid(const torch::Tensor& x, const FakeQuantizerImpl& q) {
  return ((x / q.scale).round() + q.zero_point).clamp(0, 255).sub(q.zero_point) * q.scale;
}

}  // namespace

TEST_CASE("a transposed convolution equals torch's on the grids of every group", "[nn][conv_transpose]") {
  torch::manual_seed(0);
  const auto execution = GENERATE(Execution::simulated, Execution::integer);
  const auto groups = GENERATE(1, 2);
  const auto options = rnn::ConvTranspose2dOptions(4, 6, 3).stride(2).padding(1).output_padding(1).groups(groups);
  torch::nn::Sequential model{rnn::ConvTranspose2d(options)};
  auto config = QConfig::int8();
  config.execution = execution;
  prepare_qat(*model, config);
  const auto x = torch::randn({2, 4, 5, 4});
  model->forward(x);
  model->eval();
  auto* layer = model->ptr(0)->as<rnn::ConvTranspose2dImpl>();
  REQUIRE(layer->quant->find("weight")->scale.numel() == 6);
  REQUIRE(layer->quant->find("weight")->options.scheme.axis() == 1);
  const auto expected = torch::conv_transpose2d(input_on_grid(x, *layer->quant->find("input")),
                                                weight_on_grid(layer->weight, *layer->quant->find("weight"), groups),
                                                layer->bias, {2, 2}, {1, 1}, {1, 1}, groups, {1, 1});
  REQUIRE(torch::allclose(model->forward(x), expected, 1e-5, 1e-5));
  convert(*model);
  const torch::NoGradGuard no_grad;
  REQUIRE(layer->weight.scalar_type() == torch::kInt8);
  REQUIRE(torch::allclose(model->forward(x), expected, 1e-5, 1e-5));
  REQUIRE(torch::allclose(layer->forward(x[0]), expected[0], 1e-5, 1e-5));
  REQUIRE(layer->forward(x, at::IntArrayRef({9, 7})).sizes() == at::IntArrayRef({2, 6, 9, 7}));
}

TEST_CASE("transposed convolutions of torch::nn are replaced in containers", "[nn][conv_transpose]") {
  torch::manual_seed(0);
  torch::nn::Sequential model(
      torch::nn::ConvTranspose1d(torch::nn::ConvTranspose1dOptions(4, 4, 4).stride(2).groups(2)), torch::nn::ReLU(),
      torch::nn::ConvTranspose1d(4, 2, 3));
  const auto x = torch::randn({2, 4, 6});
  const auto before = model->forward(x);
  prepare_qat(*model, QConfig::int8());
  const auto y = model->forward(x);
  REQUIRE(torch::allclose(y, before, 0.1, 0.1));
  y.sum().backward();
  for (const auto& parameter : model->parameters()) {
    REQUIRE(parameter.grad().defined());
  }
  REQUIRE(dynamic_cast<rnn::ConvTranspose1dImpl*>(model->ptr(0).get())->relu());
  model->eval();
  const torch::NoGradGuard no_grad;
  const auto simulated = model->forward(x);
  convert(*model, [&] { return std::vector{model->forward(x)}; });
  REQUIRE_THAT(report(*model), ContainsSubstring("gives bytes"));
  REQUIRE(torch::allclose(model->forward(x), simulated, 1e-4, 1e-4));

  const auto folder = std::filesystem::temp_directory_path() / "rarefy_conv_transpose";
  save_quantized(*model, folder);
  torch::nn::Sequential again(
      torch::nn::ConvTranspose1d(torch::nn::ConvTranspose1dOptions(4, 4, 4).stride(2).groups(2)), torch::nn::ReLU(),
      torch::nn::ConvTranspose1d(4, 2, 3));
  load_quantized(*again, folder);
  REQUIRE(torch::equal(again->forward(x), model->forward(x)));
  std::filesystem::remove_all(folder);
}

TEST_CASE("a transposed convolution says what does not fit", "[nn][conv_transpose]") {
  REQUIRE_THAT(message_of([] { rnn::ConvTranspose2d(rnn::ConvTranspose2dOptions(4, 6, 3).groups(4)); }),
               ContainsSubstring("[ConvTranspose2d] groups must divide the channels, got 4 groups for 4 and 6"));
  rnn::ConvTranspose2d layer(rnn::ConvTranspose2dOptions(4, 6, 3).stride(2));
  REQUIRE_THAT(message_of([&] { layer->forward(torch::randn({1, 4, 3, 3}), at::IntArrayRef({9, 7})); }),
               ContainsSubstring("[ConvTranspose2d] output_size must be within [7, 8], got 9"));
}
