#include "ops/cpu/im2col.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstring>

#include "ops/allocate.h"
#include "ops/integer_ops.h"

#if !defined(INTRA_OP_PARALLEL)
#error "at::parallel_for is a template in torch's header: without -fopenmp here it runs on one thread, silently"
#endif

namespace rarefy::ops {
namespace {

std::array<int64_t, 3> in_three(at::IntArrayRef values, int64_t front) {
  std::array<int64_t, 3> out = {front, front, front};
  std::copy(values.begin(), values.end(), out.begin() + static_cast<int64_t>(3 - values.size()));
  return out;
}

}  // namespace

ConvGeometry::ConvGeometry(at::IntArrayRef x, at::IntArrayRef weight, at::IntArrayRef stride_, at::IntArrayRef padding_,
                           at::IntArrayRef dilation_)
    : batch(x[0]),
      channels(weight[1]),
      in(in_three(x.slice(2), 1)),
      kernel(in_three(weight.slice(2), 1)),
      stride(in_three(stride_, 1)),
      padding(in_three(padding_, 0)),
      dilation(in_three(dilation_, 1)) {
  const auto sizes = conv_sizes(x, weight, stride_, padding_, dilation_);
  out = in_three(at::IntArrayRef(sizes).slice(2), 1);
}

bool ConvGeometry::is_pointwise() const {
  const std::array<int64_t, 3> ones = {1, 1, 1}, zeros = {0, 0, 0};
  return kernel == ones && stride == ones && padding == zeros;
}

at::Tensor im2col(const at::Tensor& q, const ConvGeometry& g, uint8_t fill) {
  auto columns = empty_cached({g.positions(), g.patch()}, q.scalar_type());
  const auto* image = static_cast<const uint8_t*>(q.const_data_ptr());
  auto* rows = static_cast<uint8_t*>(columns.data_ptr());
  const int64_t channels = g.channels;
  const int64_t line = g.kernel[2] * channels;  // bytes of one row of the kernel
  constexpr int64_t kGrainBytes = 1 << 16;
  at::parallel_for(0, g.batch * g.out[0] * g.out[1], std::max<int64_t>(1, kGrainBytes / (g.out[2] * g.patch() + 1)),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t index = begin; index < end; ++index) {
                       const int64_t n = index / (g.out[0] * g.out[1]);
                       const int64_t od = index / g.out[1] % g.out[0];
                       const int64_t oh = index % g.out[1];
                       uint8_t* row = rows + index * g.out[2] * g.patch();
                       for (int64_t ow = 0; ow < g.out[2]; ++ow) {
                         const int64_t w0 = ow * g.stride[2] - g.padding[2];
                         for (int64_t kd = 0; kd < g.kernel[0]; ++kd) {
                           const int64_t d = od * g.stride[0] - g.padding[0] + kd * g.dilation[0];
                           for (int64_t kh = 0; kh < g.kernel[1]; ++kh, row += line) {
                             const int64_t h = oh * g.stride[1] - g.padding[1] + kh * g.dilation[1];
                             if (d < 0 || d >= g.in[0] || h < 0 || h >= g.in[1]) {
                               std::memset(row, fill, static_cast<size_t>(line));
                               continue;
                             }
                             const uint8_t* source = image + ((n * g.in[0] + d) * g.in[1] + h) * g.in[2] * channels;
                             if (g.dilation[2] == 1) {
                               const int64_t first = std::clamp<int64_t>(-w0, 0, g.kernel[2]);
                               const int64_t last = std::clamp<int64_t>(g.in[2] - w0, first, g.kernel[2]);
                               std::memset(row, fill, static_cast<size_t>(first * channels));
                               std::memcpy(row + first * channels, source + (w0 + first) * channels,
                                           static_cast<size_t>((last - first) * channels));
                               std::memset(row + last * channels, fill,
                                           static_cast<size_t>((g.kernel[2] - last) * channels));
                               continue;
                             }
                             for (int64_t kw = 0; kw < g.kernel[2]; ++kw) {
                               const int64_t w = w0 + kw * g.dilation[2];
                               uint8_t* cell = row + kw * channels;
                               if (w < 0 || w >= g.in[2]) {
                                 std::memset(cell, fill, static_cast<size_t>(channels));
                               } else {
                                 std::memcpy(cell, source + w * channels, static_cast<size_t>(channels));
                               }
                             }
                           }
                         }
                       }
                     }
                   });
  return columns;
}

}  // namespace rarefy::ops
