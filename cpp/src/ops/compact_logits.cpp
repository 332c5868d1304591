#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/aminmax.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/gather.h>
#include <ATen/ops/logsumexp.h>
#include <c10/core/DeviceGuard.h>
#include <rarefy/ops/compact_logits.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "ops/compact_logits_checks.h"

TORCH_LIBRARY_FRAGMENT(rarefy, m) {
  m.def("compact_logits(Tensor logits, Tensor indices, float temperature) -> Tensor");
  m.def(
      "compact_logits_backward(Tensor grad, Tensor logits, Tensor indices, Tensor compact, float temperature) -> "
      "Tensor");
}

namespace rarefy::ops {

at::Tensor compact_logits(const at::Tensor& logits, const at::Tensor& indices, double temperature) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("rarefy::compact_logits", "").typed<decltype(compact_logits)>();
  return op.call(logits, indices, temperature);
}

at::Tensor compact_logits_backward(const at::Tensor& grad, const at::Tensor& logits, const at::Tensor& indices,
                                   const at::Tensor& compact, double temperature) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("rarefy::compact_logits_backward", "")
                             .typed<decltype(compact_logits_backward)>();
  return op.call(grad, logits, indices, compact, temperature);
}

namespace {

constexpr double kMinusInfinity = -std::numeric_limits<double>::infinity();

/// Calls body(first, count) for runs of rows. A run's copies stay in a processor's cache, or are few for a GPU.
template <typename Body>
void for_rows(const at::Tensor& rows, const Body& body) {
  const int64_t elements = rows.is_cpu() ? int64_t{1} << 18 : int64_t{1} << 24;
  const int64_t step = std::max<int64_t>(1, elements / rows.size(1));
  for (int64_t first = 0; first < rows.size(0); first += step) {
    body(first, std::min(step, rows.size(0) - first));
  }
}

/// The classes that are not in `indices`, divided by T, and -inf in the place of those that are. A copy.
at::Tensor others(const at::Tensor& rows, const at::Tensor& indices, at::ScalarType type, double temperature) {
  return rows.to(type, /*non_blocking=*/false, /*copy=*/true).scatter_(1, indices, kMinusInfinity).div_(temperature);
}

/// Throws c10::ValueError where a class is twice in a row of [rows, k]: its probability would count twice.
void check_distinct(const at::Tensor& chosen, int64_t classes) {
  const auto indices = chosen.contiguous();
  const auto k = indices.size(1);
  std::vector<int64_t> last_row(static_cast<size_t>(classes), -1);  // where a class was last
  const auto* index = indices.const_data_ptr<int64_t>();
  for (int64_t row = 0; row < indices.size(0); ++row, index += k) {
    for (int64_t j = 0; j < k; ++j) {
      auto& last = last_row[static_cast<size_t>(index[j])];
      TORCH_CHECK_VALUE(last != row, "[compact_logits] indices must differ within a row, got ", index[j],
                        " twice at row ", row);
      last = row;
    }
  }
}

at::Tensor forward(const at::Tensor& logits, const at::Tensor& indices, double temperature) {
  check_compact_logits(logits, indices, temperature);
  const int64_t classes = logits.size(-1), k = indices.size(-1);
  if (indices.is_cpu() && indices.numel() > 0) {
    const auto [low, high] = at::aminmax(indices);
    TORCH_CHECK_INDEX(low.item<int64_t>() >= 0 && high.item<int64_t>() < classes,
                      "[compact_logits] indices must be in [0, ", classes, "), got ", low.item<int64_t>(), " to ",
                      high.item<int64_t>());
    check_distinct(indices.reshape({-1, k}), classes);
  }
  const auto type = loss_type(logits);
  auto sizes = logits.sizes().vec();
  sizes.back() = k + 1;
  auto out = at::empty(sizes, logits.options().dtype(type));
  const auto rows = logits.reshape({-1, classes}), chosen = indices.reshape({-1, k});
  const auto out_rows = out.view({-1, k + 1});
  out_rows.narrow(1, 0, k).copy_(at::gather(rows, 1, chosen));
  for_rows(rows, [&](int64_t first, int64_t count) {
    const auto rest = others(rows.narrow(0, first, count), chosen.narrow(0, first, count), type, temperature);
    out_rows.narrow(0, first, count).select(1, k).copy_(at::logsumexp(rest, {1}).mul_(temperature));
  });
  return out;
}

at::Tensor backward(const at::Tensor& grad, const at::Tensor& logits, const at::Tensor& indices,
                    const at::Tensor& compact, double temperature) {
  const int64_t classes = logits.size(-1), k = indices.size(-1);
  auto out = at::empty_like(logits, at::MemoryFormat::Contiguous);
  const auto type = loss_type(logits);
  const auto rows = logits.reshape({-1, classes}), chosen = indices.reshape({-1, k});
  const auto grads = grad.reshape({-1, k + 1}).to(type);
  const auto out_rows = out.view({-1, classes});
  // Where all others are -inf their probabilities are 0, and not -inf less -inf.
  const auto log_sum = compact.reshape({-1, k + 1}).select(1, k).div(temperature).unsqueeze(1);
  const auto finite = log_sum.masked_fill(log_sum == kMinusInfinity, 0.0);
  for_rows(rows, [&](int64_t first, int64_t count) {
    const auto index = chosen.narrow(0, first, count);
    auto rest = others(rows.narrow(0, first, count), index, type, temperature);
    rest.sub_(finite.narrow(0, first, count)).exp_();
    const auto tail_grad = grads.narrow(0, first, count).narrow(1, k, 1);
    // Not 0 * NaN: a row that does not count may hold anything.
    rest.mul_(tail_grad).masked_fill_(tail_grad == 0.0, 0.0);
    rest.scatter_(1, index, grads.narrow(0, first, count).narrow(1, 0, k));
    out_rows.narrow(0, first, count).copy_(rest);
  });
  return out;
}

}  // namespace

// torch's operators on runs of rows: one kernel for every device.
TORCH_LIBRARY_IMPL(rarefy, CompositeExplicitAutograd, m) {
  m.impl("compact_logits", &forward);
  m.impl("compact_logits_backward", &backward);
}

}  // namespace rarefy::ops
