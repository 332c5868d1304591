// What the losses on features, relations, embeddings and logits share: argument rules, types, masks, safe quotients.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/DispatchKeySet.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string_view>
#include <utility>

#include "ops/readable.h"

namespace rarefy::distillation {

/// Keeps autocast out of a loss: sums over features lose too much in 16 bits.
struct FullPrecision {
  c10::impl::ExcludeDispatchKeyGuard guard{c10::autocast_dispatch_keyset};
};

/// Student and teacher in the type of the computation: float64 for a float64 student, float32 for everything else. The
/// teacher is detached.
struct Pair {
  at::Tensor student, teacher;
};

/// Throws c10::TypeError unless both are of floating point, c10::ValueError unless they are on one device and have at least
/// `dims` dimensions, of which the first is equal, and at least one element.
Pair check_pair(const char* function, const at::Tensor& student, const at::Tensor& teacher, int64_t dims);
/// As check_pair; and the whole shape must be equal.
Pair check_equal_pair(const char* function, const at::Tensor& student, const at::Tensor& teacher, int64_t dims);

/// Throws c10::ValueError unless `value` is one of `choices`.
void check_choice(const char* function, const char* name, std::string_view value,
                  std::initializer_list<std::string_view> choices);

/// Throws c10::ValueError unless `value` is finite and positive.
void check_positive(const char* function, const char* name, double value);
/// Throws c10::ValueError unless the temperature is in [1e-6, 1e6]: its inverse and its square take part in float32.
void check_temperature(const char* function, double temperature);
/// Throws c10::ValueError unless `value` is finite and not negative.
void check_not_negative(const char* function, const char* name, double value);

using ops::is_readable;

/// Throws c10::TypeError unless `mask` is bool, c10::ValueError unless it has the shape `positions` and (where that can be
/// seen at no cost) a true element.
void check_mask(const char* function, const at::Tensor& mask, c10::SymIntArrayRef positions);

/// Where the features of x stand: `axis` if given, else 1 for [batch, channels, height, width] and the last one.
int64_t feature_axis(const char* function, const at::Tensor& x, std::optional<int64_t> axis);

/// x of shape [batch, ...] with the features at `axis` as [batch, positions, features].
at::Tensor as_positions(const at::Tensor& x, int64_t axis);

/// An undefined tensor, as modules take it for "none", as an optional one.
inline std::optional<at::Tensor> given(const at::Tensor& tensor) {
  return tensor.defined() ? std::optional<at::Tensor>(tensor) : std::nullopt;
}

/// Mean of `values` over the true elements of `mask` (of the same shape), or over all. What is masked may be NaN.
at::Tensor masked_mean(const at::Tensor& values, const std::optional<at::Tensor>& mask);

/// The distance from 1 to the next number of x's type, float or double.
double epsilon(const at::Tensor& x);

/// x / max |x| along `axes`, with the maximum a constant in the gradient. It is for what does not depend on the scale of x, so
/// that squares and powers stay in range. Where all |x| are below 1e-31 (1e-292 in float64) the result and its gradient are 0.
at::Tensor divide_by_peak(const at::Tensor& x, at::IntArrayRef axes);

/// x / ||x||_2 along `axis`, however small x is. A vector of zeros gives 0 and has gradient 0.
at::Tensor normalize(const at::Tensor& x, int64_t axis);

/// sum p (log p - log q) over the last axis, where p = exp(log_p). A class with p = 0 adds nothing.
at::Tensor kl_divergence(const at::Tensor& log_p, const at::Tensor& log_q);

/// smooth L1 with its corner at 1: d^2 / 2 where |d| < 1, |d| - 1/2 elsewhere, elementwise (Huber's loss).
at::Tensor huber(const at::Tensor& a, const at::Tensor& b);

}  // namespace rarefy::distillation
