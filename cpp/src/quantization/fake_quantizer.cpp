#include <rarefy/ops/fake_quantize.h>
#include <rarefy/quantization/fake_quantizer.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/types.h>

#include <limits>
#include <ostream>

namespace rarefy::quantization {

FakeQuantizerImpl::FakeQuantizerImpl(FakeQuantizerOptions options_) : options(std::move(options_)) {
  options.scheme.validate();
  validate(options.observer);
  TORCH_CHECK_VALUE(options.channels >= 1, "[FakeQuantizer] channels must be at least 1, got ", options.channels);
  FakeQuantizerImpl::reset();
}

void FakeQuantizerImpl::reset() {
  std::vector<int64_t> size = {options.scheme.axis().has_value() ? options.channels : 1};
  if (!options.scheme.block().empty() && !options.scheme.dynamic && !options.shape.empty()) {
    size = options.scheme.scale_shape(options.shape);
  }
  constexpr float infinity = std::numeric_limits<float>::infinity();
  scale = register_buffer("scale", torch::ones(size));
  zero_point = register_buffer("zero_point", torch::zeros(size, torch::kInt32));
  min_val = register_buffer("min_val", torch::full(size, infinity));
  max_val = register_buffer("max_val", torch::full(size, -infinity));
  skipped = register_buffer("skipped", torch::zeros({1}, torch::kInt64));
  register_format_buffers();
}

void FakeQuantizerImpl::pretty_print(std::ostream& stream) const {
  stream << "rarefy::quantization::FakeQuantizer(" << options.scheme.str() << ", " << str(options.observer)
         << (calibrated() ? ")" : ", not calibrated)");
}

bool FakeQuantizerImpl::observes_now() const {
  return observe && (is_training() || !quantize || std::holds_alternative<Latest>(options.observer));
}

/// A forward inside of a backward pass recomputes what was computed before: with the parameters of that time.
bool FakeQuantizerImpl::is_recomputing() const {
  return !std::holds_alternative<Latest>(options.observer) && torch::autograd::get_current_graph_task_id() != -1;
}

void FakeQuantizerImpl::require_calibrated() {
  known_calibrated_ = known_calibrated_ || calibrated();
  TORCH_CHECK_VALUE(known_calibrated_, "[FakeQuantizer] ", name.empty() ? "" : name + " ",
                    "must observe data before it quantizes: run a training step or calibrate");
}

/// The ends of each channel's range of x * factor, [2, channels]: rounding is monotonic, so the products of the ends do.
torch::Tensor FakeQuantizerImpl::scaled_ends(const torch::Tensor& x, const torch::Tensor& factor) const {
  constexpr float infinity = std::numeric_limits<float>::infinity();
  const auto& scheme = options.scheme;
  auto low = torch::full({x.size(0)}, infinity, min_val.options()), high = torch::full_like(low, -infinity);
  auto unused = torch::ones_like(low), unused_too = torch::zeros_like(low, torch::kInt32);
  auto count = torch::zeros_like(skipped);
  ops::observe(x, low, high, unused, unused_too, count, 0, std::nullopt, scheme.qmin(), scheme.qmax(),
               scheme.symmetric);
  return torch::stack({low * factor.detach(), high * factor.detach()});
}

void FakeQuantizerImpl::update(const torch::Tensor& x, const torch::Tensor& factor) {
  if (!observes_now()) {
    require_calibrated();
    return;
  }
  if (is_recomputing()) {
    return;
  }
  const torch::NoGradGuard no_grad;
  const auto& scheme = options.scheme;
  if (all_reduce_max && !std::holds_alternative<Latest>(options.observer)) {
    observe_over_processes(x);
  } else {
    const auto seen = factor.defined() ? scaled_ends(x, factor) : x.detach();
    const auto axis = factor.defined() && scheme.axis().has_value() ? std::optional<int64_t>(1) : scheme.axis();
    ops::observe(seen, min_val, max_val, scale, zero_point, skipped, axis, averaging_constant(options.observer),
                 scheme.qmin(), scheme.qmax(), scheme.symmetric);
  }
  tell_skipped(x);
}

torch::Tensor FakeQuantizerImpl::forward(const torch::Tensor& x) {
  const auto& scheme = options.scheme;
  if (!scheme.is_plain()) {
    return forward_format(x);
  }
  const bool is_weight = std::holds_alternative<Latest>(options.observer);
  const bool observe_here = observes_now();
  if (observe_here && is_recomputing()) {
    return quantize ? ops::fake_quantize(x, scale, zero_point, scheme.axis(), scheme.qmin(), scheme.qmax()) : x;
  }
  if (observe_here && !is_weight && all_reduce_max) {
    observe_over_processes(x);
    tell_skipped(x);
    return quantize ? ops::fake_quantize(x, scale, zero_point, scheme.axis(), scheme.qmin(), scheme.qmax()) : x;
  }
  if (observe_here && quantize) {
    auto y = ops::observe_fake_quantize(x, min_val, max_val, scale, zero_point, skipped, scheme.axis(),
                                        averaging_constant(options.observer), scheme.qmin(), scheme.qmax(),
                                        scheme.symmetric);
    tell_skipped(x);
    return y;
  }
  if (observe_here) {
    const torch::NoGradGuard no_grad;
    ops::observe(x, min_val, max_val, scale, zero_point, skipped, scheme.axis(), averaging_constant(options.observer),
                 scheme.qmin(), scheme.qmax(), scheme.symmetric);
    tell_skipped(x);
    return x;
  }
  if (!quantize) {
    return x;
  }
  require_calibrated();
  return ops::fake_quantize(x, scale, zero_point, scheme.axis(), scheme.qmin(), scheme.qmax());
}

/// The union of the processes' batches is one batch to the observer. It is left out when it is not finite in all of them;
/// counted, in all of them, when it is not finite in any.
void FakeQuantizerImpl::observe_over_processes(const torch::Tensor& x) {
  const torch::NoGradGuard no_grad;
  const auto& scheme = options.scheme;
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

void FakeQuantizerImpl::merge_over_processes() {
  const torch::NoGradGuard no_grad;
  const auto all = merged(min_val, max_val, skipped);
  take(all, std::nullopt);
  if (!options.scheme.is_plain()) {
    derive_format_scale();
  }
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
  const auto& scheme = options.scheme;
  const int64_t n = min_val.numel();
  auto counted_already = torch::zeros_like(skipped);
  ops::observe(torch::stack({-merged.slice(0, 0, n), merged.slice(0, n, 2 * n)}), min_val, max_val, scale, zero_point,
               counted_already, scheme.axis().has_value() ? std::optional<int64_t>(1) : std::nullopt, constant,
               scheme.observed_range().first, scheme.observed_range().second, scheme.symmetric);
}

void FakeQuantizerImpl::tell_skipped(const torch::Tensor& x) {
  if (!skipped.is_cpu() || (told_ && !std::holds_alternative<Latest>(options.observer)) ||
      skipped.item<int64_t>() == 0) {
    return;
  }
  const std::string who = name.empty() ? "a quantizer" : name;
  if (std::holds_alternative<Latest>(options.observer)) {
    skipped.zero_();
    const auto bad = x.numel() - torch::isfinite(x.detach().to(torch::kFloat32)).sum().item<int64_t>();
    TORCH_CHECK_VALUE(false, "[FakeQuantizer] the weight of ", who, " must be finite, got ", bad,
                      " NaN or infinite values of ", x.numel());
  }
  told_ = true;
  TORCH_WARN("[FakeQuantizer] ", who,
             " met a batch with NaN or infinite values and leaves such batches out of its range; its buffer 'skipped' "
             "counts them");
}

torch::Tensor FakeQuantizerImpl::quantize_to_integer(const torch::Tensor& x) const {
  const auto& scheme = options.scheme;
  return ops::quantize(x.detach(), scale, zero_point, scheme.axis(), scheme.qmin(), scheme.qmax());
}

void FakeQuantizerImpl::load(torch::serialize::InputArchive& archive) {
  torch::nn::Module::load(archive);
  refresh();
}

bool FakeQuantizerImpl::calibrated() const { return options.scheme.dynamic || (min_val <= max_val).all().item<bool>(); }

}  // namespace rarefy::quantization
