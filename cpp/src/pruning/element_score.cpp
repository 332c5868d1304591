#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>
#include <rarefy/pruning/element_score.h>

#include <algorithm>
#include <cmath>

#include "pruning/finite.h"
#include "pruning/random_key.h"

namespace rarefy::pruning {
namespace {

constexpr int64_t kGrain = 1 << 14;  // elements below which a second thread does not pay

at::ScalarType score_type(const at::Tensor& value) {
  return value.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

at::Tensor magnitude(double p, const at::Tensor& value) {
  TORCH_CHECK_VALUE(
      std::isfinite(p),
      "[element_scores] Magnitude of single weights needs a finite p, since the scores of a block add up, "
      "got infinity");
  auto scores = value.to(score_type(value)).abs();
  if (p == 1.0 || p == 2.0) {
    return p == 1.0 ? scores : scores.square_();
  }
  if (!scores.device().is_cpu()) {
    return scores.pow_(p);
  }
  // torch's own power has another last bit at the end of a range than in vectors: it would depend on threads and strides.
  scores = scores.contiguous();
  AT_DISPATCH_FLOATING_TYPES(scores.scalar_type(), "magnitude_scores", [&] {
    auto* values = scores.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, scores.numel(), kGrain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        values[i] = static_cast<scalar_t>(std::pow(static_cast<double>(values[i]), p));
      }
    });
  });
  return scores;
}

at::Tensor random(uint64_t seed, const std::string& name, const at::Tensor& value) {
  const uint64_t key = random_key(name, seed);
  auto scores = at::empty(value.sizes(), at::TensorOptions(score_type(value)));
  AT_DISPATCH_FLOATING_TYPES(scores.scalar_type(), "random_scores", [&] {
    // As many bits as the type's significand holds, so that 1 is never reached by rounding.
    constexpr unsigned bits = sizeof(scalar_t) == 4 ? 24 : 53;
    const auto unit = static_cast<scalar_t>(std::ldexp(1.0, -static_cast<int>(bits)));
    auto* out = scores.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, scores.numel(), kGrain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        out[i] = static_cast<scalar_t>(random_bits(key, static_cast<uint64_t>(i)) >> (64U - bits)) * unit;
      }
    });
  });
  return scores.to(value.device());
}

/// Sums run from the largest magnitude down, in float64, on one thread: the result is one of the weights alone.
at::Tensor lamp(const at::Tensor& value) {
  auto [magnitudes, order] = value.to(at::kCPU, score_type(value)).abs().flatten().sort(/*dim=*/0, /*descending=*/true);
  auto scores = at::empty({value.numel()}, magnitudes.options());
  AT_DISPATCH_FLOATING_TYPES(scores.scalar_type(), "lamp_scores", [&] {
    const auto* sorted = magnitudes.const_data_ptr<scalar_t>();
    const auto* place = order.const_data_ptr<int64_t>();
    auto* out = scores.mutable_data_ptr<scalar_t>();
    const int64_t n = scores.numel();
    double sum = 0;
    for (int64_t i = 0; i < n;) {
      int64_t end = i;  // equal magnitudes share one denominator
      while (end < n && sorted[end] == sorted[i]) {
        sum += static_cast<double>(sorted[end]) * static_cast<double>(sorted[end]);
        ++end;
      }
      const double square = static_cast<double>(sorted[i]) * static_cast<double>(sorted[i]);
      const auto score = static_cast<scalar_t>(square > 0.0 ? square / sum : 0.0);
      for (; i < end; ++i) {
        out[place[i]] = score;
      }
    }
  });
  return scores.view(value.sizes()).to(value.device());
}

at::Tensor activation(const std::string& name, const at::Tensor& value, const at::Tensor& norms) {
  const auto type = score_type(value);
  if (norms.sizes() == value.sizes()) {
    return norms.to(value.device(), type, /*non_blocking=*/false, /*copy=*/true);
  }
  TORCH_CHECK_VALUE(norms.dim() == 1 && value.dim() >= 2 &&
                        (norms.numel() == value.size(1) || norms.numel() * value.size(0) == value.numel()),
                    "[element_scores] the feature norms of '", name, "' must be one per input of a weight of sizes ",
                    value.sizes(), ", got sizes ", norms.sizes());
  auto sizes = value.sizes().vec();
  sizes[0] = 1;
  if (norms.numel() * value.size(0) != value.numel()) {
    std::fill(sizes.begin() + 2, sizes.end(), 1);
  }
  return norms.to(value.device(), type).reshape(sizes).expand(value.sizes()).clone(at::MemoryFormat::Contiguous);
}

}  // namespace

std::string Movement::to_string() const { return "Movement()"; }

void validate(const ElementCriterion& criterion) {
  std::visit([](const auto& chosen) { chosen.validate(); }, criterion);
  if (const auto* norm = std::get_if<Magnitude>(&criterion)) {
    TORCH_CHECK_VALUE(
        std::isfinite(norm->p),
        "[Magnitude] p must be finite for single weights, since the scores of a block add up, got infinity");
  }
}

std::string to_string(const ElementCriterion& criterion) {
  return std::visit([](const auto& chosen) { return chosen.to_string(); }, criterion);
}

bool needs_gradients(const ElementCriterion& criterion) {
  return std::holds_alternative<Movement>(criterion) || std::holds_alternative<Taylor>(criterion) ||
         std::holds_alternative<Fisher>(criterion);
}

at::Tensor new_accumulator(const at::Tensor& value) {
  return at::zeros(value.sizes(), at::TensorOptions(score_type(value)).device(value.device()));
}

void accumulate(const ElementCriterion& criterion, const at::Tensor& value, const at::Tensor& gradient,
                at::Tensor& accumulated) {
  if (!needs_gradients(criterion)) {
    return;
  }
  TORCH_CHECK_VALUE(gradient.defined(), "[accumulate] ", to_string(criterion),
                    " needs a gradient: run a backward pass first");
  TORCH_CHECK_VALUE(gradient.layout() == at::kStrided && gradient.sizes() == value.sizes(),
                    "[accumulate] a gradient must be dense and of its weight's sizes ", value.sizes(), ", got sizes ",
                    gradient.sizes());
  TORCH_CHECK_VALUE(
      accumulated.defined() && accumulated.sizes() == value.sizes() && accumulated.scalar_type() == score_type(value),
      "[accumulate] accumulated must be of ", score_type(value), " and sizes ", value.sizes(), ", got ",
      accumulated.defined() ? accumulated.scalar_type() : at::ScalarType::Undefined, " and ",
      accumulated.defined() ? accumulated.sizes() : at::IntArrayRef());
  const at::NoGradGuard no_grad;
  const auto type = accumulated.scalar_type();
  auto terms = gradient.detach().to(type, /*non_blocking=*/false, /*copy=*/true);
  terms.mul_(value.detach().to(type));
  TORCH_CHECK_VALUE(is_finite(terms), "[accumulate] weights and gradients must be finite, got NaN or infinity");
  if (std::holds_alternative<Movement>(criterion)) {
    accumulated.sub_(terms);
  } else if (std::holds_alternative<Taylor>(criterion)) {
    accumulated.add_(terms.abs_());
  } else {
    accumulated.add_(terms.square_(), 0.5);
  }
}

at::Tensor element_scores(const ElementCriterion& criterion, const std::string& name, const at::Tensor& value,
                          const at::Tensor& accumulated, int64_t passes) {
  validate(criterion);
  const at::NoGradGuard no_grad;
  const auto weight = value.detach();
  TORCH_CHECK_VALUE(is_finite(weight), "[element_scores] weights must be finite, got NaN or infinity in '", name, "'");
  if (const auto* norm = std::get_if<Magnitude>(&criterion)) {
    return magnitude(norm->p, weight);
  }
  if (const auto* chosen = std::get_if<Random>(&criterion)) {
    return random(chosen->seed, name, weight);
  }
  if (std::holds_alternative<Lamp>(criterion)) {
    return lamp(weight);
  }
  const bool is_activation = std::holds_alternative<Activation>(criterion);
  TORCH_CHECK_VALUE(accumulated.defined(), "[element_scores] ", to_string(criterion), " needs ",
                    is_activation ? "the norms of input features" : "accumulated gradients", ", got none for '", name,
                    "'");
  TORCH_CHECK_VALUE(is_finite(accumulated),
                    "[element_scores] what is accumulated must be finite, got NaN or infinity in "
                    "that of '",
                    name, "'");
  if (is_activation) {
    return activation(name, weight, accumulated);
  }
  TORCH_CHECK_VALUE(accumulated.sizes() == weight.sizes(), "[element_scores] what is accumulated for '", name,
                    "' must have sizes ", weight.sizes(), ", got ", accumulated.sizes());
  TORCH_CHECK_VALUE(passes >= 1, "[element_scores] passes must be at least 1, got ", passes);
  auto scores = accumulated.to(score_type(weight), /*non_blocking=*/false, /*copy=*/true);
  return std::holds_alternative<Movement>(criterion) ? scores : scores.div_(static_cast<double>(passes));
}

}  // namespace rarefy::pruning
