#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/full.h>
#include <rarefy/ops/mask.h>
#include <torch/library.h>

#include <bit>
#include <cstring>

#include "ops/mask_checks.h"

TORCH_LIBRARY_FRAGMENT(rarefy, m) {
  m.def("magnitude_mask(Tensor[] weights, float sparsity, Tensor[]? masks=None) -> Tensor[]");
  m.def("score_mask(Tensor[] scores, float sparsity, Tensor[]? masks=None) -> Tensor[]");
  m.def("nm_mask(Tensor x, int n, int m, int dim=1, Tensor? mask=None, bool magnitude=True) -> Tensor");
  m.def("pack_mask(Tensor kept) -> Tensor");
  m.def("unpack_mask(Tensor mask, SymInt[] size) -> Tensor");
  m.def("apply_mask_(Tensor(a!) x, Tensor mask) -> ()");
}

namespace rarefy::ops {

std::vector<at::Tensor> magnitude_mask(at::TensorList weights, double sparsity, std::optional<at::TensorList> masks) {
  // Without a tensor there is no backend to dispatch to, and the dispatcher's message would be about that.
  TORCH_CHECK_VALUE(!weights.empty(), "[magnitude_mask] needs at least one weight, got none");
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("rarefy::magnitude_mask", "").typed<decltype(magnitude_mask)>();
  return op.call(weights, sparsity, masks);
}

std::vector<at::Tensor> score_mask(at::TensorList scores, double sparsity, std::optional<at::TensorList> masks) {
  TORCH_CHECK_VALUE(!scores.empty(), "[score_mask] needs at least one score, got none");
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("rarefy::score_mask", "").typed<decltype(score_mask)>();
  return op.call(scores, sparsity, masks);
}

at::Tensor nm_mask(const at::Tensor& x, int64_t n, int64_t m, int64_t dim, const std::optional<at::Tensor>& mask,
                   bool magnitude) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("rarefy::nm_mask", "").typed<decltype(nm_mask)>();
  return op.call(x, n, m, dim, mask, magnitude);
}

at::Tensor pack_mask(const at::Tensor& kept) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("rarefy::pack_mask", "").typed<decltype(pack_mask)>();
  return op.call(kept);
}

at::Tensor unpack_mask(const at::Tensor& mask, at::IntArrayRef size) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("rarefy::unpack_mask", "")
                             .typed<at::Tensor(const at::Tensor&, c10::SymIntArrayRef)>();
  return op.call(mask, c10::fromIntArrayRefSlow(size));
}

void apply_mask_(at::Tensor& x, const at::Tensor& mask) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("rarefy::apply_mask_", "").typed<decltype(apply_mask_)>();
  op.call(x, mask);
}

int64_t pruned_count(const at::Tensor& mask, int64_t elements) {
  TORCH_CHECK_VALUE(mask.scalar_type() == at::kByte && mask.numel() == mask_bytes(elements),
                    "[pruned_count] mask must hold ", mask_bytes(elements), " bytes for ", elements, " elements, got ",
                    mask.numel(), " of ", mask.scalar_type());
  const auto host = mask.cpu().contiguous();
  const uint8_t* bytes = host.const_data_ptr<uint8_t>();
  int64_t kept = 0;
  for (int64_t i = 0; i < host.numel(); i += 8) {
    uint64_t word;
    std::memcpy(&word, bytes + i, sizeof word);
    if (elements - i * 8 < 64) {  // padding bits are zero in masks made here; one from elsewhere may say otherwise
      word &= (uint64_t{1} << (elements - i * 8)) - 1;
    }
    kept += std::popcount(word);
  }
  return elements - kept;
}

at::Tensor full_mask(const at::Tensor& x) {
  auto mask = at::full({mask_bytes(x.numel())}, 255, x.options().dtype(at::kByte).requires_grad(false));
  const int64_t whole = x.numel() / 8;
  if (whole < mask.numel()) {
    mask.slice(0, whole).zero_();
    if (x.numel() % 8 != 0) {
      mask.slice(0, whole, whole + 1).fill_((1 << (x.numel() % 8)) - 1);
    }
  }
  return mask;
}

}  // namespace rarefy::ops
