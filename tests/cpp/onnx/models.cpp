// rarefy_onnx_models FOLDER: what tests/python/test_cpp_onnx.py runs. Writes, for each network of models.h, each target and
// several operator sets, FOLDER/<case>.onnx, and FOLDER/<case>.safetensors with inputs "input.<n>" and outputs "output.<n>" of
// the simulated model on more samples than the example had.
#include "models.h"

#include <filesystem>
#include <iostream>

#include "bags.h"
#include "formats.h"

namespace {

namespace quantization = rarefy::quantization;
using torch::Tensor;

quantization::QConfig config_for(const std::string& target, bool is_signed) {
  auto config = quantization::QConfig::int8(target);
  if (is_signed) {
    config.activation = quantization::Scheme{.bits = 8, .symmetric = true};
  }
  config.execution = quantization::Execution::simulated;
  return config;
}

/// Scales that are powers of two: sums of products are then exact, in every order.
void make_exact(torch::nn::Module& model) {
  const torch::NoGradGuard no_grad;
  for (const auto& module : model.modules()) {
    if (auto* quantizer = module->as<quantization::FakeQuantizerImpl>()) {
      quantizer->scale.copy_(quantizer->scale.log2().ceil().exp2());
      quantizer->observe = false;
    }
  }
}

struct Case {
  std::string name, target;
  std::optional<int64_t> opset = std::nullopt;
  bool is_signed = false;
  bool exact = false;
  bool quantized = true;
  bool converted = false;
  bool linked = false;
  bool external = false;
};

class Exporter {
 public:
  explicit Exporter(std::filesystem::path folder) : folder_(std::move(folder)) {}

  template <typename Model, typename... Inputs>
  void write(const Case& c, Model model, const Inputs&... inputs) {
    model->eval();
    const std::vector<Tensor> whole{inputs...};
    const auto run = [&](const std::vector<Tensor>& tensors) { return forward(model, tensors); };
    if (c.quantized) {
      quantization::prepare(*model, config_for(c.target, c.is_signed), /*strict=*/false);
      quantization::calibrate(*model, [&] { run(whole); });
    }
    if (c.exact) {
      make_exact(*model);
    }
    if (c.converted) {
      quantization::convert(*model);
    } else if (c.linked) {
      quantization::convert(*model, [&] { return run(whole); });
    }
    std::vector<Tensor> example;
    for (const auto& input : whole) {
      example.push_back(input.slice(0, 0, 2));
    }
    rarefy::OnnxOptions options;
    options.target = c.target;
    options.opset = c.opset;
    options.external_data_above = c.external ? 0 : options.external_data_above;
    const auto stem = c.name + "-" + c.target + (c.opset ? "-" + std::to_string(*c.opset) : "");
    const auto report = rarefy::export_onnx(*model, run, example, folder_ / (stem + ".onnx"), options);
    std::cout << report << "\n";
    const torch::NoGradGuard no_grad;
    rarefy::NamedTensors tensors;
    for (size_t i = 0; i < whole.size(); ++i) {
      tensors.insert("input." + std::to_string(i), whole[i].clone());
    }
    const auto outputs = run(whole);
    for (size_t i = 0; i < outputs.size(); ++i) {
      tensors.insert("output." + std::to_string(i), outputs[i].clone());
    }
    rarefy::save_safetensors(tensors, folder_ / (stem + ".safetensors"));
  }

 private:
  static std::vector<Tensor> forward(onnx_models::Signals& model, const std::vector<Tensor>& x) {
    const auto [scores, features] = model->forward(x[0], x[1]);
    return {scores, features};
  }
  template <typename Model>
  static std::vector<Tensor> forward(Model& model, const std::vector<Tensor>& x) {
    return {model->forward(x[0])};
  }

  std::filesystem::path folder_;
};

void write_networks(const std::string& folder) {
  Exporter exporter(folder);
  const auto images = torch::randn({7, 3, 12, 12}), rows = torch::randn({7, 10}), patches = torch::randn({7, 3, 8, 8});
  const auto signals = torch::randn({7, 3, 20}), volumes = torch::randn({7, 2, 4, 6, 6});
  const auto ids = torch::randint(11, {7, 6});
  const auto write_all = [&](const Case& c) {
    const auto named = [&](const std::string& name) {
      auto copy = c;
      copy.name = name + c.name;
      return copy;
    };
    exporter.write(named("residual"), onnx_models::Residual(), images);
    exporter.write(named("mlp"), onnx_models::make_mlp(), rows);
    exporter.write(named("transformer"), onnx_models::Transformer(), ids);
    exporter.write(named("signals"), onnx_models::Signals(), signals, volumes);
    exporter.write(named("patches"), onnx_models::Patches(), patches);
  };
  for (const auto* target : {"onnxruntime", "openvino", "tensorrt", "qnn"}) {
    write_all({.name = "", .target = target});
  }
  for (int64_t opset : {13, 17, 18, 21}) {
    write_all({.name = "", .target = "onnxruntime", .opset = opset});
  }
  write_all({.name = "-signed", .target = "onnxruntime", .is_signed = true});
  write_all({.name = "-exact", .target = "onnxruntime", .exact = true});
  write_all({.name = "-float", .target = "onnxruntime", .quantized = false});
  write_all({.name = "-converted", .target = "onnxruntime", .converted = true});
  write_all({.name = "-converted", .target = "tensorrt", .converted = true});
  for (const auto* target : {"onnxruntime", "openvino", "qnn"}) {
    for (const bool plain_first : {false, true}) {
      const std::string name = plain_first ? "joined-plain-first" : "joined";
      exporter.write({.name = name, .target = target}, onnx_models::Joined(plain_first), patches);
      exporter.write({.name = name + "-linked", .target = target, .linked = true}, onnx_models::Joined(plain_first),
                     patches);
    }
    exporter.write({.name = "widened", .target = target}, onnx_models::Widened(), rows);
  }
  const auto codes = torch::randn({7, 8, 3, 3});
  for (const auto* target : {"openvino", "tensorrt", "qnn"}) {
    exporter.write({.name = "decoder", .target = target}, onnx_models::Decoder(), codes);
  }
  exporter.write({.name = "decoder-linked", .target = "openvino", .linked = true}, onnx_models::Decoder(), codes);
  for (const auto* target : {"onnxruntime", "openvino", "qnn"}) {
    exporter.write({.name = "tagger", .target = target}, onnx_models::Tagger(), ids);
    exporter.write({.name = "tagger-converted", .target = target, .converted = true}, onnx_models::Tagger(), ids);
    exporter.write({.name = "attention", .target = target}, onnx_models::DecoderLayer(), ids);
    exporter.write({.name = "attention-converted", .target = target, .converted = true}, onnx_models::DecoderLayer(),
                   ids);
  }
  const Case external{
      .name = "transformer-float-external", .target = "onnxruntime", .quantized = false, .external = true};
  exporter.write(external, onnx_models::Transformer(), ids);
}

/// Outputs are called after the operators.
void write_operators(const std::filesystem::path& folder) {
  const auto x = torch::randn({5, 4, 6, 6}), i = torch::randint(4, {5, 5});
  rarefy::OnnxOptions options;
  const auto outputs = onnx_models::every_operator(x, i);
  rarefy::NamedTensors tensors;
  tensors.insert("input.0", x);
  tensors.insert("input.1", i);
  for (const auto& [name, value] : outputs) {
    options.output_names.push_back(name);
    tensors.insert(name, value.clone());
  }
  const rarefy::OnnxForward forward = [](const std::vector<Tensor>& inputs) {
    std::vector<Tensor> out;
    for (const auto& [name, value] : onnx_models::every_operator(inputs[0], inputs[1])) {
      out.push_back(value);
    }
    return out;
  };
  torch::nn::Identity model;
  for (int64_t opset = 13; opset <= 23; ++opset) {
    options.opset = opset;
    rarefy::export_onnx(*model, forward, {x.slice(0, 0, 2), i.slice(0, 0, 2)},
                        folder / ("operators-" + std::to_string(opset) + ".onnx"), options);
  }
  rarefy::save_safetensors(tensors, folder / "operators.safetensors");
}

/// Layers that hand bytes to each other, of signed and of unsigned grids: images [N, 3, 8, 8] to [N, 4].
Tensor forward_bytes(const Tensor& x) {
  namespace ops = rarefy::ops;
  const auto grid = [](double scale, int32_t zero_point, bool is_signed) {
    return ops::ByteGrid{torch::tensor({scale}, torch::kFloat), torch::tensor({zero_point}, torch::kInt),
                         is_signed ? -127 : 0, is_signed ? 127 : 255};
  };
  const auto integers = [](at::IntArrayRef sizes) {
    const auto count = c10::multiply_integers(sizes);
    return (torch::arange(count) * 37 % 251 - 125).to(torch::kChar).view(sizes);
  };
  const auto input = grid(1.0 / 32, 3, true), middle = grid(1.0 / 16, 0, false), sum = grid(1.0 / 8, -5, true);
  const auto scales = torch::tensor({1.0 / 256, 1.0 / 512, 1.0 / 256, 1.0 / 1024}, torch::kFloat);
  const auto bias = torch::tensor({0.5, -0.25, 0.0, 1.0}, torch::kFloat);
  auto a = ops::quantized_conv(x, integers({4, 3, 3, 3}), scales, bias, input, {1, 1}, {1, 1}, {1, 1}, 1, /*relu=*/true,
                               middle);
  a = torch::max_pool2d(ops::max_pool2d_bytes(a, {3, 3}, {1, 1}, {1, 1}, {1, 1}), 2);
  const auto b = ops::requantize(x.slice(2, 0, 4).slice(3, 0, 4).sum({1}, /*keepdim=*/true), input, sum);
  const auto c = ops::quantized_add(a, b, middle, sum, /*relu=*/false, sum);
  const auto d = ops::quantized_conv(c, integers({4, 4, 2, 2}), torch::tensor({1.0 / 256}, torch::kFloat), {}, sum,
                                     {2, 2}, {0, 1, 1, 0}, {1, 1}, 1, false, sum);
  return ops::quantized_linear(d.flatten(1), integers({4, 16}), scales, bias, sum);
}

void write_bytes(const std::filesystem::path& folder) {
  const auto x = torch::randn({5, 3, 8, 8});
  torch::nn::Identity model;
  const rarefy::OnnxForward forward = [](const std::vector<Tensor>& inputs) {
    return std::vector{forward_bytes(inputs[0])};
  };
  rarefy::export_onnx(*model, forward, {x.slice(0, 0, 2)}, folder / "bytes.onnx");
  rarefy::NamedTensors tensors;
  tensors.insert("input.0", x);
  tensors.insert("output.0", forward_bytes(x));
  rarefy::save_safetensors(tensors, folder / "bytes.safetensors");
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) {
    std::cerr << "usage: rarefy_onnx_models FOLDER\n";
    return 2;
  }
  torch::manual_seed(0);
  torch::set_num_threads(1);
  write_networks(argv[1]);
  write_operators(argv[1]);
  write_bytes(argv[1]);
  write_formats(argv[1]);
  write_bags(argv[1]);
  write_adapters(argv[1]);
  return 0;
}
