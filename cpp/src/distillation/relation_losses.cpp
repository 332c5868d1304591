#include <ATen/ops/cdist.h>
#include <ATen/ops/eye.h>
#include <ATen/ops/matmul.h>
#include <rarefy/distillation/relation_losses.h>
#include <torch/library.h>

#include <limits>

#include "distillation/loss_math.h"

namespace rarefy::distillation {
namespace {

/// One side as [batch, values].
at::Tensor samples(const char* function, const at::Tensor& x, const std::optional<at::Tensor>& mask) {
  if (!mask.has_value()) {
    return x.flatten(1);
  }
  TORCH_CHECK_VALUE(x.dim() >= 3, "[", function, "] a mask is for features [batch, positions, ...], got shape ",
                    x.sym_sizes());
  check_mask(function, *mask, x.sym_sizes().slice(0, 2));
  return x.flatten(2).masked_fill(mask->logical_not().unsqueeze(-1), 0.0).flatten(1);
}

Pair check_batch(const char* function, const at::Tensor& student, const at::Tensor& teacher,
                 const std::optional<at::Tensor>& mask, int64_t least) {
  auto [s, t] = check_pair(function, student, teacher, 2);
  TORCH_CHECK_VALUE(student.sym_size(0) >= least, "[", function, "] the batch must have at least ", least,
                    " samples, got ", student.sym_size(0));
  return {samples(function, s, mask), samples(function, t, mask)};
}

/// True on the diagonal of [batch, batch].
at::Tensor same_sample(const at::Tensor& x) { return at::eye_symint(x.sym_size(0), x.options().dtype(at::kBool)); }

/// Distances between samples over their mean; 0 if all samples are one point.
at::Tensor relative_distances(const at::Tensor& x, const at::Tensor& others) {
  // Through a matrix product, nearly equal samples would lose their distance to cancellation.
  const auto scaled = divide_by_peak(x, {0, 1});
  const auto distances = at::cdist(scaled, scaled, 2.0, /*compute_mode=*/2);
  const auto mean = distances.sum() / others.sum();
  return distances / mean.masked_fill(mean == 0.0, std::numeric_limits<double>::infinity());
}

/// [j, i, k]: the cosine of the angle at x_j.
at::Tensor angles(const at::Tensor& x) {
  const auto directions = normalize(x.unsqueeze(0) - x.unsqueeze(1), -1);
  return at::matmul(directions, directions.transpose(1, 2));
}

/// Logarithms of p(j | i), with 0 on the diagonal's place of K.
at::Tensor log_neighbours(const at::Tensor& x, const at::Tensor& self) {
  const auto unit = normalize(x, -1);
  const auto kernel = ((at::matmul(unit, unit.t()) + 1.0) * 0.5).clamp_min(1e-7);
  const auto total = kernel.masked_fill(self, 0.0).sum(-1, /*keepdim=*/true);
  return (kernel / total).log();
}

}  // namespace

at::Tensor similarity_preserving_loss(const at::Tensor& student, const at::Tensor& teacher,
                                      const std::optional<at::Tensor>& mask) {
  const FullPrecision full_precision;
  const auto [s, t] = check_batch("similarity_preserving_loss", student, teacher, mask, 2);
  const auto gram = [](const at::Tensor& x) {
    const auto scaled = divide_by_peak(x, {0, 1});
    return normalize(at::matmul(scaled, scaled.t()), -1);
  };
  return (gram(s) - gram(t)).square().mean();
}

at::Tensor relational_distance_loss(const at::Tensor& student, const at::Tensor& teacher,
                                    const std::optional<at::Tensor>& mask) {
  const FullPrecision full_precision;
  const auto [s, t] = check_batch("relational_distance_loss", student, teacher, mask, 2);
  const auto others = same_sample(s).logical_not();
  return huber(relative_distances(s, others), relative_distances(t, others)).sum() / others.sum();
}

at::Tensor relational_angle_loss(const at::Tensor& student, const at::Tensor& teacher,
                                 const std::optional<at::Tensor>& mask) {
  const FullPrecision full_precision;
  const auto [s, t] = check_batch("relational_angle_loss", student, teacher, mask, 3);
  const auto others = same_sample(s).logical_not();
  const auto triples = others.unsqueeze(0).logical_and(others.unsqueeze(1)).logical_and(others.unsqueeze(2));
  return masked_mean(huber(angles(s), angles(t)), triples);
}

at::Tensor probabilistic_transfer_loss(const at::Tensor& student, const at::Tensor& teacher,
                                       const std::optional<at::Tensor>& mask) {
  const FullPrecision full_precision;
  const auto [s, t] = check_batch("probabilistic_transfer_loss", student, teacher, mask, 2);
  const auto self = same_sample(s);
  const auto log_p = log_neighbours(t, self), log_q = log_neighbours(s, self);
  return (log_p.exp() * (log_p - log_q)).masked_fill(self, 0.0).sum(-1).mean();
}

TORCH_LIBRARY_FRAGMENT(rarefy, m) {
  m.def("similarity_preserving_loss(Tensor student, Tensor teacher, Tensor? mask=None) -> Tensor");
  m.def("relational_distance_loss(Tensor student, Tensor teacher, Tensor? mask=None) -> Tensor");
  m.def("relational_angle_loss(Tensor student, Tensor teacher, Tensor? mask=None) -> Tensor");
  m.def("probabilistic_transfer_loss(Tensor student, Tensor teacher, Tensor? mask=None) -> Tensor");
}

TORCH_LIBRARY_IMPL(rarefy, CompositeImplicitAutograd, m) {
  m.impl("similarity_preserving_loss", &similarity_preserving_loss);
  m.impl("relational_distance_loss", &relational_distance_loss);
  m.impl("relational_angle_loss", &relational_angle_loss);
  m.impl("probabilistic_transfer_loss", &probabilistic_transfer_loss);
}

torch::Tensor SimilarityPreservingImpl::forward(const torch::Tensor& student, const torch::Tensor& teacher,
                                                const torch::Tensor& mask) {
  return similarity_preserving_loss(student, teacher, given(mask));
}

void SimilarityPreservingImpl::pretty_print(std::ostream& stream) const {
  stream << "rarefy::distillation::SimilarityPreserving()";
}

torch::Tensor RelationalDistanceImpl::forward(const torch::Tensor& student, const torch::Tensor& teacher,
                                              const torch::Tensor& mask) {
  return relational_distance_loss(student, teacher, given(mask));
}

void RelationalDistanceImpl::pretty_print(std::ostream& stream) const {
  stream << "rarefy::distillation::RelationalDistance()";
}

torch::Tensor RelationalAngleImpl::forward(const torch::Tensor& student, const torch::Tensor& teacher,
                                           const torch::Tensor& mask) {
  return relational_angle_loss(student, teacher, given(mask));
}

void RelationalAngleImpl::pretty_print(std::ostream& stream) const {
  stream << "rarefy::distillation::RelationalAngle()";
}

torch::Tensor ProbabilisticKnowledgeTransferImpl::forward(const torch::Tensor& student, const torch::Tensor& teacher,
                                                          const torch::Tensor& mask) {
  return probabilistic_transfer_loss(student, teacher, given(mask));
}

void ProbabilisticKnowledgeTransferImpl::pretty_print(std::ostream& stream) const {
  stream << "rarefy::distillation::ProbabilisticKnowledgeTransfer()";
}

}  // namespace rarefy::distillation
