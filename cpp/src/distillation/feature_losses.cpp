#include <ATen/ops/conv2d.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/rand.h>
#include <ATen/ops/zeros.h>
#include <rarefy/distillation/feature_losses.h>
#include <torch/library.h>

#include <cmath>

#include "distillation/loss_math.h"

namespace rarefy::distillation {
namespace {

/// The mask as [batch, positions], after the check that it is x's shape without features.
std::optional<at::Tensor> positions_mask(const char* function, const std::optional<at::Tensor>& mask,
                                         const at::Tensor& x, int64_t axis) {
  if (!mask.has_value()) {
    return std::nullopt;
  }
  auto sizes = x.sym_sizes().vec();
  sizes.erase(sizes.begin() + axis);
  check_mask(function, *mask, sizes);
  return mask->dim() == 1 ? mask->unsqueeze(1) : mask->flatten(1);
}

/// 0 where masked, so that what stands there takes part in nothing, NaN included.
at::Tensor cleared(const at::Tensor& positions, const std::optional<at::Tensor>& mask) {
  return mask.has_value() ? positions.masked_fill(mask->logical_not().unsqueeze(-1), 0.0) : positions;
}

}  // namespace

at::Tensor hint_loss(const at::Tensor& student, const at::Tensor& teacher, const std::optional<at::Tensor>& mask,
                     std::string_view loss, std::optional<int64_t> axis) {
  const FullPrecision full_precision;
  check_choice("hint_loss", "loss", loss, {"mse", "smooth_l1", "cosine"});
  const auto [s, t] = check_equal_pair("hint_loss", student, teacher, 2);
  const auto features = feature_axis("hint_loss", student, axis);
  const auto valid = positions_mask("hint_loss", mask, student, features);
  const auto a = cleared(as_positions(s, features), valid), b = cleared(as_positions(t, features), valid);
  if (loss == "cosine") {
    return masked_mean(1.0 - (normalize(a, -1) * normalize(b, -1)).sum(-1), valid);
  }
  return masked_mean((loss == "mse" ? (a - b).square() : huber(a, b)).mean(-1), valid);
}

at::Tensor attention_transfer_loss(const at::Tensor& student, const at::Tensor& teacher,
                                   const std::optional<at::Tensor>& mask, std::string_view variant, double power,
                                   std::optional<int64_t> axis) {
  const FullPrecision full_precision;
  constexpr auto function = "attention_transfer_loss";
  check_choice(function, "variant", variant, {"paper", "code"});
  TORCH_CHECK_VALUE(std::isfinite(power) && power >= 1.0, "[", function, "] power must be at least 1, got ", power);
  const auto [s, t] = check_pair(function, student, teacher, 3);
  const auto features = feature_axis(function, student, axis);
  TORCH_CHECK_VALUE(
      student.dim() == teacher.dim() && student.movedim(features, -1).sym_sizes().slice(0, student.dim() - 1) ==
                                            teacher.movedim(features, -1).sym_sizes().slice(0, student.dim() - 1),
      "[", function, "] teacher must have the student's positions, got shapes ", student.sym_sizes(), " and ",
      teacher.sym_sizes());
  const auto valid = positions_mask(function, mask, student, features);
  const auto map = [&](const at::Tensor& x) {
    const auto positions = divide_by_peak(cleared(as_positions(x, features), valid), {1, 2});
    return normalize((power == 2.0 ? positions.square() : positions.abs().pow(power)).sum(-1), -1);
  };
  const auto difference = map(s) - map(t);
  return variant == "paper" ? at::linalg_vector_norm(difference, 2, -1).mean()
                            : masked_mean(difference.square(), valid);
}

at::Tensor clear_masked(const at::Tensor& x, const at::Tensor& mask, std::optional<int64_t> axis) {
  TORCH_CHECK_VALUE(x.dim() >= 2, "[clear_masked] x must have at least 2 dimensions, got shape ", x.sym_sizes());
  const auto features = feature_axis("clear_masked", x, axis);
  auto sizes = x.sym_sizes().vec();
  sizes.erase(sizes.begin() + features);
  check_mask("clear_masked", mask, sizes);
  return x.masked_fill(mask.logical_not().unsqueeze(features), 0.0);
}

at::Tensor adapt_features(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                          std::optional<int64_t> axis) {
  TORCH_CHECK_TYPE(x.is_floating_point() && weight.is_floating_point(),
                   "[adapt_features] x and weight must be of floating point, got ", x.scalar_type(), " and ",
                   weight.scalar_type());
  TORCH_CHECK_VALUE(x.dim() >= 2, "[adapt_features] x must have at least 2 dimensions, got shape ", x.sym_sizes());
  const auto features = feature_axis("adapt_features", x, axis);
  TORCH_CHECK_VALUE(weight.dim() == 2 && weight.sym_size(1) == x.sym_size(features),
                    "[adapt_features] weight must have shape [out, ", x.sym_size(features), "] (x has ",
                    x.sym_size(features), " features at axis ", features, "), got ", weight.sym_sizes());
  const auto input = x.to(weight.scalar_type());
  if (x.dim() == 4 && features == 1) {
    return at::conv2d(input, weight.unsqueeze(-1).unsqueeze(-1), bias);
  }
  return at::linear(input.movedim(features, -1), weight, bias).movedim(-1, features);
}

TORCH_LIBRARY_FRAGMENT(rarefy, m) {
  m.def("hint_loss(Tensor student, Tensor teacher, Tensor? mask=None, *, str loss='mse', int? axis=None) -> Tensor");
  m.def(
      "attention_transfer_loss(Tensor student, Tensor teacher, Tensor? mask=None, *, str variant='paper', "
      "float power=2.0, int? axis=None) -> Tensor");
  m.def("clear_masked(Tensor x, Tensor mask, *, int? axis=None) -> Tensor");
  m.def("adapt_features(Tensor x, Tensor weight, Tensor? bias=None, *, int? axis=None) -> Tensor");
}

TORCH_LIBRARY_IMPL(rarefy, CompositeImplicitAutograd, m) {
  m.impl("hint_loss", &hint_loss);
  m.impl("attention_transfer_loss", &attention_transfer_loss);
  m.impl("clear_masked", &clear_masked);
  m.impl("adapt_features", &adapt_features);
}

void FeatureAdapterOptions::validate(const char* function) const {
  TORCH_CHECK_VALUE(student_features.has_value() == teacher_features.has_value(), "[", function,
                    "] student_features and teacher_features must be given together, got only ",
                    student_features.has_value() ? "student_features" : "teacher_features");
  for (const auto& [name, value] :
       {std::pair{"student_features", student_features}, std::pair{"teacher_features", teacher_features}}) {
    TORCH_CHECK_VALUE(value.value_or(1) >= 1, "[", function, "] ", name, " must be at least 1, got ", *value);
  }
}

FeatureAdapterImpl::FeatureAdapterImpl(const FeatureAdapterOptions& options) : options(options) {
  options.validate();
  FeatureAdapterImpl::reset();
}

void FeatureAdapterImpl::reset() {
  weight = register_parameter("weight", torch::Tensor(), /*requires_grad=*/false);
  bias = register_parameter("bias", torch::Tensor(), /*requires_grad=*/false);
  if (options.student_features.has_value()) {
    initialize(*options.student_features, *options.teacher_features);
  }
}

void FeatureAdapterImpl::initialize(int64_t student_features, int64_t teacher_features, const at::TensorOptions& like) {
  if (weight.defined()) {
    return;
  }
  const double bound = 1.0 / std::sqrt(static_cast<double>(student_features));
  const auto uniform = [&](at::IntArrayRef size) { return (at::rand(size, like) * 2.0 - 1.0) * bound; };
  options.student_features = student_features;
  options.teacher_features = teacher_features;
  weight = parameters_["weight"] = uniform({teacher_features, student_features}).requires_grad_();
  bias = parameters_["bias"] = uniform({teacher_features}).requires_grad_();
}

torch::Tensor FeatureAdapterImpl::forward(const torch::Tensor& student, const torch::Tensor& teacher) {
  if (!weight.defined()) {
    TORCH_CHECK_VALUE(student.dim() >= 2 && teacher.dim() == student.dim(),
                      "[FeatureAdapter] student and teacher must have as many dimensions, 2 or more, got shapes ",
                      student.sizes(), " and ", teacher.sizes());
    const auto axis = feature_axis("FeatureAdapter", student, options.axis);
    const bool wide = student.scalar_type() == torch::kDouble;
    initialize(student.size(axis), teacher.size(axis), student.options().dtype(wide ? torch::kDouble : torch::kFloat));
  }
  return adapt_features(student, weight, given(bias), options.axis);
}

void FeatureAdapterImpl::pretty_print(std::ostream& stream) const {
  stream << "rarefy::distillation::FeatureAdapter(";
  if (options.student_features.has_value()) {
    stream << *options.student_features << " -> " << *options.teacher_features << ")";
  } else {
    stream << "sizes of the first call)";
  }
}

void HintOptions::validate() const {
  check_choice("Hint", "loss", loss, {"mse", "smooth_l1", "cosine"});
  FeatureAdapterOptions{student_features, teacher_features, axis}.validate("Hint");
}

HintImpl::HintImpl(const HintOptions& options) : options(options) {
  options.validate();
  HintImpl::reset();
}

void HintImpl::reset() {
  adapter = register_module("adapter", FeatureAdapter(FeatureAdapterOptions{options.student_features,
                                                                            options.teacher_features, options.axis}));
}

torch::Tensor HintImpl::forward(const torch::Tensor& student, const torch::Tensor& teacher, const torch::Tensor& mask) {
  // What is masked must not reach the adapter: 0 times NaN would be in its gradient.
  const auto kept = mask.defined() ? clear_masked(student, mask, options.axis) : student;
  return hint_loss(adapter(kept, teacher), teacher, given(mask), options.loss, options.axis);
}

void HintImpl::pretty_print(std::ostream& stream) const {
  stream << "rarefy::distillation::Hint(loss=" << options.loss << ")";
}

torch::Tensor HiddenCosineImpl::forward(const torch::Tensor& student, const torch::Tensor& teacher,
                                        const torch::Tensor& mask) {
  return hint_loss(student, teacher, given(mask), "cosine");
}

void HiddenCosineImpl::pretty_print(std::ostream& stream) const { stream << "rarefy::distillation::HiddenCosine()"; }

void AttentionTransferOptions::validate(const char* function) const {
  check_choice(function, "variant", variant, {"paper", "code"});
  TORCH_CHECK_VALUE(std::isfinite(power) && power >= 1.0, "[", function, "] power must be at least 1, got ", power);
}

AttentionTransferImpl::AttentionTransferImpl(const AttentionTransferOptions& options) : options(options) {
  options.validate();
}

torch::Tensor AttentionTransferImpl::forward(const torch::Tensor& student, const torch::Tensor& teacher,
                                             const torch::Tensor& mask) {
  return attention_transfer_loss(student, teacher, given(mask), options.variant, options.power, options.axis);
}

void AttentionTransferImpl::pretty_print(std::ostream& stream) const {
  stream << "rarefy::distillation::AttentionTransfer(variant=" << options.variant << ", power=" << options.power << ")";
}

}  // namespace rarefy::distillation
