#include <rarefy/rarefy.h>
#include <torch/torch.h>

#include <filesystem>
#include <random>

#include "catch.h"

using namespace rarefy::quantization;
namespace rnn = rarefy::nn;
using Catch::Matchers::ContainsSubstring;

namespace {

/// Every way that bytes can take: a ReLU, a residual, a concatenation, a reshaping. `head` chooses the end.
struct NetImpl : torch::nn::Module {
  rnn::Conv2d first{nullptr}, inner{nullptr}, left{nullptr}, right{nullptr};
  rnn::Add add;
  rnn::Cat cat;
  rnn::Linear fc1{nullptr}, fc2{nullptr};
  bool view = false, mean = false, pool = false;

  NetImpl() : add(register_module("add", rnn::Add())), cat(register_module("cat", rnn::Cat(1))) {
    const auto conv = [](int64_t in, int64_t out, int64_t kernel, int64_t stride = 1) {
      return rnn::Conv2d(rnn::Conv2dOptions(in, out, kernel).padding(kernel / 2).stride(stride));
    };
    first = register_module("first", conv(3, 8, 3, 2));
    inner = register_module("inner", conv(8, 8, 3));
    left = register_module("left", conv(8, 4, 1));
    right = register_module("right", conv(8, 6, 3));
    fc1 = register_module("fc1", rnn::Linear(160, 12));
    fc2 = register_module("fc2", rnn::Linear(12, 5));
  }

  torch::Tensor forward(torch::Tensor x) {
    x = torch::relu(first(x));
    x = pool ? torch::max_pool2d(x, 3, 1, 1) : x;
    x = torch::relu(add(x, inner(x)));
    if (mean) {
      x = x - x.mean({2, 3}, /*keepdim=*/true);
    }
    x = cat(std::vector<torch::Tensor>{left(x), right(x)});
    x = fc1(view ? x.view({x.size(0), -1}) : x.flatten(1));
    return fc2(x.relu_());
  }
};
TORCH_MODULE(Net);

torch::Tensor images() {
  torch::manual_seed(7);
  return torch::randn({3, 3, 8, 8});
}

/// The same each time: calibrated, not converted.
Net make(const std::function<void(NetImpl&)>& change = nullptr) {
  torch::manual_seed(8);
  Net net;
  if (change != nullptr) {
    change(*net);
  }
  prepare(*net, QConfig::int8());
  calibrate(*net, [&] { net->forward(images()); });
  return net;
}

void link(Net& net) {
  convert(*net, [&] { return std::vector{net->forward(images())}; });
}

bool gives_bytes(const rnn::Quantizable& layer) { return layer.quant_state()->next() != nullptr; }

torch::Tensor run(Net& net, const torch::Tensor& x) {
  const torch::NoGradGuard no_grad;
  return net->forward(x);
}

}  // namespace

TEST_CASE("bytes flow between converted layers, and no number changes", "[link]") {
  auto apart = make(), linked = make();
  convert(*apart);
  linked->train();
  link(linked);
  REQUIRE(linked->is_training());  // as it was
  REQUIRE(torch::equal(run(linked, images()), run(apart, images())));
  const auto others = torch::randn({4, 3, 8, 8}) * 2;
  REQUIRE(torch::equal(run(linked, others), run(apart, others)));

  for (const rnn::Quantizable* layer :
       {static_cast<rnn::Quantizable*>(linked->first.get()), static_cast<rnn::Quantizable*>(linked->inner.get()),
        static_cast<rnn::Quantizable*>(linked->left.get()), static_cast<rnn::Quantizable*>(linked->right.get()),
        static_cast<rnn::Quantizable*>(linked->add.get()), static_cast<rnn::Quantizable*>(linked->cat.get()),
        static_cast<rnn::Quantizable*>(linked->fc1.get())}) {
    INFO(layer->kind() << " " << layer->note);
    REQUIRE(gives_bytes(*layer));
  }
  REQUIRE_FALSE(gives_bytes(*linked->fc2));
  REQUIRE(linked->first->relu());
  REQUIRE(linked->add->relu());
  REQUIRE(linked->fc1->relu());
  REQUIRE_FALSE(linked->inner->relu());
  const torch::NoGradGuard no_grad;
  REQUIRE(linked->first->forward(images()).scalar_type() == torch::kUInt8);
  // The grid is that of the reader, not one of its own.
  REQUIRE(torch::equal(linked->inner->quant_state()->next()->scale, linked->add->quant_state()->find("input1")->scale));
  const auto text = report(*linked);
  REQUIRE_THAT(text, ContainsSubstring("gives bytes"));
  REQUIRE_THAT(text, ContainsSubstring("gives floats: the model returns its result"));
}

TEST_CASE("a layer that something else reads gives floats", "[link]") {
  const auto with_mean = [](NetImpl& net) { net.mean = true; };
  auto apart = make(with_mean), linked = make(with_mean);
  convert(*apart);
  link(linked);
  REQUIRE(torch::equal(run(linked, images()), run(apart, images())));
  REQUIRE_FALSE(gives_bytes(*linked->add));
  REQUIRE(gives_bytes(*linked->first));
  REQUIRE_THAT(linked->add->note, ContainsSubstring("gives floats: aten::"));
  REQUIRE_THAT(linked->add->note, ContainsSubstring("reads its result in floating point"));
}

TEST_CASE("a model that refuses channels-last runs as it is", "[link]") {
  const auto with_view = [](NetImpl& net) { net.view = true; };
  auto apart = make(with_view), linked = make(with_view);
  convert(*apart);
  link(linked);
  REQUIRE(torch::equal(run(linked, images()), run(apart, images())));
  REQUIRE(linked->inner->weight.is_contiguous());
  REQUIRE(gives_bytes(*linked->fc1));
  REQUIRE(gives_bytes(*linked->cat));

  auto other = make();
  link(other);
  REQUIRE(other->inner->weight.is_contiguous(at::MemoryFormat::ChannelsLast));
}

TEST_CASE("readers on different grids, and layers that run twice, get floats", "[link]") {
  auto net = make();
  // The residual is quantized otherwise by the addition than by the convolution.
  auto* input = net->add->quant_state()->find("input0");
  const torch::NoGradGuard no_grad;
  input->scale.mul_(1.5);
  link(net);
  REQUIRE_FALSE(gives_bytes(*net->first));
  REQUIRE(net->first->note == "gives floats: its readers have different grids");

  auto twice = make();
  convert(*twice, [&] {
    twice->first(images());
    return std::vector{twice->forward(images())};
  });
  REQUIRE(twice->first->note == "gives floats: forward calls it not once");
  REQUIRE(gives_bytes(*twice->inner));
}

TEST_CASE("a function that throws leaves the model prepared", "[link]") {
  auto net = make();
  const auto before = run(net, images());
  REQUIRE_THROWS_AS(convert(*net,
                            [&]() -> std::vector<torch::Tensor> {
                              net->forward(images());
                              throw std::runtime_error("no more images");
                            }),
                    std::runtime_error);
  REQUIRE(net->first->mode() == rnn::Quantizable::Mode::prepared);
  REQUIRE(torch::equal(run(net, images()), before));
  link(net);
  REQUIRE(net->first->mode() == rnn::Quantizable::Mode::converted);
}

TEST_CASE("links are saved and loaded", "[link][saved]") {
  std::random_device random;
  const auto folder = std::filesystem::temp_directory_path() / ("rarefy_link_" + std::to_string(random()));
  auto net = make();
  link(net);
  save_quantized(*net, folder);
  const auto checkpoint = read_quantized(folder);
  REQUIRE((checkpoint.layers.at("first").next == IntegerRange{0, 255}));
  REQUIRE(checkpoint.layers.at("first").channels_last);
  REQUIRE_FALSE(checkpoint.layers.at("fc2").next.has_value());
  REQUIRE(checkpoint.tensors.contains("first.quant.next.zero_point"));
  Net fresh;
  load_quantized(*fresh, folder);
  std::filesystem::remove_all(folder);
  REQUIRE(torch::equal(run(fresh, images()), run(net, images())));
  REQUIRE(gives_bytes(*fresh->first));
  REQUIRE(fresh->first->weight.strides() == net->first->weight.strides());
}

TEST_CASE("a Sequential of torch's layers is linked", "[link]") {
  const auto make_sequential = [] {
    torch::manual_seed(9);
    torch::nn::Sequential model(torch::nn::Conv2d(torch::nn::Conv2dOptions(3, 8, 3)), torch::nn::BatchNorm2d(8),
                                torch::nn::ReLU(), torch::nn::Dropout(),
                                torch::nn::Conv2d(torch::nn::Conv2dOptions(8, 4, 1)), torch::nn::ReLU(),
                                torch::nn::Flatten(), torch::nn::Dropout(), torch::nn::Linear(144, 4));
    prepare(*model, QConfig::int8());
    calibrate(*model, [&] { model->forward(images()); });
    model->eval();
    return model;
  };
  auto apart = make_sequential(), linked = make_sequential();
  convert(*apart);
  convert(*linked, [&] { return std::vector{linked->forward(images())}; });
  const torch::NoGradGuard no_grad;
  REQUIRE(torch::equal(linked->forward(images()), apart->forward(images())));
  for (const size_t i : {0, 4}) {
    REQUIRE(gives_bytes(*dynamic_cast<rnn::Quantizable*>(linked->ptr(i).get())));
  }
  // A clone has the links.
  auto clone = std::dynamic_pointer_cast<torch::nn::SequentialImpl>(linked->clone());
  REQUIRE(torch::equal(clone->forward(images()), apart->forward(images())));
  REQUIRE(gives_bytes(*dynamic_cast<rnn::Quantizable*>(clone->ptr(0).get())));
}

TEST_CASE("bytes flow through the poolings of a Sequential, at any size of image", "[link][saved]") {
  // torch's max_pool2d refuses bytes of channels-last images with more than 127 pixels.
  const auto images = torch::randn({2, 3, 32, 32});
  const auto make_float = [] {
    torch::manual_seed(10);
    return torch::nn::Sequential(torch::nn::Conv2d(torch::nn::Conv2dOptions(3, 8, 3)), torch::nn::ReLU(),
                                 torch::nn::MaxPool2d(2), torch::nn::Conv2d(torch::nn::Conv2dOptions(8, 4, 1)),
                                 torch::nn::ReLU(), torch::nn::Flatten(), torch::nn::Linear(900, 4));
  };
  const auto make_pooled = [&] {
    auto model = make_float();
    prepare(*model, QConfig::int8());
    calibrate(*model, [&] { model->forward(images); });
    model->eval();
    return model;
  };
  auto apart = make_pooled(), linked = make_pooled();
  convert(*apart);
  convert(*linked, [&] { return std::vector{linked->forward(images)}; });
  const torch::NoGradGuard no_grad;
  REQUIRE(torch::equal(linked->forward(images), apart->forward(images)));
  const auto layer = [](const torch::nn::Sequential& model, size_t i) {
    return dynamic_cast<rnn::Quantizable*>(model->ptr(i).get());
  };
  REQUIRE(gives_bytes(*layer(linked, 0)));
  REQUIRE(gives_bytes(*layer(linked, 3)));
  auto clone = std::dynamic_pointer_cast<torch::nn::SequentialImpl>(linked->clone());
  REQUIRE(torch::equal(clone->forward(images), apart->forward(images)));

  std::random_device random;
  const auto folder = std::filesystem::temp_directory_path() / ("rarefy_pool_" + std::to_string(random()));
  save_quantized(*linked, folder);
  auto fresh = make_float();
  load_quantized(*fresh, folder);
  std::filesystem::remove_all(folder);
  fresh->eval();
  REQUIRE(gives_bytes(*layer(fresh, 0)));
  REQUIRE(torch::equal(fresh->forward(images), apart->forward(images)));
}

TEST_CASE("torch's max_pool2d in forward gets floats", "[link]") {
  const auto pooled = [](NetImpl& net) { net.pool = true; };
  auto apart = make(pooled), linked = make(pooled);
  convert(*apart);
  link(linked);
  const auto large = torch::randn({1, 3, 8, 8});
  REQUIRE(torch::equal(run(linked, large), run(apart, large)));
  REQUIRE_FALSE(gives_bytes(*linked->first));
  REQUIRE(linked->first->note == "gives floats: aten::max_pool2d reads its result in floating point");
}

TEST_CASE("an operator is no reader of its own result", "[link]") {
  // Few channels, and one dimension: the operator copies what it computed to its layout.
  const auto check = [](torch::nn::Sequential model, const torch::Tensor& x) {
    prepare(*model, QConfig::int8());
    calibrate(*model, [&] { model->forward(x); });
    model->eval();
    auto apart = std::dynamic_pointer_cast<torch::nn::SequentialImpl>(model->clone());
    convert(*apart);
    convert(*model, [&] { return std::vector{model->forward(x)}; });
    const auto& first = *dynamic_cast<rnn::Quantizable*>(model->ptr(0).get());
    INFO(first.note);
    REQUIRE(gives_bytes(first));
    const torch::NoGradGuard no_grad;
    REQUIRE(torch::equal(model->forward(x), apart->forward(x)));
  };
  torch::manual_seed(11);
  check(torch::nn::Sequential(torch::nn::Conv1d(torch::nn::Conv1dOptions(4, 8, 3)), torch::nn::ReLU(),
                              torch::nn::Conv1d(torch::nn::Conv1dOptions(8, 4, 1))),
        torch::randn({2, 4, 20}));
  check(torch::nn::Sequential(torch::nn::Conv2d(torch::nn::Conv2dOptions(1, 8, 3)), torch::nn::ReLU(),
                              torch::nn::Conv2d(torch::nn::Conv2dOptions(8, 4, 1))),
        torch::randn({2, 1, 9, 9}));
  check(torch::nn::Sequential(torch::nn::Conv2d(torch::nn::Conv2dOptions(1, 1, 3)), torch::nn::ReLU(),
                              torch::nn::Conv2d(torch::nn::Conv2dOptions(1, 4, 1))),
        torch::randn({2, 1, 9, 9}));
}
