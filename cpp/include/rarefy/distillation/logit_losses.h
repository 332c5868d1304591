#pragma once

#include <ATen/core/Tensor.h>
#include <rarefy/export.h>
#include <torch/nn/cloneable.h>
#include <torch/nn/pimpl.h>

#include <cstdint>
#include <optional>
#include <ostream>

// Losses on logits beside DistillationLoss: the terms that learn from the teacher, without the cross-entropy that the papers
// add. Every function is also torch.ops.rarefy.<name>, made of torch's operators. Common to all:
//   student_logits, teacher_logits  one shape [..., classes], float32, float64, bfloat16 or float16; the teacher is a
//                                   constant. Computed in float32 (float64 for a float64 student), also under autocast.
//   labels                          int64 [...], classes in [0, classes); rows with ignore_index add nothing. Where a loss
//                                   needs no classes, labels may be left out, or say only which rows to ignore.
//   mask                            bool [...], true where a row counts.
// Means are over the rows that count; what other rows hold does not matter. Wrong shapes and values throw c10::ValueError (so does a batch
// without a row that counts), wrong dtypes c10::TypeError, labels out of range c10::IndexError; where reading values would wait for a
// GPU or break a graph, no row that counts gives NaN, and labels out of range are torch's error.
namespace rarefy::distillation {

/// Decoupled knowledge distillation (DKD: Zhao et al., 2022, arXiv:2203.08679). With p and q the softmax of the teacher's and the
/// student's logits at temperature T, y the label, and p^, q^ the same over the classes other than y,
///
///   T^2 * (alpha * KL([p_y, 1 - p_y] || [q_y, 1 - q_y]) + beta * KL(p^ || q^))
///
/// T^2 is the factor of the paper's program. With alpha = 1 and beta = 1 - p_y this would be T^2 KL(p || q). Two classes at least. 0
/// where the teacher equals the student.
RAREFY_API at::Tensor dkd_loss(const at::Tensor& student_logits, const at::Tensor& teacher_logits,
                               const at::Tensor& labels, const std::optional<at::Tensor>& mask = std::nullopt,
                               double temperature = 4.0, double alpha = 1.0, double beta = 8.0,
                               int64_t ignore_index = -100);

/// Normalized knowledge distillation (NKD: Yang et al., 2023, arXiv:2303.13005). With p and q at temperature 1, y the label, and p^, q^
/// the softmax at temperature T over the classes other than y,
///
///   -p_y log(q_y) - gamma * T^2 * sum over c of p^_c log(q^_c)
///
/// Two classes at least. A cross-entropy: where the teacher equals the student it is not 0, and its first term still pulls q_y
/// towards 1; the second then has gradient 0.
RAREFY_API at::Tensor nkd_loss(const at::Tensor& student_logits, const at::Tensor& teacher_logits,
                               const at::Tensor& labels, const std::optional<at::Tensor>& mask = std::nullopt,
                               double temperature = 1.0, double gamma = 1.5, int64_t ignore_index = -100);

/// Correlation instead of equality (DIST: Huang et al., 2022, arXiv:2205.10536). With Y = softmax(logits / T) as [rows, classes] and
/// rho Pearson's correlation,
///
///   T^2 * (beta * mean over rows of (1 - rho of the rows) + gamma * mean over classes of (1 - rho of the columns))
///
/// T^2 is the factor of the paper's program. Two classes at least, and two rows unless gamma is 0. 0 where the teacher equals the
/// student, but for rows and columns whose values are all equal: those have no correlation and add 1, with gradient 0.
RAREFY_API at::Tensor dist_loss(const at::Tensor& student_logits, const at::Tensor& teacher_logits,
                                const std::optional<at::Tensor>& labels = std::nullopt,
                                const std::optional<at::Tensor>& mask = std::nullopt, double temperature = 1.0,
                                double beta = 1.0, double gamma = 1.0, int64_t ignore_index = -100);

/// Mean over rows and classes of (s - t)^2 (Ba and Caruana, 2014, arXiv:1312.6184, whose 1/2 ||s - t||^2 is this times classes / 2).
/// Classes that are -inf on both sides add 0. It is the limit of T^2 KL as T grows, but for the mean of the logits. 0 where the
/// teacher equals the student.
RAREFY_API at::Tensor logit_mse_loss(const at::Tensor& student_logits, const at::Tensor& teacher_logits,
                                     const std::optional<at::Tensor>& labels = std::nullopt,
                                     const std::optional<at::Tensor>& mask = std::nullopt, int64_t ignore_index = -100);

/// What DKD computes; see dkd_loss.
struct RAREFY_API DKDOptions {
  double temperature = 4.0;  // T > 0
  double alpha = 1.0;        // weight of the label's class against the rest, >= 0
  double beta = 8.0;         // weight of the rest among itself, >= 0
  int64_t ignore_index = -100;

  /// Throws c10::ValueError for a field out of range.
  void validate() const;
};

/// dkd_loss as a module.
class RAREFY_API DKDImpl : public torch::nn::Cloneable<DKDImpl> {
 public:
  explicit DKDImpl(const DKDOptions& options = {});
  torch::Tensor forward(const torch::Tensor& student_logits, const torch::Tensor& teacher_logits,
                        const torch::Tensor& labels, const torch::Tensor& mask = {});
  void reset() override {}
  void pretty_print(std::ostream& stream) const override;

  DKDOptions options;
};
TORCH_MODULE(DKD);

/// What NKD computes; see nkd_loss.
struct RAREFY_API NKDOptions {
  double temperature = 1.0;  // T > 0, of the classes other than the label's
  double gamma = 1.5;        // their weight, >= 0
  int64_t ignore_index = -100;

  /// Throws c10::ValueError for a field out of range.
  void validate() const;
};

/// nkd_loss as a module.
class RAREFY_API NKDImpl : public torch::nn::Cloneable<NKDImpl> {
 public:
  explicit NKDImpl(const NKDOptions& options = {});
  torch::Tensor forward(const torch::Tensor& student_logits, const torch::Tensor& teacher_logits,
                        const torch::Tensor& labels, const torch::Tensor& mask = {});
  void reset() override {}
  void pretty_print(std::ostream& stream) const override;

  NKDOptions options;
};
TORCH_MODULE(NKD);

/// What DIST computes; see dist_loss.
struct RAREFY_API DISTOptions {
  double temperature = 1.0;  // T > 0
  double beta = 1.0;         // weight of the rows' correlation, >= 0
  double gamma = 1.0;        // weight of the columns', >= 0
  int64_t ignore_index = -100;

  /// Throws c10::ValueError for a field out of range.
  void validate() const;
};

/// dist_loss as a module.
class RAREFY_API DISTImpl : public torch::nn::Cloneable<DISTImpl> {
 public:
  explicit DISTImpl(const DISTOptions& options = {});
  torch::Tensor forward(const torch::Tensor& student_logits, const torch::Tensor& teacher_logits,
                        const torch::Tensor& labels = {}, const torch::Tensor& mask = {});
  void reset() override {}
  void pretty_print(std::ostream& stream) const override;

  DISTOptions options;
};
TORCH_MODULE(DIST);

/// What LogitMSE computes; see logit_mse_loss.
struct RAREFY_API LogitMSEOptions {
  int64_t ignore_index = -100;
};

/// logit_mse_loss as a module.
class RAREFY_API LogitMSEImpl : public torch::nn::Cloneable<LogitMSEImpl> {
 public:
  explicit LogitMSEImpl(const LogitMSEOptions& options = {});
  torch::Tensor forward(const torch::Tensor& student_logits, const torch::Tensor& teacher_logits,
                        const torch::Tensor& labels = {}, const torch::Tensor& mask = {});
  void reset() override {}
  void pretty_print(std::ostream& stream) const override;

  LogitMSEOptions options;
};
TORCH_MODULE(LogitMSE);

}  // namespace rarefy::distillation
