#include "quantization/observed_once.h"

#include <rarefy/quantization/fake_quantizer.h>
#include <torch/types.h>

#include <algorithm>

namespace rarefy::quantization {
namespace {

constexpr size_t kRemembered = 64;

/// Whether the state is in the buffers that take_over copies.
bool has_plain_state(const FakeQuantizerImpl& quantizer) {
  return !quantizer.is_weight() &&
         (chooses_at_end(quantizer.options.observer) || std::holds_alternative<MinMax>(quantizer.options.observer) ||
          std::holds_alternative<MovingAverage>(quantizer.options.observer));
}

}  // namespace

ObservedOnce::History ObservedOnce::history_of(FakeQuantizerImpl& quantizer) {
  if (const auto found = histories_.find(&quantizer); found != histories_.end()) {
    return found->second;
  }
  const bool is_fresh = !quantizer.pending_ && quantizer.min_val.gt(quantizer.max_val).all().item<bool>() &&
                        quantizer.skipped.item<int64_t>() == 0;
  return histories_[&quantizer] = is_fresh ? 0 : next_++;
}

bool ObservedOnce::take_over(FakeQuantizerImpl& quantizer, const at::Tensor& x) {
  if (!has_plain_state(quantizer) || x.is_inference()) {
    return false;
  }
  const auto history = history_of(quantizer);
  const auto found = std::find_if(seen_.begin(), seen_.end(), [&](const Seen& seen) {
    const auto& other = *seen.quantizer;
    return seen.before == history && seen.version == static_cast<int64_t>(x._version()) &&
           seen.x.lock().get() == x.unsafeGetTensorImpl() && histories_.at(seen.quantizer) == seen.after &&
           other.options.scheme == quantizer.options.scheme && other.options.observer == quantizer.options.observer &&
           other.scale.device() == quantizer.scale.device() && other.scale.sizes() == quantizer.scale.sizes();
  });
  if (found == seen_.end()) {
    return false;
  }
  const auto& other = *found->quantizer;
  quantizer.min_val.copy_(other.min_val);
  quantizer.max_val.copy_(other.max_val);
  quantizer.scale.copy_(other.scale);
  quantizer.zero_point.copy_(other.zero_point);
  quantizer.skipped.copy_(other.skipped);
  if (quantizer.statistics) {
    const auto theirs = other.statistics->tensors();
    for (const auto& [name, tensor] : quantizer.statistics->tensors()) {
      tensor.copy_(theirs.at(name));
    }
  }
  quantizer.pending_ = other.pending_;
  histories_[&quantizer] = found->after;
  return true;
}

void ObservedOnce::observed(FakeQuantizerImpl& quantizer, const at::Tensor& x) {
  if (!has_plain_state(quantizer)) {
    return;
  }
  const auto before = history_of(quantizer), after = next_++;
  histories_[&quantizer] = after;
  if (x.is_inference()) {
    return;
  }
  if (seen_.size() == kRemembered) {
    seen_.pop_front();
  }
  seen_.push_back({c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>(x.getIntrusivePtr()),
                   static_cast<int64_t>(x._version()), &quantizer, before, after});
}

}  // namespace rarefy::quantization
