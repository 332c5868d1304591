#include <rarefy/rarefy.h>
#include <torch/torch.h>

#include <filesystem>
#include <fstream>
#include <functional>
#include <map>
#include <memory>
#include <tuple>

#include "catch.h"

using namespace rarefy::pruning;
using Catch::Matchers::ContainsSubstring;
using rarefy::graph::named_tensors;

namespace {

/// The same network as in tests/python/test_surgery.py.
struct NetImpl : torch::nn::Module {
  torch::nn::Conv2d conv1{nullptr}, depthwise{nullptr}, conv2{nullptr};
  torch::nn::BatchNorm2d bn{nullptr};
  torch::nn::Linear fc{nullptr};
  at::Tensor offset;

  NetImpl() {
    using torch::nn::Conv2dOptions;
    conv1 = register_module("conv1", torch::nn::Conv2d(Conv2dOptions(3, 8, 3).padding(1)));
    bn = register_module("bn", torch::nn::BatchNorm2d(8));
    depthwise = register_module("depthwise", torch::nn::Conv2d(Conv2dOptions(8, 8, 3).padding(1).groups(8)));
    conv2 = register_module("conv2", torch::nn::Conv2d(Conv2dOptions(8, 6, 1)));
    fc = register_module("fc", torch::nn::Linear(6 * 4, 5));
    offset = register_buffer("offset", torch::arange(8.0f).view({1, 8, 1, 1}));
  }
  at::Tensor forward(const at::Tensor& x) {
    return fc(conv2(depthwise(torch::relu(bn(conv1(x))) + offset)).flatten(1));
  }
};
TORCH_MODULE(Net);

const std::vector<int64_t> kKept{0, 2, 3, 6, 7};

std::vector<Cut> net_cuts(const std::vector<int64_t>& kept = kKept) {
  std::vector<Cut> cuts{{"offset", 1, kept}, {"conv2.weight", 1, kept}};
  for (const auto* name : {"conv1.weight", "conv1.bias", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var",
                           "depthwise.weight", "depthwise.bias"}) {
    cuts.push_back({name, 0, kept});
  }
  return cuts;
}

at::Tensor index(const std::vector<int64_t>& kept) { return torch::tensor(kept); }

using Make = std::function<std::unique_ptr<torch::optim::Optimizer>(std::vector<at::Tensor>)>;

template <typename Optimizer, typename Options>
Make make(Options options) {
  return [options](std::vector<at::Tensor> p) { return std::make_unique<Optimizer>(std::move(p), options); };
}

void step(Net& net, torch::optim::Optimizer& optimizer, uint64_t seed) {
  torch::manual_seed(seed);
  optimizer.zero_grad();
  net(torch::randn({4, 3, 2, 2})).square().sum().backward();
  optimizer.step();
}

/// Everything that must be back after a rollback: objects, memory, bits, gradients.
using Snapshot = std::map<std::string, std::tuple<const void*, const void*, std::vector<int64_t>, std::vector<float>,
                                                  const void*, std::vector<float>>>;

std::vector<float> bits(const at::Tensor& t) {
  const auto flat = t.detach().to(torch::kFloat32).contiguous().view(-1);
  return {flat.data_ptr<float>(), flat.data_ptr<float>() + flat.numel()};
}

Snapshot snapshot(torch::nn::Module& net, const std::vector<OptimizerTensor>& state) {
  Snapshot result;
  const auto add = [&](const std::string& name, const at::Tensor& t) {
    const auto grad = t.grad();
    result[name] = {t.unsafeGetTensorImpl(),
                    t.const_data_ptr(),
                    t.strides().vec(),
                    bits(t),
                    grad.defined() ? grad.unsafeGetTensorImpl() : nullptr,
                    grad.defined() ? bits(grad) : std::vector<float>()};
  };
  for (const auto& item : named_tensors(net)) {
    add(item.name, item.value);
  }
  for (const auto& item : state) {
    add(item.parameter + "/" + item.name, item.value);
  }
  return result;
}

std::string message(const std::function<void()>& call) {
  try {
    call();
  } catch (const c10::Error& error) {
    return error.what_without_backtrace();
  }
  return "";
}

void prune(torch::nn::Module& model, const std::vector<Cut>& cuts, Manifest* manifest = nullptr) {
  const auto tensors = named_tensors(model);
  auto all = cuts;
  const auto more = quantizer_cuts(model, cuts);
  all.insert(all.end(), more.begin(), more.end());
  Surgery surgery(tensors);
  surgery.apply(all);
  const auto changed = resize_modules(model, surgery);
  if (manifest != nullptr) {
    manifest->record(surgery, tensors, changed);
  }
  surgery.commit();
}

std::filesystem::path temporary(const std::string& name) {
  return std::filesystem::temp_directory_path() / ("rarefy_" + std::to_string(::getpid()) + "_" + name);
}

}  // namespace

TEST_CASE("Surgery cuts what optimizers keep, and training goes on", "[surgery]") {
  using namespace torch::optim;
  const std::map<std::string, Make> optimizers{
      {"sgd", make<SGD>(SGDOptions(0.01).momentum(0.9))},
      {"adam", make<Adam>(AdamOptions(0.01))},
      {"amsgrad", make<Adam>(AdamOptions(0.01).amsgrad(true))},
      {"adamw", make<AdamW>(AdamWOptions(0.01).amsgrad(true))},
      {"rmsprop", make<RMSprop>(RMSpropOptions(0.01).momentum(0.9).centered(true))},
      {"adagrad", make<Adagrad>(AdagradOptions(0.01))},
  };
  const std::map<std::string, size_t> tensors_each{{"sgd", 1},   {"adam", 2},    {"amsgrad", 3},
                                                   {"adamw", 3}, {"rmsprop", 3}, {"adagrad", 1}};
  for (const auto& [name, make_optimizer] : optimizers) {
    INFO(name);
    torch::manual_seed(0);
    Net net;
    auto optimizer = make_optimizer(net->parameters());
    step(net, *optimizer, 7);
    const auto tensors = named_tensors(*net);
    const auto state = optimizer_tensors(*optimizer, tensors);
    REQUIRE(state.size() == 10 * tensors_each.at(name));
    std::map<std::string, at::Tensor> expected;
    for (const auto& item : state) {
      auto value = item.value.clone();
      for (const auto& cut : net_cuts()) {
        value = cut.tensor == item.parameter ? value.index_select(cut.dim, index(cut.kept)) : value;
      }
      expected[item.parameter + item.name] = value;
    }
    Surgery surgery(tensors, state);
    surgery.apply(net_cuts());
    resize_modules(*net, surgery);
    surgery.commit();
    for (const auto& item : optimizer_tensors(*optimizer, tensors)) {
      CHECK(torch::equal(item.value, expected.at(item.parameter + item.name)));
    }
    std::map<std::string, at::Tensor> before;
    for (const auto& item : net->named_parameters()) {
      before[item.key()] = item.value().detach().clone();
    }
    step(net, *optimizer, 8);
    for (const auto& item : net->named_parameters()) {
      // A bias that batch normalization takes out again has a gradient of nothing but rounding.
      CHECK((item.key() == "conv1.bias" || !torch::equal(item.value(), before.at(item.key()))));
    }
  }
}

TEST_CASE("A cut model computes what one computes in which the channels say nothing", "[surgery]") {
  torch::manual_seed(1);
  Net net;
  net->to(torch::kFloat64);
  net->eval();
  const auto x = torch::randn({4, 3, 2, 2}, torch::kFloat64);
  at::Tensor expected;
  {
    const torch::NoGradGuard no_grad;
    const auto saved = net->conv2->weight.clone();
    net->conv2->weight.index_fill_(1, torch::tensor({1, 4, 5}), 0.0);
    expected = net(x);
    net->conv2->weight.copy_(saved);
  }
  const auto* impl = net->conv1->weight.unsafeGetTensorImpl();
  prune(*net, net_cuts());
  CHECK((net(x) - expected).abs().max().item<double>() < 1e-12);
  CHECK(net->conv1->weight.unsafeGetTensorImpl() == impl);
  CHECK(net->conv1->weight.storage().nbytes() == static_cast<size_t>(net->conv1->weight.numel()) * 8);
  CHECK(net->conv1->options.out_channels() == 5);
  CHECK(net->bn->options.num_features() == 5);
  CHECK(net->depthwise->options.groups() == 5);
  CHECK(net->depthwise->options.in_channels() == 5);
  CHECK(net->conv2->options.in_channels() == 5);
}

TEST_CASE("What is not committed comes back", "[surgery]") {
  torch::manual_seed(2);
  Net net;
  torch::optim::AdamW optimizer(net->parameters(), torch::optim::AdamWOptions(0.01));
  step(net, optimizer, 3);
  const auto tensors = named_tensors(*net);
  const auto state = optimizer_tensors(optimizer, tensors);
  const auto x = torch::randn({4, 3, 2, 2});
  const auto older = net(x).sum();
  const auto before = snapshot(*net, state);
  {
    Surgery surgery(tensors, state);
    surgery.apply(net_cuts());
    resize_modules(*net, surgery);
    CHECK(net->conv1->weight.grad().size(0) == 5);
    CHECK((snapshot(*net, state) != before));
    CHECK_THAT(message([&] { surgery.apply({}); }), ContainsSubstring("must be committed or rolled back first"));
  }
  CHECK((snapshot(*net, state) == before));
  CHECK(net->conv1->options.out_channels() == 8);
  CHECK(net->depthwise->options.groups() == 8);
  older.backward();  // the loss of before knows the accumulators of before
  step(net, optimizer, 4);
}

TEST_CASE("A loss that was computed before a cut does not disturb later ones", "[surgery]") {
  torch::manual_seed(3);
  Net net;
  const auto x = torch::randn({4, 3, 2, 2});
  const auto older = net(x).sum();
  prune(*net, net_cuts());
  net->zero_grad();
  net(x).square().sum().backward();
  CHECK((net->conv1->weight.grad().sizes() == net->conv1->weight.sizes()));
  CHECK_THAT(message([&] { older.backward(); }), ContainsSubstring("modified by an inplace operation"));
}

TEST_CASE("The order of memory stays, and ties stay", "[surgery]") {
  auto last = torch::randn({6, 4, 3, 3}).contiguous(at::MemoryFormat::ChannelsLast);
  auto transposed = torch::randn({5, 6}).t();
  auto tied = torch::randn({6, 2});
  auto same_memory = tied.detach().alias();
  auto part = torch::randn({6, 2});
  const auto overlapping = part.narrow(0, 2, 3);
  const std::vector<rarefy::graph::NamedTensor> tensors{
      {"last", last}, {"transposed", transposed},  {"tied", tied}, {"also", tied}, {"memory", same_memory},
      {"part", part}, {"overlapping", overlapping}};
  const auto values = tied.clone();
  Surgery surgery(tensors);
  CHECK_THAT(message([&] { surgery.apply({{"part", 0, {1, 2}}}); }),
             ContainsSubstring("[Surgery] part must not share some of its memory with overlapping"));
  CHECK_THAT(message([&] { surgery.apply({{"tied", 0, {1, 2}}, {"also", 0, {1, 3}}}); }),
             ContainsSubstring("of also, which is also tied, must be the same"));
  surgery.apply({{"last", 0, {1, 3, 4}}, {"last", 1, {0, 2}}, {"transposed", 0, {2, 5}}, {"tied", 0, {1, 4}}});
  surgery.commit();
  CHECK((last.sizes() == at::IntArrayRef({3, 2, 3, 3})));
  CHECK(last.is_contiguous(at::MemoryFormat::ChannelsLast));
  CHECK((transposed.strides() == at::IntArrayRef({1, 2})));
  CHECK(torch::equal(tied, values.index_select(0, torch::tensor({1, 4}))));
  CHECK(same_memory.const_data_ptr() == tied.const_data_ptr());
}

TEST_CASE("Bad cuts are refused, with everything as it was", "[surgery]") {
  Net net;
  torch::optim::Adam optimizer(net->parameters(), torch::optim::AdamOptions(0.01));
  step(net, optimizer, 1);
  const auto tensors = named_tensors(*net);
  const auto state = optimizer_tensors(optimizer, tensors);
  const auto before = snapshot(*net, state);
  const std::vector<std::pair<std::vector<Cut>, std::string>> bad{
      {{{"conv9.weight", 0, {0}}}, "must be of a parameter or buffer of the model, got 'conv9.weight'"},
      {{{"conv1.weight", 4, {0}}}, "must be in [0, 4), got 4"},
      {{{"conv1.weight", -1, {0}}}, "must be in [0, 4), got -1"},
      {{{"conv1.weight", 0, {}}}, "must keep a slice of dimension 0, got none"},
      {{{"conv1.weight", 0, {0, 0}}}, "must ascend, got 0 before 0"},
      {{{"conv1.weight", 0, {0, 8}}}, "must be in [0, 8), got 8"},
      {{{"conv1.weight", 0, {-1, 3}}}, "must be in [0, 8), got -1"},
      {{{"conv1.weight", 0, {0, 1}}, {"conv1.weight", 0, {0, 2}}}, "must be the same"},
  };
  for (const auto& [cuts, expected] : bad) {
    Surgery surgery(tensors, state);
    auto all = net_cuts();
    all.insert(all.end(), cuts.begin(), cuts.end());
    CHECK_THAT(message([&] { surgery.apply(all); }), ContainsSubstring(expected));
    CHECK((snapshot(*net, state) == before));
  }
  torch::optim::SGD foreign({torch::randn({2}, torch::requires_grad())}, torch::optim::SGDOptions(0.1));
  CHECK_THAT(message([&] { optimizer_tensors(foreign, tensors); }), ContainsSubstring("holds none of them"));
  torch::optim::LBFGS lbfgs(net->parameters(), torch::optim::LBFGSOptions(0.1));
  CHECK(optimizer_tensors(lbfgs, tensors).empty());
  lbfgs.step([&] {
    lbfgs.zero_grad();
    auto loss = net(torch::ones({2, 3, 2, 2})).square().sum();
    loss.backward();
    return loss;
  });
  CHECK_THAT(message([&] { optimizer_tensors(lbfgs, tensors); }),
             ContainsSubstring("LBFGS must not have taken a step"));
}

TEST_CASE("Which slices of a state tensor go with those of its parameter", "[surgery]") {
  const Kept kept{{0, {1, 2}}, {1, {0}}};
  const auto of = [&](const std::string& name, std::vector<int64_t> shape, std::vector<int64_t> sizes) {
    return kept_of_state({"w", name, torch::zeros(shape)}, sizes, kept);
  };
  CHECK((of("exp_avg", {4, 3, 2}, {4, 3, 2}) == kept));
  CHECK(of("step", {}, {4, 3, 2}).empty());
  CHECK(of("step", {1}, {4, 3, 2}).empty());
  CHECK((of("row_var", {4, 1}, {4, 3}) == Kept{{0, {1, 2}}}));
  CHECK((of("col_var", {1, 3}, {4, 3}) == Kept{{1, {0}}}));
  CHECK((of("exp_avg_sq_row", {4}, {4, 4}) == Kept{{0, {1, 2}}}));
  CHECK((of("exp_avg_sq_col", {4}, {4, 4}) == Kept{{0, {0}}}));
  CHECK((of("other", {3}, {4, 3}) == Kept{{0, {0}}}));
  CHECK_THAT(message([&] { of("other", {4}, {4, 4}); }),
             ContainsSubstring("optimizer state 'other' of w must say which dimensions of the parameter it has"));
  CHECK_THAT(
      message([&] { of("preconditioner", {4, 4}, {4, 3}); }),
      ContainsSubstring("must have the parameter's shape, or one that follows from it: the parameter is [4, 3], the "
                        "state [4, 4]"));
}

TEST_CASE("Options follow the shapes", "[surgery]") {
  using namespace torch::nn;
  struct Case {
    std::shared_ptr<Module> module;
    std::vector<Cut> cuts;
    std::function<at::Tensor()> run;
    std::map<std::string, std::string> changed;
  };
  const std::vector<int64_t> k{0, 3};
  Linear linear(4, 6);
  Bilinear bilinear(4, 5, 6);
  Conv1d grouped(Conv1dOptions(8, 4, 3).groups(2));
  ConvTranspose2d transposed(ConvTranspose2dOptions(4, 8, 3).groups(2));
  InstanceNorm2d instance(InstanceNorm2dOptions(4).affine(true));
  LayerNorm layer(LayerNormOptions({3, 4}));
  GroupNorm group(GroupNormOptions(4, 8));
  Embedding embedding(EmbeddingOptions(5, 4).padding_idx(3));
  EmbeddingBag bag(EmbeddingBagOptions(5, 4).mode(torch::kSum));
  PReLU prelu(PReLUOptions().num_parameters(4));
  LSTM lstm(LSTMOptions(3, 2).num_layers(2).bidirectional(true));
  GRUCell cell(3, 2);
  MultiheadAttention attention(4, 2);
  std::vector<Cut> lstm_cuts, attention_cuts;
  for (const auto* suffix : {"_l0", "_l0_reverse", "_l1", "_l1_reverse"}) {
    for (const auto* name : {"weight_ih", "weight_hh", "bias_ih", "bias_hh"}) {
      lstm_cuts.push_back({std::string(name) + suffix, 0, {1, 3, 5, 7}});
    }
    lstm_cuts.push_back({std::string("weight_hh") + suffix, 1, {1}});
    if (std::string(suffix).starts_with("_l1")) {
      lstm_cuts.push_back({std::string("weight_ih") + suffix, 1, {1, 3}});
    }
  }
  const std::vector<Case> cases{
      {linear.ptr(), {{"weight", 1, k}}, [&] { return linear(torch::randn({3, 2})); }, {{"in_features", "2"}}},
      {bilinear.ptr(),
       {{"weight", 1, k}, {"weight", 2, {0}}, {"weight", 0, k}, {"bias", 0, k}},
       [&] { return bilinear(torch::randn({3, 2}), torch::randn({3, 1})); },
       {{"in1_features", "2"}, {"in2_features", "1"}, {"out_features", "2"}}},
      // Group 0 loses everything, group 1 half of its outputs and one of its inputs.
      {grouped.ptr(),
       {{"weight", 0, {2}}, {"bias", 0, {2}}, {"weight", 1, {0, 1, 3}}},
       [&] { return grouped(torch::randn({1, 3, 5})); },
       {{"in_channels", "3"}, {"out_channels", "1"}, {"groups", "1"}}},
      {transposed.ptr(),
       {{"weight", 0, {1, 2}}, {"weight", 1, {0, 3}}, {"bias", 0, {0, 3, 4, 7}}},
       [&] { return transposed(torch::randn({1, 2, 5, 5})); },
       {{"in_channels", "2"}, {"out_channels", "4"}}},
      {instance.ptr(),
       {{"weight", 0, k}, {"bias", 0, k}},
       [&] { return instance(torch::randn({1, 2, 5, 5})); },
       {{"num_features", "2"}}},
      {layer.ptr(),
       {{"weight", 1, k}, {"bias", 1, k}},
       [&] { return layer(torch::randn({2, 3, 2})); },
       {{"normalized_shape", "[3, 2]"}}},
      {group.ptr(),
       {{"weight", 0, {2, 3, 6, 7}}, {"bias", 0, {2, 3, 6, 7}}},
       [&] { return group(torch::randn({2, 4, 5})); },
       {{"num_channels", "4"}, {"num_groups", "2"}}},
      {embedding.ptr(),
       {{"weight", 0, {1, 3}}, {"weight", 1, k}},
       [&] { return embedding(torch::tensor({0, 1})); },
       {{"num_embeddings", "2"}, {"embedding_dim", "2"}, {"padding_idx", "1"}}},
      {bag.ptr(),
       {{"weight", 1, k}},
       [&] { return bag(torch::zeros({2, 3}, torch::kLong)); },
       {{"embedding_dim", "2"}}},
      {prelu.ptr(), {{"weight", 0, k}}, [&] { return prelu(torch::randn({3, 2})); }, {{"num_parameters", "2"}}},
      {lstm.ptr(), lstm_cuts, [&] { return std::get<0>(lstm(torch::randn({5, 2, 3}))); }, {{"hidden_size", "1"}}},
      {cell.ptr(),
       {{"weight_ih", 0, {0, 2, 4}},
        {"weight_hh", 0, {0, 2, 4}},
        {"bias_ih", 0, {0, 2, 4}},
        {"bias_hh", 0, {0, 2, 4}},
        {"weight_hh", 1, {0}}},
       [&] { return cell(torch::randn({2, 3})); },
       {{"hidden_size", "1"}}},
      {attention.ptr(),
       {{"in_proj_weight", 0, {2, 3, 6, 7, 10, 11}},
        {"in_proj_bias", 0, {2, 3, 6, 7, 10, 11}},
        {"in_proj_weight", 1, k},
        {"out_proj.weight", 0, k},
        {"out_proj.weight", 1, {2, 3}},
        {"out_proj.bias", 0, k}},
       [&] {
         const auto x = torch::randn({3, 1, 2});
         return std::get<0>(attention(x, x, x));
       },
       {{"embed_dim", "2"}, {"num_heads", "1"}, {"kdim", "2"}, {"vdim", "2"}}},
  };
  for (const auto& c : cases) {
    INFO(c.module->name());
    std::ostringstream before, after;
    c.module->pretty_print(before);
    {
      Surgery surgery(named_tensors(*c.module));
      surgery.apply(c.cuts);
      auto changed = resize_modules(*c.module, surgery)[""];
      CHECK((changed == c.changed));
      CHECK(torch::isfinite(c.run()).all().item<bool>());
    }
    c.module->pretty_print(after);
    CHECK(before.str() == after.str());
    prune(*c.module, c.cuts);
    CHECK(torch::isfinite(c.run()).all().item<bool>());
  }
}

TEST_CASE("Shapes that no options describe are refused", "[surgery]") {
  using namespace torch::nn;
  Conv1d grouped(Conv1dOptions(8, 4, 3).groups(2));
  CHECK_THAT(
      message([&] { prune(*grouped, {{"weight", 0, {0, 1, 2}}, {"bias", 0, {0, 1, 2}}}); }),
      ContainsSubstring("a convolution must keep equally many slices in each group that is left, got 1 in group 1"));
  CHECK(grouped->weight.size(0) == 4);
  LSTM lstm(LSTMOptions(3, 2).num_layers(2));
  CHECK_THAT(message([&] {
               prune(*lstm, {{"weight_hh_l0", 0, {1, 3, 5, 7}},
                             {"weight_hh_l0", 1, {1}},
                             {"weight_ih_l0", 0, {1, 3, 5, 7}},
                             {"bias_ih_l0", 0, {1, 3, 5, 7}},
                             {"bias_hh_l0", 0, {1, 3, 5, 7}},
                             {"weight_ih_l1", 1, {1}}});
             }),
             ContainsSubstring("must keep one hidden size, but weight_ih_l1 must be [4, 1]"));
  MultiheadAttention attention(4, 2);
  CHECK_THAT(message([&] {
               prune(*attention, {{"in_proj_weight", 0, {2, 3, 6, 7, 10, 11}},
                                  {"in_proj_bias", 0, {2, 3, 6, 7, 10, 11}},
                                  {"out_proj.weight", 1, {2, 3}}});
             }),
             ContainsSubstring("torch::nn::MultiheadAttention must keep heads of 2 channels that add up to its width"));
  CHECK(attention->options.num_heads() == 2);
}

TEST_CASE("Layers of rarefy::nn are cut with their fake quantizers, and clone afterwards", "[surgery]") {
  torch::manual_seed(5);
  torch::nn::Sequential net(rarefy::nn::ConvBn2d(3, 6, 3), rarefy::nn::Conv2d(6, 4, 1));
  rarefy::quantization::prepare_qat(*net, rarefy::quantization::QConfig::int8());
  const auto x = torch::randn({2, 3, 5, 5});
  net->forward(x).sum().backward();
  const std::vector<int64_t> kept{1, 2, 5};
  std::vector<Cut> cuts{{"1.weight", 1, kept}};
  for (const auto* name : {"0.weight", "0.bn.weight", "0.bn.bias", "0.bn.running_mean", "0.bn.running_var"}) {
    cuts.push_back({name, 0, kept});
  }
  const auto scale = net->named_buffers()["0.quant.weight.scale"].clone();
  prune(*net, cuts);
  CHECK((torch::equal(net->named_buffers()["0.quant.weight.scale"], scale.index_select(0, index(kept)))));
  CHECK(net->named_buffers()["1.quant.weight.scale"].size(0) == 4);
  net->forward(x).sum().backward();
  net->eval();
  const auto copy = std::dynamic_pointer_cast<torch::nn::SequentialImpl>(net->clone());
  CHECK(torch::equal(copy->forward(x), net->forward(x)));
  rarefy::quantization::convert(*net);
  CHECK_THAT(message([&] { prune(*net, {{"1.weight", 0, {1, 2}}, {"1.bias", 0, {1, 2}}}); }),
             ContainsSubstring("Conv2d must not be converted yet: prune before convert"));
}

TEST_CASE("Masks are cut with their parameters", "[surgery]") {
  Net net;
  MagnitudePruner pruner(*net, {.sparsity = 0.5});
  pruner.step();
  const auto state = masked_parameters(*net);
  const auto bits = [](const MaskedParameter& parameter) {
    auto kept = at::zeros(parameter.value.sizes(), at::kBool);
    for (int64_t i = 0; i < kept.numel(); ++i) {
      kept.view(-1)[i] = (parameter.mask[i / 8].item<int>() >> (i % 8) & 1) != 0;
    }
    return kept;
  };
  std::map<std::string, at::Tensor> expected;
  for (const auto& parameter : state.parameters) {
    expected.emplace(parameter.name, bits(parameter));
  }
  for (const auto& cut : net_cuts()) {
    if (const auto found = expected.find(cut.tensor); found != expected.end()) {
      found->second = found->second.index_select(cut.dim, at::tensor(cut.kept, at::kLong));
    }
  }
  {
    Surgery surgery(rarefy::graph::named_tensors(*net));
    surgery.apply(net_cuts());
    for (const auto& parameter : state.parameters) {  // the tensors themselves
      CHECK(torch::equal(bits(parameter), expected.at(parameter.name)));
    }
  }
  check_masks(*net);  // rolled back
  prune(*net, net_cuts());
  for (const auto& parameter : masked_parameters(*net).parameters) {
    CHECK(torch::equal(bits(parameter), expected.at(parameter.name)));
  }
  check_masks(*net);
  pruner.step();
  pruner.finalize();
  Net other;
  MagnitudePruner second(*other, {.sparsity = 0.5});
  Surgery surgery(rarefy::graph::named_tensors(*other));
  CHECK_THAT(message([&] { surgery.apply({{"conv1.weight_mask_bits", 0, {0, 1}}}); }),
             ContainsSubstring("conv1.weight_mask_bits must be cut by a cut of what it belongs to"));
}

TEST_CASE("A pruned model is saved and loaded into the original class", "[manifest]") {
  torch::manual_seed(6);
  const auto file = temporary("pruned.safetensors"), plain = temporary("plain.safetensors");
  Net net;
  Manifest manifest;
  prune(*net, net_cuts(), &manifest);
  prune(*net, net_cuts({0, 1, 4}), &manifest);
  CHECK((manifest.tensors.at("conv1.weight") == TensorRecord{{8, 3, 3, 3}, {{0, {0, 2, 7}}}}));
  CHECK((manifest.attributes.at("depthwise") ==
         std::map<std::string, std::string>{{"groups", "3"}, {"in_channels", "3"}, {"out_channels", "3"}}));
  save_pruned(*net, manifest, file);

  Net fresh;
  CHECK((load_pruned(*fresh, file) == manifest));
  net->eval();
  fresh->eval();
  const auto x = torch::randn({2, 3, 2, 2});
  CHECK(torch::equal(fresh(x), net(x)));
  CHECK(fresh->conv1->options.out_channels() == 3);

  // Bad input leaves the model as it was.
  Net target;
  const auto before = snapshot(*target, {});
  prune(*net, {{"fc.weight", 0, {0, 1}}, {"fc.bias", 0, {0, 1}}}, &manifest);
  CHECK_THAT(message([&] { load_pruned(*net, file); }),
             ContainsSubstring("conv1.weight must be [8, 3, 3, 3], got [3, 3, 3, 3]"));
  rarefy::save_safetensors(*target, plain);
  CHECK_THAT(message([&] { load_pruned(*target, plain); }), ContainsSubstring("but has no manifest"));
  manifest.attributes["body"]["heads"] = "3";
  save_pruned(*net, manifest, file);
  CHECK_THAT(message([&] { load_pruned(*target, file); }),
             ContainsSubstring("someone must set 'heads' of module 'body' to 3"));
  CHECK_THAT(message([&] { load_pruned(*target, file, [](auto&&...) { return false; }); }),
             ContainsSubstring("set_attribute must take 'heads' of module 'body', 3"));
  CHECK((snapshot(*target, {}) == before));
  CHECK(target->conv1->options.out_channels() == 8);
  std::string heads;
  load_pruned(*target, file, [&](const std::string& module, const std::string& name, const std::string& value) {
    heads = module + "." + name + "=" + value;
    return true;
  });
  CHECK(heads == "body.heads=3");
  CHECK_THAT(
      message([&] { save_pruned(*Net(), manifest, file); }),
      ContainsSubstring("conv1.weight must have the shape that its record says, [3, 3, 3, 3], got [8, 3, 3, 3]"));
  std::filesystem::remove(file);
  std::filesystem::remove(plain);
}

TEST_CASE("What is no manifest is refused", "[manifest]") {
  const auto reason = [](const std::string& text) { return message([&] { Manifest::from_json(text, "f"); }); };
  const std::string tensor = R"({"format": 1, "kept": [[0, 2]], "tensors": {"w": {"shape": [3], "kept": [[0, 0]]}}})";
  CHECK((Manifest::from_json(tensor, "f").tensors.at("w").kept == Kept{{0, {0, 2}}}));
  CHECK_THAT(reason("{}"), ContainsSubstring("[load_pruned] f: the manifest must say its format"));
  CHECK_THAT(reason(R"({"format": 2})"), ContainsSubstring("must be of format 1, got 2"));
  CHECK_THAT(reason(R"({"format": 1)"), ContainsSubstring("must be JSON with '}'"));
  CHECK_THAT(reason(R"({"format": 1, "kept": [[0, 3]], "tensors": {"w": {"shape": [3], "kept": [[0, 0]]}}})"),
             ContainsSubstring("must keep ascending indices of the dimensions of w, but does not in dimension 0"));
  CHECK_THAT(reason(R"({"format": 1, "kept": [[1, 0]], "tensors": {"w": {"shape": [3], "kept": [[0, 0]]}}})"),
             ContainsSubstring("must keep ascending indices"));
  CHECK_THAT(reason(R"({"format": 1, "kept": [[0]], "tensors": {"w": {"shape": [3], "kept": [[1, 0]]}}})"),
             ContainsSubstring("does not in dimension 1"));
  CHECK_THAT(reason(R"({"format": 1, "kept": [], "tensors": {"w": {"shape": [3], "kept": [[0, 0]]}}})"),
             ContainsSubstring("must have list 0 of w, got 0 lists"));
  CHECK_THAT(reason(R"({"format": 1, "modules": {"m": {"a": 01}}})"), ContainsSubstring("no leading zero"));
  CHECK_THAT(reason(R"({"format": 1, "modules": {"m": {"a": tru}}})"), ContainsSubstring("with a value at byte"));
  CHECK_THAT(reason(R"({"format": 1, "x": )" + std::string(100, '[') + "}"), ContainsSubstring("deeper than 64"));
  const auto values = Manifest::from_json(
      R"({"format": 1, "modules": {"m": {"a": -1.5e3, "b": [1, "x\"]", null], "c": {"d": true}}}})", "f");
  CHECK(values.attributes.at("m").at("a") == "-1.5e3");
  CHECK(values.attributes.at("m").at("b") == R"([1, "x\"]", null])");
  CHECK((Manifest::from_json(values.to_json(), "f") == values));
}
