#include "ops/cuda/mask_kernel.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/core/DeviceGuard.h>
#include <rarefy/ops/mask.h>
#include <torch/library.h>

#include "ops/cuda/launch.h"
#include "ops/mask_checks.h"
#include "ops/selection.h"

namespace rarefy::ops {
namespace {

std::vector<at::Tensor> magnitude_mask_cuda(at::TensorList weights, double sparsity,
                                            std::optional<at::TensorList> masks) {
  check_magnitude_mask("magnitude_mask", "weight", weights, sparsity, masks);
  const c10::DeviceGuard guard(weights[0].device());
  void* stream = stream_of(weights[0]);
  bool is_double = false;
  for (const auto& weight : weights) {
    is_double = is_double || weight.scalar_type() == at::kDouble;
  }
  std::vector<at::Tensor> values, alive, out;
  std::vector<cuda::Weights> sources;
  int64_t total = 0, dead = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    values.push_back((is_double ? weights[i].to(at::kDouble) : weights[i]).contiguous());
    const auto& x = values.back();
    const uint8_t* bits = nullptr;
    if (masks.has_value()) {
      alive.push_back((*masks)[i].contiguous());
      bits = alive.back().const_data_ptr<uint8_t>();
      dead += pruned_count(alive.back(), x.numel());
    }
    sources.push_back({float_type(x), x.const_data_ptr(), bits, x.numel()});
    out.push_back(at::empty({mask_bytes(x.numel())}, x.options().dtype(at::kByte)));
    total += x.numel();
  }
  // One pass of histograms a round; the last element of the buffer is the largest key, which shows a NaN.
  const int64_t infinity = is_double ? 0x7ff0000000000000 : 0x7f800000;
  const auto fill = [&](const KeyRange& range, int shift, Histogram& histogram) {
    const auto counts = at::zeros({kBins + 1}, values[0].options().dtype(at::kLong));
    auto* bins = reinterpret_cast<unsigned long long*>(counts.data_ptr<int64_t>());
    for (const auto& source : sources) {
      check_launch("magnitude_mask",
                   cuda::count_keys(source, range.low, range.high, shift, bins, bins + kBins, stream));
    }
    const auto host = counts.cpu();
    const int64_t* read = host.const_data_ptr<int64_t>();
    std::copy(read, read + kBins, histogram.begin());
    if (read[kBins] > infinity) {
      for (size_t i = 0; i < values.size(); ++i) {
        const auto bad = values[i].isnan().flatten().nonzero();
        TORCH_CHECK_VALUE(bad.numel() == 0, "[magnitude_mask] weights must not be NaN, got NaN in tensor ", i,
                          " at flat index ", bad[0].item<int64_t>());
      }
    }
  };
  const int64_t more = std::max<int64_t>(0, elements_to_prune(sparsity, total) - dead);
  KeyRange selected{-1, -1, 0};
  if (more > 0) {
    selected = select_rank({0, infinity, 0}, more - 1, 1, fill);
  } else {
    Histogram unused{};
    fill({0, infinity, 0}, bin_shift({0, infinity, 0}), unused);  // for the check of the values
  }

  int64_t ties_pruned = more - selected.below;
  for (size_t i = 0; i < sources.size(); ++i) {
    const int64_t chunks = (sources[i].elements + cuda::kChunk - 1) / cuda::kChunk;
    const auto ties = at::zeros({chunks}, values[i].options().dtype(at::kInt));
    auto* mask = out[i].data_ptr<uint8_t>();
    check_launch("magnitude_mask", cuda::write_mask(sources[i], selected.low, mask, ties.data_ptr<int32_t>(), stream));
    const auto host = ties.cpu();
    const int32_t* counts = host.const_data_ptr<int32_t>();
    for (int64_t c = 0; c < chunks; ++c) {
      const int64_t pruned = std::min<int64_t>(ties_pruned, counts[c]);
      ties_pruned -= pruned;
      if (pruned < counts[c]) {
        check_launch("magnitude_mask", cuda::keep_ties(sources[i], selected.low, c, pruned, mask, stream));
      }
    }
  }
  return out;
}

void apply_mask_cuda(at::Tensor& x, const at::Tensor& mask) {
  check_apply_mask(x, mask);
  const c10::DeviceGuard guard(x.device());
  const auto packed = mask.contiguous();
  const auto dense = x.contiguous();
  check_launch("apply_mask_", cuda::apply_mask(float_type(x), dense.data_ptr(), packed.const_data_ptr<uint8_t>(),
                                               x.numel(), stream_of(x)));
  if (!x.is_contiguous()) {
    x.copy_(dense);
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(rarefy, CUDA, m) {
  m.impl("magnitude_mask", &magnitude_mask_cuda);
  m.impl("apply_mask_", &apply_mask_cuda);
}

}  // namespace rarefy::ops
