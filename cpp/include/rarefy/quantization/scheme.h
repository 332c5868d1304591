#pragma once

#include <c10/core/ScalarType.h>
#include <c10/util/ArrayRef.h>
#include <rarefy/export.h>
#include <rarefy/quantization/format.h>
#include <rarefy/quantization/observer.h>

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

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

/// One scale per `size` neighbours along `axis` (negative: from the end). Where `size` does not divide the axis, its last group
/// is shorter: [O, I] with axis -1 has scales of shape [O, ceil(I / size)].
struct PerGroup {
  int64_t size = 128;
  int64_t axis = -1;
  bool operator==(const PerGroup&) const = default;
};

/// One scale per block of `rows` by `columns` of the last two axes: [..., R, C] has scales of shape
/// [..., ceil(R / rows), ceil(C / columns)]; blocks at the ends are smaller.
struct PerBlock {
  int64_t rows = 128;
  int64_t columns = 128;
  bool operator==(const PerBlock&) const = default;
};

/// One scale per index of all axes but the last, from the tensor itself: [..., C] has scales of shape [..., 1].
struct PerToken {
  bool operator==(const PerToken&) const = default;
};

using Granularity = std::variant<PerTensor, PerChannel, PerGroup, PerBlock, PerToken>;

/// What a tensor is quantized to: the elements and what shares a scale, without the values of scale and zero point.
///
/// Integers:
///   signed     [-2^(bits-1), 2^(bits-1) - 1], one less at the bottom with narrow_range
///   unsigned   [0, 2^bits - 1],               one more at the bottom with narrow_range
struct Scheme {
  /// Width of an element: 2 to 16 for integers (layers with integer kernels take 2 to 8), that of the format otherwise.
  int64_t bits = 8;
  /// The zero point is fixed in the middle of the range (0 when signed); otherwise it follows the data.
  bool symmetric = true;
  /// Unset: signed when symmetric, unsigned otherwise.
  std::optional<bool> is_signed = std::nullopt;
  /// Leave out the lowest integer, so that a signed range is symmetric about 0 ([-127, 127]).
  bool narrow_range = false;
  Granularity granularity = PerTensor{};
  Format format = Integer{};
  /// The scale is taken from the very tensor that is rounded, each time: nothing is observed.
  bool dynamic = false;
  /// Scales are powers of two, rounded up so that the range still fits.
  bool power_of_two = false;
  Rounding rounding = Rounding::nearest_even;
  /// Of stochastic rounding.
  int64_t seed = 0;
  StraightThrough straight_through = StraightThrough::clipped;
  /// Of training alone; convert leaves it out.
  std::optional<Noise> noise = std::nullopt;

  /// Presets of formats that have one width and one way to share scales.
  RAREFY_API static Scheme minifloat(const Minifloat& format, Granularity granularity = PerTensor{});
  RAREFY_API static Scheme mx(MXElement element, int64_t block = 32, int64_t axis = -1);
  RAREFY_API static Scheme nvfp4(int64_t block = 16, int64_t axis = -1);
  RAREFY_API static Scheme nf4(int64_t block = 64, bool double_quantized = false, int64_t axis = -1);
  RAREFY_API static Scheme codebook(int64_t entries, Granularity granularity = PerTensor{});
  RAREFY_API static Scheme binary(Granularity granularity = PerTensor{});
  RAREFY_API static Scheme ternary(Granularity granularity = PerTensor{}, double threshold = 0.7);

  RAREFY_API bool signed_range() const;
  /// Throw c10::ValueError, naming the format, for formats without a range of integers.
  RAREFY_API int64_t qmin() const;
  RAREFY_API int64_t qmax() const;
  bool is_integer() const { return std::holds_alternative<Integer>(format); }
  /// A grid of integers with one observed scale for the tensor or each channel, rounded to nearest with the clipped gradient:
  /// what the operator fake_quantize computes. Everything else has operators of its own (rarefy/ops/formats.h).
  RAREFY_API bool is_plain() const;
  /// Why no integer kernel computes with it; unset when some do.
  RAREFY_API std::optional<std::string> why_not_integer() const;
  /// Whether a range has to be observed beforehand; otherwise the scale follows from the tensor that is rounded.
  RAREFY_API bool needs_range() const;
  /// The integers for which an observer of the range finds scale and zero point: qmin and qmax, and -1 and 1 for formats without
  /// integers, whose scale follows from the range afterwards.
  RAREFY_API std::pair<int64_t, int64_t> observed_range() const;
  /// The channel axis, unset unless PerChannel.
  RAREFY_API std::optional<int64_t> axis() const;
  /// The sizes of what shares a scale, as the operators of rarefy/ops/formats.h take them: empty per tensor and channel, {size}
  /// per group, {rows, columns} per block, {-1} per token.
  RAREFY_API std::vector<int64_t> block() const;
  /// The axis that goes with block(): of groups, of channels, unset per tensor.
  RAREFY_API std::optional<int64_t> block_axis() const;
  /// The shape of the scales of a tensor of this shape. Throws c10::ValueError where the granularity does not fit it.
  RAREFY_API std::vector<int64_t> scale_shape(c10::ArrayRef<int64_t> sizes) const;
  /// The type that stores the integers: int8 or uint8, int16 or uint16. Throws as qmin().
  RAREFY_API c10::ScalarType dtype() const;
  /// Throws c10::ValueError, with the rule and the value, for a combination that does not exist.
  RAREFY_API void validate() const;
  /// "int8 symmetric per-channel(axis=0) [-127, 127]"; different for every two schemes that differ.
  RAREFY_API std::string str() const;
  /// One line of JSON, and back: from_json(to_json()) == *this once `is_signed` is set. from_json throws c10::ValueError for
  /// what is no scheme.
  RAREFY_API std::string to_json() const;
  RAREFY_API static Scheme from_json(const std::string& json);

  bool operator==(const Scheme&) const = default;
};

/// "per-tensor", "per-channel(axis=0)", "per-group(128, axis=-1)", "per-block(128, 128)", "per-token".
RAREFY_API std::string str(const Granularity& granularity);

}  // namespace rarefy::quantization
