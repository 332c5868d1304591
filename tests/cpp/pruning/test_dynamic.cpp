#include <rarefy/ops/mask.h>
#include <rarefy/pruning/enforce.h>
#include <rarefy/pruning/pattern_check.h>
#include <rarefy/pruning/pruner.h>
#include <torch/torch.h>

#include <functional>
#include <sstream>

#include "catch.h"

using namespace rarefy::pruning;
using Catch::Matchers::ContainsSubstring;

namespace {

struct NetImpl : torch::nn::Module {
  torch::nn::Conv2d conv{nullptr};
  torch::nn::BatchNorm2d bn{nullptr};
  torch::nn::Linear fc{nullptr};

  NetImpl()
      : conv(register_module("conv", torch::nn::Conv2d(4, 8, 3))),
        bn(register_module("bn", torch::nn::BatchNorm2d(8))),
        fc(register_module("fc", torch::nn::Linear(8, 4))) {}
  at::Tensor forward(const at::Tensor& x) { return fc(bn(conv(x)).relu().mean({2, 3})); }
};
TORCH_MODULE(Net);

constexpr int64_t kElements = 4 * 8 * 9 + 8 * 4;
constexpr int kSteps = 12;

Net make(uint64_t seed = 0) {
  torch::manual_seed(seed);
  return {};
}

void backward(Net& net, torch::optim::Optimizer& optimizer, int step) {
  torch::manual_seed(1000 + static_cast<uint64_t>(step));
  const auto x = at::randn({8, 4, 6, 6});
  const auto y = at::randint(0, 4, {8}, at::kLong);
  optimizer.zero_grad();
  at::cross_entropy_loss(net(x), y).backward();
}

torch::optim::Adam make_optimizer(Net& net) {
  return torch::optim::Adam(net->parameters(), torch::optim::AdamOptions(0.05));
}

at::Tensor kept(const Pruner& pruner, size_t i) {
  const auto& parameter = pruner.state().parameters[i];
  return rarefy::ops::unpack_mask(parameter.mask, parameter.value.sizes());
}

int64_t pruned(const Pruner& pruner) {
  int64_t count = 0;
  for (size_t i = 0; i < pruner.state().parameters.size(); ++i) {
    count += kept(pruner, i).logical_not().sum().item<int64_t>();
  }
  return count;
}

std::vector<std::pair<std::string, PrunerOptions>> runs() {
  const LinearSchedule linear{.end = 8, .every = 3};
  return {
      {"linear", {.sparsity = 0.75, .schedule = linear}},
      {"cyclic", {.sparsity = 0.75, .schedule = CyclicSchedule{.end = 10, .cycles = 2}}},
      {"ACDC", {.sparsity = 0.75, .schedule = ACDC{.begin = 1, .end = 9, .sparse = 2, .dense = 2}}},
      {"rewind", {.sparsity = 0.75, .schedule = Iterative{2, 4, Rewind::weights, 1}}},
      {"SET", {.sparsity = 0.75, .regrowth = SET{.end = 12, .every = 2}}},
      {"RigL", {.sparsity = 0.75, .schedule = linear, .regrowth = RigL{.end = 12, .every = 2}}},
      {"soft",
       {.sparsity = 0.5, .pattern = NM{2, 4}, .regrowth = StraightThrough{.end = 9, .every = 2, .decay = 0.01}}},
      {"movement", {.sparsity = 0.75, .schedule = linear, .criterion = Movement{}}},
      {"rows", {.sparsity = 0.5, .schedule = linear, .pattern = Row{}, .criterion = Taylor{}}},
  };
}

}  // namespace

TEST_CASE("a pruner resumes bit for bit after every step of every kind", "[pruning][dynamic]") {
  for (const auto& [name, options] : runs()) {
    INFO(name);
    auto straight = make();
    auto optimizer = make_optimizer(straight);
    Pruner pruner(*straight, options);
    std::vector<std::string> models, optimizers;
    for (int step = 0; step < kSteps; ++step) {
      backward(straight, optimizer, step);
      pruner.step(optimizer);
      std::ostringstream model_file, optimizer_file;
      torch::save(straight, model_file);
      torch::save(optimizer, optimizer_file);
      models.push_back(model_file.str());
      optimizers.push_back(optimizer_file.str());
    }
    for (int killed = 1; killed < kSteps; ++killed) {
      auto net = make(1);
      Pruner again(*net, options);
      auto its_optimizer = make_optimizer(net);
      std::istringstream model_file(models[static_cast<size_t>(killed - 1)]);
      std::istringstream optimizer_file(optimizers[static_cast<size_t>(killed - 1)]);
      torch::load(net, model_file);
      torch::load(its_optimizer, optimizer_file);
      REQUIRE(again.steps() == killed);
      for (int step = killed; step < kSteps; ++step) {
        backward(net, its_optimizer, step);
        again.step(its_optimizer);
      }
      for (const auto& parameter : straight->named_parameters()) {
        REQUIRE(at::equal(parameter.value(), net->named_parameters()[parameter.key()]));
      }
      for (const auto& buffer : straight->named_buffers()) {
        REQUIRE(at::equal(buffer.value(), net->named_buffers()[buffer.key()]));
      }
    }
  }
}

TEST_CASE("RigL exchanges without a change of sparsity, and what grows starts at zero", "[pruning][dynamic]") {
  for (const bool is_set : {false, true}) {
    auto net = make();
    auto optimizer = make_optimizer(net);
    PrunerOptions options{.sparsity = 0.75, .scope = Scope::erk};
    options.regrowth = is_set ? Regrowth(SET{.end = 12, .every = 2}) : Regrowth(RigL{.end = 12, .every = 2});
    Pruner pruner(*net, options);
    int64_t grown = 0;
    for (int step = 0; step < kSteps; ++step) {
      const std::vector<at::Tensor> before{kept(pruner, 0), kept(pruner, 1)};
      backward(net, optimizer, step);
      pruner.step(optimizer);
      REQUIRE(pruned(pruner) == std::llrint(0.75 * kElements));
      for (size_t i = 0; i < 2; ++i) {
        const auto fresh = kept(pruner, i).logical_and(before[i].logical_not());
        const auto gone = kept(pruner, i).logical_not();
        grown += fresh.sum().item<int64_t>();
        const auto& value = pruner.state().parameters[i].value;
        REQUIRE(!value.masked_select(fresh.logical_or(gone)).any().item<bool>());
        REQUIRE(!value.grad().masked_select(gone).any().item<bool>());
        for (const auto& moment : moments_of(pruner.state(), optimizer)) {
          if (moment.parameter == i) {
            REQUIRE(!moment.value.masked_select(fresh.logical_or(gone)).any().item<bool>());
          }
        }
      }
    }
    REQUIRE(grown > 0);
  }
}

TEST_CASE("RigL grows by the largest gradients", "[pruning][dynamic]") {
  auto value = at::tensor({5.0f, 4.0f, 3.0f, 2.0f, 1.0f, 0.5f, 0.25f, 0.125f}).view({1, 8}).requires_grad_();
  Pruner pruner({{"w", value}},
                {.sparsity = 0.5, .regrowth = RigL{.end = 10, .every = 2, .fraction = 0.5, .decay = Decay::constant}});
  value.mutable_grad() = at::zeros({1, 8});
  pruner.step();
  REQUIRE(at::equal(value.detach(), at::tensor({5.0f, 4.0f, 3.0f, 2.0f, 0.0f, 0.0f, 0.0f, 0.0f}).view({1, 8})));
  value.mutable_grad() = at::tensor({9.0f, 9.0f, 0.5f, 3.0f, 0.1f, -7.0f, 0.2f, 0.3f}).view({1, 8});
  pruner.step();  // drops 3 and 2; of what is then pruned, gradients 7 and 3 are the largest: the 2 has not been away
  REQUIRE(at::equal(value.detach(), at::tensor({5.0f, 4.0f, 0.0f, 2.0f, 0.0f, 0.0f, 0.0f, 0.0f}).view({1, 8})));
  REQUIRE(at::equal(kept(pruner, 0), at::tensor({1, 1, 0, 1, 0, 1, 0, 0}).to(at::kBool).view({1, 8})));
  value.mutable_grad() = at::Tensor();
  pruner.step();
  REQUIRE_THROWS_WITH(pruner.step(), ContainsSubstring("RigL needs the gradient of 'w' at this step, got none"));
  REQUIRE(pruner.steps() == 3);
}

TEST_CASE("soft masks keep dense weights beside", "[pruning][dynamic]") {
  auto value = at::tensor({4.0f, 3.0f, 2.0f, 1.0f}).view({1, 4}).requires_grad_();
  Pruner pruner({{"w", value}}, {.sparsity = 0.5, .regrowth = StraightThrough{.end = 3}});
  const auto step = [&](std::vector<float> gradient) {
    value.mutable_grad() = at::tensor(gradient).view({1, 4});
    pruner.accumulate();
    {
      const torch::NoGradGuard no_grad;
      value.sub_(value.grad());
    }
    pruner.step();
  };
  const auto is = [&](std::vector<float> values) { return at::equal(value.detach(), at::tensor(values).view({1, 4})); };
  REQUIRE_THROWS_WITH(pruner.step(), ContainsSubstring("needs accumulate() between the backward pass and"));
  step({0, 0, 0, 0});
  REQUIRE(is({4, 3, 0, 0}));
  REQUIRE(at::equal(pruner.state().parameters[0].latent, at::tensor({0.0f, 0.0f, 2.0f, 1.0f}).view({1, 4})));
  step({0, 0, 0, -2.5f});  // 4 3 2 3.5
  REQUIRE(is({4, 0, 0, 3.5f}));
  step({0, -2, 0, 0});  // 4 5 2 3.5: the end
  REQUIRE(is({4, 5, 0, 0}));
  REQUIRE(!pruner.state().parameters[0].latent.any().item<bool>());
  REQUIRE(!pruner.needs_accumulate());
  pruner.step();
  REQUIRE(is({4, 5, 0, 0}));
}

TEST_CASE("weights are rewound with all the rest of the model", "[pruning][dynamic]") {
  auto net = make();
  auto optimizer = make_optimizer(net);
  Pruner pruner(*net, {.sparsity = 0.75, .schedule = Iterative{2, 4, Rewind::weights, 1}});
  std::map<std::string, at::Tensor> after_one;
  for (int step = 1; step <= 4; ++step) {
    backward(net, optimizer, step);
    pruner.step(optimizer);
    if (step == 1) {
      for (const auto& parameter : net->named_parameters()) {
        after_one.emplace(parameter.key(), parameter.value().detach().clone());
      }
      after_one.emplace("bn.running_mean", net->bn->running_mean.clone());
    }
  }
  REQUIRE(pruner.rewound());
  REQUIRE(pruner.training_step() == 1);
  REQUIRE(optimizer.state().empty());
  REQUIRE(at::equal(net->bn->running_mean, after_one.at("bn.running_mean")));
  REQUIRE(at::equal(net->fc->bias, after_one.at("fc.bias")));
  REQUIRE(at::equal(net->conv->weight, at::where(kept(pruner, 0), after_one.at("conv.weight"), 0.0f)));
  REQUIRE(pruned(pruner) == std::llrint(0.5 * kElements));
}

TEST_CASE("masks made elsewhere are adopted", "[pruning][dynamic]") {
  auto net = make();
  const auto mask = at::rand({8, 4, 3, 3}) < 0.5;
  auto pruner = Pruner::from_masks(*net, {{"conv.weight", mask}});
  REQUIRE(at::equal(net->conv->weight == 0, mask.logical_not()));
  auto optimizer = make_optimizer(net);
  for (int step = 0; step < 3; ++step) {
    backward(net, optimizer, step);
    optimizer.step();
    pruner.step();
  }
  REQUIRE(at::equal(net->conv->weight == 0, mask.logical_not()));
  REQUIRE(pruner.report().target == pruner.sparsity());
  REQUIRE_THROWS_WITH(Pruner::from_masks(*net, {{"conv.weight", mask}}), ContainsSubstring("must have no masks yet"));
  auto other = make();
  REQUIRE_THROWS_WITH(Pruner::from_masks(*other, {{"x", mask}}),
                      ContainsSubstring("must be that of a parameter, got 'x'"));
  REQUIRE_THROWS_WITH(Pruner::from_masks(*other, {{"fc.weight", mask}}),
                      ContainsSubstring("must be bool of shape [4, 8]"));
  REQUIRE_THROWS_WITH(Pruner::from_masks(*other, {}), ContainsSubstring("needs at least one mask"));
  REQUIRE(other->conv->named_buffers(false).is_empty());
}

TEST_CASE("options that do not fit are refused", "[pruning][dynamic]") {
  auto net = make();
  const auto refused = [&](PrunerOptions options, const char* message) {
    REQUIRE_THROWS_WITH(Pruner(*net, std::move(options)), ContainsSubstring(message));
    REQUIRE(net->conv->named_buffers(false).is_empty());
  };
  refused({.schedule = LinearSchedule{.end = 9}, .regrowth = StraightThrough{.end = 8}},
          "StraightThrough must not end before the schedule's last update at 9, got end 8");
  refused({.pattern = NM{2, 4}, .regrowth = RigL{}}, "must have a pattern whose sparsity can rise, got 2:4");
  refused({.pattern = Head{3}}, "'conv.weight' cannot have the pattern");
  refused({.layers = {{"x", 0.5}}}, "every name in layers must be that of a parameter that is pruned");
  refused({.scores = std::map<std::string, at::Tensor>{}}, "got none for 'conv.weight'");
  REQUIRE_THROWS_WITH(MagnitudePruner(*net, {.criterion = Movement{}}),
                      ContainsSubstring("[MagnitudePruner] the criterion must be Magnitude, got Movement()"));
  Pruner(*net, {.criterion = Movement{}});
  REQUIRE_THROWS_WITH(Pruner(*net, {}), ContainsSubstring("got 'conv.weight_mask_score' too"));
}

TEST_CASE("holds_pattern is the pattern", "[pruning][dynamic]") {
  const auto mask = [](std::vector<int> bits, int64_t rows) { return at::tensor(bits).to(at::kBool).view({rows, -1}); };
  const auto two_of_four = mask({1, 0, 1, 0, 1, 1, 0, 1, 1, 0, 1, 1}, 2);  // rows of 6: the last groups are short
  REQUIRE(holds_pattern(NM{2, 4}, two_of_four));
  REQUIRE(!holds_pattern(NM{1, 4}, two_of_four));
  REQUIRE(!holds_pattern(NM{2, 4}, mask({1, 1, 1, 0}, 1)));
  const auto blocks = mask({1, 1, 0, 1, 1, 0, 0, 0, 1}, 3);  // 2 x 2, 2 x 1, 1 x 2 and 1 x 1
  REQUIRE(holds_pattern(Block{2, 2}, blocks));
  REQUIRE(!holds_pattern(Block{2, 1}, mask({1, 1, 0, 1}, 2)));
  REQUIRE(holds_pattern(Row{}, mask({1, 1, 0, 0}, 2)));
  REQUIRE(!holds_pattern(Row{}, mask({1, 0, 0, 0}, 2)));
  REQUIRE(holds_pattern(Column{}, mask({1, 0, 1, 0}, 2)));
  REQUIRE(!holds_pattern(Column{}, mask({1, 1, 0, 0}, 2)));
  REQUIRE(holds_pattern(Head{2}, mask({1, 1, 1, 1, 0, 0, 0, 0}, 4)));
  REQUIRE(!holds_pattern(Head{2}, mask({1, 1, 0, 0, 0, 0, 0, 0}, 4)));
  REQUIRE_THROWS_WITH(holds_pattern(Head{3}, mask({1, 1, 0, 0}, 2)), ContainsSubstring("[holds_pattern]"));
}
