#pragma once

#include <ATen/core/Tensor.h>
#include <rarefy/distillation/feature_losses.h>
#include <rarefy/export.h>
#include <torch/nn/cloneable.h>
#include <torch/nn/pimpl.h>

#include <cstdint>
#include <optional>
#include <ostream>

// Losses for pairs of towers (CLIP). Every function is also torch.ops.rarefy.<name>; types and errors as in
// feature_losses.h. Each is 0 where the teacher equals the student.
namespace rarefy::distillation {

/// The divergence of contrastive distributions across modalities (CLIP-KD: Yang et al., 2024, arXiv:2307.12732): from logits
/// [images, texts] (similarities times the model's scale), with p the teacher's and q the student's softmax at temperature T,
///
///   T^2 * (mean over images of KL(p(. | image) || q(. | image)) + mean over texts of KL(p(. | text) || q(. | text)))
///
/// Both sides of one shape. The paper has T = 1.
RAREFY_API at::Tensor contrastive_kl_loss(const at::Tensor& student_logits, const at::Tensor& teacher_logits,
                                          double temperature = 1.0);

/// Affinity mimicking (TinyCLIP: Wu et al., 2023, arXiv:2309.12314): with the affinity of image i and text j
/// A_ij = scale * <image_i, text_j> / (||image_i|| ||text_j||), contrastive_kl_loss of both models' affinities. The paper's
/// cross-entropy is this plus the entropy of the teacher's distributions, a constant: the gradients are the same.
///
/// Embeddings [batch, width], the teacher's of another width if need be; scales are scalar tensors, 1 over the temperature
/// of each model. Differentiable in the student's scale too.
RAREFY_API at::Tensor affinity_mimicking_loss(const at::Tensor& student_image, const at::Tensor& student_text,
                                              const at::Tensor& teacher_image, const at::Tensor& teacher_text,
                                              const at::Tensor& student_scale, const at::Tensor& teacher_scale);

/// Mean over the batch of ||s - t||_2^2, of embeddings [batch, width] that are first divided by their norms if `normalize`
/// (feature distillation of CLIP-KD, arXiv:2307.12732). A mean over elements is this divided by the width.
RAREFY_API at::Tensor embedding_mse_loss(const at::Tensor& student, const at::Tensor& teacher, bool normalize = true);

/// What ContrastiveKL computes; see contrastive_kl_loss.
struct RAREFY_API ContrastiveKLOptions {
  double temperature = 1.0;  // T > 0, on top of what the logits hold

  /// Throws c10::ValueError for a field out of range.
  void validate() const;
};

/// contrastive_kl_loss as a module: of logits per image [images, texts].
class RAREFY_API ContrastiveKLImpl : public torch::nn::Cloneable<ContrastiveKLImpl> {
 public:
  explicit ContrastiveKLImpl(const ContrastiveKLOptions& options = {});
  torch::Tensor forward(const torch::Tensor& student_logits, const torch::Tensor& teacher_logits);
  void reset() override {}
  void pretty_print(std::ostream& stream) const override;

  ContrastiveKLOptions options;
};
TORCH_MODULE(ContrastiveKL);

/// The embeddings of a batch of pairs.
struct RAREFY_API ImageText {
  torch::Tensor image, text;
};

/// What AffinityMimicking computes; see affinity_mimicking_loss.
struct RAREFY_API AffinityMimickingOptions {
  double student_scale = 1.0 / 0.07;  // > 0, where the call gives none
  double teacher_scale = 1.0 / 0.07;

  /// Throws c10::ValueError for a field out of range.
  void validate() const;
};

/// affinity_mimicking_loss as a module.
class RAREFY_API AffinityMimickingImpl : public torch::nn::Cloneable<AffinityMimickingImpl> {
 public:
  explicit AffinityMimickingImpl(const AffinityMimickingOptions& options = {});
  /// Scalar scales, such as exp(logit_scale) of either model, take the place of the options'.
  torch::Tensor forward(const ImageText& student, const ImageText& teacher, const torch::Tensor& student_scale = {},
                        const torch::Tensor& teacher_scale = {});
  void reset() override {}
  void pretty_print(std::ostream& stream) const override;

  AffinityMimickingOptions options;
};
TORCH_MODULE(AffinityMimicking);

/// What EmbeddingMSE computes; see embedding_mse_loss.
struct RAREFY_API EmbeddingMSEOptions {
  bool normalize = true;
  std::optional<int64_t> student_features;  // both set: a learned adapter between them
  std::optional<int64_t> teacher_features;

  /// Throws c10::ValueError for a field out of range.
  void validate() const;
};

/// embedding_mse_loss, behind a learned adapter where sizes are given (state: adapter.weight, adapter.bias).
class RAREFY_API EmbeddingMSEImpl : public torch::nn::Cloneable<EmbeddingMSEImpl> {
 public:
  explicit EmbeddingMSEImpl(const EmbeddingMSEOptions& options = {});
  torch::Tensor forward(const torch::Tensor& student, const torch::Tensor& teacher);
  void reset() override;
  void pretty_print(std::ostream& stream) const override;

  EmbeddingMSEOptions options;
  FeatureAdapter adapter{nullptr};
};
TORCH_MODULE(EmbeddingMSE);

}  // namespace rarefy::distillation
