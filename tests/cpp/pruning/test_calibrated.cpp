#include <rarefy/rarefy.h>
#include <torch/torch.h>

#include <cmath>
#include <limits>

#include "catch.h"

using namespace rarefy::pruning;
using Catch::Matchers::ContainsSubstring;

namespace {

/// Inputs with correlated features of unequal size.
at::Tensor correlated(int64_t samples, int64_t features) {
  torch::manual_seed(3);
  const auto mixing = at::randn({features / 2, features}, at::kDouble);
  const auto scale = at::randn({features}, at::kDouble).mul(0.75).exp();
  return (at::randn({samples, features / 2}, at::kDouble).mm(mixing) / std::sqrt(features / 2.0) +
          0.5 * at::randn({samples, features}, at::kDouble)) *
         scale;
}

at::Tensor hessian_of(const at::Tensor& x) { return x.t().mm(x) / x.size(0); }

/// Optimal brain surgery with the inverse of what remains of the Hessian, one block, unstructured.
at::Tensor surgery(const at::Tensor& weight, const at::Tensor& hessian, double sparsity) {
  auto w = weight.clone();
  const int64_t rows = w.size(0), n = w.size(1);
  const auto h = hessian + 0.01 * hessian.diagonal().mean() * at::eye(n, at::kDouble);
  std::vector<at::Tensor> rest;
  auto cost = at::empty_like(w);
  for (int64_t j = 0; j < n; ++j) {
    rest.push_back(h.slice(0, j).slice(1, j).inverse());
    cost.select(1, j).copy_(w.select(1, j).square() / rest.back()[0][0]);
  }
  const auto pruned = static_cast<int64_t>(std::nearbyint(sparsity * static_cast<double>(w.numel())));
  auto keep = at::ones({w.numel()}, at::kBool);
  keep.index_put_({cost.flatten().argsort().narrow(0, 0, pruned)}, false);
  keep = keep.view({rows, n});
  for (int64_t j = 0; j < n; ++j) {
    for (int64_t r = 0; r < rows; ++r) {
      if (!keep[r][j].item<bool>()) {
        w[r].slice(0, j).sub_(rest[static_cast<size_t>(j)][0] * (w[r][j] / rest[static_cast<size_t>(j)][0][0]));
        w[r][j] = 0;
      }
    }
  }
  return w;
}

struct NetImpl : torch::nn::Module {
  torch::nn::Linear first{nullptr}, last{nullptr};

  NetImpl()
      : first(register_module("first", torch::nn::Linear(12, 16))),
        last(register_module("last", torch::nn::Linear(16, 4))) {}
  at::Tensor hidden(const at::Tensor& x) { return torch::relu(first(x)); }
};
TORCH_MODULE(Net);

std::vector<CalibrationStage> stages_of(Net& net, const std::vector<at::Tensor>& batches) {
  return {{{{"first.weight", net->first->weight, {{16, 12}}}},
           [&](const InputSink& see) {
             for (const auto& x : batches) {
               see(0, x);
             }
           }},
          {{{"last.weight", net->last->weight, {{4, 16}}}}, [&](const InputSink& see) {
             const at::NoGradGuard no_grad;
             for (const auto& x : batches) {
               see(0, net->hidden(x));
             }
           }}};
}

}  // namespace

TEST_CASE("sparse_gpt is optimal brain surgery from left to right", "[pruning][calibrated]") {
  torch::manual_seed(0);
  const auto x = correlated(200, 24);
  const auto weight = at::randn({6, 24}, at::kDouble);
  const auto hessian = hessian_of(x);
  for (const double sparsity : {0.0, 0.3, 0.5, 0.9}) {
    const auto result = sparse_gpt("fc", weight, hessian, {.sparsity = sparsity});
    CHECK(at::allclose(result.weight, surgery(weight, hessian, sparsity), 1e-9, 1e-11));
    CHECK(at::equal(result.mask, result.weight.ne(0)));
  }
}

TEST_CASE("refit is least squares per row", "[pruning][calibrated]") {
  torch::manual_seed(0);
  const auto x = correlated(200, 20);
  const auto weight = at::randn({5, 20}, at::kDouble);
  const auto mask = at::rand({5, 20}) < 0.5;
  const auto result = refit("fc", weight, mask, hessian_of(x), {.damping = 0});
  for (int64_t r = 0; r < 5; ++r) {
    const auto kept = mask[r].nonzero().flatten();
    const auto expected =
        std::get<0>(at::linalg_lstsq(x.index_select(1, kept), x.mv(weight[r]).unsqueeze(1))).flatten();
    CHECK(at::allclose(result.weight[r].index_select(0, kept), expected, 1e-9, 1e-11));
  }
  CHECK(result.weight.masked_select(mask.logical_not()).count_nonzero().item<int64_t>() == 0);
}

TEST_CASE("errors fall from magnitude over wanda and sparse_gpt to refit", "[pruning][calibrated]") {
  torch::manual_seed(0);
  const auto x = correlated(600, 128).to(at::kFloat);
  const auto weight = at::randn({64, 128});
  const auto hessian = hessian_of(x);
  for (const Pattern& pattern : {Pattern(Unstructured{}), Pattern(NM{2, 4})}) {
    const auto error = [&](const CalibratedWeight& result) { return relative_error(weight, result.weight, hessian); };
    const auto gpt = sparse_gpt("fc", weight, hessian, {.pattern = pattern});
    const std::vector<double> errors{error(wanda("fc", weight, at::ones({128}), {.pattern = pattern})),
                                     error(wanda("fc", weight, hessian.diagonal().sqrt(), {.pattern = pattern})),
                                     error(gpt), error(refit("fc", weight, gpt.mask, hessian))};
    for (size_t i = 1; i < errors.size(); ++i) {
      CHECK(errors[i] < errors[i - 1]);
    }
    CHECK(gpt.mask.sum().item<int64_t>() == 64 * 64);
    if (std::holds_alternative<NM>(pattern)) {
      CHECK(gpt.mask.view({64, 32, 4}).sum(2).eq(2).all().item<bool>());
    }
  }
}

TEST_CASE("a model is pruned stage by stage, or not at all", "[pruning][calibrated]") {
  torch::manual_seed(0);
  Net net;
  const std::vector<at::Tensor> batches{at::randn({30, 12}), at::randn({2, 10, 12})};
  const auto first = net->first->weight.detach().clone(), last = net->last->weight.detach().clone();

  std::vector<std::string> done;
  const auto result =
      prune_calibrated(stages_of(net, batches), {.method = SparseGptOptions{.pattern = NM{2, 4}},
                                                 .refit = RefitOptions{},
                                                 .on_layer = [&](const std::string& name) { done.push_back(name); }});
  CHECK(done == std::vector<std::string>{"first.weight", "last.weight"});
  CHECK(result.masks.at("first.weight").view({16, 3, 4}).sum(2).eq(2).all().item<bool>());
  CHECK(at::equal(net->first->weight.ne(0), result.masks.at("first.weight")));
  REQUIRE(result.report.tensors.size() == 2);
  CHECK(result.report.tensors[0].samples == 50);
  CHECK(result.report.sparsity() == 0.5);
  CHECK(result.report.method == "sparse_gpt, 2:4, refit");
  CHECK_THAT(result.report.to_string(), ContainsSubstring("last.weight"));

  // The second stage saw what the pruned first one gives.
  const auto h = hessian_of(net->hidden(at::cat({batches[0], batches[1].flatten(0, 1)})).detach().to(at::kDouble));
  const auto gpt = sparse_gpt("last.weight", last, h, {.pattern = NM{2, 4}});
  CHECK(at::equal(gpt.mask, result.masks.at("last.weight")));

  // A failure in the second stage.
  Net other;
  const auto before = other->first->weight.detach().clone();
  auto stages = stages_of(other, batches);
  stages[1].run = [](const InputSink&) { throw std::runtime_error("no more data"); };
  CHECK_THROWS_WITH(prune_calibrated(stages), ContainsSubstring("no more data"));
  CHECK(at::equal(other->first->weight, before));
}

TEST_CASE("prune_calibrated refuses what it cannot do before it runs", "[pruning][calibrated]") {
  Net net;
  bool ran = false;
  auto stages = stages_of(net, {});
  for (auto& stage : stages) {
    stage.run = [&](const InputSink&) { ran = true; };
  }
  CHECK_THROWS_WITH(prune_calibrated({}), ContainsSubstring("needs at least one layer"));
  CHECK_THROWS_WITH(prune_calibrated(stages, {.method = WandaOptions{.sparsity = 1.0}}),
                    ContainsSubstring("sparsity must be in [0, 1), got 1"));
  CHECK_THROWS_WITH(prune_calibrated(stages, {.method = SparseGptOptions{.pattern = NM{2, 14}}}),
                    ContainsSubstring("'first.weight': NM(n=2, m=14) needs 14"));
  CHECK_THROWS_WITH(prune_calibrated(stages, {.method = SparseGptOptions{.pattern = Row{}}}),
                    ContainsSubstring("pattern must be unstructured or n:m, got 'row'"));
  CHECK_THROWS_WITH(prune_calibrated(stages, {.method = MaskRefit{}}),
                    ContainsSubstring("got none for 'first.weight'"));
  CHECK_THROWS_WITH(prune_calibrated(stages, {.layers = {{"nowhere", 0.5}}}), ContainsSubstring("got 'nowhere'"));
  CHECK_FALSE(ran);
  CHECK_THROWS_WITH(prune_calibrated(stages), ContainsSubstring("no input reached it"));
  {
    const at::NoGradGuard no_grad;
    net->last->weight[0][0] = std::numeric_limits<float>::quiet_NaN();
  }
  CHECK_THROWS_WITH(prune_calibrated(stages), ContainsSubstring("NaN or infinity in 'last.weight'"));
}

TEST_CASE("a HessianAccumulator unfolds convolutions", "[pruning][calibrated]") {
  torch::manual_seed(0);
  torch::nn::Conv2d conv(
      torch::nn::Conv2dOptions(4, 6, {3, 2}).stride({2, 1}).padding({1, 2}).dilation({1, 2}).groups(2));
  conv->to(at::kDouble);
  const LayerShape shape{{6, 2, 3, 2}, {2, 1}, {1, 2}, {1, 2}, 2};
  const auto x = at::randn({3, 4, 7, 6}, at::kDouble);
  const auto rows = input_rows(shape, x);
  const auto weight = conv->weight.detach().view({2, 3, 12});
  const auto out = at::einsum("gsf,gof->sgo", {rows, weight}).flatten(1) + conv->bias.detach();
  CHECK(at::allclose(out, conv(x).detach().movedim(1, -1).reshape({-1, 6})));

  HessianAccumulator hessian("conv", shape, Statistic::products, true);
  CHECK(hessian.update(x.narrow(0, 0, 1)));
  CHECK(hessian.update(x.narrow(0, 1, 2)));
  CHECK_FALSE(hessian.update(x / 0));
  CHECK(at::allclose(hessian.hessian(), rows.transpose(1, 2).bmm(rows) / rows.size(1)));
  CHECK(hessian.samples() == rows.size(1));
  CHECK(hessian.skipped() == 1);
}
