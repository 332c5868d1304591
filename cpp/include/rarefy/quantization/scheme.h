#pragma once

#include <c10/core/ScalarType.h>
#include <rarefy/export.h>
#include <rarefy/quantization/observer.h>

#include <cstdint>
#include <optional>
#include <string>
#include <variant>

namespace rarefy::quantization {

/// One scale and zero point for the whole tensor.
struct PerTensor {
  bool operator==(const PerTensor&) const = default;
};

/// One scale and zero point per index of `axis`: an input of shape [C, ...] with axis 0 has scales of shape [C].
struct PerChannel {
  int64_t axis = 0;
  bool operator==(const PerChannel&) const = default;
};

using Granularity = std::variant<PerTensor, PerChannel>;

/// How a tensor maps onto integers: the grid, without the values of scale and zero point.
///
///   signed     [-2^(bits-1), 2^(bits-1) - 1], one less at the bottom with narrow_range
///   unsigned   [0, 2^bits - 1],               one more at the bottom with narrow_range
struct Scheme {
  /// Width of the integers: 2 to 8, or 16 (activations alone, which compute in floating point then).
  int64_t bits = 8;
  /// The zero point is fixed in the middle of the range (0 when signed); otherwise it follows the data.
  bool symmetric = true;
  /// Unset: signed when symmetric, unsigned otherwise.
  std::optional<bool> is_signed = std::nullopt;
  /// Leave out the lowest integer, so that a signed range is symmetric about 0 ([-127, 127]).
  bool narrow_range = false;
  Granularity granularity = PerTensor{};

  RAREFY_API bool signed_range() const;
  RAREFY_API int64_t qmin() const;
  RAREFY_API int64_t qmax() const;
  /// The channel axis, unset for PerTensor.
  RAREFY_API std::optional<int64_t> axis() const;
  /// The type that stores the integers: int8 or uint8, int16 or uint16.
  RAREFY_API c10::ScalarType dtype() const;
  /// Throws c10::ValueError for bits other than 2 to 8 and 16.
  RAREFY_API void validate() const;
  /// "int8 symmetric per-channel(axis=0) [-127, 127]"
  RAREFY_API std::string str() const;

  bool operator==(const Scheme&) const = default;
};

}  // namespace rarefy::quantization
