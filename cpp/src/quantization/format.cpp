#include <c10/util/Exception.h>
#include <fmt/format.h>
#include <rarefy/quantization/format.h>

#include <cmath>
#include <utility>

namespace rarefy::quantization {
namespace {

constexpr std::pair<MXElement, const char*> kElements[] = {{MXElement::e4m3, "e4m3"}, {MXElement::e5m2, "e5m2"},
                                                           {MXElement::e3m2, "e3m2"}, {MXElement::e2m3, "e2m3"},
                                                           {MXElement::e2m1, "e2m1"}, {MXElement::int8, "int8"}};

constexpr std::pair<Specials, const char*> kSpecials[] = {
    {Specials::none, "none"}, {Specials::nan, "nan"}, {Specials::ieee, "ieee"}};

struct Width {
  int64_t operator()(const Integer&) const { return 0; }
  int64_t operator()(const Binary&) const { return 1; }
  int64_t operator()(const Ternary&) const { return 2; }
  int64_t operator()(const Minifloat& format) const { return format.bits(); }
  int64_t operator()(const MX& format) const {
    return format.element == MXElement::int8 ? 8 : element_float(format.element).bits();
  }
  int64_t operator()(const NVFP4&) const { return 4; }
  int64_t operator()(const NF4&) const { return 4; }
  int64_t operator()(const Codebook& format) const {
    int64_t bits = 1;
    while (int64_t{1} << bits < format.entries) {
      ++bits;
    }
    return bits;
  }
};

}  // namespace

Minifloat Minifloat::e4m3() { return {4, 3, 7, Specials::nan, true}; }
Minifloat Minifloat::e5m2() { return {5, 2, 15, Specials::ieee, true}; }
Minifloat Minifloat::e3m2() { return {3, 2, 3, Specials::none, true}; }
Minifloat Minifloat::e2m3() { return {2, 3, 1, Specials::none, true}; }
Minifloat Minifloat::e2m1() { return {2, 1, 1, Specials::none, true}; }

int64_t Minifloat::greatest_exponent() const {
  const int64_t largest_code = (int64_t{1} << exponent_bits) - 1;
  const bool code_is_special = specials == Specials::ieee || (specials == Specials::nan && mantissa_bits == 0);
  return largest_code - (code_is_special ? 1 : 0) - bias;
}

double Minifloat::greatest() const {
  const int64_t mantissas = int64_t{1} << mantissa_bits;
  const int64_t last = specials == Specials::nan && mantissa_bits > 0 ? mantissas - 2 : mantissas - 1;
  const double significand = 1.0 + static_cast<double>(last) / static_cast<double>(mantissas);
  return std::ldexp(significand, static_cast<int>(greatest_exponent()));
}

std::string Minifloat::str() const {
  std::string text = fmt::format("e{}m{}", exponent_bits, mantissa_bits);
  Minifloat usual = *this;
  usual.bias = (int64_t{1} << (exponent_bits - 1)) - 1;
  usual.saturate = true;
  usual.specials = text == "e4m3" ? Specials::nan : text == "e5m2" ? Specials::ieee : Specials::none;
  if (bias != usual.bias) {
    text += fmt::format(" bias {}", bias);
  }
  if (specials != usual.specials) {
    text += fmt::format(" {}", specials == Specials::none ? "finite" : quantization::str(specials));
  }
  return fmt::format("{}{}", text, saturate ? "" : " unsaturated");
}

std::string name(const Format& format) {
  constexpr const char* names[] = {"integer", "binary", "ternary", "minifloat", "mx", "nvfp4", "nf4", "codebook"};
  return names[format.index()];
}

std::string str(MXElement element) { return kElements[static_cast<size_t>(element)].second; }

MXElement mx_element(const std::string& name) {
  for (const auto& [element, known] : kElements) {
    if (name == known) {
      return element;
    }
  }
  TORCH_CHECK_VALUE(false, "[MX] element must be e4m3, e5m2, e3m2, e2m3, e2m1 or int8, got '", name, "'");
}

Minifloat element_float(MXElement element) {
  switch (element) {
    case MXElement::e4m3:
      return Minifloat::e4m3();
    case MXElement::e5m2:
      return Minifloat::e5m2();
    case MXElement::e3m2:
      return Minifloat::e3m2();
    case MXElement::e2m3:
      return Minifloat::e2m3();
    case MXElement::e2m1:
      return Minifloat::e2m1();
    case MXElement::int8:
      // One exponent, the denormals': 0, 1/64, ..., 63/64 and 1, ..., 127/64.
      return {1, 6, 1, Specials::none, true};
  }
  return Minifloat::e4m3();
}

int64_t element_bits(const Format& format) { return std::visit(Width{}, format); }

std::string str(Specials specials) { return kSpecials[static_cast<size_t>(specials)].second; }

Specials specials(const std::string& name) {
  for (const auto& [value, known] : kSpecials) {
    if (name == known) {
      return value;
    }
  }
  TORCH_CHECK_VALUE(false, "[Minifloat] specials must be none, nan or ieee, got '", name, "'");
}

}  // namespace rarefy::quantization
