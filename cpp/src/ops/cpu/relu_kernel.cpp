#include <rarefy/ops/relu.h>
#include <torch/library.h>

#include <cstring>

#include "ops/allocate.h"
#include "ops/cpu/dense.h"
#include "ops/cpu/fake_quantize_kernel.h"
#include "ops/cpu/relu_simd.h"
#include "ops/fake_quantize_checks.h"

namespace rarefy::ops {
namespace {

void relu_mask_into(const at::Tensor& x, const at::Tensor& y, const at::Tensor& mask) {
  auto* bits = mask.data_ptr<uint8_t>();
  if (x.scalar_type() == at::kDouble) {
    const double* in = x.const_data_ptr<double>();
    double* out = y.data_ptr<double>();
    parallel_words(x.numel(), [&](int64_t begin, int64_t end) {
      for (int64_t first = begin; first < end; first += kWord) {
        uint64_t word = 0;
        for (int64_t i = first; i < std::min(first + kWord, end); ++i) {
          const double value = in[i];
          out[i] = value <= 0.0 ? 0.0 : value;
          word |= static_cast<uint64_t>(!(value <= 0.0)) << (i - first);
        }
        std::memcpy(bits + first / 8, &word, sizeof word);
      }
    });
    return;
  }
  const auto type = layout_of(x, -1).type;
  const void* in = x.const_data_ptr();
  void* out = y.data_ptr();
  parallel_words(x.numel(),
                 [&](int64_t begin, int64_t end) { RAREFY_ISA_CALL(relu_mask, type, in, out, bits, begin, end); });
}

std::tuple<at::Tensor, at::Tensor> relu_mask_cpu(const at::Tensor& x) {
  check_float("relu", x, "input");
  const auto in = dense(x);
  auto out = empty_for(in);
  auto mask = empty_mask(in);
  relu_mask_into(in, out, mask);
  return {out, mask};
}

at::Tensor relu_mask_inplace_cpu(at::Tensor& x) {
  check_float("relu_", x, "input");
  check_dense_strides("relu_", x.sizes(), x.strides());
  auto mask = empty_mask(x);
  relu_mask_into(x, x, mask);
  return mask;
}

}  // namespace

TORCH_LIBRARY_IMPL(rarefy, CPU, m) {
  m.impl("relu_mask", &relu_mask_cpu);
  m.impl("relu_mask_", &relu_mask_inplace_cpu);
}

}  // namespace rarefy::ops
