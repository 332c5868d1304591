// What a fake quantizer does for schemes that are no plain grid of integers.
#include <rarefy/ops/fake_quantize.h>
#include <rarefy/ops/formats.h>
#include <rarefy/ops/weight_formats.h>
#include <rarefy/quantization/fake_quantizer.h>
#include <rarefy/quantization/format_search.h>
#include <rarefy/quantization/simulate.h>
#include <torch/types.h>

namespace rarefy::quantization {
namespace {

std::vector<c10::SymInt> block_of(const Scheme& scheme) {
  const auto sizes = scheme.block();
  return {sizes.begin(), sizes.end()};
}

}  // namespace

void FakeQuantizerImpl::register_format_buffers() {
  const auto& scheme = options.scheme;
  if (const auto* format = std::get_if<Codebook>(&scheme.format)) {
    auto sizes = std::vector<int64_t>{};
    if (scheme.block_axis().has_value()) {
      sizes = scale.sizes().vec();
    }
    sizes.push_back(format->entries);
    codebook = register_buffer("codebook", torch::zeros(sizes));
  }
  if (scheme.rounding == Rounding::stochastic) {
    draws = register_buffer("draws", torch::tensor({scheme.seed, int64_t{0}}, torch::kInt64));
  }
}

void FakeQuantizerImpl::observe_weight_format(const torch::Tensor& x) {
  const torch::NoGradGuard no_grad;
  const auto& scheme = options.scheme;
  const auto seen = x.detach();
  if (!follows_a_range(options.observer) && was_searched(x)) {
    return;
  }
  if (seen.is_cpu() && !torch::isfinite(seen).all().item<bool>()) {
    skipped.fill_(1);
    tell_skipped(seen);
  }
  if (scheme.dynamic) {
    return;
  }
  if (codebook.defined()) {
    if (!calibrated()) {
      codebook.copy_(ops::kmeans_codebook(seen, codebook.size(-1), scheme.block_axis(), block_of(scheme)));
    }
  } else if (!follows_a_range(options.observer)) {
    search_format(x);
    return;
  } else {
    const auto [s, z] = scheme_qparams(seen, scheme);
    scale.copy_(s);
    zero_point.copy_(z);
  }
  const auto [low, high] = ops::block_range(seen, scheme.block_axis(), block_of(scheme));
  min_val.copy_(low);
  max_val.copy_(high);
}

void FakeQuantizerImpl::search_format(const torch::Tensor& x) {
  const auto found = search_scheme(x.detach(), options.scheme, options.observer,
                                   importance.defined() ? std::optional(importance) : std::nullopt);
  scale.copy_(found.scale);
  zero_point.copy_(found.zero_point);
  min_val.copy_(found.low);
  max_val.copy_(found.high);
  note_searched(x);
}

/// The scale of a range that an observer of integers has just taken in.
void FakeQuantizerImpl::derive_format_scale() const {
  const torch::NoGradGuard no_grad;
  if (!(min_val <= max_val).all().item<bool>()) {
    return;
  }
  // Of ends [2, channels], or [2, 1] for the tensor.
  auto of_ends = options.scheme;
  of_ends.granularity = of_ends.axis().has_value() ? Granularity(PerChannel{1}) : Granularity(PerTensor{});
  const auto [s, z] = scheme_qparams(torch::stack({min_val, max_val}), of_ends);
  scale.copy_(s);
  zero_point.copy_(z);
}

torch::Tensor FakeQuantizerImpl::forward_format(const torch::Tensor& x) {
  const auto& scheme = options.scheme;
  if (observes_now() && !is_recomputing() && x.numel() > 0) {
    if (is_weight()) {
      observe_weight_format(x);
    } else if (!scheme.dynamic) {
      const torch::NoGradGuard no_grad;
      if (all_reduce_max) {
        observe_over_processes(x);
      } else {
        observe_alone(x, scheme.axis());
      }
      if (!statistics) {  // their range is chosen later
        derive_format_scale();
      }
      tell_skipped(x);
    }
  }
  if (!quantize) {
    return x;
  }
  require_calibrated();
  std::optional<torch::Tensor> seed;
  if (draws.defined()) {
    seed = draws.clone();
    if (is_training()) {
      const torch::NoGradGuard no_grad;
      draws.slice(0, 1, 2).add_(1);
    }
  }
  return simulate(x, codebook.defined() ? codebook : scale, zero_point, scheme, seed);
}

}  // namespace rarefy::quantization
