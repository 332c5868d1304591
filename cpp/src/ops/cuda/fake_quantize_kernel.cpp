#include "ops/cuda/fake_quantize_kernel.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/empty_strided.h>
#include <c10/core/DeviceGuard.h>
#include <rarefy/ops/fake_quantize.h>
#include <torch/library.h>

#include "ops/cuda/launch.h"
#include "ops/fake_quantize_checks.h"

namespace rarefy::ops {
namespace {

at::Tensor dense(const at::Tensor& x) { return x.is_non_overlapping_and_dense() ? x : x.clone(); }

cuda::Layout layout_of(const at::Tensor& x, int64_t axis) {
  const bool one_channel = axis < 0 || x.size(axis) == 1;
  return {float_type(x), x.numel(), one_channel ? 1 : x.size(axis),
          one_channel ? std::max<int64_t>(x.numel(), 1) : x.stride(axis)};
}

/// Keeps the parameters alive, in the type that x is computed in, while the kernel's arguments are built.
struct DeviceGrid {
  at::Tensor scale;
  at::Tensor zero_point;
  cuda::Grid grid;

  DeviceGrid(const at::Tensor& x, const at::Tensor& s, const at::Tensor& z, int64_t qmin, int64_t qmax)
      : scale(s.to(x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat).contiguous()),
        zero_point(z.contiguous()),
        grid{scale.const_data_ptr(), zero_point.const_data_ptr<int32_t>(), static_cast<int>(qmin),
             static_cast<int>(qmax)} {}
};

void fake_quantize_into(const char* function, const at::Tensor& in, const at::Tensor& out, void* mask,
                        const at::Tensor& scale, const at::Tensor& zero_point, int64_t axis, int64_t qmin,
                        int64_t qmax) {
  const DeviceGrid grid(in, scale, zero_point, qmin, qmax);
  check_launch(function, cuda::fake_quantize(in.const_data_ptr(), out.data_ptr(), mask, layout_of(in, axis), grid.grid,
                                             stream_of(in)));
}

at::Tensor empty_mask(const at::Tensor& x) { return at::empty({mask_bytes(x.numel())}, x.options().dtype(at::kByte)); }

at::Tensor fake_quantize_cuda(const at::Tensor& x, const at::Tensor& scale, const at::Tensor& zero_point,
                              std::optional<int64_t> axis, int64_t qmin, int64_t qmax) {
  const int64_t resolved = check_fake_quantize("fake_quantize", x, scale, zero_point, axis, qmin, qmax);
  const c10::DeviceGuard guard(x.device());
  const auto in = dense(x);
  auto out = at::empty_like(in);
  fake_quantize_into("fake_quantize", in, out, nullptr, scale, zero_point, resolved, qmin, qmax);
  return out;
}

std::tuple<at::Tensor, at::Tensor> fake_quantize_mask_cuda(const at::Tensor& x, const at::Tensor& scale,
                                                           const at::Tensor& zero_point, std::optional<int64_t> axis,
                                                           int64_t qmin, int64_t qmax) {
  const int64_t resolved = check_fake_quantize("fake_quantize", x, scale, zero_point, axis, qmin, qmax);
  const c10::DeviceGuard guard(x.device());
  const auto in = dense(x);
  auto out = at::empty_like(in);
  auto mask = empty_mask(in);
  fake_quantize_into("fake_quantize", in, out, mask.data_ptr(), scale, zero_point, resolved, qmin, qmax);
  return {out, mask};
}

at::Tensor fake_quantize_backward_cuda(const at::Tensor& grad, const at::Tensor& mask, c10::SymIntArrayRef strides) {
  check_backward("fake_quantize_backward", grad, mask);
  const auto wanted = C10_AS_INTARRAYREF_SLOW(strides);
  check_dense_strides("fake_quantize_backward", grad.sizes(), wanted);
  const c10::DeviceGuard guard(grad.device());
  auto out = at::empty_strided(grad.sizes(), wanted, grad.options());
  at::Tensor in = grad;
  if (grad.strides() != wanted) {
    out.copy_(grad);
    in = out;
  }
  check_launch("fake_quantize_backward", cuda::mask_gradient(in.const_data_ptr(), mask.const_data_ptr(), out.data_ptr(),
                                                             layout_of(in, -1), stream_of(in)));
  return out;
}

void fake_quantize_backward_inplace_cuda(at::Tensor& grad, const at::Tensor& mask) {
  check_backward("fake_quantize_backward_", grad, mask);
  check_dense_strides("fake_quantize_backward_", grad.sizes(), grad.strides());
  const c10::DeviceGuard guard(grad.device());
  check_launch("fake_quantize_backward_", cuda::mask_gradient(grad.const_data_ptr(), mask.const_data_ptr(),
                                                              grad.data_ptr(), layout_of(grad, -1), stream_of(grad)));
}

at::Tensor quantize_cuda(const at::Tensor& x, const at::Tensor& scale, const at::Tensor& zero_point,
                         std::optional<int64_t> axis, int64_t qmin, int64_t qmax) {
  const int64_t resolved = check_fake_quantize("quantize", x, scale, zero_point, axis, qmin, qmax);
  check_quantized_type("quantize", qmin, qmax);
  const c10::DeviceGuard guard(x.device());
  const auto in = dense(x);
  auto out = at::empty_like(in, in.options().dtype(qmin < 0 ? at::kChar : at::kByte));
  const DeviceGrid grid(in, scale, zero_point, qmin, qmax);
  check_launch("quantize",
               cuda::quantize(in.const_data_ptr(), out.data_ptr(), layout_of(in, resolved), grid.grid, stream_of(in)));
  return out;
}

void observe_into(const char* function, const at::Tensor& in, at::Tensor& min_val, at::Tensor& max_val,
                  at::Tensor& scale, at::Tensor& zero_point, at::Tensor& skipped, int64_t axis,
                  std::optional<double> averaging_constant, int64_t qmin, int64_t qmax, bool symmetric) {
  const auto layout = layout_of(in, axis);
  auto encoded = at::empty({2 * layout.channels + 1}, in.options().dtype(at::kInt));
  auto* codes = reinterpret_cast<uint32_t*>(encoded.data_ptr<int32_t>());
  check_launch(function, cuda::min_max(in.const_data_ptr(), codes, layout, stream_of(in)));
  check_launch(function, cuda::update_observer(
                             codes,
                             {min_val.data_ptr<float>(), max_val.data_ptr<float>(), scale.data_ptr<float>(),
                              zero_point.data_ptr<int32_t>(), skipped.data_ptr<int64_t>()},
                             layout.channels, averaging_constant.value_or(0.0), qmin, qmax, symmetric, stream_of(in)));
}

void observe_cuda(const at::Tensor& x, at::Tensor& min_val, at::Tensor& max_val, at::Tensor& scale,
                  at::Tensor& zero_point, at::Tensor& skipped, std::optional<int64_t> axis,
                  std::optional<double> averaging_constant, int64_t qmin, int64_t qmax, bool symmetric) {
  const int64_t resolved = check_observe("observe", x, min_val, max_val, scale, zero_point, skipped, axis,
                                         averaging_constant, qmin, qmax, symmetric);
  const c10::DeviceGuard guard(x.device());
  observe_into("observe", dense(x), min_val, max_val, scale, zero_point, skipped, resolved, averaging_constant, qmin,
               qmax, symmetric);
}

std::tuple<at::Tensor, at::Tensor> observe_fake_quantize_mask_cuda(const at::Tensor& x, at::Tensor& min_val,
                                                                   at::Tensor& max_val, at::Tensor& scale,
                                                                   at::Tensor& zero_point, at::Tensor& skipped,
                                                                   std::optional<int64_t> axis,
                                                                   std::optional<double> averaging_constant,
                                                                   int64_t qmin, int64_t qmax, bool symmetric) {
  constexpr const char* function = "observe_fake_quantize";
  const int64_t resolved = check_observe(function, x, min_val, max_val, scale, zero_point, skipped, axis,
                                         averaging_constant, qmin, qmax, symmetric);
  const c10::DeviceGuard guard(x.device());
  const auto in = dense(x);
  auto out = at::empty_like(in);
  auto mask = empty_mask(in);
  observe_into(function, in, min_val, max_val, scale, zero_point, skipped, resolved, averaging_constant, qmin, qmax,
               symmetric);
  fake_quantize_into(function, in, out, mask.data_ptr(), scale, zero_point, resolved, qmin, qmax);
  return {out, mask};
}

at::Tensor observe_fake_quantize_cuda(const at::Tensor& x, at::Tensor& min_val, at::Tensor& max_val, at::Tensor& scale,
                                      at::Tensor& zero_point, at::Tensor& skipped, std::optional<int64_t> axis,
                                      std::optional<double> averaging_constant, int64_t qmin, int64_t qmax,
                                      bool symmetric) {
  constexpr const char* function = "observe_fake_quantize";
  const int64_t resolved = check_observe(function, x, min_val, max_val, scale, zero_point, skipped, axis,
                                         averaging_constant, qmin, qmax, symmetric);
  const c10::DeviceGuard guard(x.device());
  const auto in = dense(x);
  auto out = at::empty_like(in);
  observe_into(function, in, min_val, max_val, scale, zero_point, skipped, resolved, averaging_constant, qmin, qmax,
               symmetric);
  fake_quantize_into(function, in, out, nullptr, scale, zero_point, resolved, qmin, qmax);
  return out;
}

std::tuple<at::Tensor, at::Tensor> choose_qparams_cuda(const at::Tensor& min_val, const at::Tensor& max_val,
                                                       int64_t qmin, int64_t qmax, bool symmetric) {
  check_choose_qparams("choose_qparams", min_val, max_val, qmin, qmax, symmetric);
  // A handful of values: computed where their own checks are.
  auto [scale, zero_point] = choose_qparams(min_val.cpu(), max_val.cpu(), qmin, qmax, symmetric);
  return {scale.to(min_val.device()), zero_point.to(min_val.device())};
}

}  // namespace

TORCH_LIBRARY_IMPL(rarefy, CUDA, m) {
  m.impl("fake_quantize", &fake_quantize_cuda);
  m.impl("fake_quantize_mask", &fake_quantize_mask_cuda);
  m.impl("fake_quantize_backward", &fake_quantize_backward_cuda);
  m.impl("fake_quantize_backward_", &fake_quantize_backward_inplace_cuda);
  m.impl("quantize", &quantize_cuda);
  m.impl("observe", &observe_cuda);
  m.impl("observe_fake_quantize", &observe_fake_quantize_cuda);
  m.impl("observe_fake_quantize_mask", &observe_fake_quantize_mask_cuda);
  m.impl("choose_qparams", &choose_qparams_cuda);
}

}  // namespace rarefy::ops
