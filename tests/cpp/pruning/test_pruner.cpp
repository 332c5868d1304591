#include <rarefy/rarefy.h>
#include <torch/torch.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <sstream>

#include "catch.h"

using namespace rarefy::pruning;
using Catch::Matchers::ContainsSubstring;

namespace {

/// The same network as in tests/python/test_pruning.py, so that keys can be compared.
struct NetImpl : torch::nn::Module {
  torch::nn::Conv2d conv{nullptr};
  torch::nn::BatchNorm2d bn{nullptr};
  torch::nn::Sequential head;

  NetImpl()
      : conv(register_module("conv", torch::nn::Conv2d(3, 7, 3))),
        bn(register_module("bn", torch::nn::BatchNorm2d(7))),
        head(register_module(
            "head", torch::nn::Sequential(torch::nn::Linear(7, 13), torch::nn::ReLU(), torch::nn::Linear(13, 5)))) {}
  at::Tensor forward(const at::Tensor& x) { return head->forward(bn(conv(x)).relu().mean({2, 3})); }
};
TORCH_MODULE(Net);

constexpr int64_t kElements = 3 * 7 * 9 + 7 * 13 + 13 * 5;
const PolynomialSchedule kSchedule{.begin = 2, .end = 17, .every = 4};

Net make(uint64_t seed = 0) {
  torch::manual_seed(seed);
  return {};
}

std::vector<at::Tensor> weights(Net& net) {
  std::vector<at::Tensor> out;
  for (const auto& parameter : net->named_parameters()) {
    if (parameter.key().ends_with("weight") && parameter.value().dim() >= 2) {
      out.push_back(parameter.value());
    }
  }
  return out;
}

int64_t zeros(Net& net) {
  int64_t count = 0;
  for (const auto& weight : weights(net)) {
    count += weight.numel() - weight.count_nonzero().item<int64_t>();
  }
  return count;
}

void train(Net& net, torch::optim::Optimizer& optimizer, MagnitudePruner& pruner, int first, int last) {
  for (int step = first; step < last; ++step) {
    torch::manual_seed(1000 + static_cast<uint64_t>(step));
    const auto x = at::randn({8, 3, 8, 8});
    const auto y = at::randint(0, 5, {8}, at::kLong);
    optimizer.zero_grad();
    at::cross_entropy_loss(net(x), y).backward();
    optimizer.step();
    pruner.step();
  }
}

torch::optim::SGD make_optimizer(Net& net) {
  return torch::optim::SGD(net->parameters(), torch::optim::SGDOptions(0.1).momentum(0.9));
}

std::vector<std::string> buffer_keys(Net& net) {
  std::vector<std::string> keys;
  for (const auto& buffer : net->named_buffers()) {
    if (buffer.key().rfind("bn.", 0) != 0) {
      keys.push_back(buffer.key());
    }
  }
  std::sort(keys.begin(), keys.end());
  return keys;
}

}  // namespace

TEST_CASE("PolynomialSchedule is the formula of the paper", "[pruning]") {
  const PolynomialSchedule schedule{.begin = 100, .end = 1100, .every = 30, .initial = 0.2, .power = 3};
  for (int64_t t = 100; t < 1100; t += 7) {
    const double expected = 0.9 + (0.2 - 0.9) * std::pow(1.0 - static_cast<double>(t - 100) / 1000.0, 3.0);
    REQUIRE(std::abs(schedule.sparsity_at(t, 0.9) - expected) < 1e-15);
  }
  REQUIRE(schedule.sparsity_at(99, 0.9) == 0.0);
  REQUIRE(schedule.sparsity_at(1100, 0.9) == 0.9);
  REQUIRE(schedule.sparsity_at(5000, 0.9) == 0.9);
  REQUIRE(schedule.updates_at(100));
  REQUIRE(!schedule.updates_at(129));
  REQUIRE(schedule.updates_at(130));
  REQUIRE(schedule.updates_at(1100));  // 1000 is no multiple of 30
  REQUIRE(!schedule.updates_at(1120));
}

TEST_CASE("MagnitudePruner has the keys of the Python package", "[pruning]") {
  auto net = make();
  const MagnitudePruner pruner(*net, {.sparsity = 0.5});
  REQUIRE(buffer_keys(net) == std::vector<std::string>{"conv.weight_mask_bits", "head.0.weight_mask_bits",
                                                       "head.2.weight_mask_bits", "pruning_step"});
  REQUIRE(pruner.buffers().size() == 4);
  REQUIRE(zeros(net) == 0);
}

TEST_CASE("MagnitudePruner hits its target exactly and momentum cannot bring zeros back", "[pruning]") {
  for (const auto scope : {Scope::global, Scope::local}) {
    auto net = make();
    auto optimizer = make_optimizer(net);
    MagnitudePruner pruner(*net, {.sparsity = 0.83, .scope = scope, .schedule = kSchedule});
    train(net, optimizer, pruner, 0, 17);
    int64_t expected = 0;
    for (const auto& weight : weights(net)) {
      expected += std::llrint(0.83 * static_cast<double>(weight.numel()));
    }
    expected = scope == Scope::local ? expected : std::llrint(0.83 * kElements);
    REQUIRE(zeros(net) == expected);
    std::vector<at::Tensor> before;
    for (const auto& weight : weights(net)) {
      before.push_back(weight.detach() == 0);
    }
    train(net, optimizer, pruner, 17, 25);
    for (size_t i = 0; i < before.size(); ++i) {
      REQUIRE(at::equal(weights(net)[i] == 0, before[i]));
    }
    REQUIRE(pruner.steps() == 25);
    REQUIRE(pruner.report().zeros() == expected);
  }
}

TEST_CASE("a saved model resumes bit for bit", "[pruning]") {
  auto straight = make();
  auto straight_optimizer = make_optimizer(straight);
  MagnitudePruner straight_pruner(*straight, {.sparsity = 0.8, .schedule = kSchedule});
  train(straight, straight_optimizer, straight_pruner, 0, 20);

  for (const int interruption : {1, 7, 17}) {
    std::stringstream model_file, optimizer_file;
    {
      auto net = make();
      auto optimizer = make_optimizer(net);
      MagnitudePruner pruner(*net, {.sparsity = 0.8, .schedule = kSchedule});
      train(net, optimizer, pruner, 0, interruption);
      torch::save(net, model_file);
      torch::save(optimizer, optimizer_file);
    }
    auto net = make(1);
    auto optimizer = make_optimizer(net);
    MagnitudePruner pruner(*net, {.sparsity = 0.8, .schedule = kSchedule});
    torch::load(net, model_file);
    torch::load(optimizer, optimizer_file);
    REQUIRE(pruner.steps() == interruption);
    train(net, optimizer, pruner, interruption, 20);
    for (const auto& parameter : straight->named_parameters()) {
      REQUIRE(at::equal(parameter.value(), net->named_parameters()[parameter.key()]));
    }
    for (const auto& buffer : straight->named_buffers()) {
      REQUIRE(at::equal(buffer.value(), net->named_buffers()[buffer.key()]));
    }
  }
}

TEST_CASE("a second pruner on a model with masks continues", "[pruning]") {
  auto net = make();
  MagnitudePruner(*net, {.sparsity = 0.5}).step();
  const MagnitudePruner again(*net, {.sparsity = 0.5});
  REQUIRE(again.steps() == 1);
  REQUIRE(again.sparsity() == static_cast<double>(std::llrint(0.5 * kElements)) / kElements);
  REQUIRE_THROWS_WITH(MagnitudePruner(*net, {.include = std::vector<std::string>{"conv"}}),
                      ContainsSubstring("for the parameters chosen only, got 'head.0.weight_mask_bits' too"));
}

TEST_CASE("finalize removes the buffers and keeps the zeros", "[pruning]") {
  auto net = make();
  const auto parameters = net->parameters();
  MagnitudePruner pruner(*net, {.sparsity = 0.5});
  pruner.step();
  pruner.finalize();
  REQUIRE(buffer_keys(net).empty());
  REQUIRE(zeros(net) == std::llrint(0.5 * kElements));
  REQUIRE(pruner.report().finalized);
  for (size_t i = 0; i < parameters.size(); ++i) {
    REQUIRE(parameters[i].is_same(net->parameters()[i]));
  }
  REQUIRE_THROWS_WITH(pruner.step(), ContainsSubstring("[Pruner.step] must not be called after finalize()"));
  REQUIRE_THROWS_WITH(pruner.finalize(), ContainsSubstring("[Pruner.finalize] must not be called after"));
  MagnitudePruner(*net, {.sparsity = 0.75}).step();
  REQUIRE(zeros(net) == std::llrint(0.75 * kElements));
}

TEST_CASE("an explicit list of parameters is pruned", "[pruning]") {
  const auto a = at::randn({10, 10}), b = at::randn({100});
  MagnitudePruner pruner({{"a", a}, {"b", b}, {"again", a}}, {.sparsity = 0.25});
  pruner.step();
  REQUIRE(200 - (a.count_nonzero() + b.count_nonzero()).item<int64_t>() == 50);
  REQUIRE(pruner.buffers()[0].first == "a_mask_bits");
  REQUIRE(pruner.buffers()[2].second.item<int64_t>() == 1);
  const auto report = pruner.report();
  REQUIRE(report.left_alone.size() == 1);
  REQUIRE(report.left_alone[0].reason == "the same tensor as a");
  REQUIRE_THAT(report.to_string(), ContainsSubstring("10x10"));
  pruner.finalize();
  REQUIRE(pruner.report().finalized);
  REQUIRE_THROWS_WITH(MagnitudePruner({{"a", a}}, {.exclude = {"a"}}),
                      ContainsSubstring("must be unset for an explicit list"));
  REQUIRE_THROWS_WITH(MagnitudePruner({{"i", at::ones({2, 2}, at::kInt)}}),
                      ContainsSubstring("parameters must be floating point, got 'i'"));
}

TEST_CASE("a pruner that fails leaves the model as it was", "[pruning]") {
  auto net = make();
  for (const double sparsity : {1.0, -0.1, std::nan("")}) {
    REQUIRE_THROWS_WITH(MagnitudePruner(*net, {.sparsity = sparsity}), ContainsSubstring("sparsity must be in [0, 1)"));
  }
  const auto with = [](PolynomialSchedule schedule) {
    return MagnitudePrunerOptions{.sparsity = 0.5, .schedule = schedule};
  };
  REQUIRE_THROWS_WITH(MagnitudePruner(*net, with({.begin = 5, .end = 5})),
                      ContainsSubstring("end must be larger than begin"));
  REQUIRE_THROWS_WITH(MagnitudePruner(*net, with({.every = 0})), ContainsSubstring("every must be positive, got 0"));
  REQUIRE_THROWS_WITH(MagnitudePruner(*net, with({.initial = 0.7})),
                      ContainsSubstring("must not be below the schedule's initial 0.7, got 0.5"));
  REQUIRE_THROWS_WITH(
      MagnitudePruner(*net, {.include = std::vector<std::string>{"fc9"}}),
      ContainsSubstring("every name in include must be that of a parameter or of a module with parameters, got 'fc9'"));
  torch::nn::BatchNorm2d norm(3);
  REQUIRE_THROWS_WITH(MagnitudePruner(*norm), ContainsSubstring("needs at least one parameter to prune"));
  REQUIRE_THROWS_WITH(parse_scope("layer"), ContainsSubstring("scope must be 'local', 'global' or 'erk', got 'layer'"));
  REQUIRE(buffer_keys(net).empty());

  MagnitudePruner pruner(*net, {.sparsity = 0.5});
  {
    const torch::NoGradGuard no_grad;
    net->head->ptr<torch::nn::LinearImpl>(2)->weight[1][2] = std::numeric_limits<float>::quiet_NaN();
  }
  REQUIRE_THROWS_WITH(pruner.step(), ContainsSubstring("got 1 NaN in 'head.2.weight', the first at flat index 15"));
  REQUIRE(pruner.steps() == 0);
  REQUIRE(zeros(net) == 0);
  REQUIRE(pruner.sparsity() == 0.0);
}

TEST_CASE("a mask of another model is refused", "[pruning]") {
  auto net = make();
  MagnitudePruner pruner(*net, {.sparsity = 0.5});
  net->conv->named_buffers()["weight_mask_bits"].set_data(at::zeros({8}, at::kByte));  // what torch::load does
  REQUIRE_THROWS_WITH(pruner.step(), ContainsSubstring("the mask of 'conv.weight' must hold 24 bytes"));
  REQUIRE(pruner.steps() == 0);
  REQUIRE(zeros(net) == 0);
}
