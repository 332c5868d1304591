// How a fake quantizer observes: one process or several, the range alone or statistics that it is chosen from.
#include <rarefy/ops/fake_quantize.h>
#include <rarefy/ops/range_search.h>
#include <rarefy/quantization/fake_quantizer.h>
#include <torch/types.h>

#include <limits>

#include "quantization/observed_once.h"

namespace rarefy::quantization {

void FakeQuantizerImpl::observe_alone(const torch::Tensor& x, std::optional<int64_t> axis) {
  if (observed_once != nullptr && observed_once->take_over(*this, x)) {
    return;
  }
  const auto& scheme = options.scheme;
  if (statistics) {
    statistics->observe(x, axis, skipped);
    chosen_after_observing();
  } else if (std::holds_alternative<MSE>(options.observer) || std::holds_alternative<HalfQuadratic>(options.observer)) {
    search(x, axis);
  } else {
    const auto [qmin, qmax] = scheme.observed_range();
    ops::observe(x.detach(), min_val, max_val, scale, zero_point, skipped, axis, averaging_constant(options.observer),
                 qmin, qmax, scheme.symmetric);
  }
  if (observed_once != nullptr) {
    observed_once->observed(*this, x);
  }
}

bool FakeQuantizerImpl::was_searched(const torch::Tensor& weight) const {
  return !weight.is_inference() && searched_.lock().get() == weight.unsafeGetTensorImpl() &&
         searched_version_ == weight._version();
}

void FakeQuantizerImpl::note_searched(const torch::Tensor& weight) {
  if (!weight.is_inference()) {
    searched_ = c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>(weight.getIntrusivePtr());
    searched_version_ = weight._version();
  }
}

void FakeQuantizerImpl::search(const torch::Tensor& weight, std::optional<int64_t> axis) {
  if (was_searched(weight)) {
    return;
  }
  const auto& scheme = options.scheme;
  const auto x = weight.detach();
  // The range first: it finds and counts values that are not finite.
  const auto before = skipped.clone();
  ops::observe(x, min_val, max_val, scale, zero_point, skipped, axis, 1.0, scheme.qmin(), scheme.qmax(),
               scheme.symmetric);
  if (!skipped.equal(before)) {
    return;
  }
  if (const auto* mse = std::get_if<MSE>(&options.observer)) {
    const auto weights = importance.defined() ? std::optional(importance) : std::nullopt;
    const auto [low, high] = ops::mse_range(x, axis, scheme.qmin(), scheme.qmax(), scheme.symmetric, mse->norm,
                                            mse->steps, mse->bins, weights);
    take(low, high, 1.0);
  } else {
    const auto& hq = std::get<HalfQuadratic>(options.observer);
    const auto [found_scale, found_zero_point] = ops::half_quadratic_qparams(
        x, axis, scheme.qmin(), scheme.qmax(), scheme.symmetric, hq.norm, hq.beta, hq.kappa, hq.iterations);
    scale.copy_(found_scale);
    zero_point.copy_(found_zero_point);
    min_val.copy_((scheme.qmin() - zero_point) * scale);
    max_val.copy_((scheme.qmax() - zero_point) * scale);
  }
  note_searched(weight);
}

/// While it quantizes, the batch is rounded with what it has added to.
void FakeQuantizerImpl::chosen_after_observing() {
  pending_ = true;
  if (quantize) {
    settle();
  }
}

void FakeQuantizerImpl::settle() const {
  if (!learned.empty()) {
    settle_learned();
    return;
  }
  if (!pending_) {
    return;
  }
  const torch::NoGradGuard no_grad;
  const auto [low, high] = statistics->choose(options.scheme);
  take(low, high, 1.0);
  pending_ = false;
}

void FakeQuantizerImpl::take_statistics(const std::map<std::string, torch::Tensor>& values) {
  const torch::NoGradGuard no_grad;
  skipped.copy_(values.at("skipped"));
  if (!learned.empty()) {
    min_val.copy_(values.at("min_val"));
    max_val.copy_(values.at("max_val"));
    start_from(min_val, max_val);
    refresh();
    return;
  }
  take(values.at("min_val").to(min_val.device()), values.at("max_val").to(max_val.device()), 1.0);
  if (statistics) {
    for (const auto& [name, tensor] : statistics->tensors()) {
      tensor.copy_(values.at(name));
    }
    pending_ = true;
  }
  known_calibrated_ = calibrated();
}

void FakeQuantizerImpl::drop_statistics() {
  options.scheme.noise.reset();
  if (!learned.empty()) {
    freeze_learned();
    return;
  }
  settle();
  if (statistics) {
    unregister_module("statistics");
    statistics = nullptr;
    options.observer = MinMax{};
  } else if (is_weight()) {
    options.observer = Latest{};
  }
}

// --- Several processes --------------------------------------------------------------------------------------------------

/// The union of the processes' batches is one batch to the observer. It is left out when it is not finite in all of them;
/// counted, in all of them, when it is not finite in any.
void FakeQuantizerImpl::observe_over_processes(const torch::Tensor& x) {
  const torch::NoGradGuard no_grad;
  const auto& scheme = options.scheme;
  if (statistics) {
    require_all_processes();
    statistics->observe_over_processes(x, scheme.axis(), skipped, all_reduce_max, all_reduce_sum);
    chosen_after_observing();
    return;
  }
  constexpr float infinity = std::numeric_limits<float>::infinity();
  auto low = torch::full_like(min_val, infinity), high = torch::full_like(max_val, -infinity);
  auto local_scale = torch::empty_like(scale), local_zero_point = torch::empty_like(zero_point);
  auto bad = torch::zeros_like(skipped);
  const auto [qmin, qmax] = scheme.observed_range();
  ops::observe(x, low, high, local_scale, local_zero_point, bad, scheme.axis(), std::nullopt, qmin, qmax,
               scheme.symmetric);
  const auto all = merged(low, high, bad);
  take(all, averaging_constant(options.observer));
  skipped.add_(all.slice(0, 2 * min_val.numel()).to(torch::kInt64));
}

void FakeQuantizerImpl::require_all_processes() const {
  TORCH_CHECK_VALUE(all_reduce_sum != nullptr && all_gather != nullptr,
                    "[FakeQuantizer] all_reduce_sum and all_gather must be set beside all_reduce_max for ",
                    str(options.observer));
}

void FakeQuantizerImpl::merge_over_processes() {
  const torch::NoGradGuard no_grad;
  if (!learned.empty()) {
    auto low = min_val.clone(), high = max_val.clone();
    average_over_processes(low, high, /*all=*/false);
    min_val.copy_(low);
    max_val.copy_(high);
    if (calibrated()) {
      start_from(min_val, max_val);
    }
    auto count = skipped.to(torch::kFloat32);
    all_reduce_max(count);
    skipped.copy_(count);
    return;
  }
  if (statistics) {
    require_all_processes();
    statistics->merge_over_processes(all_reduce_max, all_reduce_sum, all_gather);
    auto count = skipped.to(torch::kFloat32);
    all_reduce_max(count);
    skipped.copy_(count);
    pending_ = true;
    return;
  }
  const auto all = merged(min_val, max_val, skipped);
  take(all, std::nullopt);
  skipped.copy_(all.slice(0, 2 * min_val.numel()));
}

/// [-low, high, count] over all processes, one maximum for all: a process that has seen nothing gives -inf.
torch::Tensor FakeQuantizerImpl::merged(const torch::Tensor& low, const torch::Tensor& high,
                                        const torch::Tensor& count) {
  auto packed = torch::cat({-low, high, count.to(torch::kFloat32)});
  all_reduce_max(packed);
  return packed;
}

/// Observes the two ends of a merged range.
void FakeQuantizerImpl::take(const torch::Tensor& merged, std::optional<double> constant) {
  const int64_t n = min_val.numel();
  take(-merged.slice(0, 0, n), merged.slice(0, n, 2 * n), constant);
}

/// The same for the ends themselves. Ends that are not finite leave the range as it is.
void FakeQuantizerImpl::take(const torch::Tensor& low, const torch::Tensor& high,
                             std::optional<double> constant) const {
  const auto& scheme = options.scheme;
  auto counted_already = torch::zeros_like(skipped);
  // Handles of the same buffers: the operator wants references that it may write through.
  auto from = min_val, to = max_val, step = scale, zero = zero_point;
  const auto [qmin, qmax] = scheme.observed_range();
  ops::observe(torch::stack({low, high}), from, to, step, zero, counted_already,
               scheme.axis().has_value() ? std::optional<int64_t>(1) : std::nullopt, constant, qmin, qmax,
               scheme.symmetric);
  if (!scheme.is_plain()) {
    derive_format_scale();
  }
}

}  // namespace rarefy::quantization
