#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/gather.h>
#include <ATen/ops/searchsorted.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>
#include <rarefy/ops/weight_formats.h>
#include <torch/library.h>

#include <limits>

#include "ops/block_views.h"
#include "ops/kmeans.h"

TORCH_LIBRARY_FRAGMENT(rarefy, m) {
  m.def("fake_quantize_binary(Tensor x, int? axis=None, SymInt[] block=[], bool clipped=True) -> Tensor");
  m.def("fake_quantize_ternary(Tensor x, float threshold=0.7, int? axis=None, SymInt[] block=[]) -> Tensor");
  m.def("codebook_indices(Tensor x, Tensor codebook, int? axis=None, SymInt[] block=[]) -> Tensor");
  m.def("fake_quantize_codebook(Tensor x, Tensor codebook, int? axis=None, SymInt[] block=[]) -> Tensor");
  m.def(
      "kmeans_codebook(Tensor x, int entries, int? axis=None, SymInt[] block=[], Tensor? weights=None, "
      "int iterations=100) -> Tensor");
}

namespace rarefy::ops {
#define RAREFY_OP(name) \
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("rarefy::" #name, "").typed<decltype(name)>()

at::Tensor fake_quantize_binary(const at::Tensor& x, std::optional<int64_t> axis, c10::SymIntArrayRef block,
                                bool clipped) {
  RAREFY_OP(fake_quantize_binary);
  return op.call(x, axis, block, clipped);
}

at::Tensor fake_quantize_ternary(const at::Tensor& x, double threshold, std::optional<int64_t> axis,
                                 c10::SymIntArrayRef block) {
  RAREFY_OP(fake_quantize_ternary);
  return op.call(x, threshold, axis, block);
}

at::Tensor codebook_indices(const at::Tensor& x, const at::Tensor& codebook, std::optional<int64_t> axis,
                            c10::SymIntArrayRef block) {
  RAREFY_OP(codebook_indices);
  return op.call(x, codebook, axis, block);
}

at::Tensor fake_quantize_codebook(const at::Tensor& x, const at::Tensor& codebook, std::optional<int64_t> axis,
                                  c10::SymIntArrayRef block) {
  RAREFY_OP(fake_quantize_codebook);
  return op.call(x, codebook, axis, block);
}

at::Tensor kmeans_codebook(const at::Tensor& x, int64_t entries, std::optional<int64_t> axis, c10::SymIntArrayRef block,
                           const std::optional<at::Tensor>& weights, int64_t iterations) {
  RAREFY_OP(kmeans_codebook);
  return op.call(x, entries, axis, block, weights, iterations);
}

namespace {

/// The mean of `magnitudes` over what `counts`, for each block, [blocks, 1], in x's computing type; 0 over nothing.
at::Tensor mean_over(const at::Tensor& magnitudes, const at::Tensor& counts) {
  const auto sum = at::where(counts, magnitudes, at::zeros_like(magnitudes)).sum(1, true, at::kDouble);
  const auto number = counts.sum(1, true, at::kDouble);
  return (sum / number.clamp_min(1.0)).to(magnitudes.scalar_type());
}

at::ScalarType computing_type(const at::Tensor& x) { return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

at::Tensor like(const at::Tensor& values, const at::Tensor& x, const Sharing& sharing) {
  return at::empty_like(x).copy_(from_blocks(values, x, sharing));
}

at::Tensor fake_quantize_binary_any(const at::Tensor& x, std::optional<int64_t> axis, c10::SymIntArrayRef block, bool) {
  const auto sharing = check_sharing("fake_quantize_binary", x, axis, block);
  // What fills short blocks up counts in no mean.
  const auto values = to_blocks(x.to(computing_type(x)), sharing, std::numeric_limits<double>::quiet_NaN());
  const auto mean = mean_over(values.abs(), values.isfinite());
  return like(at::where(values.isnan(), values, at::where(values.lt(0.0), -mean, mean)), x, sharing);
}

at::Tensor fake_quantize_ternary_any(const at::Tensor& x, double threshold, std::optional<int64_t> axis,
                                     c10::SymIntArrayRef block) {
  const auto sharing = check_sharing("fake_quantize_ternary", x, axis, block);
  TORCH_CHECK_VALUE(threshold > 0.0, "[fake_quantize_ternary] threshold must be positive, got ", threshold);
  const auto values = to_blocks(x.to(computing_type(x)), sharing, std::numeric_limits<double>::quiet_NaN());
  const auto magnitudes = values.abs();
  const auto finite = values.isfinite();
  const auto above = magnitudes.gt(mean_over(magnitudes, finite) * threshold);
  const auto size = mean_over(magnitudes, above.logical_and(finite));
  const auto ternary = at::where(above, at::where(values.lt(0.0), -size, size), at::zeros_like(values));
  return like(at::where(values.isnan(), values, ternary), x, sharing);
}

/// The sizes that a codebook must have.
Sharing check_codebook(const char* function, const at::Tensor& x, const at::Tensor& codebook,
                       std::optional<int64_t> axis, c10::SymIntArrayRef block) {
  const auto sharing = check_sharing(function, x, axis, block);
  TORCH_CHECK_TYPE(codebook.scalar_type() == at::kFloat, "[", function, "] codebook must be float32, got ",
                   codebook.scalar_type());
  auto sizes = sharing.axis < 0 ? std::vector<c10::SymInt>{} : scale_sizes(x, sharing);
  TORCH_CHECK_VALUE(codebook.dim() == static_cast<int64_t>(sizes.size()) + 1 && codebook.sym_size(-1) >= 2 &&
                        codebook.sym_size(-1) <= 256,
                    "[", function, "] codebook must have 2 to 256 entries on its last axis and ", sizes.size(),
                    " axes before it, got shape ", codebook.sym_sizes());
  sizes.push_back(codebook.sym_size(-1));
  TORCH_CHECK_VALUE(codebook.sym_sizes() == c10::SymIntArrayRef(sizes), "[", function, "] codebook must have shape ",
                    c10::SymIntArrayRef(sizes), ", got ", codebook.sym_sizes());
  TORCH_CHECK_VALUE(codebook.device() == x.device(), "[", function, "] codebook must be on the input's device ",
                    x.device(), ", got ", codebook.device());
  return sharing;
}

/// The codes of [blocks, elements].
at::Tensor block_codes(const at::Tensor& values, const at::Tensor& codebook) {
  const auto flat = codebook.reshape_symint({values.sym_size(0), codebook.sym_size(-1)}).to(values.scalar_type());
  const auto [ordered, place] = flat.sort(1);
  const auto entries = ordered.sym_size(1);
  const auto bounds =
      (ordered.narrow_symint(1, 0, entries - 1).to(at::kDouble) + ordered.narrow_symint(1, 1, entries - 1)) / 2.0;
  // Up to the middle, and with it, the smaller value is the nearest.
  const auto codes = at::searchsorted(bounds.to(values.scalar_type()).contiguous(), values.contiguous());
  return at::gather(place, 1, codes);
}

at::Tensor codebook_indices_any(const at::Tensor& x, const at::Tensor& codebook, std::optional<int64_t> axis,
                                c10::SymIntArrayRef block) {
  const auto sharing = check_codebook("codebook_indices", x, codebook, axis, block);
  const auto codes = block_codes(to_blocks(x.detach().to(computing_type(x)), sharing, 0.0), codebook);
  return at::empty_like(x, x.options().dtype(at::kByte)).copy_(from_blocks(codes, x, sharing));
}

at::Tensor fake_quantize_codebook_any(const at::Tensor& x, const at::Tensor& codebook, std::optional<int64_t> axis,
                                      c10::SymIntArrayRef block) {
  const auto sharing = check_codebook("fake_quantize_codebook", x, codebook, axis, block);
  const auto values = to_blocks(x.to(computing_type(x)), sharing, 0.0);
  const auto flat = codebook.reshape_symint({values.sym_size(0), codebook.sym_size(-1)});
  const auto chosen = at::gather(flat.to(values.scalar_type()), 1, block_codes(values, codebook));
  return like(at::where(values.isnan(), values, chosen), x, sharing);
}

at::Tensor kmeans_codebook_any(const at::Tensor& x, int64_t entries, std::optional<int64_t> axis,
                               c10::SymIntArrayRef block, const std::optional<at::Tensor>& weights,
                               int64_t iterations) {
  constexpr auto function = "kmeans_codebook";
  const auto sharing = check_sharing(function, x, axis, block);
  TORCH_CHECK_VALUE(entries >= 2 && entries <= 256, "[", function, "] entries must be in 2..256, got ", entries);
  TORCH_CHECK_VALUE(iterations >= 1, "[", function, "] iterations must be at least 1, got ", iterations);
  TORCH_CHECK_VALUE(x.numel() > 0, "[", function, "] input must not be empty, got shape ", x.sizes());
  TORCH_CHECK_VALUE(!weights.has_value() || weights->sizes() == x.sizes(), "[", function,
                    "] weights must have the input's shape ", x.sizes(), ", got ",
                    weights.has_value() ? weights->sizes() : at::IntArrayRef());
  const auto wide = x.detach().to(at::kCPU, at::kDouble);
  TORCH_CHECK_VALUE(wide.isfinite().all().item<bool>(), "[", function, "] input must be finite, got NaN or infinity");
  const auto values = to_blocks(wide, sharing, std::numeric_limits<double>::quiet_NaN()).contiguous();
  auto importance = at::full_like(values, 1.0);
  if (weights.has_value()) {
    const auto given = weights->detach().to(at::kCPU, at::kDouble);
    TORCH_CHECK_VALUE(given.isfinite().all().item<bool>() && given.ge(0.0).all().item<bool>(), "[", function,
                      "] weights must be finite and not negative");
    importance = to_blocks(given, sharing, 0.0).contiguous();
  }
  auto codebook = at::empty({values.size(0), entries}, at::kFloat);
  for (int64_t i = 0; i < values.size(0); ++i) {
    std::vector<WeightedValue> points;
    double total = 0.0;
    for (int64_t k = 0; k < values.size(1); ++k) {
      const double value = values.const_data_ptr<double>()[i * values.size(1) + k];
      const double weight = importance.const_data_ptr<double>()[i * values.size(1) + k];
      if (value == value && weight > 0.0) {  // what fills a short block up is NaN
        points.push_back({value, weight});
        total += weight;
      }
    }
    TORCH_CHECK_VALUE(total > 0.0, "[", function, "] the weights of every block must have a positive sum, got ", total,
                      " for block ", i);
    const auto centers = kmeans(std::move(points), entries, iterations);
    for (int64_t k = 0; k < entries; ++k) {
      codebook.data_ptr<float>()[i * entries + k] = static_cast<float>(centers[static_cast<size_t>(k)]);
    }
  }
  auto sizes = sharing.axis < 0 ? std::vector<c10::SymInt>{} : scale_sizes(x, sharing);
  sizes.emplace_back(entries);
  return codebook.reshape_symint(sizes).to(x.device());
}

at::Tensor codebook_meta(const at::Tensor& x, int64_t entries, std::optional<int64_t> axis, c10::SymIntArrayRef block,
                         const std::optional<at::Tensor>&, int64_t) {
  const auto sharing = check_sharing("kmeans_codebook", x, axis, block);
  auto sizes = sharing.axis < 0 ? std::vector<c10::SymInt>{} : scale_sizes(x, sharing);
  sizes.emplace_back(entries);
  return at::empty_symint(sizes, x.options().dtype(at::kFloat));
}

}  // namespace

TORCH_LIBRARY_IMPL(rarefy, CompositeExplicitAutograd, m) {
  m.impl("fake_quantize_binary", &fake_quantize_binary_any);
  m.impl("fake_quantize_ternary", &fake_quantize_ternary_any);
  m.impl("codebook_indices", &codebook_indices_any);
  m.impl("fake_quantize_codebook", &fake_quantize_codebook_any);
  m.impl("kmeans_codebook", &kmeans_codebook_any);
}

TORCH_LIBRARY_IMPL(rarefy, Meta, m) {
  m.impl("fake_quantize_binary", [](const at::Tensor& x, std::optional<int64_t> axis, c10::SymIntArrayRef block, bool) {
    check_sharing("fake_quantize_binary", x, axis, block);
    return at::empty_like(x);
  });
  m.impl("fake_quantize_ternary",
         [](const at::Tensor& x, double, std::optional<int64_t> axis, c10::SymIntArrayRef block) {
           check_sharing("fake_quantize_ternary", x, axis, block);
           return at::empty_like(x);
         });
  m.impl("codebook_indices",
         [](const at::Tensor& x, const at::Tensor& codebook, std::optional<int64_t> axis, c10::SymIntArrayRef block) {
           check_codebook("codebook_indices", x, codebook, axis, block);
           return at::empty_like(x, x.options().dtype(at::kByte));
         });
  m.impl("fake_quantize_codebook",
         [](const at::Tensor& x, const at::Tensor& codebook, std::optional<int64_t> axis, c10::SymIntArrayRef block) {
           check_codebook("fake_quantize_codebook", x, codebook, axis, block);
           return at::empty_like(x);
         });
  m.impl("kmeans_codebook", &codebook_meta);
}

}  // namespace rarefy::ops
