#pragma once

#include <cstdint>
#include <optional>

// Quantizers whose grid is trained: each stands where an observer of ranges may, for activations and for weights as said
// below. The grid starts from data (the first training batch, a calibration, the weight itself) and then follows its gradient.
// FakeQuantizer (rarefy/quantization/fake_quantizer.h) holds the parameters, docs/dev/numerics.md the rules. All of them want
// a plain grid of integers, per tensor or channel, and compute in floating point until conversion.
namespace rarefy::quantization {

/// Learned step size (Esser et al., 2020, arXiv:1902.08153). Parameter `scale`. For weights and activations.
struct LSQ {
  /// What the scale's gradient is multiplied with. Unset: 1 / sqrt(n * levels), where n is the number of elements of a channel
  /// of a weight (of the weight, per tensor) and of one sample of an activation, and levels the integers above 0.
  std::optional<double> gradient_scale = std::nullopt;
  bool operator==(const LSQ&) const = default;
};

/// Learned step size and offset (Bhalgat et al., 2020, arXiv:2004.09576). Parameters `scale` and `offset`. For asymmetric
/// activations. The offset is rounded to the grid, so that 0 is on it and integer kernels run.
struct LSQPlus {
  std::optional<double> gradient_scale = std::nullopt;  ///< of both parameters, as in LSQ
  bool operator==(const LSQPlus&) const = default;
};

/// Learned clipping of activations that are not negative (Choi et al., 2018, arXiv:1805.06085). Parameter `alpha`. For asymmetric
/// unsigned activations, per tensor; a first batch with negative values is an error.
struct PACT {
  bool operator==(const PACT&) const = default;
};

/// Learned threshold, scales that are powers of two (Jain et al., 2019, arXiv:1903.08066). Parameter `log2_threshold`. For
/// weights and activations.
struct TQT {
  bool operator==(const TQT&) const = default;
};

/// Learned bit width and range (Uhlich et al., 2020, arXiv:1905.11452). Parameters `bits` [1] and `bound`. For symmetric weights and
/// activations, and for asymmetric unsigned activations that are not negative. The scheme's width is the greatest, and where
/// training begins; model_size_bits (rarefy/quantization/learned_parameters.h) is what a loss holds against it.
struct LearnedBits {
  int64_t lowest = 2;  ///< smallest width, 2 to 8
  bool operator==(const LearnedBits&) const = default;
};

}  // namespace rarefy::quantization
