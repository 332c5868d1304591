#include <rarefy/graph/constants.h>
#include <rarefy/graph/cost.h>
#include <rarefy/graph/pairs.h>
#include <rarefy/graph/record.h>
#include <rarefy/graph/svg.h>
#include <rarefy/pruning/counts.h>
#include <rarefy/pruning/structure.h>
#include <torch/torch.h>

#include "catch.h"

using namespace rarefy::graph;
using Catch::Matchers::ContainsSubstring;

namespace {

using Tensors = std::vector<at::Tensor>;

struct BlockImpl : torch::nn::Module {
  BlockImpl() {
    conv = register_module("conv", torch::nn::Conv2d(torch::nn::Conv2dOptions(4, 4, 3).padding(1).bias(false)));
    bn = register_module("bn", torch::nn::BatchNorm2d(4));
    fc = register_module("fc", torch::nn::Linear(4 * 5 * 5, 7));
  }
  at::Tensor forward(const at::Tensor& x) { return fc((bn(conv(x)) + x).relu_().flatten(1)); }
  torch::nn::Conv2d conv = nullptr;
  torch::nn::BatchNorm2d bn = nullptr;
  torch::nn::Linear fc = nullptr;
};

Graph block() {
  BlockImpl net;
  const auto x = torch::randn({2, 4, 5, 5});
  return record(net, [&] { return Tensors{net.forward(x)}; }, {x});
}

constexpr int64_t kConvMacs = 2 * 4 * 25 * 4 * 9, kLinearMacs = 2 * 7 * 100;

size_t count_of(const std::string& text, const std::string& what) {
  size_t count = 0;
  for (size_t at = text.find(what); at != std::string::npos; at = text.find(what, at + 1)) {
    ++count;
  }
  return count;
}

}  // namespace

TEST_CASE("A recording prints as a table", "[graph]") {
  const auto text = block().to_string();
  CHECK_THAT(text, ContainsSubstring("Graph(6 operators, 5 parameters of 859 elements, [2, 4, 5, 5] -> [2, 7])"));
  CHECK_THAT(text, ContainsSubstring("input.0, .weight"));
  CHECK_THAT(text, ContainsSubstring("padding=[1, 1]"));
  CHECK_THAT(text, ContainsSubstring("start_dim=1"));
  CHECK(text.find("stride") == std::string::npos);  // as in the schema
}

TEST_CASE("Costs of a recording", "[graph]") {
  const auto graph = block();
  const auto costs = count_costs(graph);
  CHECK(costs.total.macs == kConvMacs + kLinearMacs);
  CHECK(costs.total.flops == 2 * costs.total.macs + 2 * 200 + 200 + 200);  // batch_norm, add, relu_
  CHECK(costs.total.parameters == 4 * 4 * 9 + 8 + 100 * 7 + 7);
  CHECK(costs.total.parameter_bytes == 4 * costs.total.parameters);
  CHECK(costs.total.activation_bytes == 4 * (3 * 200 + 14));  // conv, batch_norm, add, linear
  CHECK(costs.uncounted.empty());
  CHECK(costs.modules.at(0).module.empty());
  CHECK(costs.modules.at(0).cost.macs == costs.total.macs);
  CHECK(costs.modules.at(1).module == "conv");
  CHECK(costs.modules.at(1).cost.macs == kConvMacs);
  CHECK_THAT(costs.to_string(), ContainsSubstring("8,600"));
  CHECK_THAT(costs.to_string(true), ContainsSubstring("aten::linear (fc)"));
  CHECK_THAT(costs.to_html(), ContainsSubstring("<td"));
  const auto structure = rarefy::pruning::find_structure(graph);
  const rarefy::pruning::Removal nothing(structure.groups.size());
  CHECK(rarefy::pruning::mac_count(structure, nothing) == static_cast<double>(costs.total.macs));
}

TEST_CASE("Drawings have a box per operator and an edge around the residual", "[graph]") {
  const auto svg = to_svg(block());
  CHECK(count_of(svg, "class=\"box\"") == 6 + 2);
  CHECK(count_of(svg, "class=\"edge far\"") == 1);
  CHECK(count_of(svg, "class=\"edge\"") == 7);
  CHECK_THAT(svg, ContainsSubstring(">28,800 MACs<"));
  CHECK(svg.starts_with("<svg"));
  CHECK(svg.ends_with("</svg>\n"));
}

TEST_CASE("A convolution and its normalization are a pair that one convolution replaces", "[graph]") {
  BlockImpl net;
  net.eval();
  const auto x = torch::randn({2, 4, 5, 5});
  const torch::NoGradGuard no_grad;
  net.bn->running_mean.uniform_(-1, 1);
  net.bn->running_var.uniform_(0.5, 2);
  net.bn->bias.uniform_(-1, 1);
  const auto graph = record(net, [&] { return Tensors{net.forward(x)}; }, {x});
  const auto pairs = conv_bn_pairs(graph);
  REQUIRE(pairs.size() == 1);
  const auto& pair = pairs[0];
  CHECK(pair.weight == "conv.weight");
  CHECK(pair.bias.empty());
  CHECK(pair.scale == "bn.weight");
  CHECK(pair.variance == "bn.running_var");
  const auto tensor = [&](const std::string& name) { return graph.values[graph.find(name)].tensor; };
  const auto factor = tensor(pair.scale) / (tensor(pair.variance) + pair.eps).sqrt();
  const auto folded = at::conv2d(x, tensor(pair.weight) * factor.view({-1, 1, 1, 1}),
                                 tensor(pair.shift) - tensor(pair.mean) * factor, 1, 1);
  CHECK(at::allclose(folded, net.bn(net.conv(x)), 1e-4, 1e-5));
}

TEST_CASE("Constants are computed once", "[graph]") {
  const auto x = torch::randn({3});
  const auto graph = record(
      [&] {
        auto table = at::zeros({3});
        table.slice(0, 0, 1).fill_(5);
        return Tensors{x * table + at::arange(3).to(at::kFloat)};
      },
      {{"input.0", x, Origin::input}});
  const auto folded = fold_constants(graph);
  CHECK(folded.schedule.size() == 2);
  CHECK(constant_nodes(graph).size() + 2 == graph.schedule.size());
  const auto& product = folded.nodes[folded.schedule[0]];
  const auto& table = folded.values[product.input(1)];
  CHECK(table.origin == Origin::constant);
  CHECK(at::equal(table.tensor, at::tensor({5.0f, 0.0f, 0.0f})));
  CHECK(graph.values[product.input(1)].origin == Origin::intermediate);
}
