#include <rarefy/graph/record.h>
#include <rarefy/ops/relu.h>
#include <torch/torch.h>

#include <thread>

#include "catch.h"

using namespace rarefy::graph;
using Catch::Matchers::ContainsSubstring;

namespace {

using Tensors = std::vector<at::Tensor>;

Graph record_function(const std::function<Tensors(const at::Tensor&)>& forward, const at::Tensor& x) {
  return record([&] { return forward(x); }, {{"input.0", x, Origin::input}});
}

std::vector<std::string> ops(const Graph& graph) {
  std::vector<std::string> out;
  for (auto index : graph.schedule) {
    out.push_back(graph.nodes[index].op.name);
  }
  return out;
}

const Node& node(const Graph& graph, const std::string& op) {
  for (auto index : graph.schedule) {
    if (graph.nodes[index].op.name == op) {
      return graph.nodes[index];
    }
  }
  FAIL("no " << op);
  return graph.nodes[0];
}

struct NetImpl : torch::nn::Module {
  NetImpl() {
    inner = register_module("inner", torch::nn::Linear(3, 4));
    dropout = register_module("dropout", torch::nn::Dropout(0.5));
    dropout->eval();
  }
  at::Tensor forward(const at::Tensor& x) {
    if (fails) {
      throw std::runtime_error("by the model");
    }
    return dropout(inner(x)).relu();
  }
  torch::nn::Linear inner = nullptr;
  torch::nn::Dropout dropout = nullptr;
  bool fails = false;
};
TORCH_MODULE(Net);

/// False once nothing holds the memory any more.
bool is_alive(const c10::weak_intrusive_ptr<c10::StorageImpl>& storage) { return !storage.expired(); }

}  // namespace

TEST_CASE("Operators in place keep the value, views its memory", "[record]") {
  const auto graph = record_function(
      [](const at::Tensor& x) {
        auto y = x * 2;
        y.slice(0, 1).add_(1);
        y.unsqueeze_(0);
        return Tensors{y.t_().detach(), at::ones({2})};
      },
      at::randn({4}).view({2, 2}).select(0, 0));
  const auto made = node(graph, "aten::mul").outputs.at(0);
  const auto view = node(graph, "aten::slice").outputs.at(0);
  CHECK(node(graph, "aten::add_").outputs.at(0) == view);
  CHECK(graph.values[view].memory == made);
  const auto reshaped = node(graph, "aten::unsqueeze_").outputs.at(0);
  CHECK(reshaped != made);
  CHECK(graph.values[reshaped].sizes == std::vector<int64_t>{1, 2});
  CHECK(graph.values[graph.outputs.at(0)].memory == made);
  const auto ones = graph.outputs.at(1);
  CHECK(graph.values[ones].memory != made);
}

TEST_CASE("Floating-point intermediates are not kept, integers are", "[record]") {
  std::vector<c10::weak_intrusive_ptr<c10::StorageImpl>> storages;
  const auto graph = record_function(
      [&](at::Tensor x) {
        for (int i = 0; i < 4; ++i) {
          x = x.sin();
          storages.push_back(x.storage().getWeakStorageImpl());
        }
        CHECK_FALSE(is_alive(storages[1]));  // already while it runs
        storages.push_back((x > 0).storage().getWeakStorageImpl());
        return Tensors{x};
      },
      at::randn({100}));
  CHECK_FALSE(is_alive(storages[0]));
  CHECK_FALSE(is_alive(storages[2]));
  CHECK(is_alive(storages[3]));  // returned
  CHECK(is_alive(storages[4]));  // a mask
  CHECK(graph.values[node(graph, "aten::gt").outputs.at(0)].tensor.scalar_type() == at::kBool);
}

TEST_CASE("A module on the stack and one of a shared pointer are recorded, in evaluation mode", "[record]") {
  const auto x = torch::randn({2, 3});
  NetImpl local;
  Net shared;
  for (NetImpl* net : {&local, shared.get()}) {
    REQUIRE(net->is_training());
    const auto graph = record(*net, [&] { return Tensors{net->forward(x)}; }, {x});
    CHECK(ops(graph) == std::vector<std::string>{"aten::linear", "aten::dropout", "aten::relu"});
    CHECK(graph.nodes[graph.schedule[0]].module == "inner");
    CHECK(graph.values[node(graph, "aten::linear").input(1)].name == "inner.weight");
    CHECK_FALSE(node(graph, "aten::dropout").inputs.at(2).toBool());
    CHECK(net->is_training());
    CHECK(net->inner->is_training());
    CHECK_FALSE(net->dropout->is_training());
    net->fails = true;
    CHECK_THROWS_WITH(record(*net, [&] { return Tensors{net->forward(x)}; }, {x}), ContainsSubstring("by the model"));
    CHECK(net->is_training());
    CHECK(net->inner->is_training());
    CHECK_FALSE(net->dropout->is_training());
  }
}

TEST_CASE("An exception leaves what was recorded, and nothing attached", "[record]") {
  const auto x = at::randn({2, 3});
  Graph partial;
  CHECK_THROWS(record([&] { return Tensors{x.relu().matmul(x)}; }, {{"input.0", x, Origin::input}}, {}, &partial));
  CHECK(ops(partial) == std::vector<std::string>{"aten::relu"});
  CHECK(std::any_of(partial.nodes.begin(), partial.nodes.end(),
                    [](const Node& item) { return item.failed && item.op.name == "aten::matmul"; }));
  const auto count = partial.nodes.size();
  x.sigmoid();
  CHECK(partial.nodes.size() == count);
  // A model that goes on does without the operator that failed.
  const auto graph = record_function(
      [](const at::Tensor& input) {
        try {
          return Tensors{input.view({7})};
        } catch (const c10::Error&) {
          return Tensors{input.flatten()};
        }
      },
      x);
  CHECK(ops(graph) == std::vector<std::string>{"aten::flatten"});
  CHECK(graph.nodes[0].failed);
}

TEST_CASE("A recording inside of a recording is refused", "[record]") {
  const auto x = at::randn({3});
  const auto inner = [](const at::Tensor& input) { return Tensors{input.relu()}; };
  CHECK_THROWS_WITH(record_function(
                        [&](const at::Tensor& input) {
                          record_function(inner, input);
                          return Tensors{input};
                        },
                        x),
                    ContainsSubstring("[record] must not be called while another recording runs on this thread"));
  CHECK(ops(record_function(inner, x)).size() == 1);
}

TEST_CASE("What other threads run is not recorded", "[record]") {
  const auto graph = record_function(
      [](const at::Tensor& x) {
        std::thread([&] { x.sigmoid(); }).join();
        return Tensors{x.relu()};
      },
      at::randn({3}));
  CHECK(ops(graph) == std::vector<std::string>{"aten::relu"});
}

TEST_CASE("Lists, absent tensors and composite operators", "[record]") {
  const auto index = at::tensor({1, 0});
  auto graph = record_function(
      [&](const at::Tensor& x) { return Tensors{at::cat({x, x.flip(0)}).index({torch::indexing::Slice(), index})}; },
      at::randn({2, 3}));
  CHECK(node(graph, "aten::cat").input_values.at(0).size() == 2);
  CHECK(node(graph, "aten::index").input_values.at(1).at(0) == -1);
  CHECK(graph.values[node(graph, "aten::index").input_values[1].at(1)].origin == Origin::constant);
  graph =
      record_function([](const at::Tensor& x) { return Tensors{at::einsum("ij,kj->ik", {x, x})}; }, at::randn({2, 3}));
  for (const auto& name : ops(graph)) {
    CHECK(name != "aten::einsum");
  }
  CHECK(graph.nodes[0].op.name == "aten::einsum");
  graph = record_function([](const at::Tensor& x) { return Tensors{rarefy::ops::relu(x) + x.data()}; }, at::randn({3}));
  CHECK(ops(graph) == std::vector<std::string>{"rarefy::relu", "aten::add"});
  CHECK(node(graph, "aten::add").input(1) == graph.inputs.at(0));  // x.data() is x
}

TEST_CASE("What cannot be recorded is refused", "[record]") {
  const auto nothing = [] { return Tensors{}; };
  CHECK_THROWS_WITH(record(nothing, {{"w", at::Tensor(), Origin::parameter}}), ContainsSubstring("'w' is undefined"));
  CHECK_THROWS_WITH(record(nothing, {{"w", at::eye(2).to_sparse(), Origin::parameter}}),
                    ContainsSubstring("'w' must be dense, got Sparse"));
  CHECK_THROWS_WITH(record([] { return Tensors{at::Tensor()}; }, {}),
                    ContainsSubstring("returned an undefined tensor"));
}
