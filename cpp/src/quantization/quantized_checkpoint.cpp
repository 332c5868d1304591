#include <ATen/ops/isfinite.h>
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <rarefy/quantization/packed_weight.h>
#include <rarefy/quantization/quantized_checkpoint.h>
#include <rarefy/quantization/target.h>
#include <rarefy/version.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <limits>
#include <optional>
#include <sstream>
#include <string_view>
#include <utility>

#include "checkpoint_state.h"
#include "folder.h"
#include "json.h"

// quantization.json:
//   {"format": 1, "rarefy": "0.1.0", "mode": "converted",
//    "tensors": {"file": "model.safetensors", "bytes": 1234, "crc32": 5678},
//    "layers": {
//     "conv": {"kind": "Conv2d", "target": null, "relu": true, "channels_last": false, "next": {"qmin": 0, "qmax": 255}, "quantizers": {
//      "input": {"bits": 8, "symmetric": false, "signed": false, "narrow_range": false, "qmin": 0, "qmax": 255, "axis": null},
//      "weight": {..., "axis": 0}}}},
//    "folded": ["bn"]}
namespace rarefy::quantization {
namespace {

constexpr uint64_t kFormat = 1;
constexpr const char* kDescription = "quantization.json";
constexpr const char* kTensors = "model.safetensors";
constexpr const char* kMode = "converted";
constexpr const char* kAttention = "MultiheadAttention";
constexpr std::array kQuantizers = {"input", "input0", "input1",        "weight", "output",
                                    "query", "key",    "probabilities", "value"};

bool is_weight(const std::string& quantizer, bool several) {
  return several ? quantizer.starts_with("weight_") : quantizer == "weight";
}

bool is_known(const std::string& quantizer, bool several) {
  if (several && (is_weight(quantizer, true) || quantizer.starts_with("input") || quantizer.starts_with("hidden"))) {
    return true;
  }
  return std::find(kQuantizers.begin(), kQuantizers.end(), quantizer) != kQuantizers.end();
}

/// The tensor of a weight's quantizer.
std::string weight_of(const std::string& kind, const std::string& quantizer) {
  return kind == kAttention ? quantizer.substr(std::string_view("weight_").size(), 1) + "_proj_weight" : quantizer;
}

std::string described(const torch::Tensor& tensor) {
  std::ostringstream text;
  text << tensor.scalar_type() << " " << tensor.sizes();
  return text.str();
}

constexpr std::array kTypes = {std::pair("float32", c10::kFloat), std::pair("float64", c10::kDouble),
                               std::pair("bfloat16", c10::kBFloat16), std::pair("float16", c10::kHalf)};

const char* name_of(c10::ScalarType type) {
  for (const auto& [name, known] : kTypes) {
    if (known == type) {
      return name;
    }
  }
  TORCH_CHECK_VALUE(false, "[save_quantized] a weight must be floating point of 16 to 64 bits, got ", type);
}

const char* boolean(bool value) { return value ? "true" : "false"; }

// ---- writing ----

void append_scheme(std::string& json, const Scheme& scheme) {
  if (!scheme.is_plain()) {
    json += fmt::format(R"({{"scheme": {}}})", scheme.to_json());
    return;
  }
  const auto axis = scheme.axis();
  json += fmt::format(
      R"({{"bits": {}, "symmetric": {}, "signed": {}, "narrow_range": {}, "qmin": {}, "qmax": {}, "axis": {}}})",
      scheme.bits, boolean(scheme.symmetric), boolean(scheme.signed_range()), boolean(scheme.narrow_range),
      scheme.qmin(), scheme.qmax(), axis.has_value() ? std::to_string(*axis) : "null");
}

std::string to_json(const QuantizedCheckpoint& checkpoint, const FileSum& sum) {
  constexpr const char* kContext = "[save_quantized] names";
  std::string json = fmt::format(
      "{{\"format\": {}, \"rarefy\": \"{}\", \"mode\": \"{}\",\n \"tensors\": {{\"file\": \"{}\", \"bytes\": {}, "
      "\"crc32\": {}}},\n \"layers\": {{",
      kFormat, RAREFY_VERSION, kMode, kTensors, sum.bytes, sum.crc32);
  const char* separator = "\n  ";
  for (const auto& [name, layer] : checkpoint.layers) {
    json += std::exchange(separator, ",\n  ");
    append_json(json, name, kContext);
    json += ": {\"kind\": ";
    append_json(json, layer.kind, kContext);
    const auto range = layer.next.has_value()
                           ? fmt::format(R"({{"qmin": {}, "qmax": {}}})", layer.next->qmin, layer.next->qmax)
                           : std::string("null");
    json += ", \"target\": ";
    if (layer.target.empty()) {
      json += "null";
    } else {
      append_json(json, layer.target, kContext);
    }
    json += fmt::format(R"(, "relu": {}, "channels_last": {}, "next": {}, "quantizers": {{)", boolean(layer.relu),
                        boolean(layer.channels_last), range);
    const char* next = "\n   ";
    for (const auto& [quantizer, scheme] : layer.quantizers) {
      json += std::exchange(next, ",\n   ");
      append_json(json, quantizer, kContext);
      json += ": ";
      append_scheme(json, scheme);
    }
    json += "}";
    if (layer.packed.has_value()) {
      json +=
          fmt::format(R"(, "packed": {{"scheme": {}, "shape": [{}], "dtype": "{}"}})", layer.packed->scheme.to_json(),
                      fmt::join(layer.packed->shape, ", "), name_of(layer.packed->dtype));
    }
    json += "}";
  }
  json += "},\n \"folded\": [";
  const char* comma = "";
  for (const auto& name : checkpoint.folded) {
    json += std::exchange(comma, ", ");
    append_json(json, name, kContext);
  }
  return json + "]}\n";
}

// ---- reading ----

bool read_bool(JsonReader& reader, const char* what) {
  const auto text = reader.value();
  reader.require(text == "true" || text == "false", "must have true or false as ", what, ", got ", text);
  return text == "true";
}

int64_t read_integer(JsonReader& reader, const char* what) {
  const auto text = reader.value();
  int64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  reader.require(error == std::errc() && end == text.data() + text.size(), "must have an integer as ", what, ", got ",
                 text);
  return value;
}

/// Steps over null when it comes next.
bool take_null(JsonReader& reader) {
  if (!reader.take('n')) {
    return false;
  }
  for (const char c : {'u', 'l', 'l'}) {
    reader.expect(c);
  }
  return true;
}

IntegerRange read_range(JsonReader& reader, const std::string& name) {
  std::optional<int64_t> qmin, qmax;
  reader.object([&](const std::string& field) {
    reader.require(field == "qmin" || field == "qmax", "must describe the range at ", name, " by qmin and qmax, got '",
                   field, "'");
    (field == "qmin" ? qmin : qmax) = read_integer(reader, "an end of a range");
  });
  const bool fits =
      qmin.has_value() && qmax.has_value() && *qmin < *qmax && *qmin >= -128 && *qmax <= (*qmin < 0 ? 127 : 255);
  reader.require(fits, "must have a range inside of int8 or uint8 at ", name, ", got ", qmin.value_or(0), " to ",
                 qmax.value_or(0));
  return {*qmin, *qmax};
}

/// A scheme as Scheme::to_json writes it.
Scheme read_full_scheme(JsonReader& reader) {
  const auto text = reader.value();
  try {
    return Scheme::from_json(std::string(text));
  } catch (const c10::Error& error) {
    reader.require(false, "must hold a scheme: ", error.what_without_backtrace());
    throw;
  }
}

SavedPacking read_packing(JsonReader& reader, const std::string& name) {
  SavedPacking packing;
  std::set<std::string> seen;
  reader.object([&](const std::string& field) {
    seen.insert(field);
    if (field == "scheme") {
      packing.scheme = read_full_scheme(reader);
    } else if (field == "shape") {
      reader.array([&] { packing.shape.push_back(read_integer(reader, "a size")); });
    } else {
      const auto text = reader.string();
      const auto* known =
          std::find_if(kTypes.begin(), kTypes.end(), [&](const auto& item) { return text == item.first; });
      reader.require(field == "dtype" && known != kTypes.end(), "must describe the packed weight of ", name,
                     " by scheme, shape and a floating-point dtype, got '", field, "': '", text, "'");
      packing.dtype = known->second;
    }
  });
  reader.require(seen.size() == 3, "must say scheme, shape and dtype of the packed weight of ", name);
  return packing;
}

Scheme read_scheme(JsonReader& reader, const std::string& name) {
  Scheme scheme;
  std::optional<Scheme> full;
  std::set<std::string> seen;
  int64_t qmin = 0, qmax = 0;
  reader.object([&](const std::string& field) {
    seen.insert(field);
    if (field == "scheme") {
      full = read_full_scheme(reader);
    } else if (field == "bits") {
      scheme.bits = read_integer(reader, "bits");
      reader.require((scheme.bits >= 2 && scheme.bits <= 8) || scheme.bits == 16, "must have 2 to 8 or 16 bits at ",
                     name, ", got ", scheme.bits);
    } else if (field == "symmetric") {
      scheme.symmetric = read_bool(reader, "symmetric");
    } else if (field == "signed") {
      scheme.is_signed = read_bool(reader, "signed");
    } else if (field == "narrow_range") {
      scheme.narrow_range = read_bool(reader, "narrow_range");
    } else if (field == "qmin") {
      qmin = read_integer(reader, "qmin");
    } else if (field == "qmax") {
      qmax = read_integer(reader, "qmax");
    } else if (field == "axis") {
      if (!take_null(reader)) {
        scheme.granularity = PerChannel{read_integer(reader, "axis")};
      }
    } else {
      reader.require(false, "must describe a grid by bits, symmetric, signed, narrow_range, qmin, qmax and axis, got '",
                     field, "' at ", name);
    }
  });
  if (full.has_value()) {
    reader.require(seen.size() == 1, "must describe the format at ", name, " by its scheme alone");
    return *full;
  }
  for (const auto* field : {"bits", "symmetric", "signed", "narrow_range", "qmin", "qmax", "axis"}) {
    reader.require(seen.count(field) == 1, "must say ", field, " of the grid at ", name);
  }
  reader.require(scheme.qmin() == qmin && scheme.qmax() == qmax, "must have the integers ", scheme.qmin(), " to ",
                 scheme.qmax(), " of a grid of ", scheme.bits, " bits at ", name, ", got ", qmin, " to ", qmax);
  return scheme;
}

SavedLayer read_layer(JsonReader& reader, const std::string& name) {
  SavedLayer layer;
  reader.object([&](const std::string& field) {
    if (field == "kind") {
      layer.kind = reader.string();
    } else if (field == "relu") {
      layer.relu = read_bool(reader, "relu");
    } else if (field == "channels_last") {
      layer.channels_last = read_bool(reader, "channels_last");
    } else if (field == "target") {
      if (!take_null(reader)) {
        layer.target = reader.string();
      }
    } else if (field == "next") {
      if (!take_null(reader)) {
        layer.next = read_range(reader, name + ".quant.next");
      }
    } else if (field == "packed") {
      layer.packed = read_packing(reader, name);
    } else if (field == "quantizers") {
      reader.object([&](const std::string& quantizer) {
        layer.quantizers[quantizer] = read_scheme(reader, fmt::format("{}.quant.{}", name, quantizer));
      });
    } else {
      reader.require(false,
                     "must describe a layer by kind, target, relu, channels_last, next, quantizers and packed, got '",
                     field, "' at ", name);
    }
  });
  reader.require(!layer.kind.empty(), "must say the kind of layer ", name);
  reader.require(!layer.quantizers.empty() || layer.packed.has_value(), "must say the quantizers of layer ", name);
  return layer;
}

/// Fills in layers and folded; what the description says of the other file.
FileSum read_description(const std::string& json, const std::string& file, QuantizedCheckpoint& checkpoint) {
  JsonReader reader(json, "[load_quantized] " + file + ": the description ");
  std::optional<uint64_t> format;
  std::string mode, name;
  FileSum sum;
  reader.object([&](const std::string& field) {
    if (field == "format") {
      format = reader.integer();
      reader.require(*format == kFormat, "must be of format ", kFormat, ", got ", *format,
                     " (made by another version of rarefy)");
    } else if (field == "mode") {
      mode = reader.string();
    } else if (field == "tensors") {
      reader.object([&](const std::string& key) {
        if (key == "file") {
          name = reader.string();
        } else if (key == "bytes") {
          sum.bytes = reader.integer();
        } else if (key == "crc32") {
          const auto crc32 = reader.integer();
          reader.require(crc32 <= std::numeric_limits<uint32_t>::max(), "must have a checksum of 32 bits, got ", crc32);
          sum.crc32 = static_cast<uint32_t>(crc32);
        } else {
          reader.value();
        }
      });
    } else if (field == "layers") {
      reader.object([&](const std::string& layer) { checkpoint.layers[layer] = read_layer(reader, layer); });
    } else if (field == "folded") {
      reader.array([&] { checkpoint.folded.insert(reader.string()); });
    } else {
      reader.value();  // for readers of this format that know more
    }
  });
  reader.end();
  reader.require(format.has_value(), "must say its format");
  reader.require(mode == kMode, "must be of a ", kMode, " model, got mode '", mode, "'");
  reader.require(name == kTensors, "must belong to ", kTensors, ", got '", name, "'");
  reader.require(!checkpoint.layers.empty(), "must have layers, got none");
  return sum;
}

// ---- checks ----

/// Checks the tensors of one layer. Messages begin with context and the layer's name.
class LayerCheck {
 public:
  LayerCheck(const NamedTensors& tensors, const std::string& name, std::string context)
      : tensors_(tensors), name_(name), context_(std::move(context)) {}

  void operator()(const SavedLayer& layer) const {
    std::map<std::string, int64_t> channels;
    const bool several = has_several_weights(layer.kind);
    for (const auto& [quantizer, scheme] : layer.quantizers) {
      if (is_weight(quantizer, several)) {
        const auto name = weight_of(layer.kind, quantizer);
        channels[quantizer] = check_weight(name, quantizer, scheme, layer.kind.starts_with("ConvTranspose"));
      }
    }
    if (layer.kind == kAttention) {
      check_attention(channels);
    }
    if (layer.packed.has_value()) {
      check_packed(*layer.packed, channels.empty());
    }
    const auto targets = target_names();
    require(layer.target.empty() || std::find(targets.begin(), targets.end(), layer.target) != targets.end(),
            "target must be one of ", fmt::format("{}", fmt::join(targets, ", ")), ", got '", layer.target, "'");
    require(!layer.next.has_value() || layer.quantizers.count("output") == 0,
            "a layer that hands on bytes must have no quant.output, which they would not pass");
    for (const auto& [quantizer, scheme] : layer.quantizers) {
      require(is_known(quantizer, several), "quantizers must be of ", fmt::format("{}", fmt::join(kQuantizers, ", ")),
              ", got '", quantizer, "'");
      const auto weight = channels.find(quantizer);
      require(weight != channels.end() || !scheme.axis().has_value(), "quant.", quantizer, " must have one scale, got ",
              scheme.str());
      const int64_t size = weight != channels.end() && scheme.axis().has_value() ? weight->second : 1;
      const std::string prefix = "quant." + quantizer + ".";
      if (!scheme.is_plain()) {
        check_format(prefix, scheme);
        continue;
      }
      check_grid(prefix, {scheme.qmin(), scheme.qmax()}, size);
      check_shape(prefix + "min_val", tensor(prefix + "min_val", torch::kFloat32), size);
      check_shape(prefix + "max_val", tensor(prefix + "max_val", torch::kFloat32), size);
      check_shape(prefix + "skipped", tensor(prefix + "skipped", torch::kInt64), 1);
    }
    if (layer.next.has_value()) {
      check_grid("quant.next.", *layer.next, 1);
    }
  }

 private:
  template <typename... Rule>
  void require(bool condition, const Rule&... rule) const {
    TORCH_CHECK_VALUE(condition, context_, "layer ", name_, ": ", rule...);
  }

  const torch::Tensor& tensor(const std::string& name, c10::ScalarType type) const {
    const auto* found = tensors_.find(name_ + "." + name);
    require(found != nullptr, name, " must be there, but is missing");
    require(found->scalar_type() == type, name, " must be ", type, ", got ", described(*found));
    return *found;
  }

  /// The number of output channels. The weight of a transposed convolution, [in, out / groups, kernel...], has as many as it
  /// has scales: those of each group.
  int64_t check_weight(const std::string& name, const std::string& quantizer_name, const Scheme& scheme,
                       bool transposed_conv) const {
    const auto weight = tensor(name, torch::kInt8);
    require(scheme.symmetric && scheme.bits <= 8, "weights must be symmetric and of 8 bits or fewer, got ",
            scheme.str());
    const auto quantizer = "quant." + quantizer_name;
    require(tensor(quantizer + ".zero_point", torch::kInt32).eq(0).all().item<bool>(), "the zero points of ", quantizer,
            " must be 0, which integer kernels take them for");
    require(weight.dim() >= 2 && weight.numel() > 0, "weight must have two or more dimensions and values, got shape ",
            weight.sizes());
    const int64_t axis = scheme.axis().value_or(0);
    require(axis >= 0 && axis < weight.dim(), "the axis of ", quantizer, " must be a dimension of the weight, got ",
            axis, " for shape ", weight.sizes());
    const auto low = weight.min().item<int64_t>(), high = weight.max().item<int64_t>();
    require(low >= scheme.qmin() && high <= scheme.qmax(), "integers must be in [", scheme.qmin(), ", ", scheme.qmax(),
            "], got ", low, " to ", high);
    const auto bias_name =
        name.starts_with("weight") ? "bias" + name.substr(std::string_view("weight").size()) : std::string("bias");
    if (tensors_.contains(name_ + "." + bias_name)) {
      const auto bias = tensor(bias_name, torch::kFloat32);
      require(bias.dim() == 1, "bias must have one dimension, got shape ", bias.sizes());
      require(at::isfinite(bias).all().item<bool>(), "bias must be finite, but is not");
    }
    if (transposed_conv && scheme.axis().has_value()) {
      const auto count = tensor("quant.weight.scale", torch::kFloat32).numel();
      require(axis == 1 && count > 0 && count % weight.size(1) == 0 && weight.size(0) % (count / weight.size(1)) == 0,
              "quant.weight must have a scale for each of ", weight.size(1),
              " channels of every group, and groups that divide ", weight.size(0), " input channels, got ", count,
              " scales on axis ", axis);
      return count;
    }
    return weight.size(axis);
  }

  /// Codes and scales of a weight, of the types and sizes that its scheme wants.
  void check_packed(const SavedPacking& packing, bool is_alone) const {
    require(is_alone, "a packed weight must have no quantizer");
    QuantizedTensorParts parts{packing.scheme, packing.shape, packing.dtype, {}};
    for (const auto size : packing.shape) {
      require(size > 0, "a packed weight must have values, got shape ", at::IntArrayRef(packing.shape));
    }
    for (const auto& name : part_names(packing.scheme)) {
      const auto* found = tensors_.find(name_ + ".weight_" + name);
      require(found != nullptr, "weight_", name, " must be there, but is missing");
      parts.tensors[name] = *found;
      const bool is_number = found->is_floating_point() && name != "data";
      require(!is_number || at::isfinite(found->to(torch::kFloat32)).all().item<bool>(), "weight_", name,
              " must be finite, but is not");
    }
    try {
      check_parts("packed", parts);
    } catch (const c10::ValueError& error) {
      require(false, error.what_without_backtrace());
    }
    if (tensors_.contains(name_ + ".bias")) {
      const auto& bias = *tensors_.find(name_ + ".bias");
      require(bias.scalar_type() == packing.dtype && bias.dim() == 1, "bias must be ", packing.dtype,
              " with one dimension, got ", described(bias));
    }
  }

  /// The range of an activation in a format without integers.
  void check_format(const std::string& prefix, const Scheme& scheme) const {
    require(scheme.rounding == Rounding::nearest_even, prefix, " must round to nearest, got ", scheme.str());
    const auto scale = tensor(prefix + "scale", torch::kFloat32);
    require((at::isfinite(scale) & (scale > 0)).all().item<bool>(), prefix, "scale must be finite and positive");
    tensor(prefix + "zero_point", torch::kInt32);
    for (const auto* name : {"min_val", "max_val"}) {
      check_shape(prefix + name, tensor(prefix + name, torch::kFloat32), scale.numel());
    }
    check_shape(prefix + "skipped", tensor(prefix + "skipped", torch::kInt64), 1);
  }

  /// All projections, and biases in floating point.
  void check_attention(const std::map<std::string, int64_t>& channels) const {
    for (const auto* quantizer : {"weight_query", "weight_key", "weight_value"}) {
      require(channels.count(quantizer) == 1, "quantizers must have ", quantizer, ", but have none");
    }
    for (const auto* name : {"in_proj_bias", "bias_k", "bias_v"}) {
      if (tensors_.contains(name_ + "." + name)) {
        require(at::isfinite(tensor(name, torch::kFloat32)).all().item<bool>(), name, " must be finite, but is not");
      }
    }
  }

  void check_shape(const std::string& name, const torch::Tensor& value, int64_t size) const {
    require(value.dim() == 1 && value.size(0) == size, name, " must have shape [", size, "], got ", value.sizes());
  }

  void check_grid(const std::string& prefix, const IntegerRange& range, int64_t size) const {
    const auto scale = tensor(prefix + "scale", torch::kFloat32);
    check_shape(prefix + "scale", scale, size);
    require((at::isfinite(scale) & (scale > 0)).all().item<bool>(), prefix, "scale must be finite and positive, got ",
            scale.min().item<float>(), " to ", scale.max().item<float>());
    const auto zero_point = tensor(prefix + "zero_point", torch::kInt32);
    check_shape(prefix + "zero_point", zero_point, size);
    const auto low = zero_point.min().item<int64_t>(), high = zero_point.max().item<int64_t>();
    require(low >= range.qmin && high <= range.qmax, prefix, "zero_point must be in [", range.qmin, ", ", range.qmax,
            "], got ", low, " to ", high);
  }

  const NamedTensors& tensors_;
  const std::string& name_;
  std::string context_;
};

}  // namespace

bool has_several_weights(const std::string& kind) {
  return kind == "LSTM" || kind == "GRU" || kind == "LSTMCell" || kind == "GRUCell" || kind == kAttention;
}

std::optional<std::string> weight_quantizer(const std::string& kind, const std::string& tensor) {
  if (kind == kAttention) {
    for (const auto* part : {"query", "key", "value"}) {
      const auto quantizer = std::string("weight_") + part;
      if (weight_of(kind, quantizer) == tensor) {
        return quantizer;
      }
    }
    return std::nullopt;
  }
  return tensor.starts_with("weight_") ? std::optional(tensor) : std::nullopt;
}

void QuantizedCheckpoint::validate(const std::string& context) const {
  TORCH_CHECK_VALUE(!layers.empty(), context, "there must be a converted layer, got none");
  for (const auto& [name, layer] : layers) {
    LayerCheck(tensors, name, context)(layer);
  }
}

void write_quantized(const QuantizedCheckpoint& checkpoint, const std::filesystem::path& folder) {
  const std::string context = "[save_quantized] ";
  checkpoint.validate(context);
  State state;
  for (const auto& item : checkpoint.tensors) {
    state.emplace_back(item.key(), item.value());
  }
  Metadata metadata;
  const auto written = without_duplicates(std::move(state), metadata);
  replace_folder(
      folder, {kDescription, kTensors},
      [&](const std::filesystem::path& made) {
        save_safetensors(written, made / kTensors, metadata);
        write_text(made / kDescription, to_json(checkpoint, sum_of_file(made / kTensors, context)), context);
      },
      context);
}

QuantizedCheckpoint read_quantized(const std::filesystem::path& folder) {
  const std::string context = "[load_quantized] ";
  TORCH_CHECK_VALUE(std::filesystem::is_directory(folder), context, folder.string(),
                    " must be a folder that save_quantized has written, but is none");
  for (const auto* name : {kDescription, kTensors}) {
    TORCH_CHECK_VALUE(std::filesystem::exists(folder / name), context, folder.string(), " must hold ", kDescription,
                      " and ", kTensors, ", but ", name, " is missing");
  }
  const auto description = folder / kDescription, file = folder / kTensors;
  QuantizedCheckpoint result;
  const auto said = read_description(read_text(description, context), description.string(), result);
  const auto sum = sum_of_file(file, context);
  TORCH_CHECK_VALUE(sum.bytes == said.bytes && sum.crc32 == said.crc32, context, file.string(),
                    " must be as it was written, of ", said.bytes, " bytes with checksum ", said.crc32, ", got ",
                    sum.bytes, " bytes with checksum ", sum.crc32);
  auto checkpoint = load_safetensors(file);
  result.tensors = std::move(checkpoint.tensors);
  for (const auto& [alias, name] : checkpoint.metadata) {
    if (const auto* tensor = result.tensors.find(name); tensor != nullptr && !result.tensors.contains(alias)) {
      result.tensors.insert(alias, torch::Tensor(*tensor));
    }
  }
  result.validate(context + file.string() + ": ");
  return result;
}

}  // namespace rarefy::quantization
