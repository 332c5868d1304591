// Weights of formats: the recorded operators that round them, as the parts that a file holds.
#include <ATen/ops/equal.h>
#include <ATen/ops/zeros_like.h>
#include <fmt/format.h>

#include <bit>

#include "graph/call.h"
#include "onnx/translate.h"

namespace rarefy::onnx {
namespace {

using namespace quantization;

/// A recorded call's arguments by the names of its schema.
struct Arguments {
  const graph::Node& node;

  const c10::IValue& at(const char* name) const {
    const auto index = graph::argument_index(node, name);
    TORCH_INTERNAL_ASSERT(index.has_value());
    return node.inputs[*index];
  }
  int64_t id(const char* name) const {
    const auto index = graph::argument_index(node, name);
    return index.has_value() ? node.input(*index) : -1;
  }
  int64_t integer(const char* name) const { return at(name).toInt(); }
  std::optional<int64_t> axis() const { return at("axis").toOptional<int64_t>(); }
  Granularity granularity(at::IntArrayRef sizes) const {
    const auto along = axis();
    const auto block = at("block").toIntVector();
    if (!along.has_value()) {
      return PerTensor{};
    }
    if (block.empty()) {
      return PerChannel{*along};
    }
    if (block.size() == 2) {
      return PerBlock{block[0], block[1]};
    }
    const auto size = block[0] < 0 ? sizes[static_cast<size_t>(*along < 0 ? *along + sizes.size() : *along)] : block[0];
    return PerGroup{size, *along};
  }
};

/// The grid of the integers qmin to qmax.
Scheme integer_scheme(int64_t qmin, int64_t qmax, bool symmetric) {
  Scheme scheme;
  scheme.is_signed = qmin < 0;
  scheme.bits = std::bit_width(static_cast<uint64_t>(qmax)) + (qmin < 0 ? 1 : 0);
  scheme.symmetric = symmetric;
  scheme.narrow_range = qmin != (qmin < 0 ? -qmax - 1 : 0);
  return scheme;
}

/// The scheme that an operator rounds to; unset for other operators.
std::optional<Scheme> scheme_of(const graph::Node& node, at::IntArrayRef sizes) {
  const Arguments a{node};
  const auto& name = node.op.name;
  Scheme scheme;
  if (name == "rarefy::fake_quantize") {
    scheme = integer_scheme(a.integer("qmin"), a.integer("qmax"), /*symmetric=*/false);
    scheme.granularity = a.axis().has_value() ? Granularity(PerChannel{*a.axis()}) : PerTensor{};
    return scheme;
  }
  if (name == "rarefy::fake_quantize_group") {
    scheme = integer_scheme(a.integer("qmin"), a.integer("qmax"), /*symmetric=*/false);
  } else if (name == "rarefy::fake_quantize_dynamic") {
    scheme = integer_scheme(a.integer("qmin"), a.integer("qmax"), a.at("symmetric").toBool());
    scheme.dynamic = true;
    scheme.power_of_two = a.at("power_of_two").toBool();
  } else if (name == "rarefy::cast_minifloat" || name == "rarefy::cast_minifloat_dynamic") {
    scheme.dynamic = name.ends_with("dynamic");
    const Minifloat f{a.integer("exponent_bits"), a.integer("mantissa_bits"), a.integer("bias"),
                      specials(std::string(a.at("specials").toStringView())),
                      scheme.dynamic || a.at("saturate").toBool()};
    scheme.format = f;
    scheme.power_of_two = scheme.dynamic && a.at("power_of_two").toBool();
  } else if (name == "rarefy::fake_quantize_binary") {
    scheme = Scheme::binary();
  } else if (name == "rarefy::fake_quantize_ternary") {
    scheme = Scheme::ternary({}, a.at("threshold").toDouble());
  } else if (name == "rarefy::fake_quantize_mx") {
    return Scheme::mx(mx_element(std::string(a.at("element").toStringView())), a.integer("block"), a.integer("axis"));
  } else if (name == "rarefy::fake_quantize_nvfp4" && a.id("tensor_scale") < 0) {
    return Scheme::nvfp4(a.integer("block"), a.integer("axis"));
  } else if (name == "rarefy::fake_quantize_nf4") {
    scheme = Scheme::nf4(a.integer("block"), a.integer("scale_block") > 0, a.integer("axis"));
    if (a.integer("scale_block") > 0) {
      scheme.format = NF4{true, a.integer("scale_block")};
    }
    return scheme;
  } else if (name == "rarefy::fake_quantize_codebook") {
    scheme.format = Codebook{};
  } else {
    return std::nullopt;
  }
  scheme.granularity = a.granularity(sizes);
  if (!scheme.is_integer()) {
    scheme.bits = element_bits(scheme.format);
  }
  return scheme;
}

}  // namespace

bool rounds_to_format(const graph::Node& node) {
  static const std::unordered_set<std::string_view> names = {
      "rarefy::fake_quantize_group",    "rarefy::fake_quantize_dynamic", "rarefy::cast_minifloat",
      "rarefy::cast_minifloat_dynamic", "rarefy::fake_quantize_binary",  "rarefy::fake_quantize_ternary",
      "rarefy::fake_quantize_mx",       "rarefy::fake_quantize_nvfp4",   "rarefy::fake_quantize_nf4",
      "rarefy::fake_quantize_codebook"};
  return names.contains(node.op.name);
}

std::optional<QuantizedTensorParts> Translator::stored(int64_t id) const {
  const auto* made_by = maker(id);
  const auto& recorded = graph().values[id];
  if (recorded.origin != graph::Origin::constant || made_by == nullptr) {
    return std::nullopt;
  }
  const auto checked = [&](QuantizedTensorParts parts) {
    if (!at::equal(quantization::dequantize(parts), recorded.tensor)) {
      refuse(
          fmt::format("the weight must be what {} stores, but its codes stand for other values", parts.scheme.str()));
    }
    return parts;
  };
  if (auto parts = packed(*made_by)) {
    return checked(std::move(*parts));
  }
  if (!rounds_to_format(*made_by) && made_by->op.name != "rarefy::fake_quantize") {
    return std::nullopt;
  }
  auto scheme = scheme_of(*made_by, recorded.tensor.sizes());
  if (!scheme.has_value()) {
    return std::nullopt;
  }
  const Arguments a{*made_by};
  std::optional<at::Tensor> scale, zero_point;
  const bool is_codebook = std::holds_alternative<Codebook>(scheme->format);
  if (const auto of_scale = a.id(is_codebook ? "codebook" : "scale"); of_scale >= 0) {
    scale = graph().values[of_scale].tensor;
    if (is_codebook) {
      const Codebook format{scale->size(-1)};
      scheme->format = format;
      scheme->bits = element_bits(scheme->format);
    }
  }
  if (const auto of_zeros = a.id("zero_point"); of_zeros >= 0) {
    zero_point = graph().values[of_zeros].tensor;
  }
  // Values that were rounded at random are on the grid of their scales now.
  const auto& x = graph().values[made_by->input(0)].tensor;
  const bool random = a.id("seed") >= 0;
  return checked(quantize_to(x.defined() && !random ? x : recorded.tensor, *scheme, scale, zero_point));
}

Value* Translator::weight(const QuantizedTensorParts& parts, bool transposed, std::string_view role) {
  OnnxWeightForm form;
  try {
    form = onnx_weight_form(parts, {opset(), transposed, options_.weight_zero_points});
  } catch (const c10::ValueError& error) {
    refuse(error.what_without_backtrace());
  }
  std::unordered_map<std::string, Value*> known;
  for (const auto& [name, values, is_int4] : form.tensors) {
    // "weight_scale" of a role "weight".
    auto* value = constant(values, std::string(role) + name.substr(std::string_view("weight").size()));
    value->is_int4 = is_int4;
    known[name] = value;
  }
  Value* result = nullptr;
  for (const auto& node : form.nodes) {
    std::vector<Value*> inputs;
    for (const auto& name : node.inputs) {
      inputs.push_back(known.at(name));
    }
    Attributes attributes;
    for (const auto& [name, value] : node.attributes) {
      std::visit([&, &key = name](const auto& number) { attributes.emplace_back(key, number); }, value);
    }
    result = known[node.output] = emit(node.op, inputs, attributes, node.dtype);
    result->shape = fixed(node.shape);
    result->has_shape = true;
  }
  return result;
}

}  // namespace rarefy::onnx
