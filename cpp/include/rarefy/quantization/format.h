#pragma once

#include <rarefy/export.h>

#include <cstdint>
#include <string>
#include <variant>

// What the elements of a quantized tensor are: the formats of Scheme. docs/quantization.md has them as a table.
namespace rarefy::quantization {

/// Integers of Scheme::bits bits with a scale and, unless symmetric, a zero point.
struct Integer {
  bool operator==(const Integer&) const = default;
};

/// -1 and 1, times the mean of |w| (XNOR-Net: Rastegari et al., 2016, arXiv:1603.05279). Weights alone; 0 counts as positive.
struct Binary {
  bool operator==(const Binary&) const = default;
};

/// -1, 0 and 1, times the mean of |w| over what is not 0 (TWN: Li et al., 2016, arXiv:1605.04711). Weights alone.
struct Ternary {
  /// |w| up to threshold * mean |w| becomes 0; > 0.
  double threshold = 0.7;
  bool operator==(const Ternary&) const = default;
};

/// What a floating-point format keeps codes for.
enum class Specials {
  none,  ///< every code is a finite number (FP6, FP4)
  nan,   ///< the largest code of each sign is NaN, there is no infinity (E4M3 "fn")
  ieee,  ///< the largest exponent is infinity and NaN (E5M2)
};

/// Floating point of at most 8 bits: a sign, an exponent, a mantissa, with denormals.
///
///   value = (-1)^sign * 2^(exponent - bias) * (1 + mantissa / 2^mantissa_bits)      exponent > 0
///           (-1)^sign * 2^(1 - bias) * mantissa / 2^mantissa_bits                    exponent = 0
struct Minifloat {
  int64_t exponent_bits = 4;  ///< 1 to 7
  int64_t mantissa_bits = 3;  ///< 0 to 6; 8 bits at most with the sign
  int64_t bias = 7;
  Specials specials = Specials::nan;
  /// What is beyond the largest number becomes that number; otherwise infinity (ieee) or NaN (nan).
  bool saturate = true;

  RAREFY_API static Minifloat e4m3();
  RAREFY_API static Minifloat e5m2();
  RAREFY_API static Minifloat e3m2();
  RAREFY_API static Minifloat e2m3();
  RAREFY_API static Minifloat e2m1();

  int64_t bits() const { return 1 + exponent_bits + mantissa_bits; }
  /// Exponent of the largest number: it is in [2^n, 2^(n+1)).
  RAREFY_API int64_t greatest_exponent() const;
  /// The largest number: 448 for e4m3.
  RAREFY_API double greatest() const;
  /// "e4m3", with what is unusual: "e4m3 bias 8", "e3m4 ieee", "e5m2 unsaturated".
  RAREFY_API std::string str() const;
  bool operator==(const Minifloat&) const = default;
};

/// Elements of OCP microscaling formats (MX v1.0). int8 is a multiple of 1/64 in [-127/64, 127/64].
enum class MXElement { e4m3, e5m2, e3m2, e2m3, e2m1, int8 };

/// Blocks (Scheme::granularity, PerGroup, 32 in the standard) whose elements share a power of two, stored as E8M0:
/// 2^(floor(log2(max |x|)) - n), where n is the element type's largest exponent (Rouhani et al., 2023, arXiv:2310.10537).
struct MX {
  MXElement element = MXElement::e4m3;
  bool operator==(const MX&) const = default;
};

/// FP4 elements (e2m1) in blocks (PerGroup, 16 in the standard) with a scale each in e4m3, and one float32 scale for the tensor.
struct NVFP4 {
  bool operator==(const NVFP4&) const = default;
};

/// 4-bit NormalFloat (QLoRA: Dettmers et al., 2023, arXiv:2305.14314): 16 quantiles of the normal distribution times the
/// largest |x| of a block (PerGroup, 64 in the paper).
struct NF4 {
  /// The scales are stored in 8 bits: less their mean, in blocks of scale_block with a float32 scale each.
  bool double_quantized = false;
  int64_t scale_block = 256;
  bool operator==(const NF4&) const = default;
};

/// The nearest of `entries` values that k-means chose: weight clustering (Han et al., 2016, arXiv:1510.00149).
struct Codebook {
  int64_t entries = 16;  ///< 2 to 256
  bool operator==(const Codebook&) const = default;
};

using Format = std::variant<Integer, Binary, Ternary, Minifloat, MX, NVFP4, NF4, Codebook>;

/// How a value between two of a grid is rounded.
enum class Rounding {
  nearest_even,
  /// Up or down, with probabilities that give the value itself on average. The random numbers are Philox4x32-10 of
  /// (Scheme::seed, number of the call, position of the element): the same for any number of threads.
  stochastic,
};

/// What training does in place of rounding every value to the nearest; everywhere else all values are rounded. Random numbers are
/// those of torch's generator of the device.
struct Noise {
  /// The part of the values, drawn anew at every forward, that is quantized; the others stay as they are, with their exact gradient
  /// (Quant-Noise: Fan et al., 2020, arXiv:2004.07320). In (0, 1]; below 1 unless uniform.
  double share = 1.0;
  /// An even draw from a step's width around the value stands for its rounding, as pseudo-quantization noise has it (UNIQ: Baskin
  /// et al., 2018, arXiv:1804.10969; DiffQ: Defossez et al., 2021, arXiv:2104.09987). What lies beyond the grid is clamped as ever.
  bool uniform = false;
  bool operator==(const Noise&) const = default;
};

/// The gradient of what is rounded.
enum class StraightThrough {
  clipped,  ///< 0 where the value was clamped to the end of the grid
  pass,     ///< as it is, everywhere
};

/// "integer", "binary", "ternary", "minifloat", "mx", "nvfp4", "nf4", "codebook".
RAREFY_API std::string name(const Format& format);
/// "noise(share=0.1)", "noise(share=1, uniform)".
RAREFY_API std::string str(const Noise& noise);
/// "e4m3", "int8", ...
RAREFY_API std::string str(MXElement element);
/// The element type of a name. Throws c10::ValueError for another name.
RAREFY_API MXElement mx_element(const std::string& name);
/// The elements as a minifloat. int8 is one whose numbers are evenly spaced: a single exponent.
RAREFY_API Minifloat element_float(MXElement element);
/// Bits of one element without its share of scales; 0 for Integer, whose bits are Scheme::bits.
RAREFY_API int64_t element_bits(const Format& format);
/// "none", "nan", "ieee", and back; throws c10::ValueError for another name.
RAREFY_API std::string str(Specials specials);
RAREFY_API Specials specials(const std::string& name);

}  // namespace rarefy::quantization
