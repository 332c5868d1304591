#include <rarefy/rarefy.h>
#include <torch/torch.h>

#include <cmath>
#include <limits>
#include <numeric>

#include "catch.h"

using namespace rarefy::pruning;
using Catch::Matchers::ContainsSubstring;

namespace {

std::vector<int32_t> units(int32_t count, int32_t each = 1) {
  std::vector<int32_t> out;
  for (int32_t i = 0; i < count * each; ++i) {
    out.push_back(i / each);
  }
  return out;
}

/// 5 hidden units with a normalization; the output layer reads them.
struct NetImpl : torch::nn::Module {
  torch::nn::Linear first{nullptr}, last{nullptr};
  torch::nn::BatchNorm1d norm{nullptr};

  NetImpl()
      : first(register_module("first", torch::nn::Linear(4, 5))),
        last(register_module("last", torch::nn::Linear(5, 3))),
        norm(register_module("norm", torch::nn::BatchNorm1d(5))) {
    torch::nn::init::normal_(norm->weight);
  }
  at::Tensor forward(const at::Tensor& x) { return last(norm(first(x)).relu()); }
};
TORCH_MODULE(Net);

Structure structure() {
  Group group{"first.weight", 5, {}};
  group.members = {{"first.weight", -1, 0, Role::output, units(5)},      {"first.bias", -1, 0, Role::output, units(5)},
                   {"norm.weight", -1, 0, Role::affine, units(5)},       {"norm.bias", -1, 0, Role::affine, units(5)},
                   {"norm.running_mean", -1, 0, Role::affine, units(5)}, {"last.weight", -1, 1, Role::input, units(5)}};
  Structure out;
  out.groups.push_back(group);
  return out;
}

Net make() {
  torch::manual_seed(0);
  Net net;
  net->to(at::kDouble);
  return net;
}

/// The mean over the three members of what `term` sums up to on a unit's elements, given (weight, gradient).
template <typename Term, typename Finish>
std::vector<double> reference(Net& net, const Term& term, const Finish& finish) {
  std::vector<double> out;
  const auto gradient = [](const at::Tensor& p) { return p.grad().defined() ? p.grad() : at::zeros_like(p); };
  for (int64_t unit = 0; unit < 5; ++unit) {
    double mean = 0;
    for (const auto& [parameter, dim] :
         {std::pair{net->first->weight, 0}, {net->norm->weight, 0}, {net->last->weight, 1}}) {
      const at::Tensor w = parameter.detach().select(dim, unit).reshape({-1});
      const at::Tensor g = gradient(parameter).select(dim, unit).reshape({-1});
      double sum = 0;
      for (int64_t i = 0; i < w.numel(); ++i) {
        sum += term(w[i].item<double>(), g[i].item<double>());
      }
      mean += finish(sum) / 3;
    }
    out.push_back(mean);
  }
  return out;
}

void check(const std::vector<GroupScore>& scores, const std::vector<double>& expected) {
  REQUIRE(scores.size() == 1);
  REQUIRE(scores[0].values.numel() == static_cast<int64_t>(expected.size()));
  for (size_t i = 0; i < expected.size(); ++i) {
    CHECK(scores[0].values[static_cast<int64_t>(i)].item<double>() == Approx(expected[i]).epsilon(1e-10));
  }
}

ImportanceOptions raw(Criterion criterion) {
  return {.criterion = criterion, .reduction = Reduction::mean, .normalization = Normalization::none};
}

}  // namespace

TEST_CASE("criteria equal plain loops", "[importance]") {
  auto net = make();
  const auto parameters = parameter_lookup(*net);
  net->forward(at::randn({6, 4}, at::kDouble)).square().sum().backward();
  const auto same = [](double sum) { return sum; };
  check(importance(structure(), parameters, raw(Magnitude{1})),
        reference(net, [](double w, double) { return std::abs(w); }, same));
  check(
      importance(structure(), parameters, raw(Magnitude{3})),
      reference(net, [](double w, double) { return std::pow(std::abs(w), 3); }, [](double s) { return std::cbrt(s); }));
  check(importance(structure(), parameters, raw(Taylor{})),
        reference(net, [](double w, double g) { return w * g; }, [](double s) { return std::abs(s); }));
  check(importance(structure(), parameters, raw(Taylor{.joint = false})),
        reference(net, [](double w, double g) { return std::abs(w * g); }, same));
  check(importance(structure(), parameters, raw(Fisher{})),
        reference(net, [](double w, double g) { return w * g; }, [](double s) { return 0.5 * s * s; }));
}

TEST_CASE("the accumulator takes the mean over passes", "[importance]") {
  auto net = make();
  FisherAccumulator fisher(structure());
  CHECK_THROWS_WITH(fisher.importance(), ContainsSubstring("update() must run at least once"));
  std::vector<double> mean(5, 0.0);
  for (int pass = 0; pass < 2; ++pass) {
    net->zero_grad();
    net->forward(at::randn({6, 4}, at::kDouble)).square().sum().backward();
    fisher.update(parameter_lookup(*net));
    const auto once = reference(net, [](double w, double g) { return w * g; }, [](double s) { return 0.25 * s * s; });
    std::transform(mean.begin(), mean.end(), once.begin(), mean.begin(), std::plus<>());
  }
  CHECK(fisher.batches() == 2);
  check(fisher.importance(Reduction::mean, Normalization::none), mean);
}

TEST_CASE("statistics and callables", "[importance]") {
  auto net = make();
  const Statistics statistics{{{"first.weight", 0}, at::arange(5, at::kDouble)}};
  check(importance(structure(), parameter_lookup(*net), raw(Activation{}), statistics), {0, 1, 2, 3, 4});
  check(importance(
            structure(), [](const Group& group) { return at::arange(group.units, at::kDouble); }, Normalization::sum),
        {0, 0.1, 0.2, 0.3, 0.4});
  CHECK_THROWS_WITH(importance(structure(), parameter_lookup(*net), raw(Activation{})),
                    ContainsSubstring("got no activation statistics in any of 1 groups"));
}

TEST_CASE("bad tensors are named", "[importance]") {
  auto net = make();
  CHECK_THROWS_WITH(importance(structure(), parameter_lookup(*net), raw(Taylor{})),
                    ContainsSubstring("got none for first.weight"));
  {
    const torch::NoGradGuard no_grad;
    net->first->bias[2] = std::numeric_limits<double>::quiet_NaN();
  }
  CHECK_THROWS_AS(importance(structure(), parameter_lookup(*net)), c10::ValueError);
  CHECK_THROWS_WITH(importance(structure(), parameter_lookup(*net)),
                    ContainsSubstring("NaN or infinity in first.bias"));
  CHECK_THROWS_AS(Magnitude{0}.validate(), c10::ValueError);
  CHECK_THROWS_AS(importance(structure(), parameter_lookup(*net), raw(Magnitude{-1})), c10::ValueError);
}
