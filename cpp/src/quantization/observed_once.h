#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <deque>
#include <map>

namespace rarefy::quantization {

class FakeQuantizerImpl;

/// Spares a calibration the work of observing a tensor twice. Two quantizers of one scheme and observer that have seen the same
/// tensors have the same state, so the second to see a tensor (an input shared by two layers) takes over the state of the
/// first. One of these is shared by all quantizers of a calibration.
class ObservedOnce {
 public:
  /// Takes over the state of a quantizer that had seen what this one has, and just now x; says whether there was one.
  bool take_over(FakeQuantizerImpl& quantizer, const at::Tensor& x);
  /// To be told when a quantizer has observed x itself.
  void observed(FakeQuantizerImpl& quantizer, const at::Tensor& x);

 private:
  /// Equal for two quantizers that have seen the same; 0 for those that had seen nothing when they first came here.
  using History = int64_t;
  struct Seen {
    c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl> x;  // keeps its address, not its memory
    int64_t version;
    FakeQuantizerImpl* quantizer;
    History before, after;
  };

  History history_of(FakeQuantizerImpl& quantizer);

  std::map<FakeQuantizerImpl*, History> histories_;
  std::deque<Seen> seen_;  // the latest: layers that share an input are called one after the other
  History next_ = 1;
};

}  // namespace rarefy::quantization
