#include <ATen/core/grad_mode.h>
#include <ATen/ops/abs.h>
#include <ATen/ops/exp2.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/log2.h>
#include <ATen/ops/round.h>
#include <ATen/ops/zeros_like.h>
#include <rarefy/ops/fake_quantize.h>
#include <rarefy/ops/fake_quantize_learned.h>
#include <rarefy/ops/fake_quantize_range.h>
#include <rarefy/ops/range_search.h>
#include <rarefy/quantization/learned_grids.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>

#include "ops/block_views.h"

namespace rarefy::quantization {
namespace {

constexpr double kSmallestScale = 0x1p-60;  // as in choose_qparams

struct Grid {
  int64_t qmin, qmax;
  bool symmetric;

  int64_t middle() const {  // ceil((qmin + qmax) / 2)
    const int64_t sum = qmin + qmax;
    return sum >= 0 ? (sum + 1) / 2 : -(-sum / 2);
  }
  /// The integers above 0: Q_P of the papers.
  int64_t levels() const { return symmetric ? qmax - middle() : qmax - qmin; }
  double bits() const { return std::round(std::log2(static_cast<double>(qmax) + 1.0)) + (symmetric ? 1.0 : 0.0); }
};

/// A parameter as float32 and positive: the sign that a step of the optimizer may give it does not count.
at::Tensor as_positive(const at::Tensor& parameter) {
  return at::abs(parameter.to(at::kFloat)).clamp_min(kSmallestScale);
}

/// `value`, bit by bit, with the gradient of `parameter`.
at::Tensor straight_through(const at::Tensor& value, const at::Tensor& parameter) {
  return value.detach() + (parameter - parameter.detach());
}

double gradient_factor(const at::Tensor& x, std::optional<double> given, bool is_weight, std::optional<int64_t> axis,
                       const Grid& grid) {
  if (given.has_value()) {
    return *given;
  }
  // Elements of a channel, or of a sample: the size of the batch is not asked for, so that a compiled graph may leave it open.
  const int64_t left_out = !is_weight ? (x.dim() > 1 ? 0 : -1) : !axis.has_value() ? -1 : (*axis + x.dim()) % x.dim();
  double count = 1.0;
  for (int64_t i = 0; i < x.dim(); ++i) {
    if (i != left_out) {
      count *= static_cast<double>(x.sym_size(i).guard_int(__FILE__, __LINE__));
    }
  }
  return 1.0 / std::sqrt(std::max(count, 1.0) * static_cast<double>(grid.levels()));
}

/// 2^ceil(log2_threshold) over the integers of one side, exactly; its gradient is the scale times ln 2.
at::Tensor power_of_two_scale(const at::Tensor& log2_threshold, const Grid& grid) {
  const auto threshold = log2_threshold.to(at::kFloat);
  const double steps = std::exp2(std::round(std::log2(static_cast<double>(grid.levels() + 1))));
  const auto scale = ops::powers_of_two(threshold.detach().ceil().clamp(-60.0 + std::log2(steps), 126.0)) / steps;
  return scale * (1.0 + std::log(2.0) * (threshold - threshold.detach()));
}

struct LearnedEnds {
  at::Tensor scale, low, high, zero_point;
};

at::Tensor offset_zero_point(const at::Tensor& scale, const at::Tensor& offset, const Grid& grid) {
  return at::round(-offset.detach() / scale.detach()).clamp(grid.qmin, grid.qmax);
}

LearnedEnds offset_ends(const at::Tensor& scale_, const at::Tensor& offset_, const Grid& grid) {
  const auto scale = as_positive(scale_), offset = offset_.to(at::kFloat);
  const auto zero = offset_zero_point(scale, offset, grid);
  const auto on_grid = straight_through(-zero * scale, offset);
  return {scale, scale * static_cast<double>(grid.qmin) + on_grid, scale * static_cast<double>(grid.qmax) + on_grid,
          zero.to(at::kInt)};
}

LearnedEnds alpha_ends(const at::Tensor& alpha_, const Grid& grid) {
  const auto alpha = as_positive(alpha_);
  const auto scale = (alpha.detach() / static_cast<double>(grid.levels())).clamp_min(kSmallestScale);
  return {scale, at::zeros_like(scale), alpha, at::full_like(scale, grid.qmin, scale.options().dtype(at::kInt))};
}

LearnedEnds bit_ends(const at::Tensor& bits_, const at::Tensor& bound_, const Grid& grid) {
  const auto bits = bits_.to(at::kFloat), bound = as_positive(bound_);
  const auto whole = straight_through(at::round(bits).clamp(2.0, grid.bits()), bits);
  const auto levels = at::exp2(grid.symmetric ? whole - 1.0 : whole) - 1.0;
  const auto scale = (bound / levels).clamp_min(kSmallestScale);
  return {scale, grid.symmetric ? -bound : at::zeros_like(bound), bound,
          at::zeros_like(scale, scale.options().dtype(at::kInt))};
}

LearnedEnds ends_of(at::TensorList parameters, const std::string& kind, const Grid& grid) {
  if (kind == "lsq_plus") {
    return offset_ends(parameters[0], parameters[1], grid);
  }
  return kind == "pact" ? alpha_ends(parameters[0], grid) : bit_ends(parameters[0], parameters[1], grid);
}

void check_kind(const char* function, at::TensorList parameters, const std::string& kind) {
  const auto names = learned_names(kind);
  TORCH_CHECK_VALUE(!names.empty(), "[", function, "] kind must be lsq, lsq_plus, pact, tqt or bits, got ", kind);
  TORCH_CHECK_VALUE(parameters.size() == names.size(), "[", function, "] ", kind, " must have ", names.size(),
                    " parameters, got ", parameters.size());
}

}  // namespace

std::string learned_kind(const Observer& observer) {
  return std::holds_alternative<LSQ>(observer)           ? "lsq"
         : std::holds_alternative<LSQPlus>(observer)     ? "lsq_plus"
         : std::holds_alternative<PACT>(observer)        ? "pact"
         : std::holds_alternative<TQT>(observer)         ? "tqt"
         : std::holds_alternative<LearnedBits>(observer) ? "bits"
                                                         : "";
}

std::vector<std::string> learned_names(const std::string& kind) {
  return kind == "lsq"        ? std::vector<std::string>{"scale"}
         : kind == "lsq_plus" ? std::vector<std::string>{"scale", "offset"}
         : kind == "pact"     ? std::vector<std::string>{"alpha"}
         : kind == "tqt"      ? std::vector<std::string>{"log2_threshold"}
         : kind == "bits"     ? std::vector<std::string>{"bits", "bound"}
                              : std::vector<std::string>{};
}

void check_learned_scheme(const char* function, const Observer& observer, const Scheme& scheme, bool is_weight) {
  if (!is_learned(observer)) {
    return;
  }
  validate(observer);
  const auto name = str(observer);
  TORCH_CHECK_VALUE(scheme.is_plain(), "[", function, "] ", name,
                    " must have a plain grid of integers, per tensor or channel, got ", scheme.str());
  TORCH_CHECK_VALUE(!scheme.noise.has_value() || !scheme.noise->uniform, "[", function, "] ", name,
                    " must have no uniform noise, from which its grid would learn nothing, got ", scheme.str());
  const bool from_zero = !scheme.symmetric && scheme.qmin() == 0;
  if (std::holds_alternative<LSQPlus>(observer)) {
    TORCH_CHECK_VALUE(!is_weight, "[", function, "] ", name,
                      " is for activations (integer kernels have no weight zero point), got a weight");
    TORCH_CHECK_VALUE(!scheme.symmetric, "[", function, "] ", name, " must have an asymmetric grid, got ",
                      scheme.str());
  } else if (std::holds_alternative<PACT>(observer)) {
    TORCH_CHECK_VALUE(!is_weight, "[", function, "] ", name, " is for activations, got a weight");
    TORCH_CHECK_VALUE(from_zero && !scheme.axis().has_value(), "[", function, "] ", name,
                      " must have an asymmetric unsigned grid from 0, per tensor, got ", scheme.str());
  } else if (const auto* bits = std::get_if<LearnedBits>(&observer)) {
    TORCH_CHECK_VALUE(from_zero || (scheme.symmetric && scheme.signed_range()), "[", function, "] ", name,
                      " must have a symmetric signed grid, or an asymmetric unsigned one from 0, got ", scheme.str());
    TORCH_CHECK_VALUE(scheme.bits <= 8 && bits->lowest <= scheme.bits, "[", function, "] ", name,
                      " must have a grid of at most 8 bits and no fewer than its lowest, got ", scheme.str());
  }
}

at::Tensor learned_fake_quantize(const at::Tensor& x, at::TensorList parameters, const at::Tensor& zero_point,
                                 const std::string& kind, std::optional<double> gradient_scale, bool is_weight,
                                 std::optional<int64_t> axis, int64_t qmin, int64_t qmax, bool symmetric) {
  check_kind("learned_fake_quantize", parameters, kind);
  const Grid grid{qmin, qmax, symmetric};
  if (kind == "lsq") {
    const double factor = gradient_factor(x, gradient_scale, is_weight, axis, grid);
    return ops::fake_quantize_learned(x, as_positive(parameters[0]), zero_point, axis, qmin, qmax, factor);
  }
  if (kind == "tqt") {
    return ops::fake_quantize_learned(x, power_of_two_scale(parameters[0], grid), zero_point, axis, qmin, qmax, 1.0);
  }
  const auto ends = ends_of(parameters, kind, grid);
  if (kind != "bits" && !at::GradMode::is_enabled()) {  // the same bits, in one pass
    return ops::fake_quantize(x, ends.scale, ends.zero_point, axis, qmin, qmax);
  }
  const double factor = kind == "lsq_plus" ? gradient_factor(x, gradient_scale, is_weight, axis, grid) : 1.0;
  return ops::fake_quantize_range(x, ends.scale, ends.low, ends.high, axis, factor);
}

std::tuple<at::Tensor, at::Tensor> learned_qparams(at::TensorList parameters, const at::Tensor& zero_point,
                                                   const std::string& kind, int64_t qmin, int64_t qmax,
                                                   bool symmetric) {
  check_kind("learned_qparams", parameters, kind);
  const at::NoGradGuard no_grad;
  const Grid grid{qmin, qmax, symmetric};
  if (kind == "lsq") {
    return {as_positive(parameters[0]), zero_point};
  }
  if (kind == "tqt") {
    return {power_of_two_scale(parameters[0], grid), zero_point};
  }
  const auto ends = ends_of(parameters, kind, grid);
  return {ends.scale, ends.zero_point};
}

std::tuple<at::Tensor, at::Tensor> learned_range(const at::Tensor& x_, const std::string& kind,
                                                 std::optional<int64_t> axis, int64_t qmin, int64_t qmax,
                                                 bool symmetric) {
  const at::NoGradGuard no_grad;
  const Grid grid{qmin, qmax, symmetric};
  const auto x = x_.detach();
  if (kind == "lsq" && symmetric) {
    std::vector<int64_t> others;
    for (int64_t i = 0; i < x.dim(); ++i) {
      if (!axis.has_value() || i != (*axis + x.dim()) % x.dim()) {
        others.push_back(i);
      }
    }
    const auto type = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
    const auto magnitude = others.empty() ? at::abs(x).to(type) : at::abs(x).mean(others, /*keepdim=*/false, type);
    const auto high = (magnitude * (2.0 * std::sqrt(static_cast<double>(grid.levels())))).to(at::kFloat).reshape({-1});
    return {-high, high};
  }
  if (learned_from_zero(kind, symmetric)) {
    const auto [low, high] = ops::mse_range(x.clamp_min(0), axis, qmin, qmax, false);
    return {x.min().to(at::kFloat).expand_as(low).contiguous(), high};
  }
  return ops::mse_range(x, axis, qmin, qmax, symmetric);
}

std::vector<at::Tensor> learned_start(const at::Tensor& low, const at::Tensor& high, const std::string& kind,
                                      int64_t qmin, int64_t qmax, bool symmetric) {
  const at::NoGradGuard no_grad;
  const Grid grid{qmin, qmax, symmetric};
  const auto least = learned_from_zero(kind, symmetric) ? at::zeros_like(low) : low;
  auto [scale, zero_point] = ops::choose_qparams(least, high, qmin, qmax, symmetric);
  const auto bound = scale * static_cast<double>(grid.levels());
  if (kind == "lsq") {
    return {scale, zero_point};
  }
  if (kind == "lsq_plus") {
    return {scale, -zero_point * scale, zero_point};
  }
  if (kind == "pact") {
    return {bound, zero_point};
  }
  if (kind == "bits") {
    return {at::full_like(scale.slice(0, 0, 1), grid.bits()), bound, zero_point};
  }
  // The scale is rounded up to a power of two: a little less than the bound, so that the rounding of log2 does not double it.
  const auto threshold = at::log2(bound) - 0x1p-20;
  if (!symmetric) {
    const auto rounded = power_of_two_scale(threshold, grid);
    zero_point = (qmin - at::round(least.clamp_max(0) / rounded)).clamp(qmin, qmax).to(at::kInt);
  }
  return {threshold, zero_point};
}

namespace {

at::Tensor fake_quantize_op(const at::Tensor& x, at::TensorList parameters, const at::Tensor& zero_point,
                            std::string kind, std::optional<double> gradient_scale, bool is_weight,
                            std::optional<int64_t> axis, int64_t qmin, int64_t qmax, bool symmetric) {
  return learned_fake_quantize(x, parameters, zero_point, kind, gradient_scale, is_weight, axis, qmin, qmax, symmetric);
}

std::tuple<at::Tensor, at::Tensor> qparams_op(at::TensorList parameters, const at::Tensor& zero_point, std::string kind,
                                              int64_t qmin, int64_t qmax, bool symmetric) {
  return learned_qparams(parameters, zero_point, kind, qmin, qmax, symmetric);
}

std::tuple<at::Tensor, at::Tensor> range_op(const at::Tensor& x, std::string kind, std::optional<int64_t> axis,
                                            int64_t qmin, int64_t qmax, bool symmetric) {
  return learned_range(x, kind, axis, qmin, qmax, symmetric);
}

std::vector<at::Tensor> start_op(const at::Tensor& low, const at::Tensor& high, std::string kind, int64_t qmin,
                                 int64_t qmax, bool symmetric) {
  return learned_start(low, high, kind, qmin, qmax, symmetric);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(rarefy, m) {
  m.def(
      "learned_fake_quantize(Tensor x, Tensor[] parameters, Tensor zero_point, str kind, float? gradient_scale, bool "
      "is_weight, int? axis, int qmin, int qmax, bool symmetric) -> Tensor");
  m.def(
      "learned_qparams(Tensor[] parameters, Tensor zero_point, str kind, int qmin, int qmax, bool symmetric) -> "
      "(Tensor, Tensor)");
  m.def("learned_range(Tensor x, str kind, int? axis, int qmin, int qmax, bool symmetric) -> (Tensor, Tensor)");
  m.def("learned_start(Tensor low, Tensor high, str kind, int qmin, int qmax, bool symmetric) -> Tensor[]");
}

TORCH_LIBRARY_IMPL(rarefy, CompositeImplicitAutograd, m) {
  m.impl("learned_fake_quantize", &fake_quantize_op);
  m.impl("learned_qparams", &qparams_op);
  m.impl("learned_range", &range_op);
  m.impl("learned_start", &start_op);
}

}  // namespace rarefy::quantization
