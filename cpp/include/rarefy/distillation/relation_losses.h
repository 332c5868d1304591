#pragma once

#include <ATen/core/Tensor.h>
#include <rarefy/export.h>
#include <torch/nn/cloneable.h>
#include <torch/nn/pimpl.h>

#include <optional>
#include <ostream>

// Losses on how the samples of a batch stand to one another, which need no adapter: student and teacher may differ in
// everything but the batch size B. Every function is also torch.ops.rarefy.<name>; types, masks and errors as in
// feature_losses.h.
//   student, teacher  [B, ...], each sample flattened to a vector; B >= 2 (3 for angles)
//   mask              bool [B, N] for features [B, N, ...]: what is masked becomes 0 on both sides
// Each is 0 where the teacher equals the student.
namespace rarefy::distillation {

/// Similarity-preserving (Tung and Mori, 2019, arXiv:1907.09682): with the rows of G = A A^T divided by their 2-norms,
///
///   1 / B^2 * ||G_t - G_s||_F^2
///
/// Does not change when either side is multiplied by a number or rotated.
RAREFY_API at::Tensor similarity_preserving_loss(const at::Tensor& student, const at::Tensor& teacher,
                                                 const std::optional<at::Tensor>& mask = std::nullopt);

/// Distance-wise relations (RKD: Park et al., 2019, arXiv:1904.05068): with psi(i, j) = ||x_i - x_j||_2 / mu, mu the mean of
/// these distances over pairs of distinct samples,
///
///   mean over pairs of huber(psi_t(i, j), psi_s(i, j))                      (the paper sums over pairs)
///
/// Does not change when either side is moved, rotated or multiplied by a positive number.
RAREFY_API at::Tensor relational_distance_loss(const at::Tensor& student, const at::Tensor& teacher,
                                               const std::optional<at::Tensor>& mask = std::nullopt);

/// Angle-wise relations (RKD: Park et al., 2019, arXiv:1904.05068): with psi(i, j, k) the cosine of the angle at x_j between
/// x_i and x_k (0 where two of them coincide),
///
///   mean over triples of distinct samples of huber(psi_t(i, j, k), psi_s(i, j, k))   (the paper sums over triples)
///
/// Does not change when either side is moved, rotated or multiplied by a number. Takes memory for B^3 values.
RAREFY_API at::Tensor relational_angle_loss(const at::Tensor& student, const at::Tensor& teacher,
                                            const std::optional<at::Tensor>& mask = std::nullopt);

/// Probabilistic knowledge transfer (PKT: Passalis and Tefas, 2018, arXiv:1803.10837): with K(a, b) = (cos(a, b) + 1) / 2, not
/// below 1e-7, and the probability of a neighbour p(j | i) = K(x_i, x_j) / sum over k != i of K(x_i, x_k),
///
///   mean over i of sum over j != i of p_t(j | i) log(p_t(j | i) / p_s(j | i))     (the paper sums over i)
///
/// Does not change when a sample of either side is multiplied by a positive number, or all are rotated.
RAREFY_API at::Tensor probabilistic_transfer_loss(const at::Tensor& student, const at::Tensor& teacher,
                                                  const std::optional<at::Tensor>& mask = std::nullopt);

/// similarity_preserving_loss as a module.
class RAREFY_API SimilarityPreservingImpl : public torch::nn::Cloneable<SimilarityPreservingImpl> {
 public:
  torch::Tensor forward(const torch::Tensor& student, const torch::Tensor& teacher, const torch::Tensor& mask = {});
  void reset() override {}
  void pretty_print(std::ostream& stream) const override;
};
TORCH_MODULE(SimilarityPreserving);

/// relational_distance_loss as a module.
class RAREFY_API RelationalDistanceImpl : public torch::nn::Cloneable<RelationalDistanceImpl> {
 public:
  torch::Tensor forward(const torch::Tensor& student, const torch::Tensor& teacher, const torch::Tensor& mask = {});
  void reset() override {}
  void pretty_print(std::ostream& stream) const override;
};
TORCH_MODULE(RelationalDistance);

/// relational_angle_loss as a module.
class RAREFY_API RelationalAngleImpl : public torch::nn::Cloneable<RelationalAngleImpl> {
 public:
  torch::Tensor forward(const torch::Tensor& student, const torch::Tensor& teacher, const torch::Tensor& mask = {});
  void reset() override {}
  void pretty_print(std::ostream& stream) const override;
};
TORCH_MODULE(RelationalAngle);

/// probabilistic_transfer_loss as a module.
class RAREFY_API ProbabilisticKnowledgeTransferImpl : public torch::nn::Cloneable<ProbabilisticKnowledgeTransferImpl> {
 public:
  torch::Tensor forward(const torch::Tensor& student, const torch::Tensor& teacher, const torch::Tensor& mask = {});
  void reset() override {}
  void pretty_print(std::ostream& stream) const override;
};
TORCH_MODULE(ProbabilisticKnowledgeTransfer);

}  // namespace rarefy::distillation
