#include <ATen/ops/rand_like.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>
#include <rarefy/quantization/noise.h>
#include <torch/library.h>

#include <string>
#include <vector>

#include "ops/block_views.h"
#include "quantization/scheme_cache.h"

namespace rarefy::quantization {
namespace {

/// The scale of each element, in x's shape.
at::Tensor step_of(const at::Tensor& x, const at::Tensor& scale, const Scheme& scheme) {
  const auto sizes = scheme.block();
  const std::vector<c10::SymInt> block(sizes.begin(), sizes.end());
  const auto sharing = ops::check_sharing("quantization_noise", x, scheme.block_axis(), block);
  const auto blocks = ops::to_blocks(x.detach(), sharing, 0.0);
  TORCH_CHECK_VALUE(scale.sym_numel() == blocks.sym_size(0), "[quantization_noise] scale must have ",
                    blocks.sym_size(0), " values for ", str(scheme.granularity), " and shape ", x.sym_sizes(), ", got ",
                    scale.sym_numel());
  return ops::from_blocks(scale.reshape({-1, 1}).expand_symint(blocks.sym_sizes()), x, sharing);
}

at::Tensor quantization_noise_json(const at::Tensor& x, const at::Tensor& rounded, const at::Tensor& scale,
                                   std::string scheme) {
  return quantization_noise(x, rounded, scale, scheme_of(scheme));
}

}  // namespace

at::Tensor quantization_noise(const at::Tensor& x, const at::Tensor& rounded, const at::Tensor& scale,
                              const Scheme& scheme) {
  TORCH_CHECK_VALUE(scheme.noise.has_value(), "[quantization_noise] the scheme must have noise, got ", scheme.str());
  TORCH_CHECK_VALUE(x.sym_sizes() == rounded.sym_sizes(), "[quantization_noise] rounded must have the shape of x, ",
                    x.sym_sizes(), ", got ", rounded.sym_sizes());
  const auto options = x.options().dtype(x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
  auto noisy = rounded;
  if (scheme.noise->uniform) {
    const auto step = step_of(x, scale.detach(), scheme).to(options);
    const auto error = x.detach().to(options) - rounded.detach().to(options);
    const auto drawn = at::rand_like(error).sub(0.5).mul(step);
    const auto shift = at::where(error.abs() <= step * 0.5, error + drawn, at::zeros_like(error));
    noisy = rounded + shift.to(x.scalar_type());
  }
  if (scheme.noise->share < 1.0) {
    noisy = at::where(at::rand_like(x.detach(), options) < scheme.noise->share, noisy, x);
  }
  return noisy;
}

TORCH_LIBRARY_FRAGMENT(rarefy, m) {
  m.def("quantization_noise(Tensor x, Tensor rounded, Tensor scale, str scheme) -> Tensor",
        {at::Tag::nondeterministic_seeded});
}
TORCH_LIBRARY_IMPL(rarefy, CompositeImplicitAutograd, m) {
  m.impl("quantization_noise", TORCH_FN(quantization_noise_json));
}

}  // namespace rarefy::quantization
