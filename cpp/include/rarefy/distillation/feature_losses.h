#pragma once

#include <ATen/core/Tensor.h>
#include <rarefy/export.h>
#include <torch/nn/cloneable.h>
#include <torch/nn/pimpl.h>

#include <cstdint>
#include <optional>
#include <ostream>
#include <string>
#include <string_view>

// Losses between one layer of the student and one of the teacher, position by position. Every function is also
// torch.ops.rarefy.<name>, made of torch's operators, so that autograd, torch.compile and torch.export follow it. Common to
// these and to relation_losses.h, transformer_losses.h and clip_losses.h:
//   student, teacher  float32, float64, bfloat16 or float16, on one device. Computed in float32 (float64 for a float64
//                     student), also under autocast; the loss is a scalar of that type. The teacher is a constant.
//   mask              bool, true where a position counts; what is masked may hold anything.
// A wrong shape or value throws c10::ValueError (so do an empty batch and a mask without a true element; where reading the
// mask would wait for a GPU or break a graph, the loss is NaN instead), a wrong dtype c10::TypeError.
// A vector of zeros has no direction: it is 0 after normalization and its gradient is 0.
namespace rarefy::distillation {

/// The distance of the student's features from the teacher's (FitNets: Romero et al., 2015, arXiv:1412.6550):
///
///   "mse"        mean of (s - t)^2 over positions and features
///   "smooth_l1"  mean of d^2 / 2 where |d| = |s - t| < 1, of |d| - 1/2 elsewhere
///   "cosine"     mean of 1 - <s, t> / (||s|| ||t||) over positions (DistilBERT: Sanh et al., 2019, arXiv:1910.01108)
///
/// student, teacher: one shape [batch, ...], features at `axis` (1 for four dimensions, else the last). mask: the shape
/// without the features. The paper's "1/2 ||.||^2" is "mse" times half the number of features.
RAREFY_API at::Tensor hint_loss(const at::Tensor& student, const at::Tensor& teacher,
                                const std::optional<at::Tensor>& mask = std::nullopt, std::string_view loss = "mse",
                                std::optional<int64_t> axis = std::nullopt);

/// The distance of attention maps (Zagoruyko and Komodakis, 2017, arXiv:1612.03928). With the map of a sample
/// Q = vec(sum over features of |x|^power) over positions, and q = Q / ||Q||_2:
///
///   "paper"  mean over the batch of ||q_s - q_t||_2           (the paper's sum over layers and factor beta / 2 are weights)
///   "code"   mean over batch and positions of (q_s - q_t)^2   (as the authors' program computes it, with power 2)
///
/// student, teacher: [batch, ...] with equal positions; the number of features (at `axis`, as in hint_loss) may differ.
/// mask: [batch, positions...]. Does not change when either side is multiplied by a number.
RAREFY_API at::Tensor attention_transfer_loss(const at::Tensor& student, const at::Tensor& teacher,
                                              const std::optional<at::Tensor>& mask = std::nullopt,
                                              std::string_view variant = "paper", double power = 2.0,
                                              std::optional<int64_t> axis = std::nullopt);

/// x with 0 where the mask (x's shape without the features' axis) is false.
RAREFY_API at::Tensor clear_masked(const at::Tensor& x, const at::Tensor& mask,
                                   std::optional<int64_t> axis = std::nullopt);

/// x with weight [out, in] (and bias [out]) applied along the features' axis: a linear layer on [..., in], a 1x1 convolution
/// on [batch, in, height, width]. In the weight's dtype, or autocast's.
RAREFY_API at::Tensor adapt_features(const at::Tensor& x, const at::Tensor& weight,
                                     const std::optional<at::Tensor>& bias = std::nullopt,
                                     std::optional<int64_t> axis = std::nullopt);

/// Sizes that a FeatureAdapter may also take from its first call.
struct RAREFY_API FeatureAdapterOptions {
  std::optional<int64_t> student_features;  // in, >= 1
  std::optional<int64_t> teacher_features;  // out, >= 1
  std::optional<int64_t> axis;              // 1 for four dimensions, else the last

  /// Throws c10::ValueError for a field out of range, or one size without the other.
  void validate(const char* function = "FeatureAdapter") const;
};

/// The learned map from the student's features to the teacher's: adapt_features with parameters `weight` [teacher_features,
/// student_features] and `bias`. Without sizes the parameters are undefined until the first call (or until
/// `initialize`): build the optimizer after it.
class RAREFY_API FeatureAdapterImpl : public torch::nn::Cloneable<FeatureAdapterImpl> {
 public:
  explicit FeatureAdapterImpl(const FeatureAdapterOptions& options = {});
  /// Makes the parameters, uniform in +-1 / sqrt(student_features), if there are none.
  void initialize(int64_t student_features, int64_t teacher_features, const at::TensorOptions& like = {});
  /// The student's features in the teacher's number. The teacher's are looked at for their number only.
  torch::Tensor forward(const torch::Tensor& student, const torch::Tensor& teacher);
  void reset() override;
  void pretty_print(std::ostream& stream) const override;

  FeatureAdapterOptions options;
  torch::Tensor weight, bias;
};
TORCH_MODULE(FeatureAdapter);

/// What Hint computes; see hint_loss.
struct RAREFY_API HintOptions {
  std::string loss = "mse";                 // "mse", "smooth_l1", "cosine"
  std::optional<int64_t> student_features;  // of the adapter; from the first call if unset
  std::optional<int64_t> teacher_features;
  std::optional<int64_t> axis;

  /// Throws c10::ValueError for a field out of range.
  void validate() const;
};

/// hint_loss of the student's features behind a learned adapter (state: adapter.weight, adapter.bias).
class RAREFY_API HintImpl : public torch::nn::Cloneable<HintImpl> {
 public:
  explicit HintImpl(const HintOptions& options = {});
  torch::Tensor forward(const torch::Tensor& student, const torch::Tensor& teacher, const torch::Tensor& mask = {});
  void reset() override;
  void pretty_print(std::ostream& stream) const override;

  HintOptions options;
  FeatureAdapter adapter{nullptr};
};
TORCH_MODULE(Hint);

/// hint_loss with "cosine" and no adapter: 1 - cos of hidden states of equal width (DistilBERT, arXiv:1910.01108).
class RAREFY_API HiddenCosineImpl : public torch::nn::Cloneable<HiddenCosineImpl> {
 public:
  torch::Tensor forward(const torch::Tensor& student, const torch::Tensor& teacher, const torch::Tensor& mask = {});
  void reset() override {}
  void pretty_print(std::ostream& stream) const override;
};
TORCH_MODULE(HiddenCosine);

/// What AttentionTransfer computes; see attention_transfer_loss.
struct RAREFY_API AttentionTransferOptions {
  std::string variant = "paper";  // "paper", "code"
  double power = 2.0;             // >= 1
  std::optional<int64_t> axis;

  /// Throws c10::ValueError for a field out of range.
  void validate(const char* function = "AttentionTransfer") const;
};

/// attention_transfer_loss as a module.
class RAREFY_API AttentionTransferImpl : public torch::nn::Cloneable<AttentionTransferImpl> {
 public:
  explicit AttentionTransferImpl(const AttentionTransferOptions& options = {});
  torch::Tensor forward(const torch::Tensor& student, const torch::Tensor& teacher, const torch::Tensor& mask = {});
  void reset() override {}
  void pretty_print(std::ostream& stream) const override;

  AttentionTransferOptions options;
};
TORCH_MODULE(AttentionTransfer);

}  // namespace rarefy::distillation
