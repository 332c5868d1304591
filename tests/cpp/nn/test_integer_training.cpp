// Training in integers: the layers against the same layers in simulation, in float32 on the CPU.
#include <rarefy/rarefy.h>
#include <torch/torch.h>

#include <functional>

#include "catch.h"

using namespace rarefy::quantization;
namespace rnn = rarefy::nn;
using Catch::Matchers::ContainsSubstring;

namespace {

// Sums are exact in integers and rounded in floating point.
constexpr double kRelative = 1e-4, kAbsolute = 1e-5;
// One rounding to 8 bits of mantissa in each factor of the sums.
constexpr double kBfloat16 = 2e-2;

std::string message_of(const std::function<void()>& body) {
  try {
    body();
  } catch (const c10::Error& e) {
    return e.what_without_backtrace();
  }
  return "nothing was thrown";
}

QConfig int8(std::optional<Execution> execution, c10::ScalarType gradient_dtype = torch::kFloat32) {
  auto config = QConfig::int8();
  config.execution = execution;
  config.gradient_dtype = gradient_dtype;
  return config;
}

/// What a step of a layer leaves behind.
struct Outcome {
  torch::Tensor y, x_grad;
  std::vector<std::pair<std::string, torch::Tensor>> gradients, state;
};

/// A copy of the layer, alone in a model, prepared.
template <typename Layer>
struct Prepared {
  Prepared(const Layer& original, const QConfig& config) : layer(std::dynamic_pointer_cast<Layer>(original.clone())) {
    model->push_back(layer);
    prepare_qat(*model, config);
  }

  Outcome step(const torch::Tensor& x) {
    auto input = x.detach().clone().requires_grad_();
    model->zero_grad();
    Outcome outcome;
    outcome.y = layer->forward(input);
    // A gradient that differs everywhere, and is not of size 1.
    const auto upstream = torch::linspace(-2, 3, outcome.y.numel()).view(outcome.y.sizes());
    outcome.y.backward(upstream);
    outcome.x_grad = input.grad();
    for (const auto& item : layer->named_parameters()) {
      outcome.gradients.emplace_back(item.key(), item.value().grad().clone());
    }
    for (const auto& item : layer->named_buffers()) {
      outcome.state.emplace_back(item.key(), item.value().clone());
    }
    return outcome;
  }

  std::shared_ptr<Layer> layer;
  torch::nn::ModuleList model;
};

void require_close(const std::string& name, const torch::Tensor& a, const torch::Tensor& b, double relative) {
  INFO(name << " differs by " << (a - b).abs().max().item<double>() << " of " << b.abs().max().item<double>());
  REQUIRE(a.sizes() == b.sizes());
  REQUIRE(b.abs().max().item<double>() > 0);
  // Relative to the largest: elements of a sum cancel.
  REQUIRE((a - b).abs().max().item<double>() <= kAbsolute + relative * b.abs().max().item<double>());
}

void require_equal(const Outcome& a, const Outcome& b, double gradient_tolerance) {
  require_close("y", a.y, b.y, kRelative);
  require_close("gradient of x", a.x_grad, b.x_grad, gradient_tolerance);
  REQUIRE(a.gradients.size() == b.gradients.size());
  for (size_t i = 0; i < a.gradients.size(); ++i) {
    REQUIRE(a.gradients[i].first == b.gradients[i].first);
    require_close(a.gradients[i].first, a.gradients[i].second, b.gradients[i].second, gradient_tolerance);
  }
  REQUIRE(a.state.size() == b.state.size());
  for (size_t i = 0; i < a.state.size(); ++i) {
    const auto& [name, value] = a.state[i];
    INFO(name);
    REQUIRE(name == b.state[i].first);
    if (name.find("running_") == std::string::npos) {  // ranges are taken of the same values
      REQUIRE(torch::equal(value, b.state[i].second));
    } else {
      REQUIRE(torch::allclose(value, b.state[i].second, kRelative, kAbsolute));
    }
  }
}

/// In training, in evaluation, with ranges that no longer hold the data, and in bfloat16.
template <typename Layer>
void check_against_simulation(Layer& original, const torch::Tensor& x) {
  Prepared<Layer> integer(original, int8(Execution::integer)), simulated(original, int8(Execution::simulated));
  REQUIRE_THAT(rarefy::quantization::report(*integer.model), ContainsSubstring("int8"));
  for (int i = 0; i < 2; ++i) {
    require_equal(integer.step(x + 0.1 * i), simulated.step(x + 0.1 * i), kRelative);
  }
  integer.model->eval();
  simulated.model->eval();
  require_equal(integer.step(x), simulated.step(x), kRelative);
  // Values beyond the range are clamped: their gradient is 0 in both.
  const auto outside = integer.step(4 * x);
  REQUIRE((outside.x_grad == 0).sum().template item<int64_t>() > 0);
  require_equal(outside, simulated.step(4 * x), kRelative);

  Prepared<Layer> narrow(original, int8(Execution::integer, torch::kBFloat16)), wide(original, int8(std::nullopt));
  const auto rounded = narrow.step(x), exact = wide.step(x);
  REQUIRE(torch::equal(rounded.y, exact.y));  // the forward pass is in integers all the same
  REQUIRE(rounded.x_grad.scalar_type() == torch::kFloat32);
  REQUIRE(!torch::equal(rounded.x_grad, exact.x_grad));
  require_equal(rounded, exact, kBfloat16);
}

template <size_t D>
torch::Tensor input_of() {
  const std::vector<int64_t> sizes{3, 4, 9, 7, 6};
  return torch::randn(at::IntArrayRef(sizes).slice(0, D + 2)) + 0.3;
}

template <size_t D>
std::vector<rnn::ConvOptions<D>> cases() {
  using Options = rnn::ConvOptions<D>;
  std::vector<Options> found{Options(4, 8, 3).stride(2).padding(1), Options(4, 6, 2).padding(torch::kSame).bias(false),
                             Options(4, 5, 3).padding(1).padding_mode(torch::kReflect), Options(4, 8, 2).dilation(2)};
  if (D < 3) {
    found.push_back(Options(4, 8, 3).groups(2).padding(1));
    found.push_back(Options(4, 4, 3).groups(4).padding(1));
  }
  return found;
}

template <size_t D>
void check_convolutions() {
  torch::manual_seed(static_cast<uint64_t>(D));
  for (const auto& options : cases<D>()) {
    for (const bool relu : {false, true}) {
      rnn::ConvImpl<D> plain(options);
      plain.set_relu(relu);
      check_against_simulation(plain, input_of<D>());

      rnn::ConvBnImpl<D> folded(options);
      folded.set_relu(relu);
      {
        const torch::NoGradGuard no_grad;
        folded.bn->weight.uniform_(0.5, 2.0).index({0}).neg_();
        folded.bn->bias.normal_();
        folded.bn->running_mean.normal_();
        folded.bn->running_var.uniform_(0.5, 2.0);
      }
      check_against_simulation(folded, input_of<D>());
    }
  }
}

/// A second derivative of the sum of squares.
template <typename Layer>
torch::Tensor second_derivative(Prepared<Layer>& prepared, const torch::Tensor& x) {
  auto input = x.detach().clone().requires_grad_();
  const auto first = torch::autograd::grad({prepared.layer->forward(input).square().sum()}, {input}, {}, std::nullopt,
                                           /*create_graph=*/true)[0];
  return torch::autograd::grad({first.square().sum()}, {input})[0];
}

}  // namespace

TEST_CASE("a linear layer trains in integers as in simulation", "[nn][integer]") {
  torch::manual_seed(0);
  for (const bool bias : {true, false}) {
    for (const bool relu : {true, false}) {
      rnn::LinearImpl layer(rnn::LinearOptions(37, 19).bias(bias));
      layer.set_relu(relu);
      check_against_simulation(layer, torch::randn({11, 37}));
      check_against_simulation(layer, torch::randn({2, 3, 37}));
    }
  }
}

TEST_CASE("convolutions of one dimension train in integers as in simulation", "[nn][integer]") {
  check_convolutions<1>();
}

TEST_CASE("convolutions of two dimensions train in integers as in simulation", "[nn][integer]") {
  check_convolutions<2>();
}

TEST_CASE("convolutions of three dimensions train in integers as in simulation", "[nn][integer]") {
  check_convolutions<3>();
}

TEST_CASE("gamma and beta train in integers, frozen too", "[nn][integer]") {
  torch::manual_seed(0);
  rnn::ConvBn2dImpl layer(4, 6, 3);
  {
    const torch::NoGradGuard no_grad;
    layer.bn->weight.uniform_(-2, 2).index({2}).zero_();  // a channel that batch normalization has switched off
    layer.bn->running_var.uniform_(0.5, 2.0);
  }
  const auto x = input_of<2>();
  Prepared<rnn::ConvBn2dImpl> integer(layer, int8(Execution::integer)), simulated(layer, int8(Execution::simulated));
  for (const bool frozen : {false, true}) {
    freeze_batch_norm(*integer.model, frozen);
    freeze_batch_norm(*simulated.model, frozen);
    const auto mean = integer.layer->bn->running_mean.clone();
    require_equal(integer.step(x), simulated.step(x), kRelative);
    REQUIRE(torch::equal(mean, integer.layer->bn->running_mean) == frozen);
    REQUIRE(integer.layer->bn->weight.grad().abs().min().item<float>() > 0);
    REQUIRE(integer.layer->bn->bias.grad().abs().min().item<float>() > 0);
  }
}

TEST_CASE("a sample without a batch dimension trains in integers", "[nn][integer]") {
  torch::manual_seed(0);
  rnn::Conv2dImpl layer(4, 6, 3);
  check_against_simulation(layer, input_of<2>()[0]);
}

TEST_CASE("integer execution is used where it is possible, and demanded where it is set", "[nn][integer]") {
  torch::manual_seed(0);
  rnn::LinearImpl linear(8, 4);
  const auto x = torch::randn({5, 8});
  // float64 has no kernel.
  linear.to(torch::kFloat64);
  Prepared<rnn::LinearImpl> automatic(linear, int8(std::nullopt)), simulated(linear, int8(Execution::simulated)),
      demanded(linear, int8(Execution::integer));
  const auto wide = x.to(torch::kFloat64);
  REQUIRE(torch::equal(automatic.layer->forward(wide), simulated.layer->forward(wide)));
  const auto before = demanded.layer->quant->find("input")->max_val.clone();
  REQUIRE_THAT(message_of([&] { demanded.layer->forward(wide); }),
               ContainsSubstring("[Linear] execution = integer must be possible for its input, but float64 has no "
                                 "integer kernels"));
  REQUIRE(torch::equal(demanded.layer->quant->find("input")->max_val, before));

  // Groups in three dimensions have none.
  rnn::Conv3dImpl grouped(rnn::Conv3dOptions(4, 4, 2).groups(2));
  const auto volumes = input_of<3>();
  Prepared<rnn::Conv3dImpl> automatic_groups(grouped, int8(std::nullopt)),
      simulated_groups(grouped, int8(Execution::simulated)), demanded_groups(grouped, int8(Execution::integer));
  REQUIRE(torch::equal(automatic_groups.layer->forward(volumes), simulated_groups.layer->forward(volumes)));
  REQUIRE_THAT(message_of([&] { demanded_groups.layer->forward(volumes); }),
               ContainsSubstring("[Conv3d] execution = integer must be possible for its input, but there is no integer "
                                 "kernel for groups in three dimensions"));

  // Off while it does not quantize.
  Prepared<rnn::Conv3dImpl> off(grouped, int8(Execution::integer));
  set_state(*off.model, std::nullopt, false);
  REQUIRE(torch::equal(off.layer->forward(volumes), grouped.forward(volumes)));
}

TEST_CASE("integer execution has no second derivative", "[nn][integer]") {
  torch::manual_seed(0);
  rnn::LinearImpl linear(8, 4);
  rnn::Conv2dImpl conv(4, 6, 3);
  const auto x = torch::randn({5, 8}), images = input_of<2>();
  Prepared<rnn::LinearImpl> simulated(linear, int8(Execution::simulated)), integer(linear, int8(Execution::integer));
  REQUIRE(second_derivative(simulated, x).abs().max().item<float>() > 0);
  REQUIRE_THAT(message_of([&] { second_derivative(integer, x); }), ContainsSubstring("second derivative"));
  Prepared<rnn::Conv2dImpl> simulated_conv(conv, int8(Execution::simulated)),
      integer_conv(conv, int8(Execution::integer));
  REQUIRE(second_derivative(simulated_conv, images).abs().max().item<float>() > 0);
  REQUIRE_THAT(message_of([&] { second_derivative(integer_conv, images); }), ContainsSubstring("second derivative"));
}
