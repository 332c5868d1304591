#pragma once

#include <rarefy/export.h>
#include <rarefy/quantization/scheme.h>
#include <torch/nn/cloneable.h>
#include <torch/nn/pimpl.h>

namespace rarefy::quantization {

/// Options of a FakeQuantizer.
struct FakeQuantizerOptions {
  Scheme scheme;
  Observer observer = MovingAverage{};
  /// Number of channels for PerChannel; ignored for PerTensor.
  int64_t channels = 1;
};

/// Observes ranges and rounds to the grid, in floating point, with the clipped straight-through gradient.
///
/// Buffers, all of shape [1] or [channels]: scale (float32), zero_point (int32), min_val and max_val (float32, +inf and
/// -inf until something was observed).
/// A weight (Latest) is observed at every forward; an activation while training, and in calibration (observe without
/// quantize) always.
class RAREFY_API FakeQuantizerImpl : public torch::nn::Cloneable<FakeQuantizerImpl> {
 public:
  /// Throws c10::ValueError for an invalid scheme or observer, or channels < 1.
  explicit FakeQuantizerImpl(FakeQuantizerOptions options);
  void reset() override;
  void pretty_print(std::ostream& stream) const override;

  /// x on the grid when `quantize`, x itself otherwise; any shape that the scheme's axis fits.
  /// Throws c10::ValueError when it quantizes but has never observed anything.
  torch::Tensor forward(const torch::Tensor& x);

  /// The integers of x, int8 or uint8, with the parameters as they are.
  torch::Tensor quantize_to_integer(const torch::Tensor& x) const;

  /// True once something was observed.
  bool calibrated() const;

  /// Takes notice of buffers that were written to from outside, as by a checkpoint that was loaded.
  void refresh() { known_calibrated_ = calibrated(); }
  void load(torch::serialize::InputArchive& archive) override;

  FakeQuantizerOptions options;
  bool observe = true;
  bool quantize = true;
  torch::Tensor scale, zero_point, min_val, max_val;

 private:
  bool known_calibrated_ = false;  // saves reading the buffers back at every forward
};
TORCH_MODULE(FakeQuantizer);

}  // namespace rarefy::quantization
