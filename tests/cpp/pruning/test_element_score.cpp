#include <rarefy/rarefy.h>
#include <torch/torch.h>

#include <cmath>
#include <limits>

#include "catch.h"

using namespace rarefy::pruning;
using Catch::Matchers::ContainsSubstring;

namespace {

/// Scores an element at a time, from (weight, gradient) of each pass.
template <typename Function>
at::Tensor reference(const at::Tensor& weight, const std::vector<at::Tensor>& gradients, const Function& function) {
  auto out = at::zeros_like(weight);
  for (int64_t i = 0; i < weight.numel(); ++i) {
    double sum = 0;
    for (const auto& gradient : gradients) {
      sum += function(weight.flatten()[i].item<double>(), gradient.flatten()[i].item<double>());
    }
    out.view(-1)[i] = sum;
  }
  return out;
}

at::Tensor after(const ElementCriterion& criterion, const at::Tensor& weight,
                 const std::vector<at::Tensor>& gradients) {
  auto accumulated = new_accumulator(weight);
  for (const auto& gradient : gradients) {
    accumulate(criterion, weight, gradient, accumulated);
  }
  return element_scores(criterion, "w", weight, accumulated, static_cast<int64_t>(gradients.size()));
}

struct NetImpl : torch::nn::Module {
  torch::nn::Conv2d conv{nullptr};
  torch::nn::BatchNorm2d norm{nullptr};
  torch::nn::Linear head{nullptr};

  NetImpl()
      : conv(register_module("conv", torch::nn::Conv2d(torch::nn::Conv2dOptions(2, 4, 3).padding(1)))),
        norm(register_module("norm", torch::nn::BatchNorm2d(4))),
        head(register_module("head", torch::nn::Linear(4 * 9, 3))) {}
  at::Tensor forward(const at::Tensor& x) { return head(torch::relu(norm(conv(x))).flatten(1)); }
};
TORCH_MODULE(Net);

struct ModelCopy {
  std::vector<at::Tensor> values;
  std::vector<const void*> memory;
  std::vector<bool> flags;

  explicit ModelCopy(Net& net) {
    for (const auto& tensor : net->parameters()) {
      values.push_back(tensor.detach().clone());
      values.push_back(tensor.grad().defined() ? tensor.grad().clone() : at::Tensor());
      memory.push_back(tensor.data_ptr());
      flags.push_back(tensor.requires_grad());
    }
    for (const auto& tensor : net->buffers()) {
      values.push_back(tensor.detach().clone());
      memory.push_back(tensor.data_ptr());
    }
    for (const auto& module : net->modules()) {
      flags.push_back(module->is_training());
    }
  }
};

void check_same(Net& net, const ModelCopy& before) {
  const ModelCopy now(net);
  CHECK(now.memory == before.memory);
  CHECK(now.flags == before.flags);
  REQUIRE(now.values.size() == before.values.size());
  for (size_t i = 0; i < now.values.size(); ++i) {
    REQUIRE(now.values[i].defined() == before.values[i].defined());
    if (now.values[i].defined()) {
      CHECK(now.values[i].scalar_type() == before.values[i].scalar_type());
      CHECK(at::equal(now.values[i], before.values[i]));
    }
  }
}

}  // namespace

TEST_CASE("element scores are those of plain loops", "[pruning][element_score]") {
  torch::manual_seed(0);
  const auto weight = at::randn({3, 5}, at::kDouble);
  const std::vector<at::Tensor> gradients{at::randn({3, 5}, at::kDouble), at::randn({3, 5}, at::kDouble)};
  const auto close = [](const at::Tensor& a, const at::Tensor& b) { return at::allclose(a, b, 1e-12, 1e-14); };
  CHECK(close(after(Movement{}, weight, gradients),
              reference(weight, gradients, [](double w, double g) { return -w * g; })));
  CHECK(close(after(Taylor{}, weight, gradients),
              reference(weight, gradients, [](double w, double g) { return std::abs(w * g) / 2; })));
  CHECK(close(after(Fisher{}, weight, gradients),
              reference(weight, gradients, [](double w, double g) { return w * w * g * g / 4; })));
  CHECK(close(element_scores(Magnitude{3}, "w", weight),
              reference(weight, {weight}, [](double w, double) { return std::abs(w * w * w); })));
  const auto lamp = element_scores(Lamp{}, "w", weight);
  for (int64_t i = 0; i < 15; ++i) {
    const double w = weight.flatten()[i].item<double>();
    double sum = 0;
    for (int64_t j = 0; j < 15; ++j) {
      const double v = weight.flatten()[j].item<double>();
      sum += std::abs(v) >= std::abs(w) ? v * v : 0;
    }
    CHECK(lamp.flatten()[i].item<double>() == Approx(w * w / sum));
  }
  const auto norms = at::rand({5}, at::kDouble);
  CHECK(at::equal(element_scores(Activation{}, "w", weight, norms), norms.expand({3, 5})));
}

TEST_CASE("random scores depend on seed, name and index alone", "[pruning][element_score]") {
  const auto small = element_scores(Random{5}, "a", at::zeros({10}));
  const auto large = element_scores(Random{5}, "a", at::ones({200, 300}));
  CHECK(at::equal(large.flatten().narrow(0, 0, 10), small));
  CHECK_FALSE(at::equal(element_scores(Random{6}, "a", at::zeros({10})), small));
  CHECK_FALSE(at::equal(element_scores(Random{5}, "b", at::zeros({10})), small));
  CHECK(large.min().item<double>() >= 0);
  CHECK(large.max().item<double>() < 1);
}

TEST_CASE("element scores refuse what is not a number", "[pruning][element_score]") {
  const auto weight = at::ones({2, 3});
  auto accumulated = new_accumulator(weight);
  const auto bad = at::full({2, 3}, std::numeric_limits<float>::quiet_NaN());
  CHECK_THROWS_WITH(accumulate(Movement{}, weight, bad, accumulated), ContainsSubstring("must be finite"));
  CHECK_THROWS_WITH(accumulate(Movement{}, weight, at::Tensor(), accumulated), ContainsSubstring("needs a gradient"));
  CHECK(at::equal(accumulated, at::zeros({2, 3})));
  CHECK_THROWS_WITH(element_scores(Magnitude{}, "fc", bad), ContainsSubstring("NaN or infinity in 'fc'"));
  CHECK_THROWS_WITH(element_scores(Taylor{}, "fc", weight), ContainsSubstring("got none for 'fc'"));
  CHECK_THROWS_WITH(validate(Magnitude{-1}), ContainsSubstring("p must be positive, got -1"));
  CHECK_THROWS_WITH(validate(Magnitude{INFINITY}), ContainsSubstring("p must be finite"));
  CHECK(needs_gradients(Fisher{}));
  CHECK_FALSE(needs_gradients(Lamp{}));
  CHECK(to_string(Movement{}) == "Movement()");
}

TEST_CASE("one-shot scores of a module leave it as it was", "[pruning][one_shot_score]") {
  torch::manual_seed(0);
  Net net;
  net->norm->eval();
  net->conv->weight.set_requires_grad(false);
  const auto x = at::randn({4, 2, 3, 3});
  const auto y = at::randint(3, {4}, at::kLong);
  net->forward(x).sum().backward();
  net->norm->train();
  const std::vector<LossFunction> losses{[&] { return torch::nn::functional::cross_entropy(net->forward(x), y); }};
  const ModelCopy before(net);

  const auto sensitivity = snip(*net, losses);
  check_same(net, before);
  double sum = 0;
  for (const auto& [name, score] : sensitivity) {
    sum += score.sum().item<double>();
  }
  CHECK(sum == Approx(1.0).epsilon(1e-5));
  CHECK(sensitivity.size() == 2);

  const auto flow = grasp(*net, losses);
  check_same(net, before);
  CHECK(flow.at("conv.weight").abs().sum().item<double>() > 0);

  const auto ones = at::ones({1, 2, 3, 3}, at::kDouble);
  const auto synaptic = synflow(*net, [&] { return net->forward(ones); }, {.sparsity = 0.5, .rounds = 5});
  check_same(net, before);
  CHECK(synaptic.at("head.weight").scalar_type() == at::kDouble);
  int64_t zeros = 0;
  for (const auto& [name, score] : synaptic) {
    zeros += score.eq(0).sum().item<int64_t>();
  }
  CHECK(zeros >= static_cast<int64_t>((4 * 2 * 9 + 36 * 3) * (1 - std::pow(0.5, 0.8))));

  CHECK_THROWS_WITH(synflow(*net, []() -> at::Tensor { throw std::runtime_error("stop here"); }),
                    ContainsSubstring("stop here"));
  check_same(net, before);
  CHECK_THROWS_WITH(snip(*net, {}), ContainsSubstring("needs at least one batch"));
  CHECK_THROWS_WITH(snip(*net, {[&] { return net->forward(x); }}), ContainsSubstring("a loss must be one number"));
  check_same(net, before);
  CHECK(snip(*net, losses, std::vector<std::string>{"head"}).size() == 1);
}
