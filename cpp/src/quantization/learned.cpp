// What a fake quantizer does whose grid is learned (rarefy/quantization/learned.h).
#include <rarefy/quantization/fake_quantizer.h>
#include <rarefy/quantization/learned_grids.h>
#include <torch/types.h>

#include <cmath>
#include <limits>

namespace rarefy::quantization {

const Scheme& FakeQuantizerImpl::widest() const { return widest_.has_value() ? *widest_ : options.scheme; }

int64_t FakeQuantizerImpl::greatest_bits() const { return widest().bits; }

void FakeQuantizerImpl::register_learned(c10::IntArrayRef size) {
  learned.clear();
  const auto kind = learned_kind(options.observer);
  if (kind.empty()) {
    return;
  }
  const auto& scheme = options.scheme;
  // A grid of scale 1, until it starts from data.
  const double levels = static_cast<double>(
      scheme.symmetric ? scheme.qmax() - static_cast<int64_t>(std::ceil((scheme.qmin() + scheme.qmax()) / 2.0))
                       : scheme.qmax() - scheme.qmin());
  const auto high = torch::full(size, levels), low = scheme.symmetric ? -high : torch::zeros(size);
  const auto values = learned_start(low, high, kind, scheme.qmin(), scheme.qmax(), scheme.symmetric);
  const auto names = learned_names(kind);
  for (size_t i = 0; i < names.size(); ++i) {
    learned[names[i]] = register_parameter(names[i], values[i].clone());
  }
  zero_point.copy_(values.back());
  if (const auto found = learned.find("scale"); found != learned.end()) {
    scale = found->second;
  }
  started_from_ = 0;
}

std::vector<torch::Tensor> FakeQuantizerImpl::learned_values() const {
  std::vector<torch::Tensor> values;
  for (const auto& name : learned_names(learned_kind(options.observer))) {
    values.push_back(learned.at(name));
  }
  return values;
}

torch::Tensor FakeQuantizerImpl::forward_learned(const torch::Tensor& x) {
  if (!quantize) {
    if (observes_now() && !is_recomputing()) {
      start_learned(x);
    }
    return x;
  }
  if (!known_calibrated_) {
    if (!calibrated()) {
      if (observe && (is_training() || is_weight())) {
        start_learned(x);
      } else {
        require_calibrated();
      }
    }
    known_calibrated_ = calibrated();
  }
  if (const auto* bits = std::get_if<LearnedBits>(&options.observer); bits != nullptr && is_training()) {
    const torch::NoGradGuard no_grad;
    learned.at("bits").clamp_(bits->lowest, greatest_bits());
  }
  std::optional<double> gradient_scale;
  if (const auto* lsq = std::get_if<LSQ>(&options.observer)) {
    gradient_scale = lsq->gradient_scale;
  } else if (const auto* plus = std::get_if<LSQPlus>(&options.observer)) {
    gradient_scale = plus->gradient_scale;
  }
  const auto& scheme = widest();
  return learned_fake_quantize(x, learned_values(), zero_point, learned_kind(options.observer), gradient_scale,
                               is_weight(), scheme.axis(), scheme.qmin(), scheme.qmax(), scheme.symmetric);
}

/// Starts from a batch, or from the mean of the ranges of all batches so far. One that is not finite is left out.
void FakeQuantizerImpl::start_learned(const torch::Tensor& x) {
  if (x.numel() == 0) {
    return;
  }
  const torch::NoGradGuard no_grad;
  const auto& scheme = widest();
  const auto kind = learned_kind(options.observer);
  const auto seen = x.detach();
  auto low = torch::full_like(min_val, std::numeric_limits<float>::infinity()), high = -low;
  if (torch::isfinite(seen.to(torch::kFloat32)).all().item<bool>()) {
    const auto [least, greatest] =
        learned_range(seen, kind, scheme.axis(), scheme.qmin(), scheme.qmax(), scheme.symmetric);
    low.copy_(least);
    high.copy_(greatest);
  }
  if (!is_weight() && all_reduce_max && quantize) {
    average_over_processes(low, high, /*all=*/true);
  }
  if (!(low <= high).all().item<bool>()) {
    skipped.add_(1);
    tell_skipped(x);
    return;
  }
  if (learned_from_zero(kind, scheme.symmetric)) {
    const auto least = low.min().item<double>();
    TORCH_CHECK_VALUE(least >= 0.0, "[", str(options.observer), "] ", name.empty() ? "the quantizer" : name,
                      " must have values that are not negative, as after a ReLU (LSQPlus has an offset), got ", least);
  }
  ++started_from_;
  if (started_from_ == 1) {
    min_val.copy_(low);
    max_val.copy_(high);
  } else {
    min_val.add_((low - min_val) / started_from_);
    max_val.add_((high - max_val) / started_from_);
  }
  start_from(min_val, max_val);
}

void FakeQuantizerImpl::start_from(const torch::Tensor& low, const torch::Tensor& high) const {
  const torch::NoGradGuard no_grad;
  const auto& scheme = widest();
  const auto kind = learned_kind(options.observer);
  const auto values = learned_start(low, high, kind, scheme.qmin(), scheme.qmax(), scheme.symmetric);
  const auto parameters = learned_values();
  for (size_t i = 0; i < parameters.size(); ++i) {
    parameters[i].copy_(values[i]);
  }
  zero_point.copy_(values.back());
  settle_learned();
}

/// The mean of the processes' ranges; with `all`, nothing is left when one has none.
void FakeQuantizerImpl::average_over_processes(torch::Tensor& low, torch::Tensor& high, bool all) {
  require_all_processes();
  const auto count = low.numel();
  auto sum_low = torch::zeros_like(low), sum_high = torch::zeros_like(high);
  int64_t processes = 0, with_range = 0;
  for (const auto& other : all_gather(torch::cat({low, high}))) {
    ++processes;
    if (torch::isfinite(other).all().item<bool>()) {
      ++with_range;
      sum_low.add_(other.slice(0, 0, count));
      sum_high.add_(other.slice(0, count));
    }
  }
  const bool none = with_range == 0 || (all && with_range < processes);
  low = none ? torch::full_like(low, std::numeric_limits<float>::infinity()) : sum_low / with_range;
  high = none ? -low : sum_high / with_range;
}

/// Scale and zero point of the parameters as they are, where they are not parameters themselves; those positive.
void FakeQuantizerImpl::settle_learned() const {
  const torch::NoGradGuard no_grad;
  const auto& scheme = widest();
  if (const auto* bits = std::get_if<LearnedBits>(&options.observer)) {
    learned.at("bits").clamp_(bits->lowest, greatest_bits());
  }
  const auto [s, z] = learned_qparams(learned_values(), zero_point, learned_kind(options.observer), scheme.qmin(),
                                      scheme.qmax(), scheme.symmetric);
  // A backward pass that is still to come may have saved the parameter: it is written to only where it must be.
  if (!scale.equal(s)) {
    scale.copy_(s);
  }
  if (!zero_point.equal(z)) {
    zero_point.copy_(z);
  }
}

void FakeQuantizerImpl::settle_bits() {
  if (!std::holds_alternative<LearnedBits>(options.observer)) {
    return;
  }
  settle_learned();
  widest_ = widest();
  options.scheme.bits = static_cast<int64_t>(std::lround(learned.at("bits").item<double>()));
  options.scheme.narrow_range = options.scheme.symmetric;
}

/// Scale and zero point become buffers, and the range the grid's.
void FakeQuantizerImpl::freeze_learned() {
  const torch::NoGradGuard no_grad;
  settle_learned();
  settle_bits();
  const bool weight = is_weight();
  const auto fixed = scale.detach().clone();
  const bool was_parameter = learned.contains("scale");
  for (const auto& [key, parameter] : learned) {
    parameters_.erase(key);
  }
  learned.clear();
  if (was_parameter) {
    scale = register_buffer("scale", fixed);
  }
  options.observer = weight ? Observer(Latest{}) : Observer(MinMax{});
  widest_.reset();
  min_val.copy_((options.scheme.qmin() - zero_point) * scale);
  max_val.copy_((options.scheme.qmax() - zero_point) * scale);
}

}  // namespace rarefy::quantization
