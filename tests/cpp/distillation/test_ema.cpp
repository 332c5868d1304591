#include <rarefy/distillation/ema.h>
#include <torch/torch.h>

#include <algorithm>

#include "catch.h"

using Catch::Matchers::ContainsSubstring;
using namespace rarefy::distillation;

namespace {

std::vector<torch::Tensor> values(int seed) {
  torch::manual_seed(static_cast<uint64_t>(seed));
  return {torch::randn({3, 4}), torch::randn({5}, torch::kDouble), torch::randn({1, 1296}), torch::randn({0})};
}

struct NetImpl : torch::nn::Module {
  explicit NetImpl(int64_t width = 6)
      : linear(register_module("linear", torch::nn::Linear(4, width))),
        norm(register_module("norm", torch::nn::BatchNorm1d(width))) {}
  torch::Tensor forward(const torch::Tensor& x) { return norm(linear(x)); }
  torch::nn::Linear linear;
  torch::nn::BatchNorm1d norm;
};
TORCH_MODULE(Net);

}  // namespace

TEST_CASE("averages follow the formula", "[ema]") {
  for (const double warmup : {0.0, 1.0, 10.0}) {
    Ema ema({0.75, warmup});
    auto averages = values(0), expected = values(0);
    for (int t = 0; t < 8; ++t) {
      const double decay = warmup == 0.0 ? 0.75 : std::min(0.75, t / (t + warmup));
      CHECK(ema.next_decay() == decay);
      const auto now = values(t + 1);
      ema.update(averages, now);
      for (size_t i = 0; i < expected.size(); ++i) {
        expected[i] = decay * expected[i] + (1 - decay) * now[i];
        CHECK(torch::allclose(averages[i], expected[i], 1e-5, 1e-6));
      }
    }
    CHECK(ema.updates() == 8);
  }
}

TEST_CASE("with a warmup of one the average is the mean", "[ema]") {
  Ema ema({0.999, 1.0});
  std::vector<torch::Tensor> average{torch::full({2}, 100.0, torch::kDouble)};
  for (int t = 1; t <= 9; ++t) {
    ema.update(average, {torch::full({2}, static_cast<double>(t), torch::kDouble)});
  }
  CHECK(torch::allclose(average[0], torch::full({2}, 5.0, torch::kDouble)));
}

TEST_CASE("a module's parameters are averaged and its buffers copied", "[ema]") {
  torch::manual_seed(0);
  Net student, teacher;
  Ema ema({0.9, 0.0});
  const auto before = teacher->linear->weight.detach().clone();
  student->train();
  student(torch::randn({8, 4}));
  ema.update(*teacher, *student);
  CHECK(torch::allclose(teacher->linear->weight, 0.9 * before + 0.1 * student->linear->weight));
  CHECK(torch::equal(teacher->norm->running_mean, student->norm->running_mean));
  CHECK(teacher->norm->num_batches_tracked.item<int64_t>() == 1);
  CHECK(teacher->linear->weight.grad_fn() == nullptr);
}

TEST_CASE("a refused update changes nothing", "[ema]") {
  torch::manual_seed(0);
  Ema ema({0.5, 0.0});
  std::vector<torch::Tensor> averages{torch::zeros({2}), torch::zeros({3})};
  CHECK_THROWS_WITH(ema.update(averages, {torch::ones({2})}),
                    ContainsSubstring("[Ema] there must be one value per average, got 1 values for 2 averages"));
  CHECK_THROWS_WITH(ema.update(averages, {torch::ones({2}), torch::ones({4})}),
                    ContainsSubstring("[Ema] values must have the shapes of the averages, got [4] for [3] at 1"));
  CHECK_THROWS_WITH(ema.update(averages, {torch::ones({2}), torch::ones({3}, torch::kLong)}),
                    ContainsSubstring("[Ema] values must be floating point"));
  CHECK_THROWS_WITH(ema.update({torch::zeros({2}, torch::kBFloat16)}, {torch::ones({2})}),
                    ContainsSubstring("[Ema] averages must be float32 or float64"));
  CHECK(averages[0].abs().sum().item<double>() == 0);
  Net teacher(6), wider(7);
  const auto before = teacher->linear->weight.detach().clone();
  CHECK_THROWS_WITH(ema.update(*teacher, *wider),
                    ContainsSubstring("parameters must keep their shapes, got 'linear.weight'"));
  CHECK_THROWS_WITH(ema.update(*teacher, *teacher->linear),
                    ContainsSubstring("both modules must have the same parameters"));
  CHECK(torch::equal(teacher->linear->weight, before));
  CHECK(ema.updates() == 0);
  CHECK_THROWS_WITH(Ema({1.0, 0.0}), ContainsSubstring("[Ema] decay must be in [0, 1), got 1"));
  CHECK_THROWS_WITH(Ema({0.5, -1.0}), ContainsSubstring("[Ema] warmup must be 0 or more and finite, got -1"));
  CHECK_THROWS_WITH(ema.set_updates(-3), ContainsSubstring("[Ema] updates must be 0 or more, got -3"));
}
