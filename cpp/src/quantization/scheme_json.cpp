#include <fmt/format.h>
#include <rarefy/quantization/scheme.h>

#include <charconv>

#include "json.h"

namespace rarefy::quantization {
namespace {

const char* text(bool value) { return value ? "true" : "false"; }

struct WriteGranularity {
  std::string operator()(const PerTensor&) const { return R"({"kind":"per_tensor"})"; }
  std::string operator()(const PerChannel& g) const {
    return fmt::format(R"({{"kind":"per_channel","axis":{}}})", g.axis);
  }
  std::string operator()(const PerGroup& g) const {
    return fmt::format(R"({{"kind":"per_group","size":{},"axis":{}}})", g.size, g.axis);
  }
  std::string operator()(const PerBlock& g) const {
    return fmt::format(R"({{"kind":"per_block","rows":{},"columns":{}}})", g.rows, g.columns);
  }
  std::string operator()(const PerToken&) const { return R"({"kind":"per_token"})"; }
};

struct WriteFormat {
  std::string operator()(const Integer&) const { return R"({"kind":"integer"})"; }
  std::string operator()(const Binary&) const { return R"({"kind":"binary"})"; }
  std::string operator()(const Ternary& f) const {
    return fmt::format(R"({{"kind":"ternary","threshold":{}}})", f.threshold);
  }
  std::string operator()(const Minifloat& f) const {
    return fmt::format(
        R"({{"kind":"minifloat","exponent_bits":{},"mantissa_bits":{},"bias":{},"specials":"{}","saturate":{}}})",
        f.exponent_bits, f.mantissa_bits, f.bias, str(f.specials), text(f.saturate));
  }
  std::string operator()(const MX& f) const { return fmt::format(R"({{"kind":"mx","element":"{}"}})", str(f.element)); }
  std::string operator()(const NVFP4&) const { return R"({"kind":"nvfp4"})"; }
  std::string operator()(const NF4& f) const {
    return fmt::format(R"({{"kind":"nf4","double_quantized":{},"scale_block":{}}})", text(f.double_quantized),
                       f.scale_block);
  }
  std::string operator()(const Codebook& f) const {
    return fmt::format(R"({{"kind":"codebook","entries":{}}})", f.entries);
  }
};

template <typename Number>
Number number(JsonReader& reader, const std::string& name) {
  const auto written = reader.value();
  Number value{};
  const auto* end = written.data() + written.size();
  const auto [at, error] = std::from_chars(written.data(), end, value);
  reader.require(error == std::errc() && at == end, "must have a number at ", name, ", got ", written);
  return value;
}

bool boolean(JsonReader& reader, const std::string& name) {
  const auto written = reader.value();
  reader.require(written == "true" || written == "false", "must have true or false at ", name, ", got ", written);
  return written == "true";
}

/// Every key of a granularity or of a format with its value, whichever of them the object has.
struct Fields {
  std::string kind, specials = "nan", element = "e4m3";
  int64_t axis = -1, size = 0, rows = 0, columns = 0, exponent_bits = 0, mantissa_bits = 0, bias = 0, scale_block = 256,
          entries = 0;
  double threshold = 0.7;
  bool saturate = true, double_quantized = false;

  explicit Fields(JsonReader& reader) {
    reader.object([&](const std::string& name) {
      const std::pair<const char*, int64_t*> integers[] = {{"axis", &axis},
                                                           {"size", &size},
                                                           {"rows", &rows},
                                                           {"columns", &columns},
                                                           {"exponent_bits", &exponent_bits},
                                                           {"mantissa_bits", &mantissa_bits},
                                                           {"bias", &bias},
                                                           {"scale_block", &scale_block},
                                                           {"entries", &entries}};
      for (const auto& [key, value] : integers) {
        if (name == key) {
          *value = number<int64_t>(reader, name);
          return;
        }
      }
      if (name == "kind" || name == "specials" || name == "element") {
        (name == "kind" ? kind : name == "specials" ? specials : element) = reader.string();
      } else if (name == "threshold") {
        threshold = number<double>(reader, name);
      } else if (name == "saturate" || name == "double_quantized") {
        (name == "saturate" ? saturate : double_quantized) = boolean(reader, name);
      } else {
        reader.require(false, "must not have the key '", name, "' in a granularity or format");
      }
    });
  }
};

Granularity read_granularity(JsonReader& reader) {
  const Fields fields(reader);
  if (fields.kind == "per_channel") {
    return PerChannel{fields.axis};
  }
  if (fields.kind == "per_group") {
    return PerGroup{fields.size, fields.axis};
  }
  if (fields.kind == "per_block") {
    return PerBlock{fields.rows, fields.columns};
  }
  if (fields.kind == "per_token") {
    return PerToken{};
  }
  reader.require(fields.kind == "per_tensor", "must have a known granularity, got '", fields.kind, "'");
  return PerTensor{};
}

Format read_format(JsonReader& reader) {
  const Fields fields(reader);
  if (fields.kind == "binary") {
    return Binary{};
  }
  if (fields.kind == "ternary") {
    return Ternary{fields.threshold};
  }
  if (fields.kind == "minifloat") {
    return Minifloat{fields.exponent_bits, fields.mantissa_bits, fields.bias, specials(fields.specials),
                     fields.saturate};
  }
  if (fields.kind == "mx") {
    return MX{mx_element(fields.element)};
  }
  if (fields.kind == "nvfp4") {
    return NVFP4{};
  }
  if (fields.kind == "nf4") {
    return NF4{fields.double_quantized, fields.scale_block};
  }
  if (fields.kind == "codebook") {
    return Codebook{fields.entries};
  }
  reader.require(fields.kind == "integer", "must have a known format, got '", fields.kind, "'");
  return Integer{};
}

Noise read_noise(JsonReader& reader) {
  Noise noise;
  reader.object([&](const std::string& name) {
    reader.require(name == "share" || name == "uniform", "must not have the key '", name, "' in noise");
    if (name == "share") {
      noise.share = number<double>(reader, name);
    } else {
      noise.uniform = boolean(reader, name);
    }
  });
  return noise;
}

}  // namespace

std::string Scheme::to_json() const {
  return fmt::format(
      R"({{"format":{},"bits":{},"symmetric":{},"signed":{},"narrow_range":{},"granularity":{},"dynamic":{},)"
      R"("power_of_two":{},"rounding":"{}","seed":{},"straight_through":"{}"{}}})",
      std::visit(WriteFormat{}, format), bits, text(symmetric), text(signed_range()), text(narrow_range),
      std::visit(WriteGranularity{}, granularity), text(dynamic), text(power_of_two),
      rounding == Rounding::stochastic ? "stochastic" : "nearest_even", seed,
      straight_through == StraightThrough::pass ? "pass" : "clipped",
      noise.has_value() ? fmt::format(R"(,"noise":{{"share":{},"uniform":{}}})", noise->share, text(noise->uniform))
                        : std::string());
}

Scheme Scheme::from_json(const std::string& json) {
  JsonReader reader(json, "[Scheme] the JSON of a scheme ");
  Scheme scheme;
  reader.object([&](const std::string& key) {
    if (key == "format") {
      scheme.format = read_format(reader);
    } else if (key == "granularity") {
      scheme.granularity = read_granularity(reader);
    } else if (key == "bits") {
      scheme.bits = number<int64_t>(reader, key);
    } else if (key == "seed") {
      scheme.seed = number<int64_t>(reader, key);
    } else if (key == "symmetric") {
      scheme.symmetric = boolean(reader, key);
    } else if (key == "signed") {
      scheme.is_signed = boolean(reader, key);
    } else if (key == "narrow_range") {
      scheme.narrow_range = boolean(reader, key);
    } else if (key == "dynamic") {
      scheme.dynamic = boolean(reader, key);
    } else if (key == "power_of_two") {
      scheme.power_of_two = boolean(reader, key);
    } else if (key == "rounding") {
      const auto value = reader.string();
      reader.require(value == "nearest_even" || value == "stochastic",
                     "must have the rounding nearest_even or stochastic, got '", value, "'");
      scheme.rounding = value == "stochastic" ? Rounding::stochastic : Rounding::nearest_even;
    } else if (key == "straight_through") {
      const auto value = reader.string();
      reader.require(value == "clipped" || value == "pass", "must have straight_through clipped or pass, got '", value,
                     "'");
      scheme.straight_through = value == "pass" ? StraightThrough::pass : StraightThrough::clipped;
    } else if (key == "noise") {
      scheme.noise = read_noise(reader);
    } else {
      reader.require(false, "must not have the key '", key, "'");
    }
  });
  reader.end();
  scheme.validate();
  return scheme;
}

}  // namespace rarefy::quantization
