#include <c10/util/Exception.h>
#include <fmt/ranges.h>
#include <rarefy/quantization/target.h>

#include <algorithm>

namespace rarefy::quantization {
namespace {

const std::vector<std::string> kEveryFamily = {"linear", "conv",      "embedding", "add",      "mul",
                                               "cat",    "recurrent", "boundary",  "attention"};

std::vector<std::string> with(std::vector<std::string> families, const std::string& family) {
  families.push_back(family);
  return families;
}

const std::vector<TargetProfile>& profiles() {
  static const std::vector<TargetProfile> table = {
      // x86: convolutions, additions and 2-D products run in integers only with a quantizer right behind them, and only
      // with uint8 activations; a ReLU goes only where the zero point is the smallest integer.
      {.name = "onnxruntime",
       .families = kEveryFamily,
       .stored = {"conv_transpose"},
       .per_channel = {"linear", "conv", "embedding", "recurrent", "conv_transpose", "attention"},
       .scales_of_groups = true,
       .activation_bits = {5, 6, 7, 8},
       .narrow_grids = true,
       .int4_weights = true,
       .clipping = Clipping::integers,
       .splits_linear_bias = true,
       .pools_means = true,
       .residual_as_sum = true},
      // Grids of 255 or 256 levels; quantizers to 16 bits do not saturate (2026.4.1). A weight's zero point, even of zeros,
      // costs it the int4 kernels.
      {.name = "openvino",
       .families = with(kEveryFamily, "conv_transpose"),
       .per_channel = {"linear", "conv", "embedding", "recurrent", "conv_transpose", "attention"},
       .scales_of_groups = true,
       .activation_bits = {8},
       .wide_activations = false,
       .narrow_grids = true,
       .weight_zero_points = false,
       .int4_weights = true},
      // Explicit quantization: quantizers on what weighted operators read and nowhere else, but for the identity branch
      // of a residual. TensorRT 10.0 reads operator sets up to 20.
      {.name = "tensorrt",
       .families = {"linear", "conv", "add", "recurrent", "conv_transpose"},
       .per_channel = {"linear", "conv", "recurrent", "conv_transpose"},
       .activation_bits = {8},
       .wide_activations = false,
       .unsigned_activations = false,
       .zero_points = false,
       .residual = Residual::identity,
       .quantizes_outputs = false,
       .quantizes_before_moves = false,
       .default_opset = 19},
      // Every operator between quantizers; scales per channel for convolutions alone.
      {.name = "qnn",
       .families = with(kEveryFamily, "conv_transpose"),
       .per_channel = {"conv", "conv_transpose"},
       .activation_bits = {8, 16},
       .boundary_inputs = true,
       .clipping = Clipping::saturate,
       .pools_means = true,
       .dynamic_shapes = false},
  };
  return table;
}

template <typename T>
bool contains(const std::vector<T>& values, const T& value) {
  return std::find(values.begin(), values.end(), value) != values.end();
}

}  // namespace

std::string layer_family(const std::string& kind) {
  if (kind == "Linear" || kind == "TransposedLinear") {
    return "linear";
  }
  if (kind.starts_with("ConvTranspose") && kind.ends_with("d")) {
    return "conv_transpose";
  }
  for (const auto* boundary : {"LayerNorm", "GroupNorm", "RMSNorm", "GELU", "SiLU", "Hardswish", "Softmax"}) {
    if (kind == boundary) {
      return "boundary";
    }
  }
  if (kind == "LSTM" || kind == "GRU" || kind == "LSTMCell" || kind == "GRUCell") {
    return "recurrent";
  }
  if (kind.starts_with("Conv") && kind.ends_with("d")) {  // Conv1d, ConvBn1d, ...
    return "conv";
  }
  for (const auto& [name, family] : {std::pair("Embedding", "embedding"),
                                     {"EmbeddingBag", "embedding"},
                                     {"Add", "add"},
                                     {"Mul", "mul"},
                                     {"Cat", "cat"},
                                     {"SDPA", "attention"},
                                     {"MultiheadAttention", "attention"}}) {
    if (kind == name) {
      return family;
    }
  }
  TORCH_CHECK_VALUE(
      false, "[layer_family] kind must be that of a layer that can be quantized (Linear, Conv2d, Add, ...), got ",
      kind);
}

bool TargetProfile::executes(const std::string& kind) const { return contains(families, layer_family(kind)); }

bool TargetProfile::stores(const std::string& kind) const {
  return executes(kind) || contains(stored, layer_family(kind));
}

bool TargetProfile::has_per_channel(const std::string& kind) const { return contains(per_channel, layer_family(kind)); }

LayerConfig TargetProfile::adapt(LayerConfig config, const std::string& kind) const {
  if (config.weight.has_value() && config.weight->axis().has_value() && !has_per_channel(kind)) {
    config.weight->granularity = PerTensor{};
  }
  return config;
}

std::optional<std::string> TargetProfile::why_not_written(const Scheme& activation) const {
  if (!activation.is_plain()) {
    return fmt::format("{} holds integers with one observed scale per tensor or channel, got {}", name,
                       activation.str());
  }
  if (activation.axis().has_value()) {
    return fmt::format("{} has one scale per activation, got {}", name, activation.str());
  }
  if (!zero_points && !(activation.symmetric && activation.signed_range())) {
    return fmt::format("{} knows no zero points: activations must be symmetric and signed, got {}", name,
                       activation.str());
  }
  if (!wide_activations && activation.bits > 8) {
    return fmt::format("{} has no activations of 16 bits, got {}", name, activation.str());
  }
  const bool fills_type = !activation.narrow_range && (activation.bits == 8 || activation.bits == 16);
  if ((!narrow_grids || activation.bits > 8) && !fills_type) {
    return fmt::format(
        "{} saturates at the limits of the type only: activations must have 8 or 16 bits and their whole "
        "range, got {}",
        name, activation.str());
  }
  return std::nullopt;
}

std::optional<std::string> TargetProfile::why_not(const LayerConfig& config, const std::string& kind) const {
  if (!stores(kind)) {
    return fmt::format("{} runs {} in integers, got {}", name, fmt::join(families, ", "), kind);
  }
  if (config.weight.has_value() && !config.weight->is_plain()) {
    return fmt::format("{} holds integers with one scale per tensor or channel, got the weight {}", name,
                       config.weight->str());
  }
  if (!config.activation.has_value() || layer_family(kind) == "embedding") {
    return std::nullopt;
  }
  if (!contains(activation_bits, config.activation->bits)) {
    return fmt::format("{} executes activations of {} bits, got {}", name, fmt::join(activation_bits, ", "),
                       config.activation->str());
  }
  return why_not_written(*config.activation);
}

const TargetProfile& target_profile(const std::string& name) {
  const auto& table = profiles();
  const auto found = std::find_if(table.begin(), table.end(), [&](const auto& row) { return row.name == name; });
  TORCH_CHECK_VALUE(found != table.end(), "[target_profile] target must be one of ",
                    fmt::format("{}", fmt::join(target_names(), ", ")), ", got '", name, "'");
  return *found;
}

std::vector<std::string> target_names() {
  std::vector<std::string> names;
  for (const auto& row : profiles()) {
    names.push_back(row.name);
  }
  return names;
}

std::string str(Clipping clipping) {
  return clipping == Clipping::keep ? "keep" : clipping == Clipping::saturate ? "saturate" : "integers";
}

std::string str(Residual residual) { return residual == Residual::both ? "both" : "identity"; }

}  // namespace rarefy::quantization
