#include <ATen/ops/log_softmax.h>
#include <ATen/ops/matmul.h>
#include <rarefy/distillation/clip_losses.h>
#include <torch/library.h>
#include <torch/types.h>

#include "distillation/loss_math.h"

namespace rarefy::distillation {
namespace {

/// KL over texts for each image, and over images for each text.
at::Tensor both_directions(const at::Tensor& student, const at::Tensor& teacher) {
  const auto along = [&](int64_t axis) {
    return kl_divergence(at::log_softmax(teacher, axis).movedim(axis, -1),
                         at::log_softmax(student, axis).movedim(axis, -1))
        .mean();
  };
  return along(1) + along(0);
}

at::Tensor checked_scale(const char* name, const at::Tensor& scale, const at::Tensor& like) {
  TORCH_CHECK_VALUE(scale.sym_numel() == 1, "[affinity_mimicking_loss] ", name, " must be a scalar, got shape ",
                    scale.sym_sizes());
  TORCH_CHECK_TYPE(scale.is_floating_point(), "[affinity_mimicking_loss] ", name, " must be of floating point, got ",
                   scale.scalar_type());
  return scale.to(like.device(), like.scalar_type()).reshape({});
}

}  // namespace

at::Tensor contrastive_kl_loss(const at::Tensor& student_logits, const at::Tensor& teacher_logits, double temperature) {
  const FullPrecision full_precision;
  check_temperature("contrastive_kl_loss", temperature);
  const auto [s, t] = check_equal_pair("contrastive_kl_loss", student_logits, teacher_logits, 2);
  TORCH_CHECK_VALUE(student_logits.dim() == 2, "[contrastive_kl_loss] logits must have shape [images, texts], got ",
                    student_logits.sym_sizes());
  return both_directions(s / temperature, t / temperature) * (temperature * temperature);
}

at::Tensor affinity_mimicking_loss(const at::Tensor& student_image, const at::Tensor& student_text,
                                   const at::Tensor& teacher_image, const at::Tensor& teacher_text,
                                   const at::Tensor& student_scale, const at::Tensor& teacher_scale) {
  const FullPrecision full_precision;
  constexpr auto function = "affinity_mimicking_loss";
  const auto image = check_pair(function, student_image, teacher_image, 2);
  const auto text = check_pair(function, student_text, teacher_text, 2);
  for (const auto& [i, j] : {std::pair{student_image, student_text}, std::pair{teacher_image, teacher_text}}) {
    TORCH_CHECK_VALUE(i.dim() == 2 && j.sym_sizes() == i.sym_sizes(), "[", function,
                      "] image and text embeddings must have one shape [batch, width], got ", i.sym_sizes(), " and ",
                      j.sym_sizes());
  }
  const auto affinity = [](const at::Tensor& i, const at::Tensor& j) {
    return at::matmul(normalize(i, -1), normalize(j.to(i.scalar_type()), -1).t());
  };
  return both_directions(
      affinity(image.student, text.student) * checked_scale("student_scale", student_scale, image.student),
      affinity(image.teacher, text.teacher) * checked_scale("teacher_scale", teacher_scale.detach(), image.student));
}

at::Tensor embedding_mse_loss(const at::Tensor& student, const at::Tensor& teacher, bool normalize) {
  const FullPrecision full_precision;
  const auto [s, t] = check_equal_pair("embedding_mse_loss", student, teacher, 2);
  TORCH_CHECK_VALUE(student.dim() == 2, "[embedding_mse_loss] embeddings must have shape [batch, width], got ",
                    student.sym_sizes());
  const auto difference = normalize ? distillation::normalize(s, -1) - distillation::normalize(t, -1) : s - t;
  return difference.square().sum(-1).mean();
}

TORCH_LIBRARY_FRAGMENT(rarefy, m) {
  m.def("contrastive_kl_loss(Tensor student_logits, Tensor teacher_logits, *, float temperature=1.0) -> Tensor");
  m.def(
      "affinity_mimicking_loss(Tensor student_image, Tensor student_text, Tensor teacher_image, Tensor teacher_text, "
      "Tensor student_scale, Tensor teacher_scale) -> Tensor");
  m.def("embedding_mse_loss(Tensor student, Tensor teacher, *, bool normalize=True) -> Tensor");
}

TORCH_LIBRARY_IMPL(rarefy, CompositeImplicitAutograd, m) {
  m.impl("contrastive_kl_loss", &contrastive_kl_loss);
  m.impl("affinity_mimicking_loss", &affinity_mimicking_loss);
  m.impl("embedding_mse_loss", &embedding_mse_loss);
}

void ContrastiveKLOptions::validate() const { check_temperature("ContrastiveKL", temperature); }

ContrastiveKLImpl::ContrastiveKLImpl(const ContrastiveKLOptions& options) : options(options) { options.validate(); }

torch::Tensor ContrastiveKLImpl::forward(const torch::Tensor& student_logits, const torch::Tensor& teacher_logits) {
  return contrastive_kl_loss(student_logits, teacher_logits, options.temperature);
}

void ContrastiveKLImpl::pretty_print(std::ostream& stream) const {
  stream << "rarefy::distillation::ContrastiveKL(temperature=" << options.temperature << ")";
}

void AffinityMimickingOptions::validate() const {
  check_positive("AffinityMimicking", "student_scale", student_scale);
  check_positive("AffinityMimicking", "teacher_scale", teacher_scale);
}

AffinityMimickingImpl::AffinityMimickingImpl(const AffinityMimickingOptions& options) : options(options) {
  options.validate();
}

torch::Tensor AffinityMimickingImpl::forward(const ImageText& student, const ImageText& teacher,
                                             const torch::Tensor& student_scale, const torch::Tensor& teacher_scale) {
  const auto scale = [](const torch::Tensor& called, double option) {
    return called.defined() ? called : torch::scalar_tensor(option, torch::kDouble);
  };
  return affinity_mimicking_loss(student.image, student.text, teacher.image, teacher.text,
                                 scale(student_scale, options.student_scale),
                                 scale(teacher_scale, options.teacher_scale));
}

void AffinityMimickingImpl::pretty_print(std::ostream& stream) const {
  stream << "rarefy::distillation::AffinityMimicking(student_scale=" << options.student_scale
         << ", teacher_scale=" << options.teacher_scale << ")";
}

void EmbeddingMSEOptions::validate() const {
  FeatureAdapterOptions{student_features, teacher_features, std::nullopt}.validate("EmbeddingMSE");
}

EmbeddingMSEImpl::EmbeddingMSEImpl(const EmbeddingMSEOptions& options) : options(options) {
  options.validate();
  EmbeddingMSEImpl::reset();
}

void EmbeddingMSEImpl::reset() {
  if (options.student_features.has_value()) {
    adapter = register_module(
        "adapter", FeatureAdapter(FeatureAdapterOptions{options.student_features, options.teacher_features, -1}));
  }
}

torch::Tensor EmbeddingMSEImpl::forward(const torch::Tensor& student, const torch::Tensor& teacher) {
  return embedding_mse_loss(adapter.is_empty() ? student : adapter(student, teacher), teacher, options.normalize);
}

void EmbeddingMSEImpl::pretty_print(std::ostream& stream) const {
  stream << "rarefy::distillation::EmbeddingMSE(normalize=" << (options.normalize ? "true" : "false") << ")";
}

}  // namespace rarefy::distillation
