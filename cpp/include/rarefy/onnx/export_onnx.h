#pragma once

#include <ATen/core/Tensor.h>
#include <rarefy/export.h>

#include <concepts>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <iosfwd>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

namespace torch::nn {
class Module;
}

namespace rarefy {

struct OnnxOptions {
  /// The runtime that the file is for, by the name of its profile (rarefy/quantization/target.h): "onnxruntime", "openvino",
  /// "tensorrt", "qnn". It decides where quantizers stand and which integers they give.
  std::string target = "onnxruntime";
  /// Version of the ONNX operator set, 13 to 23. Unset: the target's.
  std::optional<int64_t> opset = std::nullopt;
  /// The file takes any size of the inputs' first dimension, which they must share. Off: all sizes are those of the example.
  bool dynamic_batch = true;
  /// Names in the file. Empty: "input" ("input_0", ... if several) and "output" ("output_0", ...).
  std::vector<std::string> input_names, output_names;
  /// Weights of more bytes in all go to a second file, `<path>.data`, which has to stay beside the first. One protobuf message
  /// holds 2 GB.
  int64_t external_data_above = 1'500'000'000;
};

/// What an export wrote. C++ has no runtime to run it with: outputs are not compared (rarefy.export.to_onnx in Python does).
struct RAREFY_API OnnxReport {
  std::filesystem::path path;
  int64_t bytes = 0;  // of the file, and of `<path>.data` where there is one
  std::string target;
  int64_t opset = 0;
  std::vector<std::pair<std::string, int64_t>> nodes;  // by operator, most frequent first
  std::vector<std::string> inputs, outputs;            // "input: float32 [batch, 3, 32, 32]"

  std::string str() const;
};
RAREFY_API std::ostream& operator<<(std::ostream& stream, const OnnxReport& report);

/// What the model is to compute, from tensors in the order of the example.
using OnnxForward = std::function<std::vector<at::Tensor>(const std::vector<at::Tensor>&)>;

/// Writes what `forward` computes with `model` as an ONNX file, with neither an ONNX nor a protobuf library. Float models,
/// and models that prepare_qat, prepare (after calibrate) or convert made: their weights are the trained integers behind
/// DequantizeLinear, with batch normalization folded in, their quantizers QuantizeLinear and DequantizeLinear.
///
/// `forward` runs in evaluation mode four times: the operators that it calls are recorded, with batches of three sizes, the
/// largest of more than twice the example's, and what differs between them follows the batch in the file. Code that takes
/// another way for other values is not seen.
/// The model is as before afterwards; ranges of weights follow the weights, as in every run.
///
/// Throws, with no file written and one of that name as it was:
///   c10::ValueError  an option; inputs that share no first dimension; quantizers that have seen no data, are switched off, have
///                    a scale that is not positive or a grid that the target cannot hold (they are named); operators without
///                    a form in ONNX (all of them are named, with the modules that call them); what cannot follow the batch
///   c10::Error       the file cannot be written
/// and passes on what `forward` throws.
RAREFY_API OnnxReport export_onnx(torch::nn::Module& model, const OnnxForward& forward,
                                  const std::vector<at::Tensor>& example_inputs, const std::filesystem::path& path,
                                  const OnnxOptions& options = {});

namespace detail {

template <typename Result>
std::vector<at::Tensor> onnx_outputs(Result&& result) {
  using Type = std::remove_cvref_t<Result>;
  if constexpr (std::is_convertible_v<Type, at::Tensor>) {
    return {std::forward<Result>(result)};
  } else if constexpr (std::is_convertible_v<Type, std::vector<at::Tensor>>) {
    return std::forward<Result>(result);
  } else {
    return std::apply([](const auto&... tensors) { return std::vector<at::Tensor>{tensors...}; }, result);
  }
}

}  // namespace detail

/// The same for a module whose forward takes tensors: export_onnx(model, std::tuple{ids, mask}, "model.onnx"). It may return a
/// tensor, a vector or a tuple of tensors.
template <typename Holder, std::same_as<at::Tensor>... Inputs>
  requires requires(Holder& model, const Inputs&... inputs) { model->forward(inputs...); }
OnnxReport export_onnx(Holder& model, const std::tuple<Inputs...>& example_inputs, const std::filesystem::path& path,
                       const OnnxOptions& options = {}) {
  const OnnxForward forward = [&](const std::vector<at::Tensor>& inputs) {
    return [&]<size_t... I>(std::index_sequence<I...>) {
      return detail::onnx_outputs(model->forward(inputs[I]...));
    }(std::index_sequence_for<Inputs...>());
  };
  const auto tensors = std::apply([](const auto&... x) { return std::vector<at::Tensor>{x...}; }, example_inputs);
  return export_onnx(*model, forward, tensors, path, options);
}

/// Of one input.
template <typename Holder>
  requires requires(Holder& model, const at::Tensor& input) { model->forward(input); }
OnnxReport export_onnx(Holder& model, const at::Tensor& example_input, const std::filesystem::path& path,
                       const OnnxOptions& options = {}) {
  return export_onnx(model, std::tuple{example_input}, path, options);
}

}  // namespace rarefy
