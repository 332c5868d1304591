#include "distillation/loss_math.h"

#include <ATen/core/Reduction.h>
#include <ATen/ops/any.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/smooth_l1_loss.h>
#include <ATen/ops/where.h>
#include <c10/util/Exception.h>

#include <cmath>
#include <limits>
#include <sstream>

namespace rarefy::distillation {
namespace {

at::ScalarType computation_type(const at::Tensor& student) {
  return student.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

void check_floating(const char* function, const char* name, const at::Tensor& x) {
  const auto type = x.scalar_type();
  TORCH_CHECK_TYPE(type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || type == at::kHalf, "[",
                   function, "] ", name, " must be float32, float64, bfloat16 or float16, got ", type);
}

}  // namespace

Pair check_pair(const char* function, const at::Tensor& student, const at::Tensor& teacher, int64_t dims) {
  check_floating(function, "student", student);
  check_floating(function, "teacher", teacher);
  TORCH_CHECK_VALUE(teacher.device() == student.device(), "[", function, "] teacher must be on the student's device ",
                    student.device(), ", got ", teacher.device());
  for (const auto& [name, x] : {std::pair{"student", student}, std::pair{"teacher", teacher}}) {
    TORCH_CHECK_VALUE(x.dim() >= dims, "[", function, "] ", name, " must have at least ", dims,
                      " dimensions, got shape ", x.sym_sizes());
    TORCH_CHECK_VALUE(x.sym_numel() >= 1, "[", function, "] ", name, " must not be empty, got shape ", x.sym_sizes());
  }
  TORCH_CHECK_VALUE(student.sym_size(0) == teacher.sym_size(0), "[", function,
                    "] student and teacher must have one batch size, got shapes ", student.sym_sizes(), " and ",
                    teacher.sym_sizes());
  const auto type = computation_type(student);
  return {student.to(type), teacher.detach().to(type)};
}

Pair check_equal_pair(const char* function, const at::Tensor& student, const at::Tensor& teacher, int64_t dims) {
  auto pair = check_pair(function, student, teacher, dims);
  TORCH_CHECK_VALUE(teacher.sym_sizes() == student.sym_sizes(), "[", function,
                    "] teacher must have the student's shape ", student.sym_sizes(), ", got ", teacher.sym_sizes());
  return pair;
}

void check_choice(const char* function, const char* name, std::string_view value,
                  std::initializer_list<std::string_view> choices) {
  std::ostringstream listed;
  for (const auto choice : choices) {
    if (choice == value) {
      return;
    }
    listed << (listed.tellp() > 0 ? ", " : "") << '\'' << choice << '\'';
  }
  TORCH_CHECK_VALUE(false, "[", function, "] ", name, " must be one of ", listed.str(), ", got '", value, "'");
}

void check_positive(const char* function, const char* name, double value) {
  TORCH_CHECK_VALUE(std::isfinite(value) && value > 0.0, "[", function, "] ", name,
                    " must be positive and finite, got ", value);
}

void check_temperature(const char* function, double temperature) {
  TORCH_CHECK_VALUE(temperature >= 1e-6 && temperature <= 1e6, "[", function,
                    "] temperature must be in [1e-6, 1e6], got ", temperature);
}

void check_not_negative(const char* function, const char* name, double value) {
  TORCH_CHECK_VALUE(std::isfinite(value) && value >= 0.0, "[", function, "] ", name,
                    " must be finite and not negative, got ", value);
}

void check_mask(const char* function, const at::Tensor& mask, c10::SymIntArrayRef positions) {
  TORCH_CHECK_TYPE(mask.scalar_type() == at::kBool, "[", function, "] mask must be bool (true counts), got ",
                   mask.scalar_type());
  TORCH_CHECK_VALUE(mask.sym_sizes() == positions, "[", function, "] mask must have shape ", positions, ", got ",
                    mask.sym_sizes());
  TORCH_CHECK_VALUE(!is_readable(mask) || mask.any().item<bool>(), "[", function,
                    "] mask must have a true element, got none");
}

int64_t feature_axis(const char* function, const at::Tensor& x, std::optional<int64_t> axis) {
  const int64_t chosen = axis.value_or(x.dim() == 4 ? 1 : -1);
  const int64_t wrapped = chosen < 0 ? chosen + x.dim() : chosen;
  TORCH_CHECK_VALUE(wrapped >= 1 && wrapped < x.dim(), "[", function, "] axis must be one of the features' axes, 1 to ",
                    x.dim() - 1, ", got ", chosen);
  return wrapped;
}

at::Tensor as_positions(const at::Tensor& x, int64_t axis) {
  const auto last = x.movedim(axis, -1);
  return last.dim() == 2 ? last.unsqueeze(1) : last.flatten(1, -2);
}

at::Tensor masked_mean(const at::Tensor& values, const std::optional<at::Tensor>& mask) {
  if (!mask.has_value()) {
    return values.mean();
  }
  return values.masked_fill(mask->logical_not(), 0.0).sum() / mask->sum();
}

double epsilon(const at::Tensor& x) {
  return x.scalar_type() == at::kDouble ? std::numeric_limits<double>::epsilon()
                                        : std::numeric_limits<float>::epsilon();
}

at::Tensor divide_by_peak(const at::Tensor& x, at::IntArrayRef axes) {
  const double least =
      (x.scalar_type() == at::kDouble ? std::numeric_limits<double>::min() : std::numeric_limits<float>::min()) /
      epsilon(x);
  const auto peak = x.detach().abs().amax(axes, /*keepdim=*/true);
  return x / peak.masked_fill(peak < least, std::numeric_limits<double>::infinity());
}

at::Tensor normalize(const at::Tensor& x, int64_t axis) {
  const auto scaled = divide_by_peak(x, axis);  // or the squares of small numbers were 0
  const auto norm = at::linalg_vector_norm(scaled, 2, axis, /*keepdim=*/true);
  return scaled / norm.masked_fill(norm == 0.0, std::numeric_limits<double>::infinity());
}

at::Tensor kl_divergence(const at::Tensor& log_p, const at::Tensor& log_q) {
  const auto p = log_p.exp();
  return (p * (log_p - log_q)).masked_fill(p == 0.0, 0.0).sum(-1);
}

at::Tensor huber(const at::Tensor& a, const at::Tensor& b) {
  return at::smooth_l1_loss(a, b, at::Reduction::None, /*beta=*/1.0);
}

}  // namespace rarefy::distillation
