#include "ops/cpu/im2col.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstring>

#include "ops/allocate.h"
#include "ops/integer_checks.h"

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

void fill_cells(uint8_t* to, uint8_t value, int64_t count) { std::memset(to, value, static_cast<size_t>(count)); }

/// One row of the kernel, laid over one line of the image (`source`) from position w0 on: kernel[2] cells.
void copy_line(const ConvGeometry& g, const uint8_t* source, int64_t w0, uint8_t fill, uint8_t* row) {
  if (g.dilation[2] == 1) {
    const int64_t first = std::clamp<int64_t>(-w0, 0, g.kernel[2]);
    const int64_t last = std::clamp<int64_t>(g.in[2] - w0, first, g.kernel[2]);
    fill_cells(row, fill, first * g.channels);
    if (last > first) {
      std::memcpy(row + first * g.channels, source + (w0 + first) * g.channels,
                  static_cast<size_t>((last - first) * g.channels));
    }
    fill_cells(row + last * g.channels, fill, (g.kernel[2] - last) * g.channels);
    return;
  }
  for (int64_t kw = 0; kw < g.kernel[2]; ++kw, row += g.channels) {
    const int64_t w = w0 + kw * g.dilation[2];
    if (w < 0 || w >= g.in[2]) {
      fill_cells(row, fill, g.channels);
    } else {
      std::memcpy(row, source + w * g.channels, static_cast<size_t>(g.channels));
    }
  }
}

/// The patch under one position of the result.
void copy_patch(const ConvGeometry& g, const uint8_t* sample, int64_t od, int64_t oh, int64_t ow, uint8_t fill,
                uint8_t* row) {
  const int64_t line = g.kernel[2] * g.channels;
  const int64_t w0 = ow * g.stride[2] - g.padding[2];
  for (int64_t kd = 0; kd < g.kernel[0]; ++kd) {
    const int64_t d = od * g.stride[0] - g.padding[0] + kd * g.dilation[0];
    for (int64_t kh = 0; kh < g.kernel[1]; ++kh, row += line) {
      const int64_t h = oh * g.stride[1] - g.padding[1] + kh * g.dilation[1];
      if (d < 0 || d >= g.in[0] || h < 0 || h >= g.in[1]) {
        fill_cells(row, fill, line);
      } else {
        copy_line(g, sample + (d * g.in[1] + h) * g.in[2] * g.channels, w0, fill, row);
      }
    }
  }
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
  for (size_t d = 0; d < 3; ++d) {
    out[d] = conv_size(in[d], kernel[d], stride[d], padding[d], dilation[d]);
  }
}

bool ConvGeometry::is_pointwise() const {
  const std::array<int64_t, 3> ones = {1, 1, 1}, zeros = {0, 0, 0};
  return kernel == ones && stride == ones && padding == zeros;
}

at::Tensor im2col(const at::Tensor& q, const ConvGeometry& g, uint8_t fill) {
  auto columns = empty_cached({g.positions(), g.patch()}, q.scalar_type());
  const auto* image = static_cast<const uint8_t*>(q.const_data_ptr());
  auto* rows = static_cast<uint8_t*>(columns.data_ptr());
  const int64_t sample_bytes = g.in[0] * g.in[1] * g.in[2] * g.channels;
  const int64_t line_bytes = g.out[2] * g.patch();
  constexpr int64_t kGrainBytes = 1 << 16;
  at::parallel_for(0, g.batch * g.out[0] * g.out[1], std::max<int64_t>(1, kGrainBytes / (line_bytes + 1)),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t line = begin; line < end; ++line) {
                       const uint8_t* sample = image + line / (g.out[0] * g.out[1]) * sample_bytes;
                       const int64_t od = line / g.out[1] % g.out[0];
                       const int64_t oh = line % g.out[1];
                       for (int64_t ow = 0; ow < g.out[2]; ++ow) {
                         copy_patch(g, sample, od, oh, ow, fill, rows + line * line_bytes + ow * g.patch());
                       }
                     }
                   });
  return columns;
}

namespace {

template <typename T>
void add_patches(const T* rows, float* images, const ConvGeometry& g, int64_t first, int64_t last) {
  const int64_t c = g.channels, image = g.in[0] * g.in[1] * g.in[2] * c, per_image = g.out[0] * g.out[1] * g.out[2];
  for (int64_t n = first; n < last; ++n) {
    float* target = images + n * image;
    std::fill(target, target + image, 0.0f);
    const T* row = rows + n * per_image * g.patch();
    for (int64_t position = 0; position < per_image; ++position) {
      const std::array<int64_t, 3> at = {position / (g.out[1] * g.out[2]), position / g.out[2] % g.out[1],
                                         position % g.out[2]};
      for (int64_t k = 0; k < g.kernel[0] * g.kernel[1] * g.kernel[2]; ++k, row += c) {
        const std::array<int64_t, 3> tap = {k / (g.kernel[1] * g.kernel[2]), k / g.kernel[2] % g.kernel[1],
                                            k % g.kernel[2]};
        int64_t cell = 0;
        bool inside = true;
        for (size_t d = 0; d < 3; ++d) {
          const int64_t i = at[d] * g.stride[d] - g.padding[d] + tap[d] * g.dilation[d];
          inside = inside && i >= 0 && i < g.in[d];
          cell = cell * g.in[d] + i;
        }
        if (!inside) {
          continue;
        }
        float* out = target + cell * c;
        for (int64_t i = 0; i < c; ++i) {
          out[i] += static_cast<float>(row[i]);
        }
      }
    }
  }
}

}  // namespace

at::Tensor col2im(const at::Tensor& columns, const ConvGeometry& g) {
  auto images = empty_cached({g.batch, g.in[0], g.in[1], g.in[2], g.channels}, at::kFloat);
  float* out = images.data_ptr<float>();
  at::parallel_for(0, g.batch, 1, [&](int64_t first, int64_t last) {
    if (columns.scalar_type() == at::kBFloat16) {
      add_patches(columns.const_data_ptr<at::BFloat16>(), out, g, first, last);
    } else {
      add_patches(columns.const_data_ptr<float>(), out, g, first, last);
    }
  });
  return images;
}

}  // namespace rarefy::ops
