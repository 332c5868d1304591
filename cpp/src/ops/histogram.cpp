#include <ATen/core/dispatch/Dispatcher.h>
#include <rarefy/ops/histogram.h>
#include <torch/library.h>

TORCH_LIBRARY_FRAGMENT(rarefy, m) {
  m.def(
      "histogram_observe(Tensor x, Tensor(a!) hist, Tensor(b!) hist_min, Tensor(c!) hist_max, Tensor(d!) skipped, "
      "int? axis) -> ()");
  m.def(
      "histogram_add(Tensor(a!) hist, Tensor(b!) hist_min, Tensor(c!) hist_max, Tensor other, Tensor other_min, "
      "Tensor other_max) -> ()");
  m.def(
      "choose_range_from_histogram(Tensor hist, Tensor hist_min, Tensor hist_max, str method, float parameter, int qmin, "
      "int qmax, bool symmetric, bool power_of_two=False) -> (Tensor, Tensor)");
}

namespace rarefy::ops {
#define RAREFY_OP(name, Signature) \
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("rarefy::" #name, "").typed<Signature>()

void histogram_observe(const at::Tensor& x, at::Tensor& hist, at::Tensor& hist_min, at::Tensor& hist_max,
                       at::Tensor& skipped, std::optional<int64_t> axis) {
  RAREFY_OP(histogram_observe, decltype(histogram_observe));
  op.call(x, hist, hist_min, hist_max, skipped, axis);
}

void histogram_add(at::Tensor& hist, at::Tensor& hist_min, at::Tensor& hist_max, const at::Tensor& other,
                   const at::Tensor& other_min, const at::Tensor& other_max) {
  RAREFY_OP(histogram_add, decltype(histogram_add));
  op.call(hist, hist_min, hist_max, other, other_min, other_max);
}

std::tuple<at::Tensor, at::Tensor> choose_range_from_histogram(const at::Tensor& hist, const at::Tensor& hist_min,
                                                               const at::Tensor& hist_max, const std::string& method,
                                                               double parameter, int64_t qmin, int64_t qmax,
                                                               bool symmetric, bool power_of_two) {
  using Signature = std::tuple<at::Tensor, at::Tensor>(const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                                       c10::string_view, double, int64_t, int64_t, bool, bool);
  RAREFY_OP(choose_range_from_histogram, Signature);
  return op.call(hist, hist_min, hist_max, method, parameter, qmin, qmax, symmetric, power_of_two);
}

#undef RAREFY_OP
}  // namespace rarefy::ops
