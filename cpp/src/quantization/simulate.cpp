#include <ATen/ops/zeros_like.h>
#include <rarefy/ops/fake_quantize.h>
#include <rarefy/ops/formats.h>
#include <rarefy/ops/weight_formats.h>
#include <rarefy/quantization/simulate.h>
#include <torch/library.h>

#include <map>
#include <mutex>
#include <string>

#include "quantization/scheme_cache.h"

namespace rarefy::quantization {
namespace {

std::vector<c10::SymInt> block_of(const Scheme& scheme) {
  std::vector<c10::SymInt> block;
  for (const auto size : scheme.block()) {
    block.emplace_back(size);
  }
  return block;
}

struct Simulation {
  const at::Tensor &x, &scale, &zero_point;
  const Scheme& scheme;
  const std::optional<at::Tensor>& seed;

  bool clipped() const { return scheme.straight_through == StraightThrough::clipped && !scheme.dynamic; }

  at::Tensor operator()(const Integer&) const {
    const auto axis = scheme.block_axis();
    const auto block = block_of(scheme);
    if (!scheme.dynamic) {
      return ops::fake_quantize_group(x, scale, zero_point, axis, block, scheme.qmin(), scheme.qmax(), clipped(), seed);
    }
    if (!seed.has_value()) {
      return ops::fake_quantize_dynamic(x, axis, block, scheme.qmin(), scheme.qmax(), scheme.symmetric,
                                        scheme.power_of_two);
    }
    const auto [s, z] = scheme_qparams(x, scheme);
    return ops::fake_quantize_group(x, s, z, axis, block, scheme.qmin(), scheme.qmax(), false, seed);
  }
  at::Tensor operator()(const Minifloat& f) const {
    const auto axis = scheme.block_axis();
    const auto block = block_of(scheme);
    const auto specials = str(f.specials);
    if (scheme.dynamic && !seed.has_value()) {
      return ops::cast_minifloat_dynamic(x, axis, block, f.exponent_bits, f.mantissa_bits, f.bias, specials,
                                         scheme.power_of_two);
    }
    const auto s = scheme.dynamic ? std::get<0>(scheme_qparams(x, scheme)) : scale;
    return ops::cast_minifloat(x, s, axis, block, f.exponent_bits, f.mantissa_bits, f.bias, specials, f.saturate,
                               clipped(), seed);
  }
  at::Tensor operator()(const MX& f) const {
    const auto& group = std::get<PerGroup>(scheme.granularity);
    return ops::fake_quantize_mx(x, str(f.element), group.size, group.axis);
  }
  at::Tensor operator()(const NVFP4&) const {
    const auto& group = std::get<PerGroup>(scheme.granularity);
    return ops::fake_quantize_nvfp4(x, std::nullopt, group.size, group.axis);
  }
  at::Tensor operator()(const NF4& f) const {
    const auto& group = std::get<PerGroup>(scheme.granularity);
    return ops::fake_quantize_nf4(x, group.size, f.double_quantized ? f.scale_block : 0, group.axis);
  }
  at::Tensor operator()(const Binary&) const {
    return ops::fake_quantize_binary(x, scheme.block_axis(), block_of(scheme),
                                     scheme.straight_through == StraightThrough::clipped);
  }
  at::Tensor operator()(const Ternary& f) const {
    return ops::fake_quantize_ternary(x, f.threshold, scheme.block_axis(), block_of(scheme));
  }
  at::Tensor operator()(const Codebook&) const {
    return ops::fake_quantize_codebook(x, scale, scheme.block_axis(), block_of(scheme));
  }
};

at::Tensor simulate_json(const at::Tensor& x, const at::Tensor& scale, const at::Tensor& zero_point, std::string scheme,
                         const std::optional<at::Tensor>& seed) {
  return simulate(x, scale, zero_point, scheme_of_json(scheme), seed);
}

std::tuple<at::Tensor, at::Tensor> scheme_qparams_json(const at::Tensor& x, std::string scheme) {
  return scheme_qparams(x, scheme_of_json(scheme));
}

}  // namespace

const Scheme& scheme_of_json(const std::string& json) {
  static std::mutex mutex;
  static std::map<std::string, Scheme> known;
  const std::lock_guard lock(mutex);
  const auto found = known.find(json);
  return found != known.end() ? found->second : known.emplace(json, Scheme::from_json(json)).first->second;
}

at::Tensor simulate(const at::Tensor& x, const at::Tensor& scale, const at::Tensor& zero_point, const Scheme& scheme,
                    const std::optional<at::Tensor>& seed) {
  const auto random = scheme.rounding == Rounding::stochastic ? seed : std::nullopt;
  TORCH_CHECK_VALUE(scheme.rounding != Rounding::stochastic || seed.has_value(),
                    "[simulate] stochastic rounding needs a seed, got none");
  if (scheme.is_plain()) {
    return ops::fake_quantize(x, scale, zero_point, scheme.axis(), scheme.qmin(), scheme.qmax());
  }
  return std::visit(Simulation{x, scale, zero_point, scheme, random}, scheme.format);
}

std::tuple<at::Tensor, at::Tensor> scheme_qparams(const at::Tensor& x, const Scheme& scheme) {
  const auto axis = scheme.block_axis();
  const auto block = block_of(scheme);
  if (scheme.is_integer()) {
    return ops::group_qparams(x, axis, block, scheme.qmin(), scheme.qmax(), scheme.symmetric, scheme.power_of_two);
  }
  const auto with_zeros = [](const at::Tensor& scale) {
    return std::tuple(scale, at::zeros_like(scale, scale.options().dtype(at::kInt)));
  };
  if (const auto* f = std::get_if<Minifloat>(&scheme.format)) {
    return with_zeros(ops::minifloat_scale(x, axis, block, f->exponent_bits, f->mantissa_bits, f->bias,
                                           str(f->specials), scheme.power_of_two));
  }
  const auto* group = std::get_if<PerGroup>(&scheme.granularity);
  if (const auto* f = std::get_if<MX>(&scheme.format)) {
    return with_zeros(ops::mx_scale(x, str(f->element), group->size, group->axis));
  }
  if (std::holds_alternative<NVFP4>(scheme.format)) {
    return with_zeros(ops::nvfp4_scale(x, ops::nvfp4_tensor_scale(x), group->size, group->axis));
  }
  const auto* nf4 = std::get_if<NF4>(&scheme.format);
  TORCH_CHECK_VALUE(nf4 != nullptr, "[scheme_qparams] the scheme must have scales beside its values, got ",
                    scheme.str());
  return with_zeros(ops::nf4_scale(x, group->size, nf4->double_quantized ? nf4->scale_block : 0, group->axis));
}

TORCH_LIBRARY_FRAGMENT(rarefy, m) {
  m.def("simulate(Tensor x, Tensor scale, Tensor zero_point, str scheme, Tensor? seed=None) -> Tensor");
  m.def("scheme_qparams(Tensor x, str scheme) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(rarefy, CompositeImplicitAutograd, m) {
  m.impl("simulate", &simulate_json);
  m.impl("scheme_qparams", &scheme_qparams_json);
}

}  // namespace rarefy::quantization
