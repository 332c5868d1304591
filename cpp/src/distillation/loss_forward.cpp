#include "distillation/loss_forward.h"

#include <rarefy/ops/distillation_loss.h>
#include <torch/library.h>
#include <torch/torch.h>

#include <cmath>
#include <string_view>
#include <utility>

#include "distillation/vocabulary.h"
#include "ops/distillation_rule.h"

namespace rarefy::distillation {
namespace {

using torch::Tensor;

// A row of equal logits has z-scores of 0, and gradients of at most 1 / sqrt(floor) times those of the z-scores.
constexpr double kVarianceFloor = 1e-5;

std::optional<Tensor> given(const Tensor& x) { return x.defined() ? std::optional<Tensor>(x) : std::nullopt; }

/// float64 stays; everything else is taken in float32.
Tensor widened(const Tensor& x) { return x.to(ops::loss_type(x)); }

Tensor standardized(const Tensor& logits) {
  return torch::layer_norm(widened(logits), {logits.size(-1)}, {}, {}, kVarianceFloor);
}

/// Logits whose softmax at this temperature is the weighted mean of the teachers'.
Tensor mixture(const std::vector<Tensor>& teachers, const std::vector<double>& weights, double temperature) {
  double total = 0.0;
  for (const double weight : weights) {
    total += weight;
  }
  Tensor log_p;
  for (size_t k = 0; k < teachers.size(); ++k) {
    const double weight = weights.empty() ? 1.0 / static_cast<double>(teachers.size()) : weights[k] / total;
    const auto part = torch::log_softmax(widened(teachers[k]) / temperature, -1) + std::log(weight);
    log_p = log_p.defined() ? torch::logaddexp(log_p, part) : part;
  }
  return log_p * temperature;
}

/// Labels and weights of rows.
struct Rows {
  Tensor labels;
  Tensor weights;
};

/// The mask in the weights, and everything moved one position to the front with `shift`: logits stay where they are, and
/// the last position of each sequence is not valid.
Rows rows_of(const Tensor& student, const Tensor& labels, const Tensor& row_weights, const Tensor& mask,
             const DistillationLossOptions& options) {
  const auto shape = student.sizes().slice(0, static_cast<size_t>(student.dim()) - 1);
  for (const auto& [name, tensor] : {std::pair("row_weights", row_weights), std::pair("mask", mask)}) {
    TORCH_CHECK_VALUE(!tensor.defined() || tensor.sizes() == shape, "[DistillationLoss] ", name,
                      " must have the logits' shape without classes, ", shape, ", got ", tensor.sizes());
  }
  Rows rows{labels, row_weights};
  if (mask.defined()) {
    TORCH_CHECK_TYPE(mask.scalar_type() == torch::kBool, "[DistillationLoss] mask must be bool, got ",
                     mask.scalar_type());
    rows.weights = row_weights.defined() ? torch::where(mask, row_weights, torch::zeros_like(row_weights))
                                         : mask.to(torch::kFloat);
  }
  if (!options.shift) {
    return rows;
  }
  TORCH_CHECK_VALUE(student.dim() >= 2 && student.size(-2) >= 2,
                    "[DistillationLoss] logits must have shape [..., length, classes] with length >= 2 for shift, got ",
                    student.sizes());
  const int64_t last = student.size(-2) - 1;
  if (labels.defined()) {
    TORCH_CHECK_VALUE(labels.sizes() == shape,
                      "[DistillationLoss] labels must have the logits' shape without classes, ", shape, ", got ",
                      labels.sizes());
    rows.labels = torch::constant_pad_nd(labels.narrow(-1, 1, last), {0, 1}, options.ignore_index);
  }
  const auto weights =
      rows.weights.defined()
          ? rows.weights.narrow(-1, 1, last)
          : torch::ones(shape, student.options().dtype(torch::kFloat).requires_grad(false)).narrow(-1, 0, last);
  rows.weights = torch::constant_pad_nd(weights, {0, 1}, 0);
  return rows;
}

/// Logits with 0 in the rows that do not count, so that what these hold does not reach the gradient.
Tensor only_valid(const Tensor& logits, const Rows& rows, int64_t ignore_index) {
  Tensor ignored;
  if (rows.weights.defined()) {
    ignored = rows.weights == 0;
  }
  if (rows.labels.defined()) {
    const auto labelled = rows.labels == ignore_index;
    ignored = ignored.defined() ? ignored.logical_or(labelled) : labelled;
  }
  return ignored.defined() ? logits.masked_fill(ignored.unsqueeze(-1), 0) : logits;
}

/// The student's dtype; float32 where that has 16 bits and the teacher's is another, whose values it may not hold.
torch::ScalarType common_type(const Tensor& student, const Tensor& teacher) {
  return student.scalar_type() == teacher.scalar_type() ? student.scalar_type() : ops::loss_type(student);
}

Tensor loss_of(const Tensor& student, const Tensor& teacher, const Rows& rows,
               const ops::DistillationLossSettings& settings) {
  const auto type = common_type(student, teacher);
  return ops::distillation_loss(student.to(type), teacher.to(student.device(), type), given(rows.labels),
                                given(rows.weights), settings);
}

Tensor loss_op(const Tensor& student_logits, torch::TensorList teacher_logits, const std::optional<Tensor>& labels,
               const std::optional<Tensor>& row_weights, const std::optional<Tensor>& mask,
               const std::optional<Tensor>& label_map, double temperature, double alpha, std::string_view divergence,
               double skew, double label_smoothing, int64_t ignore_index, std::string_view reduction,
               std::string_view vocabulary, bool shift, bool standardize, at::ArrayRef<double> teacher_weights) {
  return loss_forward(
      student_logits, teacher_logits, labels.value_or(Tensor()), row_weights.value_or(Tensor()),
      mask.value_or(Tensor()),
      {temperature, alpha, std::string(divergence), skew, label_smoothing, ignore_index, std::string(reduction),
       std::string(vocabulary), label_map.value_or(Tensor()), shift, standardize, teacher_weights.vec()});
}

}  // namespace

Tensor loss_forward(const Tensor& student_logits, torch::TensorList teacher_logits, const Tensor& labels,
                    const Tensor& row_weights, const Tensor& mask, const DistillationLossOptions& options) {
  const auto settings = options.settings();
  const auto rule = ops::resolve("DistillationLoss", settings);
  const auto vocabulary = vocabulary_of(options.vocabulary, options.label_map);
  const auto& weights = options.teacher_weights;
  TORCH_CHECK_VALUE(!teacher_logits.empty(), "[DistillationLoss] there must be at least one teacher, got none");
  TORCH_CHECK_VALUE(weights.empty() || weights.size() == teacher_logits.size(),
                    "[DistillationLoss] teacher_weights must have one number per teacher, got ", weights.size(),
                    " for ", teacher_logits.size(), " teachers");
  TORCH_CHECK_VALUE(student_logits.dim() >= 1,
                    "[DistillationLoss] logits must have shape [..., classes], got a scalar");
  const auto rows = rows_of(student_logits, labels, row_weights, mask, options);
  const bool standardize = options.standardize && rule.soft();

  std::vector<Tensor> teachers;
  for (const auto& logits : teacher_logits) {
    TORCH_CHECK_TYPE(at::isFloatingType(logits.scalar_type()),
                     "[DistillationLoss] teacher_logits must be floating point, got ", logits.scalar_type());
    TORCH_CHECK_VALUE(logits.dim() >= 1, "[DistillationLoss] logits must have shape [..., classes], got a scalar");
    TORCH_CHECK_VALUE(logits.sizes().slice(0, static_cast<size_t>(logits.dim()) - 1) ==
                          student_logits.sizes().slice(0, static_cast<size_t>(student_logits.dim()) - 1),
                      "[DistillationLoss] teacher_logits must have the student's rows, ", student_logits.sizes(),
                      " but for the classes, got ", logits.sizes());
    teachers.push_back(standardize ? standardized(logits.detach()) : logits.detach());
    TORCH_CHECK_VALUE(logits.size(-1) == teacher_logits[0].size(-1),
                      "[DistillationLoss] all teachers must have the same classes, got ", teacher_logits[0].size(-1),
                      " and ", logits.size(-1));
  }
  const auto teacher = teachers.size() == 1 ? teachers[0] : mixture(teachers, weights, options.temperature);

  const auto plain = align(student_logits, teacher, vocabulary, options.label_map, rule);
  Tensor loss;
  if (!standardize) {
    loss = loss_of(plain.student, plain.teacher, rows, settings);
  } else {
    auto soft = settings, hard = settings;
    soft.alpha = 1.0;
    hard.alpha = 0.0;
    const auto scores = standardized(only_valid(student_logits, rows, options.ignore_index));
    const auto aligned = align(scores, teacher, vocabulary, options.label_map, rule);
    loss = options.alpha * loss_of(aligned.student, aligned.teacher, rows, soft);
    if (rule.hard()) {
      loss = loss + (1.0 - options.alpha) * loss_of(plain.student, plain.student.detach(), rows, hard);
    }
  }
  return options.shift && rule.reduction == Reduction::none ? loss.narrow(-1, 0, student_logits.size(-2) - 1) : loss;
}

TORCH_LIBRARY_FRAGMENT(rarefy, m) {
  m.def(
      "distillation_logit_loss(Tensor student_logits, Tensor[] teacher_logits, Tensor? labels=None, "
      "Tensor? row_weights=None, Tensor? mask=None, Tensor? label_map=None, *, float temperature, float alpha, "
      "str divergence='kl', float skew=0.5, float label_smoothing=0.0, int ignore_index=-100, str reduction='mean', "
      "str vocabulary='error', bool shift=False, bool standardize=False, float[] teacher_weights=[]) -> Tensor",
      &loss_op);
}

}  // namespace rarefy::distillation
