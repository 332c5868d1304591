#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <map>

#include "catch.h"
#include "models.h"

// What export_onnx refuses, and what it leaves behind. That its files compute what the models compute is shown by
// tests/python/test_cpp_onnx.py, which runs them.

using Catch::Matchers::ContainsSubstring;
using torch::Tensor;
namespace fs = std::filesystem;
namespace quantization = rarefy::quantization;

namespace {

struct Folder {
  fs::path path;
  Folder() : path(fs::temp_directory_path() / ("rarefy_onnx_" + std::to_string(::getpid()))) {
    fs::create_directory(path);
  }
  Folder(const Folder&) = delete;
  Folder& operator=(const Folder&) = delete;
  ~Folder() { fs::remove_all(path); }
  size_t files() const {
    return static_cast<size_t>(std::distance(fs::directory_iterator(path), fs::directory_iterator()));
  }
};

std::string bytes_of(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

/// The message of the ValueError that exporting gives, after which there must be no file.
std::string refusal(torch::nn::Module& model, const rarefy::OnnxForward& forward, const std::vector<Tensor>& inputs,
                    const rarefy::OnnxOptions& options = {}) {
  const Folder folder;
  try {
    rarefy::export_onnx(model, forward, inputs, folder.path / "model.onnx", options);
  } catch (const c10::ValueError& error) {
    CHECK(folder.files() == 0);
    return error.what_without_backtrace();
  }
  return "nothing was thrown";
}

rarefy::OnnxForward of(const std::function<Tensor(const Tensor&)>& function) {
  return [=](const std::vector<Tensor>& inputs) { return std::vector<Tensor>{function(inputs[0])}; };
}

}  // namespace

TEST_CASE("export_onnx reports what it wrote", "[onnx]") {
  const Folder folder;
  const auto path = folder.path / "model.onnx";
  onnx_models::Residual model;
  const auto x = torch::randn({4, 3, 12, 12});
  quantization::prepare(*model, quantization::QConfig::int8());
  quantization::calibrate(*model, [&] { model(x); });
  model->train();
  const auto report = rarefy::export_onnx(model, x, path);
  CHECK(model->is_training());
  CHECK(report.path == path);
  CHECK(report.bytes == static_cast<int64_t>(fs::file_size(path)));
  CHECK(report.target == "onnxruntime");
  CHECK(report.opset == 21);
  CHECK(report.inputs == std::vector<std::string>{"input: float32 [batch, 3, 12, 12]"});
  CHECK(report.outputs == std::vector<std::string>{"output: float32 [batch, 5]"});
  const std::map<std::string, int64_t> nodes(report.nodes.begin(), report.nodes.end());
  CHECK(nodes.at("Conv") == 5);
  CHECK(!nodes.contains("BatchNormalization"));
  CHECK_THAT(report.str(), ContainsSubstring("5 Conv"));
  CHECK(folder.files() == 1);

  const auto before = bytes_of(path);
  rarefy::export_onnx(model, x, path);
  CHECK(bytes_of(path) == before);
}

TEST_CASE("export_onnx puts large weights into a file of their own", "[onnx]") {
  const Folder folder;
  const auto path = folder.path / "model.onnx";
  torch::nn::Sequential model(torch::nn::Linear(64, 64), torch::nn::Linear(64, 3));
  rarefy::OnnxOptions options;
  options.external_data_above = 1000;
  const auto report = rarefy::export_onnx(model, torch::randn({2, 64}), path, options);
  const auto data = folder.path / "model.onnx.data";
  REQUIRE(fs::exists(data));
  CHECK(fs::file_size(data) == 64 * 64 * 4);  // the second weight is smaller than 1 KiB
  CHECK(report.bytes == static_cast<int64_t>(fs::file_size(path) + fs::file_size(data)));
  CHECK(folder.files() == 2);
}

TEST_CASE("export_onnx leaves the file of weights as it was when the model cannot take its place", "[onnx]") {
  const Folder folder;
  const auto path = folder.path / "model.onnx", data = folder.path / "model.onnx.data";
  torch::nn::Linear model(64, 64);
  const auto x = torch::randn({2, 64});
  rarefy::OnnxOptions options;
  options.external_data_above = 1000;
  const auto blocked = [&](const std::vector<Tensor>& inputs) {
    fs::remove_all(path);
    fs::create_directory(path);  // after the arguments were checked
    return std::vector<Tensor>{model(inputs[0])};
  };
  CHECK_THROWS_WITH(rarefy::export_onnx(*model, blocked, {x}, path, options),
                    ContainsSubstring("[export_onnx] cannot rename " + path.string()));
  CHECK(folder.files() == 1);  // the folder in the model's place
  fs::remove_all(path);
  rarefy::export_onnx(model, x, path, options);
  const auto before = bytes_of(data);
  CHECK(before.size() == 64 * 64 * 4);
  {
    const torch::NoGradGuard no_grad;
    model->weight.add_(1.0);
  }
  CHECK_THROWS_WITH(rarefy::export_onnx(*model, blocked, {x}, path, options), ContainsSubstring("Is a directory"));
  CHECK(bytes_of(data) == before);
  CHECK(folder.files() == 2);
  fs::remove_all(path);
  rarefy::export_onnx(model, x, path, options);
  CHECK(bytes_of(data) != before);
  CHECK(folder.files() == 2);
}

TEST_CASE("export_onnx refuses arguments that are wrong", "[onnx]") {
  torch::nn::Linear model(3, 2);
  const auto x = torch::randn({2, 3});
  const auto forward = of([&](const Tensor& input) { return model(input); });
  const auto with = [&](const std::function<void(rarefy::OnnxOptions&)>& change) {
    rarefy::OnnxOptions options;
    change(options);
    return refusal(*model, forward, {x}, options);
  };
  CHECK_THAT(with([](auto& o) { o.target = "abacus"; }), ContainsSubstring("target must be one of onnxruntime"));
  CHECK_THAT(with([](auto& o) { o.opset = 12; }),
             ContainsSubstring("[export_onnx] opset must be between 13 and 23 for onnxruntime, got 12"));
  CHECK_THAT(with([](auto& o) { o.opset = 24; }), ContainsSubstring("got 24"));
  CHECK_THAT(with([](auto& o) { o.input_names = {"a", "b"}; }),
             ContainsSubstring("input_names must be 1 different names, got a, b"));
  CHECK_THAT(with([](auto& o) { o.output_names = {"a", "a"}; }), ContainsSubstring("output_names must be 1 different"));
  CHECK_THAT(with([](auto& o) {
               o.input_names = {"x"};
               o.output_names = {"x"};
             }),
             ContainsSubstring("inputs and outputs must have different names, got 'x' for both"));
  CHECK_THAT(refusal(*model, forward, {}), ContainsSubstring("example_inputs must hold at least one tensor"));
  CHECK_THAT(refusal(*model, forward, {x, torch::randn({3, 3})}),
             ContainsSubstring("share the size of their first dimension, at least 1, got shapes [2, 3], [3, 3]"));
  CHECK_THROWS_WITH(rarefy::export_onnx(model, x, "/nowhere/model.onnx"), ContainsSubstring("a folder that exists"));
  CHECK_THROWS_WITH(rarefy::export_onnx(model, x, fs::temp_directory_path()),
                    ContainsSubstring("path must name a file"));
}

TEST_CASE("export_onnx refuses quantizers that have no numbers to write", "[onnx]") {
  onnx_models::Residual model;
  const auto x = torch::randn({4, 3, 12, 12});
  const auto forward = of([&](const Tensor& input) { return model(input); });
  quantization::prepare(*model, quantization::QConfig::int8());
  CHECK_THAT(refusal(*model, forward, {x}),
             ContainsSubstring("have observed data (train a step, or calibrate), but these have not, got 10 of 16: "
                               "stem.quant.input, conv1.quant.input"));
  quantization::calibrate(*model, [&] { model(x); });
  quantization::set_state(*model, std::nullopt, false);
  CHECK_THAT(refusal(*model, forward, {x}), ContainsSubstring("these are switched off, got 16 of 16"));
  quantization::set_state(*model, std::nullopt, true);
  rarefy::OnnxOptions options;
  options.target = "tensorrt";
  CHECK_THAT(refusal(*model, forward, {x}, options),
             ContainsSubstring("stem.quant.input: tensorrt knows no zero points: activations must be symmetric"));
  model->fc->quant->find("input")->scale.zero_();
  CHECK_THAT(refusal(*model, forward, {x}),
             ContainsSubstring("scales must be finite and positive, got 0 to 0 in fc.quant.input"));
}

TEST_CASE("export_onnx names every operator that it does not know", "[onnx]") {
  onnx_models::Residual model;
  const auto x = torch::randn({4, 3, 12, 12});
  const auto around = of([&](const Tensor& input) { return torch::cumsum(model(input.flip({1})), 1).flip({1}); });
  CHECK_THAT(refusal(*model, around, {x}),
             ContainsSubstring("every operator must have a form in ONNX that is known here, but aten::flip, "
                               "aten::cumsum (after fc), aten::flip (after fc) have none"));
  CHECK_THAT(refusal(*model, of([&](const Tensor& input) { return torch::max_pool2d(input[0], 2); }), {x}),
             ContainsSubstring("aten::max_pool2d: its input must have a batch dimension"));
}

TEST_CASE("export_onnx refuses what cannot follow the batch", "[onnx]") {
  torch::nn::Linear model(3, 2);
  const auto x = torch::randn({2, 3});
  const auto refused = [&](const std::function<Tensor(const Tensor&)>& function) {
    return refusal(*model, of(function), {x});
  };
  CHECK_THAT(refused([](const Tensor& y) { return y.select(0, y.size(0) - 1); }),
             ContainsSubstring("aten::select: argument 'index' must not depend on the size of the batch"));
  CHECK_THAT(refused([](const Tensor& y) { return y + torch::arange(y.size(0)).view({-1, 1}); }),
             ContainsSubstring("aten::add: argument 'other' has values that depend on the size of the batch"));
  CHECK_THAT(refused([](const Tensor& y) { return y * torch::full({3}, static_cast<double>(y.size(0))); }),
             ContainsSubstring("constants must not depend on the size of the batch"));
  CHECK_THAT(refused([](const Tensor& y) { return y * static_cast<double>(y.size(0)); }),
             ContainsSubstring("argument 'other' must not depend on the size of the batch"));
  // Equal for 2 and 3 samples.
  CHECK_THAT(refused([](const Tensor& y) { return y.slice(0, 0, y.size(0) / 2); }),
             ContainsSubstring("aten::slice: argument 'end' must not depend on the size of the batch"));
  CHECK_THAT(refused([](const Tensor& y) { return y * static_cast<double>(y.size(0) / 2); }),
             ContainsSubstring("argument 'other' must not depend on the size of the batch"));
  CHECK_THAT(refused([](const Tensor& y) { return y * torch::full({3}, static_cast<double>(y.size(0) / 2)); }),
             ContainsSubstring("constants must not depend on the size of the batch"));
  CHECK_THAT(refused([](const Tensor& y) { return y + torch::ones({y.size(0) / 2, 1, 3}); }),
             ContainsSubstring("a size must be fixed or a multiple of the batch"));
  CHECK_THAT(refused([](const Tensor& y) { return y.unsqueeze(0).expand({y.size(0) / 2 + 1, -1, -1}).contiguous(); }),
             ContainsSubstring("aten::expand: a size must be fixed or a multiple of the batch"));
  CHECK_THAT(refused([](const Tensor& y) { return y.size(0) > 4 ? y.neg() : y.abs(); }),
             ContainsSubstring("runs aten::abs for 2 samples where it runs aten::neg for 7"));
  CHECK_THAT(refused([](const Tensor& y) { return torch::cat({y, y}).slice(0, 0, y.size(0) > 4 ? 6 : 9); }),
             ContainsSubstring("aten::slice: argument 'end' must not depend on the size of the batch"));
  CHECK_THAT(refused([](const Tensor& y) { return y.size(0) > 2 ? y.neg() : y.abs(); }),
             ContainsSubstring(
                 "the same operators for every batch, but runs aten::abs for 2 samples where it runs aten::neg"));
  CHECK_THAT(refused([](const Tensor& y) { return torch::cat(y.unbind(0)); }),
             ContainsSubstring("the same operators for every batch"));
  CHECK_THAT(
      refused([](const Tensor& y) { return y.view({2, 3}); }),
      ContainsSubstring("must run for every batch, but runs for 2 samples and not for 3, rows of the inputs "
                        "repeated (dynamic_batch = false fixes the size of the batch): shape '[2, 3]' is invalid"));
  const Folder folder;
  rarefy::OnnxOptions options;
  options.dynamic_batch = false;
  const auto last = of([](const Tensor& y) { return y.select(0, y.size(0) - 1); });
  const auto report = rarefy::export_onnx(*model, last, {x}, folder.path / "model.onnx", options);
  CHECK(report.inputs == std::vector<std::string>{"input: float32 [2, 3]"});
}

TEST_CASE("export_onnx refuses what a value of ONNX cannot do", "[onnx]") {
  torch::nn::Linear model(3, 2);
  const auto x = torch::randn({2, 3});
  CHECK_THAT(refusal(*model, of([](const Tensor& input) {
               auto y = input * 1, view = y.view({-1});
               view.add_(1);
               return y;
             }),
                     {x}),
             ContainsSubstring("aten::add_: a tensor that is changed in place must not be read through another view"));
  CHECK_THAT(
      refusal(*model,
              of([](const Tensor& input) { return input.norm().item<double>() > 0 ? input.abs() : input.neg(); }), {x}),
      ContainsSubstring("aten::item"));
  CHECK_THAT(refusal(*model, of([](const Tensor& input) { return (input > 0) + (input < 1); }), {x}),
             ContainsSubstring("aten::add: ONNX computes with numbers, got bool"));
  CHECK_THAT(refusal(*model, of([](const Tensor& input) { return torch::dropout(input, 0.5, true); }), {x}),
             ContainsSubstring("dropout must be off"));
}

TEST_CASE("export_onnx refuses bags that are not the rows of a matrix", "[onnx][embedding_bag]") {
  const auto options = torch::nn::EmbeddingBagOptions(9, 4).mode(torch::kSum);
  rarefy::nn::EmbeddingBag bag(options);
  torch::nn::EmbeddingBag plain(options);
  torch::nn::ModuleDict model(std::vector<std::pair<std::string, std::shared_ptr<torch::nn::Module>>>{
      {"bag", bag.ptr()}, {"plain", plain.ptr()}});
  // Offsets that stay offsets when they are repeated for another size of the batch.
  const auto ids = torch::randint(9, {6}), offsets = torch::zeros({6}, torch::kInt64);
  const std::string rule =
      "bags must be the rows of a matrix of indices, as ONNX has no operator that reduces the rows between offsets, got ";
  const auto two = [](auto& layer) {
    return rarefy::OnnxForward(
        [&layer](const std::vector<Tensor>& x) { return std::vector<Tensor>{layer->forward(x[0], x[1])}; });
  };
  CHECK_THAT(
      refusal(*model, two(bag), {ids, offsets}),
      ContainsSubstring("[export_onnx] rarefy::reduce_bags (bag): " + rule + "indices of 1 dimension and offsets"));
  CHECK_THAT(
      refusal(*model, two(plain), {ids, offsets}),
      ContainsSubstring("[export_onnx] aten::embedding_bag (plain): " + rule + "offsets that depend on the input"));
  // Constant offsets: bags of sizes that differ, or of the sizes of one batch alone.
  CHECK_THAT(refusal(*model, of([&](const Tensor& x) {
               const auto half = x.size(0) / 2 + 1;
               return plain->forward(x, torch::arange(x.size(0)).clamp_max(half));
             }),
                     {ids}),
             ContainsSubstring(rule + "offsets that do not cut them into bags of one size"));
  // As many bags for every batch: their offsets are constants that follow it.
  CHECK_THAT(refusal(*model, of([&](const Tensor& x) { return plain->forward(x.t()); }), {torch::randint(9, {2, 3})}),
             ContainsSubstring("constants must not depend on the size of the batch"));
  // torch lets the last of such bags go, which nobody means.
  rarefy::nn::EmbeddingBag last(torch::nn::EmbeddingBagOptions(9, 4).include_last_offset(true));
  CHECK_THAT(refusal(*last, of([&](const Tensor& x) { return last->forward(x); }), {torch::randint(9, {3, 3})}),
             ContainsSubstring(rule + "include_last_offset"));
  CHECK_THAT(refusal(*model, of([&](const Tensor& x) {
               return torch::nn::functional::embedding_bag(
                   x, plain->weight, torch::nn::functional::EmbeddingBagFuncOptions().max_norm(1.0));
             }),
                     {torch::randint(9, {3, 3})}),
             ContainsSubstring("aten::embedding_renorm_"));
  rarefy::OnnxOptions fixed;
  fixed.dynamic_batch = false;
  const Folder folder;
  const auto path = folder.path / "model.onnx";
  const auto turned = of([&](const Tensor& x) { return plain->forward(x.t()); });
  const auto report = rarefy::export_onnx(*model, turned, {torch::randint(9, {2, 3})}, path, fixed);
  CHECK(report.outputs == std::vector<std::string>{"output: float32 [3, 4]"});
}

TEST_CASE("export_onnx keeps the codes of adapters' NF4 base, unless they are merged", "[onnx][lora]") {
  rarefy::nn::LoRALinear layer(*torch::nn::Linear(192, 96),
                               rarefy::nn::LoRAOptions{.rank = 4, .base = rarefy::nn::LoRABase::nf4});
  const auto forward = of([&](const Tensor& x) { return layer->forward(x); });
  const auto x = torch::randn({2, 192});
  const Folder folder;
  const auto path = folder.path / "model.onnx";
  const auto report = rarefy::export_onnx(*layer, forward, {x}, path);
  const auto adapters = (layer->lora_a.numel() + layer->lora_b.numel() + layer->bias.numel()) * 4;
  CHECK(report.bytes < layer->packed.codes.numel() + adapters + 8192);  // codes in bytes would be 9216 more
  layer->merge();
  const auto merged = rarefy::export_onnx(*layer, forward, {x}, path);
  CHECK(merged.bytes > 192 * 96 * 4);  // base and adapters in one float matrix, as asked for
}
