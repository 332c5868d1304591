#include <rarefy/ops/fake_quantize.h>
#include <rarefy/quantization/fake_quantizer.h>
#include <rarefy/quantization/format_search.h>
#include <rarefy/quantization/learned_grids.h>
#include <rarefy/quantization/noise.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/types.h>

#include <limits>
#include <ostream>

namespace rarefy::quantization {
namespace {

/// Whether the scale is a parameter.
bool holds_scale(const Observer& observer) {
  return std::holds_alternative<LSQ>(observer) || std::holds_alternative<LSQPlus>(observer);
}

}  // namespace

FakeQuantizerImpl::FakeQuantizerImpl(FakeQuantizerOptions options_) : options(std::move(options_)) {
  options.scheme.validate();
  validate(options.observer);
  check_learned_scheme("FakeQuantizer", options.observer, options.scheme, is_weight());
  const auto refused = why_not_observed(options.scheme, options.observer);
  TORCH_CHECK_VALUE(!refused.has_value(), "[FakeQuantizer] ", str(options.observer), " does not serve ",
                    options.scheme.str(), ": ", refused.value_or(""));
  TORCH_CHECK_VALUE(options.channels >= 1, "[FakeQuantizer] channels must be at least 1, got ", options.channels);
  FakeQuantizerImpl::reset();
}

void FakeQuantizerImpl::reset() {
  std::vector<int64_t> size = {options.scheme.axis().has_value() ? options.channels : 1};
  if (!options.scheme.block().empty() && !options.scheme.dynamic && !options.shape.empty()) {
    size = options.scheme.scale_shape(options.shape);
  }
  constexpr float infinity = std::numeric_limits<float>::infinity();
  if (!holds_scale(options.observer)) {
    scale = register_buffer("scale", torch::ones(size));
  }
  zero_point = register_buffer("zero_point", torch::zeros(size, torch::kInt32));
  min_val = register_buffer("min_val", torch::full(size, infinity));
  max_val = register_buffer("max_val", torch::full(size, -infinity));
  skipped = register_buffer("skipped", torch::zeros({1}, torch::kInt64));
  register_format_buffers();
  register_learned(size);
  if (chooses_at_end(options.observer)) {
    statistics = register_module("statistics", RangeStatistics(options.observer, size.at(0)));
  }
  pending_ = false;
}

void FakeQuantizerImpl::pretty_print(std::ostream& stream) const {
  stream << "rarefy::quantization::FakeQuantizer(" << options.scheme.str() << ", " << str(options.observer)
         << (calibrated() ? ")" : ", not calibrated)");
}

bool FakeQuantizerImpl::observes_now() const { return observe && (is_training() || !quantize || is_weight()); }

/// A forward inside of a backward pass recomputes what was computed before: with the parameters of that time.
bool FakeQuantizerImpl::is_recomputing() const {
  return !is_weight() && torch::autograd::get_current_graph_task_id() != -1;
}

void FakeQuantizerImpl::require_calibrated() {
  settle();
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
  if (!learned.empty()) {
    const torch::NoGradGuard no_grad;
    forward_learned(x);
    settle();
    return;
  }
  if (!observes_now()) {
    require_calibrated();
    return;
  }
  if (is_recomputing()) {
    return;
  }
  const torch::NoGradGuard no_grad;
  const auto& scheme = options.scheme;
  if (all_reduce_max && !is_weight()) {
    observe_over_processes(x);
  } else if (!factor.defined()) {
    observe_alone(x, scheme.axis());
  } else if (std::holds_alternative<Latest>(options.observer) || !is_weight()) {
    observe_alone(scaled_ends(x, factor), scheme.axis().has_value() ? std::optional<int64_t>(1) : std::nullopt);
  } else {  // a search needs the values
    std::vector<int64_t> column(static_cast<size_t>(x.dim()), 1);
    column[0] = -1;
    observe_alone(x * factor.reshape(column), scheme.axis());
  }
  tell_skipped(x);
}

torch::Tensor FakeQuantizerImpl::forward(const torch::Tensor& x) {
  if (watch) {
    watch(x);
  }
  auto rounded = round(x);
  const bool noisy = options.scheme.noise.has_value() && is_training() && quantize;
  return noisy ? quantization_noise(x, rounded, scale, options.scheme) : rounded;
}

torch::Tensor FakeQuantizerImpl::round(const torch::Tensor& x) {
  const auto& scheme = options.scheme;
  if (!scheme.is_plain()) {
    return forward_format(x);
  }
  if (!learned.empty()) {
    return forward_learned(x);
  }
  const bool observe_here = observes_now();
  const bool has_range_alone = !statistics && (!is_weight() || std::holds_alternative<Latest>(options.observer));
  if (observe_here && is_recomputing()) {
    return quantize ? ops::fake_quantize(x, scale, zero_point, scheme.axis(), scheme.qmin(), scheme.qmax()) : x;
  }
  if (observe_here && !is_weight() && all_reduce_max) {
    observe_over_processes(x);
    tell_skipped(x);
    return quantize ? ops::fake_quantize(x, scale, zero_point, scheme.axis(), scheme.qmin(), scheme.qmax()) : x;
  }
  if (observe_here && quantize && has_range_alone) {
    auto y = ops::observe_fake_quantize(x, min_val, max_val, scale, zero_point, skipped, scheme.axis(),
                                        averaging_constant(options.observer), scheme.qmin(), scheme.qmax(),
                                        scheme.symmetric);
    tell_skipped(x);
    return y;
  }
  if (observe_here) {
    {
      const torch::NoGradGuard no_grad;
      observe_alone(x, scheme.axis());
    }
    tell_skipped(x);
    return quantize ? ops::fake_quantize(x, scale, zero_point, scheme.axis(), scheme.qmin(), scheme.qmax()) : x;
  }
  if (!quantize) {
    return x;
  }
  require_calibrated();
  return ops::fake_quantize(x, scale, zero_point, scheme.axis(), scheme.qmin(), scheme.qmax());
}

void FakeQuantizerImpl::tell_skipped(const torch::Tensor& x) {
  if (!skipped.is_cpu() || (told_ && !is_weight()) || skipped.item<int64_t>() == 0) {
    return;
  }
  const std::string who = name.empty() ? "a quantizer" : name;
  if (is_weight()) {
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
  settle();
  const auto& scheme = options.scheme;
  return ops::quantize(x.detach(), scale, zero_point, scheme.axis(), scheme.qmin(), scheme.qmax());
}

void FakeQuantizerImpl::load(torch::serialize::InputArchive& archive) {
  torch::nn::Module::load(archive);
  refresh();
}

void FakeQuantizerImpl::refresh() {
  // A checkpoint of a calibration that had not come to its end has statistics and no range.
  pending_ = bool(statistics) && !(min_val <= max_val).all().item<bool>();
  searched_.reset();
  known_calibrated_ = calibrated();
  started_from_ = known_calibrated_ ? 1 : 0;
}

bool FakeQuantizerImpl::calibrated() const {
  settle();
  return options.scheme.dynamic || (min_val <= max_val).all().item<bool>();
}

}  // namespace rarefy::quantization
