#include <ATen/ops/empty.h>
#include <rarefy/ops/histogram.h>
#include <torch/library.h>

#include "ops/histogram_checks.h"

namespace rarefy::ops {
namespace {

void histogram_observe_meta(const at::Tensor& x, at::Tensor& hist, at::Tensor& hist_min, at::Tensor& hist_max,
                            at::Tensor& skipped, std::optional<int64_t> axis) {
  check_histogram_observe("histogram_observe", x, hist, hist_min, hist_max, skipped, axis);
}

void histogram_add_meta(at::Tensor& hist, at::Tensor& hist_min, at::Tensor& hist_max, const at::Tensor& other,
                        const at::Tensor& other_min, const at::Tensor& other_max) {
  check_histogram_add("histogram_add", hist, hist_min, hist_max, other, other_min, other_max);
}

std::tuple<at::Tensor, at::Tensor> choose_range_meta(const at::Tensor& hist, const at::Tensor& hist_min,
                                                     const at::Tensor& hist_max, c10::string_view method,
                                                     double parameter, int64_t qmin, int64_t qmax, bool symmetric,
                                                     bool /*power_of_two*/) {
  check_choose_range("choose_range_from_histogram", hist, hist_min, hist_max, std::string(method), parameter, qmin,
                     qmax, symmetric);
  return {at::empty_symint({hist.sym_size(0)}, hist_min.options()),
          at::empty_symint({hist.sym_size(0)}, hist_min.options())};
}

}  // namespace

TORCH_LIBRARY_IMPL(rarefy, Meta, m) {
  m.impl("histogram_observe", &histogram_observe_meta);
  m.impl("histogram_add", &histogram_add_meta);
  m.impl("choose_range_from_histogram", &choose_range_meta);
}

}  // namespace rarefy::ops
