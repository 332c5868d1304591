#include <ATen/core/dispatch/Dispatcher.h>
#include <rarefy/ops/range_search.h>
#include <torch/library.h>

TORCH_LIBRARY_FRAGMENT(rarefy, m) {
  m.def(
      "mse_range(Tensor x, int? axis, int qmin, int qmax, bool symmetric, float norm=2.0, int steps=100, int bins=2048, "
      "Tensor? importance=None, bool power_of_two=False) -> (Tensor, Tensor)");
  m.def(
      "half_quadratic_qparams(Tensor x, int? axis, int qmin, int qmax, bool symmetric, float norm=0.7, float beta=10.0, "
      "float kappa=1.01, int iterations=20) -> (Tensor, Tensor)");
  m.def(
      "power_of_two_range(Tensor min_val, Tensor max_val, int qmin, int qmax, bool symmetric, bool nearest=False) "
      "-> (Tensor, Tensor)");
  m.def("record_ranges(Tensor(a!) batch_min, Tensor(b!) batch_max, Tensor(c!) batches, Tensor low, Tensor high) -> ()");
  m.def("mean_range(Tensor batch_min, Tensor batch_max, float? sigma, float? quantile) -> (Tensor, Tensor)");
}

namespace rarefy::ops {
#define RAREFY_OP(name, Signature) \
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("rarefy::" #name, "").typed<Signature>()

std::tuple<at::Tensor, at::Tensor> mse_range(const at::Tensor& x, std::optional<int64_t> axis, int64_t qmin,
                                             int64_t qmax, bool symmetric, double norm, int64_t steps, int64_t bins,
                                             const std::optional<at::Tensor>& importance, bool power_of_two) {
  RAREFY_OP(mse_range, decltype(mse_range));
  return op.call(x, axis, qmin, qmax, symmetric, norm, steps, bins, importance, power_of_two);
}

std::tuple<at::Tensor, at::Tensor> half_quadratic_qparams(const at::Tensor& x, std::optional<int64_t> axis,
                                                          int64_t qmin, int64_t qmax, bool symmetric, double norm,
                                                          double beta, double kappa, int64_t iterations) {
  RAREFY_OP(half_quadratic_qparams, decltype(half_quadratic_qparams));
  return op.call(x, axis, qmin, qmax, symmetric, norm, beta, kappa, iterations);
}

std::tuple<at::Tensor, at::Tensor> power_of_two_range(const at::Tensor& min_val, const at::Tensor& max_val,
                                                      int64_t qmin, int64_t qmax, bool symmetric, bool nearest) {
  RAREFY_OP(power_of_two_range, decltype(power_of_two_range));
  return op.call(min_val, max_val, qmin, qmax, symmetric, nearest);
}

void record_ranges(at::Tensor& batch_min, at::Tensor& batch_max, at::Tensor& batches, const at::Tensor& low,
                   const at::Tensor& high) {
  RAREFY_OP(record_ranges, decltype(record_ranges));
  op.call(batch_min, batch_max, batches, low, high);
}

std::tuple<at::Tensor, at::Tensor> mean_range(const at::Tensor& batch_min, const at::Tensor& batch_max,
                                              std::optional<double> sigma, std::optional<double> quantile) {
  RAREFY_OP(mean_range, decltype(mean_range));
  return op.call(batch_min, batch_max, sigma, quantile);
}

#undef RAREFY_OP
}  // namespace rarefy::ops
