#include <c10/util/Exception.h>
#include <fmt/format.h>
#include <rarefy/quantization/scheme.h>

namespace rarefy::quantization {

bool Scheme::signed_range() const { return is_signed.value_or(symmetric); }

int64_t Scheme::qmin() const {
  const int64_t lowest = signed_range() ? -(int64_t{1} << (bits - 1)) : 0;
  return narrow_range ? lowest + 1 : lowest;
}

int64_t Scheme::qmax() const { return (int64_t{1} << (signed_range() ? bits - 1 : bits)) - 1; }

std::optional<int64_t> Scheme::axis() const {
  const auto* channel = std::get_if<PerChannel>(&granularity);
  return channel == nullptr ? std::nullopt : std::optional<int64_t>(channel->axis);
}

c10::ScalarType Scheme::dtype() const {
  if (bits > 8) {
    return signed_range() ? c10::kShort : c10::kUInt16;
  }
  return signed_range() ? c10::kChar : c10::kByte;
}

void Scheme::validate() const {
  TORCH_CHECK_VALUE((bits >= 2 && bits <= 8) || bits == 16, "[Scheme] bits must be in 2..8, or 16, got ", bits);
}

std::string Scheme::str() const {
  return fmt::format("{}{} {} {} [{}, {}]", signed_range() ? "int" : "uint", bits,
                     symmetric ? "symmetric" : "asymmetric",
                     axis().has_value() ? fmt::format("per-channel(axis={})", *axis()) : "per-tensor", qmin(), qmax());
}

}  // namespace rarefy::quantization
