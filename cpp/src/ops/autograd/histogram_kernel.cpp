// Observers have no derivative; what they write in place counts as written.
#include <rarefy/ops/histogram.h>
#include <rarefy/ops/range_search.h>
#include <torch/library.h>

#include <initializer_list>

#include "ops/autograd/not_differentiable.h"

namespace rarefy::ops {
namespace {

void bump(std::initializer_list<const at::Tensor*> written) {
  for (const auto* tensor : written) {
    if (!tensor->is_inference()) {
      tensor->unsafeGetTensorImpl()->bump_version();
    }
  }
}

void histogram_observe_written(const at::Tensor& x, at::Tensor& hist, at::Tensor& hist_min, at::Tensor& hist_max,
                               at::Tensor& skipped, std::optional<int64_t> axis) {
  at::AutoDispatchBelowADInplaceOrView guard;
  histogram_observe(x, hist, hist_min, hist_max, skipped, axis);
  bump({&hist, &hist_min, &hist_max, &skipped});
}

void histogram_add_written(at::Tensor& hist, at::Tensor& hist_min, at::Tensor& hist_max, const at::Tensor& other,
                           const at::Tensor& other_min, const at::Tensor& other_max) {
  at::AutoDispatchBelowADInplaceOrView guard;
  histogram_add(hist, hist_min, hist_max, other, other_min, other_max);
  bump({&hist, &hist_min, &hist_max});
}

void record_ranges_written(at::Tensor& batch_min, at::Tensor& batch_max, at::Tensor& batches, const at::Tensor& low,
                           const at::Tensor& high) {
  at::AutoDispatchBelowADInplaceOrView guard;
  record_ranges(batch_min, batch_max, batches, low, high);
  bump({&batch_min, &batch_max, &batches});
}

std::tuple<at::Tensor, at::Tensor> choose_range_autograd(const at::Tensor& hist, const at::Tensor& hist_min,
                                                         const at::Tensor& hist_max, c10::string_view method,
                                                         double parameter, int64_t qmin, int64_t qmax, bool symmetric,
                                                         bool power_of_two) {
  at::AutoDispatchBelowAutograd guard;
  return choose_range_from_histogram(hist, hist_min, hist_max, std::string(method), parameter, qmin, qmax, symmetric,
                                     power_of_two);
}

}  // namespace

TORCH_LIBRARY_IMPL(rarefy, Autograd, m) {
  m.impl("histogram_observe", &NotDifferentiable<&histogram_observe>::call);
  m.impl("histogram_add", &NotDifferentiable<&histogram_add>::call);
  m.impl("choose_range_from_histogram", &choose_range_autograd);
  m.impl("mse_range", &NotDifferentiable<&mse_range>::call);
  m.impl("half_quadratic_qparams", &NotDifferentiable<&half_quadratic_qparams>::call);
  m.impl("power_of_two_range", &NotDifferentiable<&power_of_two_range>::call);
  m.impl("record_ranges", &NotDifferentiable<&record_ranges>::call);
  m.impl("mean_range", &NotDifferentiable<&mean_range>::call);
}

TORCH_LIBRARY_IMPL(rarefy, ADInplaceOrView, m) {
  m.impl("histogram_observe", &histogram_observe_written);
  m.impl("histogram_add", &histogram_add_written);
  m.impl("record_ranges", &record_ranges_written);
}

}  // namespace rarefy::ops
