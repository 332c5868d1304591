#include <rarefy/rarefy.h>
#include <torch/torch.h>

#include <filesystem>
#include <fstream>
#include <random>

#include "catch.h"
#include "parity.h"

using namespace rarefy::quantization;
namespace rnn = rarefy::nn;
namespace fs = std::filesystem;
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

/// An empty folder that is gone at the end of the test.
struct Folder {
  Folder() {
    std::random_device random;
    path = fs::temp_directory_path() / ("rarefy_saved_" + std::to_string(random()));
    fs::create_directory(path);
  }
  ~Folder() { fs::remove_all(path); }
  fs::path operator/(const char* name) const { return path / name; }
  fs::path path;
};

/// Layers of torch::nn in a Sequential, with batch normalizations and ReLUs after them; one without.
torch::nn::Sequential make_sequential() {
  using torch::nn::Conv2dOptions;
  torch::nn::Sequential model(
      torch::nn::Conv2d(Conv2dOptions(3, 8, 3).padding(1).bias(false)), torch::nn::BatchNorm2d(8), torch::nn::ReLU(),
      torch::nn::Conv2d(Conv2dOptions(8, 8, 3).groups(2)), torch::nn::BatchNorm2d(8),
      torch::nn::MaxPool2d(torch::nn::MaxPool2dOptions(2)), torch::nn::Conv2d(Conv2dOptions(8, 6, 1)),
      torch::nn::ReLU(), torch::nn::Flatten(), torch::nn::Linear(54, 10), torch::nn::ReLU(), torch::nn::Linear(10, 4));
  return model;
}

torch::Tensor images() { return torch::randn({5, 3, 8, 8}); }

/// Prepared and calibrated, with statistics of batch normalizations that are not the initial ones.
void calibrated(torch::nn::Sequential& model, const torch::Tensor& x, const QConfig& config = QConfig::int8()) {
  model->train();
  model->forward(x);
  model->eval();
  prepare(*model, config);
  calibrate(*model, [&] { model->forward(x); });
}

torch::nn::Sequential converted(const torch::Tensor& x, const QConfig& config = QConfig::int8()) {
  auto model = make_sequential();
  calibrated(model, x, config);
  convert(*model);
  return model;
}

std::map<std::string, torch::Tensor> state_of(const torch::nn::Module& model) {
  std::map<std::string, torch::Tensor> state;
  for (const auto& items : {model.named_parameters(), model.named_buffers()}) {
    for (const auto& item : items) {
      state.emplace(item.key(), item.value().detach().clone());
    }
  }
  return state;
}

void require_equal(const std::map<std::string, torch::Tensor>& a, const std::map<std::string, torch::Tensor>& b) {
  REQUIRE(a.size() == b.size());
  for (const auto& [name, value] : a) {
    INFO(name);
    REQUIRE(b.count(name) == 1);
    REQUIRE(value.dtype() == b.at(name).dtype());
    REQUIRE(torch::equal(value, b.at(name)));
  }
}

struct WithNormImpl : torch::nn::Module {
  rnn::Conv2d conv{nullptr};
  torch::nn::BatchNorm2d bn{nullptr};
  WithNormImpl()
      : conv(register_module("conv", rnn::Conv2d(2, 3, 1))), bn(register_module("bn", torch::nn::BatchNorm2d(3))) {}
};

}  // namespace

TEST_CASE("a converted model of torch::nn layers is loaded into a fresh one", "[saved]") {
  torch::manual_seed(1);
  const Folder folder;
  const auto x = images();
  auto model = converted(x);
  save_quantized(*model, folder / "int8");

  auto fresh = make_sequential();
  load_quantized(*fresh, folder / "int8");
  const torch::NoGradGuard no_grad;
  REQUIRE(torch::equal(fresh->forward(x), model->forward(x)));
  require_equal(state_of(*fresh), state_of(*model));
  for (size_t i = 0; i < model->size(); ++i) {
    INFO(i);
    // A ConvBn is a Conv once it is converted.
    const bool is_layer = fresh->ptr(i)->as<rnn::Linear>() != nullptr || fresh->ptr(i)->as<rnn::Conv2d>() != nullptr;
    REQUIRE((is_layer || typeid(*fresh->ptr(i)) == typeid(*model->ptr(i))));
  }
  REQUIRE(fresh->ptr(1)->as<rnn::SpentBatchNorm>() != nullptr);
  REQUIRE(fresh->ptr(4)->as<rnn::SpentBatchNorm>() != nullptr);
  for (const size_t relu : {2, 7, 10}) {
    REQUIRE(fresh->ptr(relu)->as<torch::nn::Identity>() != nullptr);
  }
  REQUIRE_FALSE(fresh->is_training());

  // Again, and a clone of it.
  save_quantized(*fresh, folder / "again");
  auto clone = std::dynamic_pointer_cast<torch::nn::SequentialImpl>(fresh->clone());
  REQUIRE(torch::equal(clone->forward(x), model->forward(x)));
  save_quantized(*clone, folder / "clone");
  for (const auto* name : {"again", "clone"}) {
    const auto checkpoint = read_quantized(folder.path / name), first = read_quantized(folder / "int8");
    REQUIRE((checkpoint.layers == first.layers));
    REQUIRE(checkpoint.folded == first.folded);
    REQUIRE(first.folded == std::set<std::string>{"1", "4"});
  }
}

TEST_CASE("every layer of rarefy::nn is loaded as it was saved", "[saved]") {
  torch::manual_seed(2);
  const Folder folder;
  EveryLayer model;
  const auto ids = torch::randint(7, {8, 5}), volumes = torch::randn({8, 2, 4, 6, 6});
  auto config = QConfig::int8();
  config.overrides.emplace_back("hidden", std::nullopt);  // stays in floating point
  prepare(*model, config);
  calibrate(*model, [&] { model(ids, volumes); });
  convert(*model);
  save_quantized(*model, folder / "int8");
  EveryLayer fresh;
  load_quantized(*fresh, folder / "int8");
  REQUIRE(torch::equal(fresh(ids, volumes), model(ids, volumes)));
  require_equal(state_of(*fresh), state_of(*model));
  REQUIRE(fresh->hidden->mode() == rnn::Quantizable::Mode::floating);
  REQUIRE(fresh->conv_bn2->bn.is_empty());
  const auto checkpoint = read_quantized(folder / "int8");
  REQUIRE(checkpoint.layers.size() == 11);
  REQUIRE(checkpoint.layers.at("conv_bn1").kind == "Conv1d");
  REQUIRE(checkpoint.layers.at("conv_bn1").relu);
  REQUIRE(checkpoint.layers.at("cat").quantizers.count("input") == 1);

  // A ConvBn takes the integers of a convolution whose batch normalization stood beside it, and its ReLU of the class stays.
  auto beside = checkpoint;
  beside.folded.insert("bn");
  beside.layers.at("conv_bn1").relu = false;
  write_quantized(beside, folder / "beside");
  EveryLayer other;
  load_quantized(*other, folder / "beside");
  REQUIRE(torch::equal(other(ids, volumes), model(ids, volumes)));
}

TEST_CASE("an output grid that Python gave a layer is applied", "[saved]") {
  torch::manual_seed(3);
  const Folder folder;
  const auto x = images();
  auto model = converted(x);
  save_quantized(*model, folder / "int8");
  auto checkpoint = read_quantized(folder / "int8");
  auto& layer = checkpoint.layers.at("11");
  layer.quantizers.emplace("output", layer.quantizers.at("input"));
  for (const auto* name : {"scale", "zero_point", "min_val", "max_val", "skipped"}) {
    checkpoint.tensors.insert(std::string("11.quant.output.") + name,
                              checkpoint.tensors[std::string("11.quant.input.") + name]);
  }
  write_quantized(checkpoint, folder / "output");
  auto fresh = make_sequential();
  load_quantized(*fresh, folder / "output");
  const torch::NoGradGuard no_grad;
  const auto scale = checkpoint.tensors["11.quant.input.scale"];
  const auto zero = checkpoint.tensors["11.quant.input.zero_point"];
  const auto y = model->forward(x);
  REQUIRE(torch::equal(fresh->forward(x), ((y / scale).round() + zero).clamp(0, 255).sub(zero) * scale));
}

TEST_CASE("loading checks everything before the model changes", "[saved]") {
  torch::manual_seed(4);
  const Folder folder;
  const auto x = images();
  auto model = converted(x);
  save_quantized(*model, folder / "int8");
  const auto checkpoint = read_quantized(folder / "int8");
  const auto refused = [&](torch::nn::Module& fresh, const fs::path& from) {
    const auto before = state_of(fresh);
    const auto message = message_of([&] { load_quantized(fresh, from); });
    require_equal(state_of(fresh), before);
    return message;
  };
  auto fresh = make_sequential();

  REQUIRE_THAT(refused(*fresh, folder / "none"), ContainsSubstring("none must be a folder that save_quantized has"));
  REQUIRE_THAT(refused(*model, folder / "int8"),
               ContainsSubstring("layer 0 must be floating point in the model, but is already converted"));
  {
    auto prepared = make_sequential();
    prepare(*prepared, QConfig::int8());
    REQUIRE_THAT(refused(*prepared, folder / "int8"), ContainsSubstring("is already prepared"));
    REQUIRE_THAT(message_of([&] { save_quantized(*prepared, folder / "x"); }),
                 ContainsSubstring("[save_quantized] layer 0 must be converted, but is only prepared"));
    REQUIRE_THAT(message_of([&] { save_quantized(*fresh, folder / "x"); }),
                 ContainsSubstring("[save_quantized] the model must have converted layers; call convert first"));
    REQUIRE_FALSE(fs::exists(folder / "x"));
  }
  const auto with = [&](const std::function<void(QuantizedCheckpoint&)>& change) {
    auto changed = checkpoint;
    change(changed);
    write_quantized(changed, folder / "changed");
    return refused(*fresh, folder / "changed");
  };
  REQUIRE_THAT(with([](auto& c) { c.layers.at("9").kind = "Conv2d"; }),
               ContainsSubstring("layer 9 must be a Conv2d in the model, got a Linear"));
  REQUIRE_THAT(with([](auto& c) { c.folded.insert("5"); }), ContainsSubstring("5 must be a batch normalization"));
  REQUIRE_THAT(with([](auto& c) { c.folded.erase("1"); }), ContainsSubstring("missing are: 1.weight"));
  REQUIRE_THAT(with([](auto& c) { c.tensors.insert("more", torch::ones(1)); }),
               ContainsSubstring("unexpected are: more"));
  REQUIRE_THAT(with([](auto& c) { c.tensors["9.weight"] = c.tensors["9.weight"].slice(1, 1).contiguous(); }),
               ContainsSubstring("the weight of layer 9 must have the model's shape [10, 54], got [10, 53]"));
  REQUIRE_THAT(
      message_of([&] { with([](auto& c) { c.tensors["9.weight"] = c.tensors["9.weight"].to(torch::kFloat32); }); }),
      ContainsSubstring("[save_quantized] layer 9: weight must be Char, got Float [10, 54]"));

  WithNormImpl typed;
  QuantizedCheckpoint of_typed;
  {
    WithNormImpl source;
    prepare(source, QConfig::int8());
    calibrate(source, [&] { source.conv(torch::randn({2, 2, 3, 3})); });
    convert(source);
    save_quantized(source, folder / "typed");
    of_typed = read_quantized(folder / "typed");
  }
  of_typed.folded.insert("bn");
  write_quantized(of_typed, folder / "typed");
  REQUIRE_THAT(refused(typed, folder / "typed"),
               ContainsSubstring("the batch normalization bn is a typed member, which cannot be taken out"));

  load_quantized(*fresh, folder / "int8");  // nothing of the failures is left
  const torch::NoGradGuard no_grad;
  REQUIRE(torch::equal(fresh->forward(x), model->forward(x)));
}

TEST_CASE("a folder is replaced as a whole, and only where it is one of these", "[saved]") {
  torch::manual_seed(5);
  const Folder folder;
  const auto x = images();
  auto first = converted(x), second = converted(x);
  save_quantized(*first, folder / "int8");
  save_quantized(*second, folder / "int8");
  require_equal(state_of(*second), [&] {
    auto fresh = make_sequential();
    load_quantized(*fresh, folder / "int8");
    return state_of(*fresh);
  }());
  std::ofstream(folder.path / "int8" / "notes.txt") << "keep me";
  REQUIRE_THAT(message_of([&] { save_quantized(*first, folder / "int8"); }),
               ContainsSubstring("must hold no other files, which would be lost when it is replaced, got 'notes.txt'"));
  REQUIRE_THAT(message_of([&] { save_quantized(*first, folder.path / "int8" / "notes.txt"); }),
               ContainsSubstring("must be a folder, or not be there"));
  REQUIRE(std::distance(fs::directory_iterator(folder.path), fs::directory_iterator()) == 1);
  REQUIRE(fs::exists(folder.path / "int8" / "notes.txt"));
}
