#pragma once

#include <rarefy/export.h>
#include <rarefy/ops/nf4_pack.h>
#include <torch/nn/cloneable.h>
#include <torch/nn/modules/linear.h>
#include <torch/nn/pimpl.h>

#include <cstdint>
#include <optional>
#include <string>

namespace rarefy::nn {

/// How the weight that the adapters adapt is kept.
enum class LoRABase {
  floating,  ///< as it is
  int8,      ///< 8 bits, symmetric, a scale for each output channel
  nf4,       ///< 4-bit NormalFloat in blocks of 64 with double quantization, as QLoRA keeps it
};

struct LoRAOptions {
  int64_t rank = 8;
  /// What the adapters' product is multiplied with is alpha / rank; unset: alpha = rank.
  std::optional<double> alpha = std::nullopt;
  /// Of the adapters' input, while training.
  double dropout = 0;
  LoRABase base = LoRABase::floating;
};

/// A linear layer whose weight is frozen, and adapters that train (Hu et al., 2021, arXiv:2106.09685):
///
///   y = x W^T + bias + dropout(x) A^T B^T * (alpha / rank)
///
/// Parameters lora_a [rank, in], from the distribution of torch's linear layers, and lora_b [out, rank], zeros, so that the
/// layer begins as the one it was made of; weight and bias without a gradient, of a floating base. Buffers of a base in int8:
/// weight (int8 [out, in]) and weight_scale (float32 [out]); in nf4: those of ops::PackedNf4 behind "weight_".
class RAREFY_API LoRALinearImpl : public torch::nn::Cloneable<LoRALinearImpl> {
 public:
  /// Over the weight and bias of `linear`, which are not copied for a floating base.
  /// Throws c10::ValueError for a rank that is not within [1, min(in, out)], a dropout outside of [0, 1), a weight that is not
  /// finite.
  LoRALinearImpl(const torch::nn::LinearImpl& linear, const LoRAOptions& options);

  void reset() override;
  void pretty_print(std::ostream& stream) const override;
  torch::Tensor forward(const torch::Tensor& x);

  /// The frozen weight as numbers, float32 or of its own type.
  torch::Tensor base_weight() const;
  /// B A * (alpha / rank): what the adapters add to the weight.
  torch::Tensor delta() const;
  /// Computes with one product of base_weight() + delta() from here on; the adapters must not change meanwhile. The state is
  /// that of the base and the adapters still.
  void merge();
  /// Back to the base and the adapters, which merge() has not touched: exactly as before.
  void unmerge() { merged_ = torch::Tensor(); }
  bool is_merged() const { return merged_.defined(); }
  /// A plain linear layer with base_weight() + delta().
  torch::nn::Linear merged() const;

  LoRAOptions options;
  int64_t in_features, out_features;
  torch::Tensor weight, weight_scale, bias, lora_a, lora_b;
  ops::PackedNf4 packed;

 private:
  double scaling() const {
    return options.alpha.value_or(static_cast<double>(options.rank)) / static_cast<double>(options.rank);
  }

  bool has_bias_;
  torch::Tensor merged_;
};
TORCH_MODULE(LoRALinear);

}  // namespace rarefy::nn
