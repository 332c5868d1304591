#include <rarefy/pruning/permutation.h>
#include <rarefy/pruning/pruner.h>
#include <torch/torch.h>

#include <algorithm>
#include <numeric>

#include "catch.h"
#include "structures.h"

using namespace rarefy::pruning;
using Catch::Matchers::ContainsSubstring;

namespace {

/// Columns whose large magnitudes stand together, as in a weight that 2:4 does badly on.
torch::Tensor clustered(int64_t rows, int64_t columns) {
  return torch::randn({rows, columns}) * torch::exp(torch::linspace(2, -2, columns));
}

double kept_by_loops(const torch::Tensor& weight, int64_t n, int64_t m) {
  const auto flat = weight.detach().movedim(1, -1).reshape({-1, weight.size(1)}).abs().to(torch::kDouble);
  double sum = 0;
  for (int64_t line = 0; line < flat.size(0); ++line) {
    for (int64_t begin = 0; begin < flat.size(1); begin += m) {
      std::vector<double> group;
      for (int64_t i = begin; i < std::min(begin + m, flat.size(1)); ++i) group.push_back(flat[line][i].item<double>());
      std::sort(group.rbegin(), group.rend());
      for (size_t i = 0; i < std::min(group.size(), static_cast<size_t>(n)); ++i) sum += group[i];
    }
  }
  return sum;
}

struct Mlp {
  torch::nn::Sequential net{torch::nn::Linear(12, 64), torch::nn::ReLU(), torch::nn::Linear(64, 24)};
  torch::Tensor x = torch::randn({5, 12});

  Mlp() {
    const torch::NoGradGuard no_grad;
    net[2]->as<torch::nn::Linear>()->weight.copy_(clustered(24, 64));
  }
  std::vector<torch::Tensor> run() { return {net->forward(x)}; }
};

}  // namespace

TEST_CASE("permute_for_nm keeps more and computes the same", "[permutation]") {
  torch::manual_seed(1);
  Mlp model;
  torch::optim::Adam optimizer(model.net->parameters(), 1e-3);
  model.net->forward(model.x).sum().backward();
  optimizer.step();
  const auto& weight = model.net[2]->as<torch::nn::Linear>()->weight;
  const auto& producer = model.net[0]->as<torch::nn::Linear>()->weight;
  const auto address = weight.data_ptr();
  const auto before = model.run()[0].detach().clone();
  const auto columns = weight.detach().clone();
  const double kept_before = kept_by_loops(weight, 2, 4);
  const auto moments = [&](const torch::Tensor& p) {
    return static_cast<torch::optim::AdamParamState&>(*optimizer.state().at(p.unsafeGetTensorImpl())).exp_avg();
  };
  const auto moment = moments(weight).clone();
  const auto gradient = producer.grad().clone();

  const auto report = permute_for_nm(*model.net, [&] { return model.run(); }, {model.x}, {}, {&optimizer});
  REQUIRE(torch::allclose(model.run()[0], before, 1e-5, 1e-5));
  REQUIRE(weight.data_ptr() == address);
  REQUIRE(report.groups.size() == 1);
  REQUIRE(report.groups[0].reason.empty());
  REQUIRE(std::abs(report.groups[0].before - kept_before) < 1e-6 * kept_before);
  REQUIRE(std::abs(report.groups[0].after - kept_by_loops(weight, 2, 4)) < 1e-6 * kept_before);
  REQUIRE(report.groups[0].after > 1.02 * kept_before);

  // Gradients and moments followed.
  std::vector<int64_t> source(report.groups[0].order.begin(), report.groups[0].order.end());
  const auto index = torch::tensor(source, torch::kLong);
  REQUIRE(torch::equal(weight, columns.index_select(1, index)));
  REQUIRE(torch::equal(moments(weight), moment.index_select(1, index)));
  REQUIRE(torch::equal(producer.grad(), gradient.index_select(0, index)));
}

TEST_CASE("the search finds the best order of a small weight", "[permutation]") {
  torch::manual_seed(2);
  for (int trial = 0; trial < 5; ++trial) {
    torch::nn::Sequential net(torch::nn::Linear(3, 8), torch::nn::ReLU(), torch::nn::Linear(8, 4));
    const auto x = torch::randn({2, 3});
    const auto weight = net[2]->as<torch::nn::Linear>()->weight;
    // All ways of choosing which four columns stand together.
    double best = 0;
    std::vector<int64_t> order(8);
    std::iota(order.begin(), order.end(), 0);
    std::vector<int> first{1, 1, 1, 1, 0, 0, 0, 0};
    do {
      std::vector<int64_t> columns;
      for (int side : {1, 0}) {
        for (int64_t i = 0; i < 8; ++i) {
          if (first[static_cast<size_t>(i)] == side) columns.push_back(i);
        }
      }
      best = std::max(best, kept_by_loops(weight.index_select(1, torch::tensor(columns, torch::kLong)), 2, 4));
    } while (std::prev_permutation(first.begin(), first.end()));
    const auto report = permute_for_nm(*net, [&] { return std::vector{net->forward(x)}; }, {x}, {});
    REQUIRE(report.after >= 0.999 * best);
    REQUIRE(report.after <= best * (1 + 1e-6));
  }
}

TEST_CASE("every structure computes the same in another order", "[permutation]") {
  const torch::NoGradGuard no_grad;
  int permuted = 0;
  for (const auto& structure : structures::all()) {
    auto model = structure.build();
    const auto inputs = structure.inputs();
    const auto expected = model.forward(inputs);
    PermutationOptions options;
    options.pattern = {1, 2};
    options.include = std::vector<std::string>{"*"};
    INFO(structure.name);
    const auto report = permute_for_nm(*model.net, [&] { return model.forward(inputs); }, inputs, options);
    const auto found = model.forward(inputs);
    REQUIRE(found.size() == expected.size());
    for (size_t i = 0; i < found.size(); ++i) {
      CHECK(torch::allclose(found[i], expected[i], 1e-9, 1e-9));
    }
    CHECK(report.after >= report.before * (1 - 1e-12));
    for (const auto& group : report.groups) {
      permuted += group.order.empty() ? 0 : 1;
      CHECK(group.order.empty() != group.reason.empty());
    }
  }
  CHECK(permuted >= 20);
}

TEST_CASE("what does not compute the same is put back", "[permutation]") {
  torch::manual_seed(3);
  Mlp model;
  const auto weight = model.net[2]->as<torch::nn::Linear>()->weight;
  const auto values = weight.detach().clone();
  const auto* bias = model.net[0]->as<torch::nn::Linear>()->bias.const_data_ptr<float>();
  const std::vector<float> biases(bias, bias + 64);
  const auto forward = [&] {  // looks at the order behind the recording's back
    const bool as_it_was = std::equal(biases.begin(), biases.end(), bias);
    return std::vector{model.net->forward(model.x) * (as_it_was ? 1 : 2)};
  };
  const auto report = permute_for_nm(*model.net, forward, {model.x}, {});
  REQUIRE(torch::equal(weight, values));
  REQUIRE(report.attempts == 2);
  REQUIRE(std::abs(report.after - report.before) < 1e-9 * report.before);
  REQUIRE_THAT(report.groups[0].reason, ContainsSubstring("the model computes something else in another order"));
}

TEST_CASE("permute_for_nm refuses bad input and changes nothing", "[permutation]") {
  torch::manual_seed(4);
  Mlp model;
  const auto forward = [&] { return model.run(); };
  const auto message = [&](const PermutationOptions& options) {
    try {
      permute_for_nm(*model.net, forward, {model.x}, options);
    } catch (const c10::ValueError& error) {
      return std::string(error.what_without_backtrace());
    }
    return std::string();
  };
  REQUIRE_THAT(message({.pattern = {4, 4}}), ContainsSubstring("[NM] must have 1 <= n < m"));
  REQUIRE_THAT(message({.escapes = -1}), ContainsSubstring("escapes must not be negative, got -1"));
  REQUIRE_THAT(message({.effort = 0}), ContainsSubstring("effort must be positive and finite, got 0"));
  REQUIRE_THAT(message({.exclude = {"nothing"}}), ContainsSubstring("nothing"));
  {
    const torch::NoGradGuard no_grad;
    const auto weight = model.net[2]->as<torch::nn::Linear>()->weight;
    const auto value = weight[1][1].clone();
    weight[1][1] = NAN;
    REQUIRE_THAT(message({}), ContainsSubstring("weights must be finite, got NaN or infinity in '2.weight'"));
    weight[1][1] = value;
  }
  MagnitudePruner pruner(*model.net, {.sparsity = 0.5});
  REQUIRE_THAT(message({}), ContainsSubstring("permute first, prune second"));
}
