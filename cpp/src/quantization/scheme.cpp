#include <c10/util/Exception.h>
#include <fmt/format.h>
#include <rarefy/quantization/scheme.h>

#include <algorithm>

namespace rarefy::quantization {

namespace {

/// The name that messages and str() use for the elements: "int8", "e4m3", "mx e4m3", "nf4".
std::string elements(const Scheme& scheme) {
  if (scheme.is_integer()) {
    return fmt::format("{}{}", scheme.signed_range() ? "int" : "uint", scheme.bits);
  }
  if (const auto* minifloat = std::get_if<Minifloat>(&scheme.format)) {
    return minifloat->str();
  }
  if (const auto* mx = std::get_if<MX>(&scheme.format)) {
    return fmt::format("mx {}", str(mx->element));
  }
  if (const auto* nf4 = std::get_if<NF4>(&scheme.format); nf4 != nullptr && nf4->double_quantized) {
    return fmt::format("nf4 double-quantized({})", nf4->scale_block);
  }
  if (const auto* codebook = std::get_if<Codebook>(&scheme.format)) {
    return fmt::format("codebook({})", codebook->entries);
  }
  if (const auto* ternary = std::get_if<Ternary>(&scheme.format)) {
    return fmt::format("ternary({})", ternary->threshold);
  }
  return name(scheme.format);
}

template <typename... Alternatives, typename Variant>
bool is_one_of(const Variant& variant) {
  return (std::holds_alternative<Alternatives>(variant) || ...);
}

void check_minifloat(const Minifloat& f) {
  TORCH_CHECK_VALUE(f.exponent_bits >= 1 && f.exponent_bits <= 7, "[Scheme] exponent_bits must be in 1..7, got ",
                    f.exponent_bits);
  TORCH_CHECK_VALUE(f.mantissa_bits >= 0 && f.mantissa_bits <= 6, "[Scheme] mantissa_bits must be in 0..6, got ",
                    f.mantissa_bits);
  TORCH_CHECK_VALUE(f.bits() <= 8, "[Scheme] a minifloat must have at most 8 bits, got ", f.bits());
  TORCH_CHECK_VALUE(f.specials != Specials::none || f.saturate,
                    "[Scheme] a minifloat without NaN and infinity must saturate, got saturate false");
  TORCH_CHECK_VALUE(f.greatest_exponent() >= 1 - f.bias,
                    "[Scheme] a minifloat must have an exponent for numbers beside NaN and infinity, got ",
                    f.exponent_bits, " exponent bits, ", f.mantissa_bits, " mantissa bits and specials ",
                    str(f.specials));
  TORCH_CHECK_VALUE(f.greatest_exponent() <= 100 && 1 - f.bias - f.mantissa_bits >= -120,
                    "[Scheme] the bias must keep a minifloat's numbers within 2^-120 and 2^101, got ", f.bias);
}

void check_granularity(const Scheme& scheme) {
  if (const auto* group = std::get_if<PerGroup>(&scheme.granularity)) {
    TORCH_CHECK_VALUE(group->size >= 1, "[Scheme] the size of a group must be at least 1, got ", group->size);
  }
  if (const auto* block = std::get_if<PerBlock>(&scheme.granularity)) {
    TORCH_CHECK_VALUE(block->rows >= 1 && block->columns >= 1,
                      "[Scheme] a block must have at least 1 row and column, got ", block->rows, " by ",
                      block->columns);
  }
  const bool per_token = is_one_of<PerToken>(scheme.granularity);
  TORCH_CHECK_VALUE(!per_token || scheme.dynamic,
                    "[Scheme] per-token scales follow from each tensor: dynamic must be true, got false");
  // Binary and ternary weights are dynamic by nature.
  const bool by_channel = is_one_of<PerChannel>(scheme.granularity) && !is_one_of<Binary, Ternary>(scheme.format);
  TORCH_CHECK_VALUE(!scheme.dynamic || !by_channel,
                    "[Scheme] dynamic scales must be per tensor, group, block or token, got ", str(scheme.granularity));
}

/// What holds for every format but integers.
void check_format(const Scheme& scheme) {
  const auto what = name(scheme.format);
  TORCH_CHECK_VALUE(scheme.bits == element_bits(scheme.format), "[Scheme] bits must be ", element_bits(scheme.format),
                    " for ", elements(scheme), ", got ", scheme.bits);
  TORCH_CHECK_VALUE(scheme.symmetric, "[Scheme] ", what, " has no zero point: symmetric must be true, got false");
  TORCH_CHECK_VALUE(scheme.signed_range(), "[Scheme] ", what, " is signed: signed must be true, got false");
  TORCH_CHECK_VALUE(!scheme.narrow_range, "[Scheme] narrow_range is for integers, got ", elements(scheme));
  const bool from_tensor = is_one_of<Binary, Ternary, MX, NVFP4, NF4>(scheme.format);
  TORCH_CHECK_VALUE(!from_tensor || scheme.dynamic, "[Scheme] ", what,
                    " takes its scales from the tensor itself: dynamic must be true, got false");
  TORCH_CHECK_VALUE(!scheme.power_of_two || is_one_of<Minifloat>(scheme.format),
                    "[Scheme] power_of_two is for integers and minifloats, got ", elements(scheme));
  const bool in_blocks = is_one_of<MX, NVFP4, NF4>(scheme.format);
  TORCH_CHECK_VALUE(!in_blocks || is_one_of<PerGroup>(scheme.granularity), "[Scheme] ", what,
                    " has a scale per block: granularity must be PerGroup, got ", str(scheme.granularity));
  if (const auto* codebook = std::get_if<Codebook>(&scheme.format)) {
    TORCH_CHECK_VALUE(codebook->entries >= 2 && codebook->entries <= 256,
                      "[Scheme] a codebook must have 2 to 256 entries, got ", codebook->entries);
    TORCH_CHECK_VALUE(!scheme.dynamic, "[Scheme] a codebook stays: dynamic must be false, got true");
    TORCH_CHECK_VALUE((is_one_of<PerTensor, PerChannel, PerGroup>(scheme.granularity)),
                      "[Scheme] a codebook must be per tensor, channel or group, got ", str(scheme.granularity));
  }
  if (const auto* ternary = std::get_if<Ternary>(&scheme.format)) {
    TORCH_CHECK_VALUE(ternary->threshold > 0.0 && ternary->threshold < 100.0,
                      "[Scheme] the threshold of ternary must be in (0, 100), got ", ternary->threshold);
  }
  if (const auto* nf4 = std::get_if<NF4>(&scheme.format)) {
    TORCH_CHECK_VALUE(nf4->scale_block >= 1, "[Scheme] scale_block must be at least 1, got ", nf4->scale_block);
  }
}

void check_noise(const Scheme& scheme) {
  const auto& noise = *scheme.noise;
  TORCH_CHECK_VALUE(noise.share > 0.0 && noise.share <= 1.0, "[Scheme] the share of noise must be in (0, 1], got ",
                    noise.share);
  TORCH_CHECK_VALUE(
      noise.uniform || noise.share < 1.0,
      "[Scheme] the share of noise must be below 1, which rounds every value as without noise, or uniform "
      "must be true, got share 1 and uniform false");
  TORCH_CHECK_VALUE(!noise.uniform || (scheme.is_integer() && !scheme.dynamic),
                    "[Scheme] uniform noise is for integers with an observed scale, got ",
                    scheme.dynamic ? "dynamic " : "", elements(scheme));
}

}  // namespace

Scheme Scheme::minifloat(const Minifloat& format, Granularity granularity) {
  const bool per_token = std::holds_alternative<PerToken>(granularity);
  return {.bits = format.bits(), .granularity = granularity, .format = format, .dynamic = per_token};
}
Scheme Scheme::mx(MXElement element, int64_t block, int64_t axis) {
  const MX format{element};
  return {.bits = element_bits(format), .granularity = PerGroup{block, axis}, .format = format, .dynamic = true};
}
Scheme Scheme::nvfp4(int64_t block, int64_t axis) {
  return {.bits = 4, .granularity = PerGroup{block, axis}, .format = NVFP4{}, .dynamic = true};
}
Scheme Scheme::nf4(int64_t block, bool double_quantized, int64_t axis) {
  return {.bits = 4,
          .granularity = PerGroup{block, axis},
          .format = NF4{.double_quantized = double_quantized},
          .dynamic = true};
}
Scheme Scheme::codebook(int64_t entries, Granularity granularity) {
  const Codebook format{entries};
  return {.bits = element_bits(format), .granularity = granularity, .format = format};
}
Scheme Scheme::binary(Granularity granularity) {
  return {.bits = 1, .granularity = granularity, .format = Binary{}, .dynamic = true};
}
Scheme Scheme::ternary(Granularity granularity, double threshold) {
  return {.bits = 2, .granularity = granularity, .format = Ternary{threshold}, .dynamic = true};
}

bool Scheme::signed_range() const { return is_signed.value_or(symmetric); }

int64_t Scheme::qmin() const {
  TORCH_CHECK_VALUE(is_integer(), "[Scheme] qmin is of a range of integers, which ", elements(*this), " has not");
  const int64_t lowest = signed_range() ? -(int64_t{1} << (bits - 1)) : 0;
  return narrow_range ? lowest + 1 : lowest;
}

int64_t Scheme::qmax() const {
  TORCH_CHECK_VALUE(is_integer(), "[Scheme] qmax is of a range of integers, which ", elements(*this), " has not");
  return (int64_t{1} << (signed_range() ? bits - 1 : bits)) - 1;
}

bool Scheme::is_plain() const {
  return is_integer() && is_one_of<PerTensor, PerChannel>(granularity) && !dynamic && !power_of_two &&
         rounding == Rounding::nearest_even && straight_through == StraightThrough::clipped;
}

std::optional<std::string> Scheme::why_not_integer() const {
  if (!is_integer()) {
    return fmt::format("{} has no integer kernels", elements(*this));
  }
  if (!is_one_of<PerTensor, PerChannel>(granularity)) {
    return fmt::format("scales {} have no integer kernels", quantization::str(granularity));
  }
  if (noise.has_value()) {
    return "noise is added in floating point";
  }
  if (!is_plain()) {
    return fmt::format("{} has no integer kernels", dynamic                            ? "a dynamic scale"
                                                    : rounding == Rounding::stochastic ? "stochastic rounding"
                                                    : power_of_two ? "a power-of-two scale"
                                                                   : "a gradient that passes the clip");
  }
  return std::nullopt;
}

bool Scheme::needs_range() const { return !dynamic && !is_one_of<Codebook>(format); }

std::pair<int64_t, int64_t> Scheme::observed_range() const {
  return is_integer() ? std::pair(qmin(), qmax()) : std::pair<int64_t, int64_t>(-1, 1);
}

std::optional<int64_t> Scheme::axis() const {
  const auto* channel = std::get_if<PerChannel>(&granularity);
  return channel == nullptr ? std::nullopt : std::optional<int64_t>(channel->axis);
}

std::vector<int64_t> Scheme::block() const {
  if (const auto* group = std::get_if<PerGroup>(&granularity)) {
    return {group->size};
  }
  if (const auto* block = std::get_if<PerBlock>(&granularity)) {
    return {block->rows, block->columns};
  }
  return is_one_of<PerToken>(granularity) ? std::vector<int64_t>{-1} : std::vector<int64_t>{};
}

std::optional<int64_t> Scheme::block_axis() const {
  if (const auto* group = std::get_if<PerGroup>(&granularity)) {
    return group->axis;
  }
  if (is_one_of<PerBlock, PerToken>(granularity)) {
    return -1;
  }
  return axis();
}

std::vector<int64_t> Scheme::scale_shape(c10::ArrayRef<int64_t> sizes) const {
  const auto dims = static_cast<int64_t>(sizes.size());
  const auto along = block_axis();
  if (!along.has_value()) {
    return {1};
  }
  TORCH_CHECK_VALUE(*along >= -dims && *along < dims, "[Scheme] ", quantization::str(granularity),
                    " must be of an axis of the tensor, got shape ", sizes);
  const auto at = static_cast<size_t>(*along < 0 ? *along + dims : *along);
  if (axis().has_value()) {
    return {sizes[at]};
  }
  auto shape = sizes.vec();
  const auto divide = [&](size_t index, int64_t size) {
    shape[index] = size < 0 ? std::min<int64_t>(shape[index], 1) : (shape[index] + size - 1) / size;
  };
  const auto sizes_of_block = block();
  divide(at, sizes_of_block.back());
  if (sizes_of_block.size() == 2) {
    TORCH_CHECK_VALUE(dims >= 2, "[Scheme] blocks must be of two axes, got shape ", sizes);
    divide(at - 1, sizes_of_block.front());
  }
  return shape;
}

c10::ScalarType Scheme::dtype() const {
  TORCH_CHECK_VALUE(is_integer(), "[Scheme] dtype is of integers, which ", elements(*this), " has not");
  if (bits > 8) {
    return signed_range() ? c10::kShort : c10::kUInt16;
  }
  return signed_range() ? c10::kChar : c10::kByte;
}

void Scheme::validate() const {
  if (is_integer()) {
    TORCH_CHECK_VALUE(bits >= 2 && bits <= 16, "[Scheme] bits must be in 2..16 for integers (1 bit is Binary), got ",
                      bits);
    TORCH_CHECK_VALUE(!power_of_two || symmetric,
                      "[Scheme] power_of_two needs a fixed zero point: symmetric must be true, got false");
  } else {
    if (const auto* minifloat = std::get_if<Minifloat>(&format)) {
      check_minifloat(*minifloat);
    }
    check_format(*this);
  }
  check_granularity(*this);
  TORCH_CHECK_VALUE(rounding == Rounding::nearest_even || (is_one_of<Integer, Minifloat>(format)),
                    "[Scheme] stochastic rounding is for integers and minifloats, got ", elements(*this));
  TORCH_CHECK_VALUE(seed >= 0, "[Scheme] seed must not be negative, got ", seed);
  if (noise.has_value()) {
    check_noise(*this);
  }
}

std::string Scheme::str() const {
  std::string text = elements(*this);
  if (is_integer()) {
    text += symmetric ? " symmetric" : " asymmetric";
  }
  text += fmt::format(" {}", quantization::str(granularity));
  if (is_integer()) {
    text += fmt::format(" [{}, {}]", qmin(), qmax());
  }
  // Formats that take their scales from the tensor by nature need not say so.
  if (dynamic && is_one_of<Integer, Minifloat>(format)) {
    text += " dynamic";
  }
  if (power_of_two) {
    text += " power-of-two";
  }
  if (rounding == Rounding::stochastic) {
    text += fmt::format(" stochastic(seed={})", seed);
  }
  if (straight_through == StraightThrough::pass) {
    text += " pass-through";
  }
  return noise.has_value() ? fmt::format("{} {}", text, quantization::str(*noise)) : text;
}

std::string str(const Noise& noise) {
  return fmt::format("noise(share={}{})", noise.share, noise.uniform ? ", uniform" : "");
}

std::string str(const Granularity& granularity) {
  if (const auto* channel = std::get_if<PerChannel>(&granularity)) {
    return fmt::format("per-channel(axis={})", channel->axis);
  }
  if (const auto* group = std::get_if<PerGroup>(&granularity)) {
    return fmt::format("per-group({}, axis={})", group->size, group->axis);
  }
  if (const auto* block = std::get_if<PerBlock>(&granularity)) {
    return fmt::format("per-block({}, {})", block->rows, block->columns);
  }
  return is_one_of<PerToken>(granularity) ? "per-token" : "per-tensor";
}

}  // namespace rarefy::quantization
