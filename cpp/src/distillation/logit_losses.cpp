#include <ATen/ops/log_softmax.h>
#include <ATen/ops/logsumexp.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros_like.h>
#include <rarefy/distillation/logit_losses.h>
#include <torch/library.h>

#include <limits>

#include "distillation/loss_math.h"

namespace rarefy::distillation {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

/// Logits as [rows, classes] with 0 in the rows that do not count, labels [rows] with 0 there, and which rows count.
struct Rows {
  at::Tensor student, teacher, labels;
  std::optional<at::Tensor> valid;
};

void check_labels(const char* function, const at::Tensor& labels, const at::Tensor& valid, const at::Tensor& logits) {
  if (!is_readable(labels)) {
    return;
  }
  const auto classes = logits.size(-1);
  const auto wrong = valid.logical_and((labels < 0).logical_or(labels >= classes)).flatten().nonzero();
  if (wrong.numel() > 0) {
    const auto row = wrong[0][0].item<int64_t>();
    TORCH_CHECK_INDEX(false, "[", function, "] labels must be in [0, ", classes, ") or ignore_index, got ",
                      labels.flatten()[row].item<int64_t>(), " at row ", row);
  }
}

Rows check_rows(const char* function, const at::Tensor& student, const at::Tensor& teacher,
                const std::optional<at::Tensor>& labels, const std::optional<at::Tensor>& mask, int64_t ignore_index,
                bool need_classes) {
  const auto [s, t] = check_equal_pair(function, student, teacher, 2);
  TORCH_CHECK_VALUE(!need_classes || student.sym_size(-1) >= 2, "[", function,
                    "] logits must have at least two classes, got shape ", student.sym_sizes());
  const auto rows = student.sym_sizes().slice(0, static_cast<size_t>(student.dim()) - 1);
  auto result = Rows{s.flatten(0, -2), t.flatten(0, -2), {}, std::nullopt};
  if (mask.has_value()) {
    check_mask(function, *mask, rows);
    result.valid = mask->flatten();
  }
  if (labels.has_value()) {
    TORCH_CHECK_TYPE(labels->scalar_type() == at::kLong, "[", function, "] labels must be int64, got ",
                     labels->scalar_type());
    TORCH_CHECK_VALUE(labels->sym_sizes() == rows, "[", function,
                      "] labels must have the logits' shape without classes, ", rows, ", got ", labels->sym_sizes());
    const auto kept = (*labels != ignore_index).flatten();
    result.valid = result.valid.has_value() ? result.valid->logical_and(kept) : kept;
    check_labels(function, labels->flatten(), *result.valid, student);
    result.labels = labels->flatten().masked_fill(result.valid->logical_not(), 0);
  }
  if (result.valid.has_value()) {
    TORCH_CHECK_VALUE(!is_readable(*result.valid) || result.valid->any().item<bool>(), "[", function,
                      "] at least one row must count (labels other than ignore_index, mask true), got none");
    const auto out = result.valid->logical_not().unsqueeze(-1);
    result.student = result.student.masked_fill(out, 0.0);
    result.teacher = result.teacher.masked_fill(out, 0.0);
  }
  return result;
}

/// True at each row's label.
at::Tensor at_label(const Rows& rows) {
  return at::zeros_like(rows.student, rows.student.options().dtype(at::kBool))
      .scatter(1, rows.labels.unsqueeze(1), true);
}

/// x - mean along `axis` over what counts, and 0 elsewhere. Of equal numbers it is 0.
at::Tensor centred(const at::Tensor& x, int64_t axis, const std::optional<at::Tensor>& keep) {
  const auto peak = [&](const at::Tensor& y) { return y.detach().abs().amax(axis, /*keepdim=*/true); };
  auto counted = x;
  at::Tensor rest;
  if (keep.has_value()) {
    const auto out = keep->logical_not();
    counted = x.masked_fill(out, 0.0);
    rest = (x - counted.sum(axis, /*keepdim=*/true) / keep->sum(axis, /*keepdim=*/true)).masked_fill(out, 0.0);
  } else {
    rest = x - x.mean(axis, /*keepdim=*/true);
  }
  // The mean of equal numbers is rounded: what it leaves of them has no direction.
  return rest.masked_fill(peak(rest) <= peak(counted) * (8.0 * epsilon(x)), 0.0);
}

/// 1 - Pearson's correlation along `axis`.
at::Tensor uncorrelated(const at::Tensor& a, const at::Tensor& b, int64_t axis,
                        const std::optional<at::Tensor>& keep = std::nullopt) {
  return 1.0 - (normalize(centred(a, axis, keep), axis) * normalize(centred(b, axis, keep), axis)).sum(axis);
}

}  // namespace

at::Tensor dkd_loss(const at::Tensor& student_logits, const at::Tensor& teacher_logits, const at::Tensor& labels,
                    const std::optional<at::Tensor>& mask, double temperature, double alpha, double beta,
                    int64_t ignore_index) {
  const FullPrecision full_precision;
  check_temperature("dkd_loss", temperature);
  check_not_negative("dkd_loss", "alpha", alpha);
  check_not_negative("dkd_loss", "beta", beta);
  const auto rows = check_rows("dkd_loss", student_logits, teacher_logits, labels, mask, ignore_index, true);
  const auto target = at_label(rows);
  const auto binary = [&](const at::Tensor& logits) {
    const auto log_p = at::log_softmax(logits / temperature, -1);
    // 1 - p_y as a sum over the others: a difference would lose the small ones.
    return at::stack({log_p.gather(1, rows.labels.unsqueeze(1)).squeeze(1),
                      at::logsumexp(log_p.masked_fill(target, -kInfinity), -1)},
                     -1);
  };
  const auto others = [&](const at::Tensor& logits) {
    return at::log_softmax((logits / temperature).masked_fill(target, -kInfinity), -1);
  };
  const auto loss = kl_divergence(binary(rows.teacher), binary(rows.student)) * alpha +
                    kl_divergence(others(rows.teacher), others(rows.student)) * beta;
  return masked_mean(loss, rows.valid) * (temperature * temperature);
}

at::Tensor nkd_loss(const at::Tensor& student_logits, const at::Tensor& teacher_logits, const at::Tensor& labels,
                    const std::optional<at::Tensor>& mask, double temperature, double gamma, int64_t ignore_index) {
  const FullPrecision full_precision;
  check_temperature("nkd_loss", temperature);
  check_not_negative("nkd_loss", "gamma", gamma);
  const auto rows = check_rows("nkd_loss", student_logits, teacher_logits, labels, mask, ignore_index, true);
  const auto target = at_label(rows);
  const auto log_label = [&](const at::Tensor& logits) {
    return at::log_softmax(logits, -1).gather(1, rows.labels.unsqueeze(1)).squeeze(1);
  };
  const auto others = [&](const at::Tensor& logits) {
    return at::log_softmax((logits / temperature).masked_fill(target, -kInfinity), -1);
  };
  const auto p = others(rows.teacher).exp();
  const auto cross = (p * others(rows.student)).masked_fill(p == 0.0, 0.0).sum(-1);
  const auto p_label = log_label(rows.teacher).exp();
  const auto label = (p_label * log_label(rows.student)).masked_fill(p_label == 0.0, 0.0);  // 0 log 0 = 0
  const auto loss = label + cross * (gamma * temperature * temperature);
  return -masked_mean(loss, rows.valid);
}

at::Tensor dist_loss(const at::Tensor& student_logits, const at::Tensor& teacher_logits,
                     const std::optional<at::Tensor>& labels, const std::optional<at::Tensor>& mask, double temperature,
                     double beta, double gamma, int64_t ignore_index) {
  const FullPrecision full_precision;
  check_temperature("dist_loss", temperature);
  check_not_negative("dist_loss", "beta", beta);
  check_not_negative("dist_loss", "gamma", gamma);
  const auto rows = check_rows("dist_loss", student_logits, teacher_logits, labels, mask, ignore_index, true);
  TORCH_CHECK_VALUE(gamma == 0.0 || rows.student.sym_size(0) >= 2,
                    "[dist_loss] there must be at least two rows unless gamma is 0, got ", rows.student.sym_size(0));
  const auto s = at::softmax(rows.student / temperature, -1), t = at::softmax(rows.teacher / temperature, -1);
  auto loss = masked_mean(uncorrelated(s, t, 1), rows.valid) * beta;
  if (gamma > 0.0) {
    const auto keep = rows.valid.has_value() ? std::optional<at::Tensor>(rows.valid->unsqueeze(-1)) : std::nullopt;
    loss = loss + uncorrelated(s, t, 0, keep).mean() * gamma;
  }
  return loss * (temperature * temperature);
}

at::Tensor logit_mse_loss(const at::Tensor& student_logits, const at::Tensor& teacher_logits,
                          const std::optional<at::Tensor>& labels, const std::optional<at::Tensor>& mask,
                          int64_t ignore_index) {
  const FullPrecision full_precision;
  const auto rows = check_rows("logit_mse_loss", student_logits, teacher_logits, labels, mask, ignore_index, false);
  const auto absent = (rows.student == -kInfinity).logical_and(rows.teacher == -kInfinity);
  const auto difference = rows.student.masked_fill(absent, 0.0) - rows.teacher.masked_fill(absent, 0.0);
  return masked_mean(difference.square().mean(-1), rows.valid);
}

TORCH_LIBRARY_FRAGMENT(rarefy, m) {
  m.def(
      "dkd_loss(Tensor student_logits, Tensor teacher_logits, Tensor labels, Tensor? mask=None, *, "
      "float temperature=4.0, float alpha=1.0, float beta=8.0, int ignore_index=-100) -> Tensor");
  m.def(
      "nkd_loss(Tensor student_logits, Tensor teacher_logits, Tensor labels, Tensor? mask=None, *, "
      "float temperature=1.0, float gamma=1.5, int ignore_index=-100) -> Tensor");
  m.def(
      "dist_loss(Tensor student_logits, Tensor teacher_logits, Tensor? labels=None, Tensor? mask=None, *, "
      "float temperature=1.0, float beta=1.0, float gamma=1.0, int ignore_index=-100) -> Tensor");
  m.def(
      "logit_mse_loss(Tensor student_logits, Tensor teacher_logits, Tensor? labels=None, Tensor? mask=None, *, "
      "int ignore_index=-100) -> Tensor");
}

TORCH_LIBRARY_IMPL(rarefy, CompositeImplicitAutograd, m) {
  m.impl("dkd_loss", &dkd_loss);
  m.impl("nkd_loss", &nkd_loss);
  m.impl("dist_loss", &dist_loss);
  m.impl("logit_mse_loss", &logit_mse_loss);
}

void DKDOptions::validate() const {
  check_temperature("DKD", temperature);
  check_not_negative("DKD", "alpha", alpha);
  check_not_negative("DKD", "beta", beta);
}

DKDImpl::DKDImpl(const DKDOptions& options) : options(options) { options.validate(); }

torch::Tensor DKDImpl::forward(const torch::Tensor& student_logits, const torch::Tensor& teacher_logits,
                               const torch::Tensor& labels, const torch::Tensor& mask) {
  TORCH_CHECK_VALUE(labels.defined(), "[DKD] labels must be given, got none");
  return dkd_loss(student_logits, teacher_logits, labels, given(mask), options.temperature, options.alpha, options.beta,
                  options.ignore_index);
}

void DKDImpl::pretty_print(std::ostream& stream) const {
  stream << "rarefy::distillation::DKD(temperature=" << options.temperature << ", alpha=" << options.alpha
         << ", beta=" << options.beta << ")";
}

void NKDOptions::validate() const {
  check_temperature("NKD", temperature);
  check_not_negative("NKD", "gamma", gamma);
}

NKDImpl::NKDImpl(const NKDOptions& options) : options(options) { options.validate(); }

torch::Tensor NKDImpl::forward(const torch::Tensor& student_logits, const torch::Tensor& teacher_logits,
                               const torch::Tensor& labels, const torch::Tensor& mask) {
  TORCH_CHECK_VALUE(labels.defined(), "[NKD] labels must be given, got none");
  return nkd_loss(student_logits, teacher_logits, labels, given(mask), options.temperature, options.gamma,
                  options.ignore_index);
}

void NKDImpl::pretty_print(std::ostream& stream) const {
  stream << "rarefy::distillation::NKD(temperature=" << options.temperature << ", gamma=" << options.gamma << ")";
}

void DISTOptions::validate() const {
  check_temperature("DIST", temperature);
  check_not_negative("DIST", "beta", beta);
  check_not_negative("DIST", "gamma", gamma);
}

DISTImpl::DISTImpl(const DISTOptions& options) : options(options) { options.validate(); }

torch::Tensor DISTImpl::forward(const torch::Tensor& student_logits, const torch::Tensor& teacher_logits,
                                const torch::Tensor& labels, const torch::Tensor& mask) {
  return dist_loss(student_logits, teacher_logits, given(labels), given(mask), options.temperature, options.beta,
                   options.gamma, options.ignore_index);
}

void DISTImpl::pretty_print(std::ostream& stream) const {
  stream << "rarefy::distillation::DIST(temperature=" << options.temperature << ", beta=" << options.beta
         << ", gamma=" << options.gamma << ")";
}

LogitMSEImpl::LogitMSEImpl(const LogitMSEOptions& options) : options(options) {}

torch::Tensor LogitMSEImpl::forward(const torch::Tensor& student_logits, const torch::Tensor& teacher_logits,
                                    const torch::Tensor& labels, const torch::Tensor& mask) {
  return logit_mse_loss(student_logits, teacher_logits, given(labels), given(mask), options.ignore_index);
}

void LogitMSEImpl::pretty_print(std::ostream& stream) const { stream << "rarefy::distillation::LogitMSE()"; }

}  // namespace rarefy::distillation
