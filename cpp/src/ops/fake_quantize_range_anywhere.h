// fake_quantize_range from torch's operators: on every device, and for what a device's own kernels leave out.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>

namespace rarefy::ops {

at::Tensor range_anywhere(const at::Tensor& x, const at::Tensor& scale, const at::Tensor& low, const at::Tensor& high,
                          std::optional<int64_t> axis, double gradient_scale);
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> range_backward_anywhere(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& scale, const at::Tensor& low, const at::Tensor& high,
    std::optional<int64_t> axis, double gradient_scale);

}  // namespace rarefy::ops
