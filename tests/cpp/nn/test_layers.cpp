#include <rarefy/rarefy.h>
#include <torch/torch.h>

#include "catch.h"

using namespace rarefy::quantization;
namespace rnn = rarefy::nn;
using Catch::Matchers::ContainsSubstring;

namespace {

std::string message_of(const std::function<void()>& body) {
  try {
    body();
  } catch (const c10::Error& e) {
    return e.what_without_backtrace();
  }
  return "nothing was thrown";
}

torch::Tensor on_grid(const torch::Tensor& x, const FakeQuantizerImpl& q) {
  std::vector<int64_t> shape(static_cast<size_t>(x.dim()), 1);
  if (q.options.scheme.axis().has_value()) {
    shape[static_cast<size_t>(*q.options.scheme.axis())] = -1;
  }
  const auto s = q.scale.view(shape);
  const auto z = q.zero_point.view(shape);
  return ((x.detach() / s).round() + z).clamp(q.options.scheme.qmin(), q.options.scheme.qmax()).sub(z) * s;
}

std::vector<std::string> names_of(const torch::nn::Module& model) {
  std::vector<std::string> names;
  for (const auto& item : model.named_parameters()) {
    names.push_back(item.key());
  }
  for (const auto& item : model.named_buffers()) {
    if (item.key().find(".quant.") == std::string::npos) {
      names.push_back(item.key());
    }
  }
  return names;
}

template <size_t D>
torch::Tensor input_of() {
  const std::vector<int64_t> sizes{2, 4, 7, 6, 5};
  return torch::randn(at::IntArrayRef(sizes).slice(0, D + 2)) + 0.3;
}

template <size_t D>
std::vector<rnn::ConvOptions<D>> cases() {
  using Options = rnn::ConvOptions<D>;
  return {Options(4, 8, 3).stride(2).padding(1),
          Options(4, 8, 2).padding(torch::kSame).bias(false),
          Options(4, 8, 3).groups(2).padding_mode(torch::kReflect).padding(2),
          Options(4, 4, 3).groups(4).dilation(2).padding(2),
          Options(4, 8, 3).padding(torch::kValid),
          Options(4, 8, 3).padding(1).padding_mode(torch::kCircular),
          Options(4, 8, 3).padding(1).padding_mode(torch::kReplicate)};
}

/// The float layer of torch::nn with another weight and bias.
template <size_t D, typename Float>
torch::Tensor torch_conv(const rnn::ConvOptions<D>& o, const torch::Tensor& x, const torch::Tensor& w,
                         const torch::Tensor& b) {
  Float layer(torch::nn::ConvOptions<D>(o.in_channels(), o.out_channels(), o.kernel_size())
                  .stride(o.stride())
                  .padding(o.padding())
                  .dilation(o.dilation())
                  .groups(o.groups())
                  .bias(b.defined())
                  .padding_mode(o.padding_mode()));
  const torch::NoGradGuard no_grad;
  layer->weight.copy_(w);
  if (b.defined()) {
    layer->bias.copy_(b);
  }
  return layer(x);
}

template <size_t D, typename Float>
void check_convolutions() {
  torch::manual_seed(0);
  for (const auto& options : cases<D>()) {
    for (const bool relu : {false, true}) {
      auto layer = std::make_shared<rnn::ConvImpl<D>>(options);
      layer->set_relu(relu);
      const auto finish = [&](const torch::Tensor& y) { return relu ? torch::relu(y) : y; };
      const auto x = input_of<D>();
      const torch::NoGradGuard no_grad;
      REQUIRE(torch::allclose(layer->forward(x), finish(torch_conv<D, Float>(options, x, layer->weight, layer->bias)),
                              1e-5, 1e-6));
      torch::nn::ModuleList model;
      model->push_back(layer);
      prepare_qat(*model, QConfig::int8());
      layer->forward(x);
      model->eval();
      const auto expected =
          finish(torch_conv<D, Float>(options, on_grid(x, *layer->quant->find("input")),
                                      on_grid(layer->weight, *layer->quant->find("weight")), layer->bias));
      const auto prepared = layer->forward(x);
      REQUIRE(torch::allclose(prepared, expected, 1e-5, 1e-6));
      convert(*model);
      REQUIRE(layer->weight.scalar_type() == torch::kChar);
      REQUIRE(torch::allclose(layer->forward(x), prepared, 1e-5, 1e-5));
      const auto copy = std::dynamic_pointer_cast<rnn::ConvImpl<D>>(layer->clone());
      REQUIRE(torch::equal(copy->forward(x), layer->forward(x)));
    }
  }
}

template <size_t D>
void check_conv_bn() {
  torch::manual_seed(0);
  auto layer = std::make_shared<rnn::ConvBnImpl<D>>(rnn::ConvOptions<D>(4, 6, 3).padding(torch::kSame).bias(false));
  layer->set_relu(true);
  torch::nn::ModuleList model;
  model->push_back(layer);
  const auto x = input_of<D>();
  for (int i = 0; i < 3; ++i) {
    layer->forward(x);
  }
  {
    const torch::NoGradGuard no_grad;
    layer->bn->weight.normal_();
    layer->bn->bias.normal_();
  }
  model->eval();
  const auto floating = layer->forward(x);
  model->train();
  auto config = QConfig::int8();
  config.execution = Execution::simulated;  // equal to the formula bit for bit
  prepare_qat(*model, config);
  layer->forward(x).square().mean().backward();
  REQUIRE(layer->bn->weight.grad().abs().sum().template item<float>() > 0);
  freeze_batch_norm(*model);
  const auto mean = layer->bn->running_mean.clone();
  const auto frozen = layer->forward(x);
  REQUIRE(torch::equal(layer->bn->running_mean, mean));
  model->eval();
  const torch::NoGradGuard no_grad;
  const auto prepared = layer->forward(x);
  freeze_batch_norm(*model, false);
  // By hand, bit for bit.
  std::vector<int64_t> shape(D + 2, 1);
  shape[0] = -1;
  const auto factor = layer->bn->weight * torch::rsqrt(layer->bn->running_var + 1e-5);
  const auto weight = on_grid(layer->weight * factor.view(shape), *layer->quant->find("weight"));
  const auto bias = layer->bn->bias + (-layer->bn->running_mean) * factor;
  const std::vector<int64_t> one(D, 1);
  const auto expected = torch::relu(at::convolution(on_grid(x, *layer->quant->find("input")), weight, bias, one, one,
                                                    one, false, std::vector<int64_t>(D, 0), 1));
  REQUIRE(torch::equal(prepared, expected));
  REQUIRE((prepared - floating).abs().max().template item<float>() < 0.2f);
  const auto copy = std::dynamic_pointer_cast<rnn::ConvBnImpl<D>>(layer->clone());
  REQUIRE(torch::equal(copy->forward(x), prepared));
  convert(*model);
  REQUIRE(layer->bn.is_empty());
  REQUIRE(torch::allclose(layer->forward(x), prepared, 1e-5, 1e-4));
}

}  // namespace

TEST_CASE("convolutions of 1, 2 and 3 dimensions with every padding", "[nn]") {
  check_convolutions<1, torch::nn::Conv1d>();
  check_convolutions<2, torch::nn::Conv2d>();
  check_convolutions<3, torch::nn::Conv3d>();
}

TEST_CASE("convolutions with batch normalization of 1, 2 and 3 dimensions", "[nn]") {
  check_conv_bn<1>();
  check_conv_bn<2>();
  check_conv_bn<3>();
}

TEST_CASE("an embedding of rounded rows", "[nn]") {
  torch::manual_seed(0);
  torch::nn::ModuleList model;
  auto layer = std::make_shared<rnn::EmbeddingImpl>(rnn::EmbeddingOptions(9, 5).padding_idx(2));
  model->push_back(layer);
  REQUIRE(layer->weight[2].abs().sum().item<float>() == 0);
  const auto indices = torch::tensor({{1, 2, 1}, {8, 0, 3}});
  REQUIRE(torch::equal(layer->forward(indices), torch::embedding(layer->weight, indices)));
  prepare_qat(*model, QConfig::int8());
  const auto* quantizer = layer->quant->find("weight");
  REQUIRE(layer->quant->find("input") == nullptr);
  const auto expected = torch::embedding(on_grid(layer->weight, *quantizer), indices);
  const auto rows = layer->forward(indices);
  REQUIRE(torch::equal(rows, expected));
  rows.sum().backward();
  const auto counts = torch::tensor({1.0, 2.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0}).unsqueeze(1).to(torch::kFloat);
  REQUIRE(torch::equal(layer->weight.grad(), counts.expand({9, 5})));
  // Rows follow the weight, and stay when told so.
  const auto before = quantizer->scale.clone();
  {
    const torch::NoGradGuard no_grad;
    layer->weight.mul_(2.0);
  }
  layer->forward(torch::tensor({1}));
  REQUIRE(quantizer->scale[1].item<float>() == 2 * before[1].item<float>());
  REQUIRE(quantizer->scale[3].item<float>() == before[3].item<float>());
  set_state(*model, false, std::nullopt);
  layer->forward(indices);
  REQUIRE(quantizer->scale[3].item<float>() == before[3].item<float>());
  set_state(*model, true, std::nullopt);
  const auto prepared = layer->forward(indices);
  convert(*model);
  REQUIRE(layer->weight.scalar_type() == torch::kChar);
  REQUIRE(torch::equal(layer->forward(indices), prepared));
  REQUIRE(torch::equal(std::dynamic_pointer_cast<rnn::EmbeddingImpl>(layer->clone())->forward(indices), prepared));
  REQUIRE_THAT(message_of([] { rnn::Embedding(rnn::EmbeddingOptions(3, 2).max_norm(1.0)); }),
               ContainsSubstring("[Embedding] max_norm is not supported"));
}

TEST_CASE("products and concatenations", "[nn]") {
  torch::manual_seed(0);
  struct BothImpl : torch::nn::Module {
    rnn::Mul mul{nullptr};
    rnn::Cat cat{nullptr};
    BothImpl() : mul(register_module("mul", rnn::Mul())), cat(register_module("cat", rnn::Cat(1))) {}
    torch::Tensor forward(const torch::Tensor& x) { return cat->forward({mul(x, x), x, 2 * x}); }
  };
  BothImpl model;
  const auto x = torch::randn({3, 4});
  REQUIRE(torch::equal(model.forward(x), torch::cat({x * x, x, 2 * x}, 1)));
  prepare(model, QConfig::int8());
  calibrate(model, [&] { model.forward(x); });
  const auto* input = model.cat->quant->find("input");
  REQUIRE(input->max_val.item<float>() == torch::cat({x * x, x, 2 * x}, 1).max().item<float>());
  const auto product = on_grid(x, *model.mul->quant->find("input0")) * on_grid(x, *model.mul->quant->find("input1"));
  const auto expected = torch::cat({on_grid(product, *input), on_grid(x, *input), on_grid(2 * x, *input)}, 1);
  REQUIRE(torch::equal(model.forward(x), expected));
  convert(model);
  REQUIRE(torch::equal(model.forward(x), expected));
}

TEST_CASE("layers of torch::nn in containers are replaced", "[nn]") {
  torch::manual_seed(0);
  torch::nn::Sequential model(torch::nn::Conv2d(torch::nn::Conv2dOptions(3, 6, 3).padding(1).bias(false)),
                              torch::nn::BatchNorm2d(6), torch::nn::ReLU(), torch::nn::Conv2d(6, 4, 1),
                              torch::nn::ReLU(), torch::nn::Flatten(), torch::nn::Linear(100, 5));
  const auto x = torch::randn({4, 3, 5, 5});
  model->forward(x);
  const auto names = names_of(*model);
  std::vector<torch::Tensor> parameters = model->parameters();
  torch::optim::SGD optimizer(parameters, 0.05);
  model->eval();
  const auto floating = model->forward(x);
  model->train();
  prepare_qat(*model, QConfig::int8());
  REQUIRE(names_of(*model) == names);
  const auto after = model->parameters();
  for (size_t i = 0; i < parameters.size(); ++i) {
    REQUIRE(after[i].is_same(parameters[i]));
  }
  auto* conv = model->ptr(0)->as<rnn::ConvBn2dImpl>();
  REQUIRE(conv != nullptr);
  REQUIRE(conv->relu());
  REQUIRE(model->ptr(3)->as<rnn::Conv2dImpl>()->relu());
  REQUIRE(!model->ptr(6)->as<rnn::LinearImpl>()->relu());
  for (int step = 0; step < 3; ++step) {
    optimizer.zero_grad();
    torch::nn::functional::cross_entropy(model->forward(x), torch::tensor({0, 1, 2, 3})).backward();
    optimizer.step();
  }
  REQUIRE(parameters[1].grad().abs().sum().item<float>() > 0);  // gamma
  model->eval();
  const torch::NoGradGuard no_grad;
  const auto prepared = model->forward(x);
  REQUIRE((prepared - floating).abs().max().item<float>() < 1.0f);

  // The clone is joined to its own batch normalization, and works when the original is gone.
  auto copy = std::dynamic_pointer_cast<torch::nn::SequentialImpl>(model->clone());
  REQUIRE(torch::equal(copy->forward(x), prepared));
  copy->ptr(1)->as<rnn::FoldedBatchNorm2dImpl>()->bias.add_(1.0);
  REQUIRE(!torch::equal(copy->forward(x), prepared));
  REQUIRE(torch::equal(model->forward(x), prepared));
  copy->ptr(1)->as<rnn::FoldedBatchNorm2dImpl>()->bias.sub_(1.0);

  convert(*model);
  REQUIRE(model->parameters().empty());
  REQUIRE(torch::allclose(model->forward(x), prepared, 1e-4, 1e-5));
  model = torch::nn::Sequential();
  const auto alone = copy->forward(x);
  REQUIRE(torch::allclose(alone, prepared, 1e-4, 1e-4));
}

TEST_CASE("lists and dictionaries; a shared layer stays one", "[nn]") {
  torch::manual_seed(0);
  struct NetImpl : torch::nn::Module {
    torch::nn::ModuleList list;
    torch::nn::ModuleDict dict;
    NetImpl() {
      register_module("list", list);
      register_module("dict", dict);
      torch::nn::Linear shared(4, 4);
      list->push_back(shared);
      list->push_back(shared);
      const std::vector<std::pair<std::string, std::shared_ptr<torch::nn::Module>>> items{
          {"embedding", torch::nn::Embedding(7, 4).ptr()}, {"conv", torch::nn::Conv1d(4, 2, 3).ptr()}};
      dict->update(items);
    }
    torch::Tensor forward(const torch::Tensor& ids) {
      auto x = dict["embedding"]->as<rnn::EmbeddingImpl>()->forward(ids);
      x = list[1]->as<rnn::LinearImpl>()->forward(torch::tanh(list[0]->as<rnn::LinearImpl>()->forward(x)));
      return dict["conv"]->as<rnn::Conv1dImpl>()->forward(x.transpose(1, 2));
    }
  };
  NetImpl model;
  const auto parameters = model.parameters();
  prepare_qat(model, QConfig::int8());
  REQUIRE(model.list[0] == model.list[1]);
  REQUIRE(model.list->named_children()["0"] == model.list[0]);
  REQUIRE(model.dict->named_children()["conv"] == model.dict["conv"]);
  for (size_t i = 0; i < parameters.size(); ++i) {
    REQUIRE(model.parameters()[i].is_same(parameters[i]));
  }
  const auto ids = torch::tensor({{1, 2, 3, 4}, {5, 6, 0, 1}});
  model.forward(ids).sum().backward();
  REQUIRE(parameters[0].grad().defined());
  model.eval();
  const torch::NoGradGuard no_grad;
  const auto prepared = model.forward(ids);
  convert(model);
  REQUIRE(torch::allclose(model.forward(ids), prepared, 1e-4, 1e-5));
}

TEST_CASE("what cannot be replaced is told", "[nn]") {
  struct TypedImpl : torch::nn::Module {
    torch::nn::Linear typed{nullptr};
    torch::nn::Sequential body{nullptr};
    TypedImpl()
        : typed(register_module("typed", torch::nn::Linear(3, 3))),
          body(register_module("body", torch::nn::Sequential(torch::nn::Linear(3, 3), torch::nn::ReLU()))) {}
  };
  TypedImpl model;
  REQUIRE_THAT(message_of([&] { prepare_qat(model, QConfig::int8()); }),
               ContainsSubstring("typed (a typed member cannot be replaced: make it a rarefy::nn::Linear)"));
  REQUIRE(model.body->ptr(0)->as<torch::nn::LinearImpl>() != nullptr);
  prepare_qat(model, QConfig::int8(), /*strict=*/false);
  REQUIRE(model.body->ptr(0)->as<rnn::LinearImpl>() != nullptr);
  REQUIRE_THAT(report(model),
               ContainsSubstring("typed") &&
                   ContainsSubstring("a typed member cannot be replaced: make it a rarefy::nn::Linear") &&
                   ContainsSubstring("body.0"));
}

TEST_CASE("statistics are estimated anew", "[nn]") {
  torch::manual_seed(0);
  torch::nn::Sequential model(rnn::ConvBn2d(3, 4, 3), torch::nn::BatchNorm2d(4));
  auto* layer = model->ptr(0)->as<rnn::ConvBn2dImpl>();
  std::vector<torch::Tensor> batches;
  for (int i = 0; i < 3; ++i) {
    batches.push_back(torch::randn({4, 3, 6, 6}) + i);
  }
  reestimate_batch_norm(*model, 3, [&](int64_t i) { model->forward(batches[static_cast<size_t>(i)]); });
  auto mean = torch::zeros({4}, torch::kFloat64), var = torch::zeros({4}, torch::kFloat64);
  for (const auto& batch : batches) {
    const auto y = torch::conv2d(batch, layer->weight.detach()).to(torch::kFloat64);
    mean += y.mean({0, 2, 3}) / 3;
    var += y.var({0, 2, 3}, /*unbiased=*/true) / 3;
  }
  REQUIRE(torch::allclose(layer->bn->running_mean.to(torch::kFloat64), mean, 1e-5, 1e-6));
  REQUIRE(torch::allclose(layer->bn->running_var.to(torch::kFloat64), var, 1e-5, 1e-6));
  REQUIRE(layer->bn->num_batches_tracked.item<int64_t>() == 3);
  REQUIRE(layer->bn->options.momentum() == 0.1);
  REQUIRE(model->is_training());
  const auto before = layer->bn->running_mean.clone();
  REQUIRE_THAT(message_of([&] { reestimate_batch_norm(*model, 2, [](int64_t) {}); }),
               ContainsSubstring("every batch normalization must see data, but none reached: 0.bn, 1"));
  REQUIRE_THAT(message_of([&] { reestimate_batch_norm(*model, 0, [](int64_t) {}); }),
               ContainsSubstring("[reestimate_batch_norm] batches must be at least 1, got 0"));
  REQUIRE(torch::equal(layer->bn->running_mean, before));
  torch::nn::Sequential plain(torch::nn::ReLU{});
  REQUIRE_THAT(message_of([&] { freeze_batch_norm(*plain); }),
               ContainsSubstring("[freeze_batch_norm] the model must have"));
}

TEST_CASE("relu saves its mask", "[nn]") {
  torch::manual_seed(0);
  auto x = torch::randn({3, 70}).requires_grad_();
  auto y = x.detach().clone().requires_grad_();
  const auto upstream = torch::randn({3, 70});
  rarefy::ops::relu(x).backward(upstream);
  torch::relu(y).backward(upstream);
  REQUIRE(torch::equal(x.grad(), y.grad()));
  auto z = torch::randn({5});
  const auto expected = torch::relu(z);
  rarefy::ops::relu_(z);
  REQUIRE(torch::equal(z, expected));
}
