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
       .formats = "all",
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
       .int4_weights = true,
       .formats = "all"},
      // Explicit quantization: quantizers on what weighted operators read and nowhere else, but for the identity branch
      // of a residual. TensorRT 10.0 reads operator sets up to 20.
      {.name = "tensorrt",
       .families = {"linear", "conv", "add", "recurrent", "conv_transpose"},
       .per_channel = {"linear", "conv", "recurrent", "conv_transpose"},
       .activation_bits = {8},
       .wide_activations = false,
       .unsigned_activations = false,
       .zero_points = false,
       .formats = "explicit",
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

template <typename... Alternatives, typename Variant>
bool is_one_of(const Variant& variant) {
  return (std::holds_alternative<Alternatives>(variant) || ...);
}

bool is_saturating_e4m3(const Scheme& scheme) {
  const auto* minifloat = std::get_if<Minifloat>(&scheme.format);
  return minifloat != nullptr && *minifloat == Minifloat::e4m3() && scheme.rounding == Rounding::nearest_even;
}

/// What TensorRT's explicit quantization has beside plain grids: INT4 in groups, and FP8 E4M3 per tensor or channel.
bool is_explicit_weight(const Scheme& weight) {
  const bool whole = is_one_of<PerTensor, PerChannel>(weight.granularity);
  if (is_saturating_e4m3(weight)) {
    return whole;
  }
  return weight.is_integer() && weight.symmetric && weight.signed_range() &&
         (whole ? weight.bits <= 8 : is_one_of<PerGroup>(weight.granularity) && weight.bits == 4);
}

/// Integers with a scale and a zero point per tensor or channel that were observed, however they follow from the range.
bool is_observed_grid(const Scheme& scheme) {
  return scheme.is_integer() && !scheme.dynamic && is_one_of<PerTensor, PerChannel>(scheme.granularity);
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

std::optional<std::string> TargetProfile::why_weight_not_written(const Scheme& weight) const {
  if (weight.is_plain()) {
    if (weight.bits > 8 && formats != "all") {
      return fmt::format("{} has no weights of more than 8 bits, got {}", name, weight.str());
    }
    return std::nullopt;
  }
  if (formats == "all" || (formats == "explicit" && is_explicit_weight(weight))) {
    return std::nullopt;
  }
  return fmt::format("{} holds weights as integers with one observed scale per tensor or channel{}, got {}", name,
                     formats == "explicit" ? ", int4 in groups and e4m3" : "", weight.str());
}

std::optional<std::string> TargetProfile::why_not_written(const Scheme& activation) const {
  if (activation.rounding == Rounding::stochastic) {
    return fmt::format("ONNX has no operator that draws the numbers of stochastic rounding, got {}", activation.str());
  }
  if (is_one_of<Binary, Ternary, NF4, Codebook>(activation.format)) {
    return fmt::format("{} is a format of weights: ONNX has no operator that rounds activations to it, got {}",
                       quantization::name(activation.format), activation.str());
  }
  if (!activation.is_plain() && formats == "all") {
    if (!activation.dynamic && !activation.block().empty()) {
      return fmt::format("observed scales of activations are per tensor or channel, got {}", activation.str());
    }
    return std::nullopt;
  }
  const bool explicit_float = formats == "explicit" && is_saturating_e4m3(activation) &&
                              is_one_of<PerTensor>(activation.granularity) && !activation.dynamic;
  if (explicit_float) {
    return std::nullopt;
  }
  if (!is_observed_grid(activation)) {
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
  if (!narrow_grids && !fills_type) {
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
  if (config.weight.has_value()) {
    if (auto reason = why_weight_not_written(*config.weight)) {
      return reason;
    }
  }
  if (!config.activation.has_value() || layer_family(kind) == "embedding") {
    return std::nullopt;
  }
  if (config.activation->is_plain() && !contains(activation_bits, config.activation->bits)) {
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
