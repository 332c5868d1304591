#pragma once

#include <ATen/core/Tensor.h>
#include <rarefy/export.h>
#include <torch/nn/cloneable.h>
#include <torch/nn/pimpl.h>

#include <array>
#include <cstdint>
#include <optional>
#include <ostream>
#include <string>
#include <string_view>

// Losses on what attention does. Every function is also torch.ops.rarefy.<name>; types and errors as in feature_losses.h.
// mask: bool [B, N], true where a token is not padding. Padding is neither attended to nor counted.
namespace rarefy::distillation {

/// Self-attention relations (MiniLMv2: Wang et al., 2021, arXiv:2012.15828) of one of query, key and value: with x [B, N, D]
/// split into `relation_heads` parts x_a of width d = D / relation_heads,
///
///   R_a = softmax(x_a x_a^T / sqrt(d)),       mean over batch, heads and tokens of KL(R_a of the teacher || of the student)
///
/// student [B, N, D_s], teacher [B, N, D_t], both widths multiples of relation_heads; the models' own numbers of heads do
/// not matter. 0 where the teacher equals the student.
RAREFY_API at::Tensor attention_relation_loss(const at::Tensor& student, const at::Tensor& teacher,
                                              const std::optional<at::Tensor>& mask, int64_t relation_heads);

/// The distance of attention maps [B, heads, N, N] of equal shape:
///
///   "mse"  mean over batch, heads and pairs of tokens of (s - t)^2 (TinyBERT: Jiao et al., 2020, arXiv:1909.10351, which takes
///          the scores before softmax)
///   "kl"   mean over batch, heads and tokens of KL(teacher's row || student's row) (MiniLM: Wang et al., 2020,
///          arXiv:2002.10957)
///
/// With `scores` the maps are from before softmax, which "kl" then applies; else they are probabilities, of which "kl" takes
/// logarithms not below log(1e-12). "mse" treats both alike; -inf on both sides, as of causal scores, is no
/// difference. 0 where the teacher equals the student.
RAREFY_API at::Tensor attention_map_loss(const at::Tensor& student, const at::Tensor& teacher,
                                         const std::optional<at::Tensor>& mask = std::nullopt,
                                         std::string_view loss = "mse", bool scores = false);

/// What MiniLMRelations computes; see attention_relation_loss.
struct RAREFY_API MiniLMRelationsOptions {
  int64_t relation_heads = 12;                // >= 1, a divisor of both widths
  std::array<double, 3> weights = {1, 1, 1};  // of query, key and value, >= 0, not all 0

  /// Throws c10::ValueError for a field out of range.
  void validate() const;
};

/// Query, key and value of one attention layer.
struct RAREFY_API QueryKeyValue {
  torch::Tensor query, key, value;
};

/// The sum of attention_relation_loss over query, key and value, each with its weight (MiniLMv2).
class RAREFY_API MiniLMRelationsImpl : public torch::nn::Cloneable<MiniLMRelationsImpl> {
 public:
  explicit MiniLMRelationsImpl(const MiniLMRelationsOptions& options = {});
  torch::Tensor forward(const QueryKeyValue& student, const QueryKeyValue& teacher, const torch::Tensor& mask = {});
  void reset() override {}
  void pretty_print(std::ostream& stream) const override;

  MiniLMRelationsOptions options;
};
TORCH_MODULE(MiniLMRelations);

/// What AttentionMaps computes; see attention_map_loss.
struct RAREFY_API AttentionMapsOptions {
  std::string loss = "mse";  // "mse", "kl"
  bool scores = false;       // before softmax

  /// Throws c10::ValueError for a field out of range.
  void validate() const;
};

/// attention_map_loss as a module.
class RAREFY_API AttentionMapsImpl : public torch::nn::Cloneable<AttentionMapsImpl> {
 public:
  explicit AttentionMapsImpl(const AttentionMapsOptions& options = {});
  torch::Tensor forward(const torch::Tensor& student, const torch::Tensor& teacher, const torch::Tensor& mask = {});
  void reset() override {}
  void pretty_print(std::ostream& stream) const override;

  AttentionMapsOptions options;
};
TORCH_MODULE(AttentionMaps);

}  // namespace rarefy::distillation
