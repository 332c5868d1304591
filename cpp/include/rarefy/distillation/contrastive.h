#pragma once

#include <ATen/core/Tensor.h>
#include <rarefy/export.h>
#include <torch/nn/cloneable.h>
#include <torch/nn/modules/linear.h>
#include <torch/nn/pimpl.h>

#include <cstdint>
#include <optional>
#include <ostream>
#include <string>
#include <tuple>

// Contrastive representation distillation (CRD: Tian et al., 2020, arXiv:1910.10699) with a memory of all samples. Every
// function is also torch.ops.rarefy.<name>.
namespace rarefy::distillation {

/// Noise-contrastive estimation of one side against the other's memory. With M samples in the memory, N negatives and
/// z = <anchor, memory[j]> / temperature - log(N / M) - log_normalizer, so that h = sigmoid(z) is the paper's critic
/// e^<.>/T / (e^<.>/T + N / M) where log_normalizer is 0,
///
///   mean over the batch of ( -log h(positive) - sum over negatives of log(1 - h(negative)) )
///
///   anchor          [B, D] of floating point, computed in float32 (float64 for float64); of unit length in the paper
///   memory          [M, D], a constant             index      int64 [B], each anchor's own place in the memory
///   negatives       int64 [B, N]                   temperature  > 0
///   log_normalizer  scalar; none: 0; not finite: log(M * mean of e^<.>/T over this batch's positives and negatives)
///
/// Returns (loss, log_normalizer as it was used). Always positive: where both models agree h tends to 1 and 0, and the loss to
/// 0 only as similarities grow. Throws c10::ValueError for wrong shapes, c10::TypeError for wrong dtypes, c10::IndexError for
/// a place outside of the memory (where reading it waits for no GPU).
RAREFY_API std::tuple<at::Tensor, at::Tensor> contrastive_loss(
    const at::Tensor& anchor, const at::Tensor& memory, const at::Tensor& index, const at::Tensor& negatives,
    double temperature, const std::optional<at::Tensor>& log_normalizer = std::nullopt);

/// `count` places [B, count] in [0, size), none of them a row's own `index`, drawn by a hash of (seed, step, row, column): the
/// same on every device and in both languages. step: int64 scalar tensor. 2 <= size < 2^31.
RAREFY_API at::Tensor contrastive_negatives(const at::Tensor& index, const at::Tensor& step, int64_t count,
                                            int64_t size, int64_t seed);

/// memory[index] = normalize(momentum * memory[index] + (1 - momentum) * values), in place. Of a place that is named twice
/// one value is kept.
RAREFY_API void update_memory_(at::Tensor& memory, const at::Tensor& index, const at::Tensor& values, double momentum);

/// x [B, ...] flattened, weight [D, features] and bias [D] to embeddings [B, D] of unit length. Computed in float32 (float64 for
/// a float64 weight).
RAREFY_API at::Tensor embed_features(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias);

/// A memory [size, features] before any batch: rows of unit length from a hash of seed and stream.
RAREFY_API at::Tensor initial_memory(int64_t size, int64_t features, int64_t seed, int64_t stream);

/// What ContrastiveRepresentation computes.
struct RAREFY_API ContrastiveRepresentationOptions {
  int64_t dataset_size = 0;      // M >= 2: samples have places 0 to M - 1
  int64_t student_features = 0;  // >= 1
  int64_t teacher_features = 0;  // >= 1
  int64_t features = 128;        // D >= 1, of the common space
  int64_t negatives = 16384;     // N >= 1
  double temperature = 0.07;     // > 0
  double momentum = 0.5;         // of the memories, in [0, 1)
  // "code": log_normalizer is estimated at the first batch, as in the authors' program. "paper": it is 0; negatives at a right
  // angle then cost log(1 + M / N) each, which for many of them outweighs the positive.
  std::string variant = "code";
  int64_t seed = 0;  // of the negatives and the first memories

  /// Throws c10::ValueError for a field out of range.
  void validate() const;
};

/// CRD as a module: both sides are embedded linearly into D features of unit length; the sum of contrastive_loss of the
/// student's embeddings against the memory of the teacher's and of the teacher's against the student's. While training, the
/// memories then take up the batch.
///
/// State: student_embedding.{weight, bias}, teacher_embedding.{weight, bias}; buffers student_memory and teacher_memory [M, D],
/// log_normalizers [2] (inf until estimated; 0 for "paper"), step (int64, how many batches were taken up). The memories take
/// 2 M D floats, and each step copies them.
class RAREFY_API ContrastiveRepresentationImpl : public torch::nn::Cloneable<ContrastiveRepresentationImpl> {
 public:
  explicit ContrastiveRepresentationImpl(const ContrastiveRepresentationOptions& options);
  /// student [B, student_features...], teacher [B, teacher_features...], both flattened; index int64 [B], places of distinct
  /// samples. The teacher's features are a constant; its embedding is trained too.
  torch::Tensor forward(const torch::Tensor& student, const torch::Tensor& teacher, const torch::Tensor& index);
  void reset() override;
  void pretty_print(std::ostream& stream) const override;

  ContrastiveRepresentationOptions options;
  torch::nn::Linear student_embedding{nullptr}, teacher_embedding{nullptr};
  torch::Tensor student_memory, teacher_memory, log_normalizers, step;
};
TORCH_MODULE(ContrastiveRepresentation);

}  // namespace rarefy::distillation
