#include "ops/linear_distillation_loss_chunks.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/aminmax.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/maximum.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>

#include <algorithm>

namespace rarefy::ops {
namespace {

constexpr int64_t kLeastRows = 16;
constexpr double kLargestHalf = 65504.0;
constexpr int64_t kClassBlock = 8192;  // of a product that is rounded to 16 bits before it is added

/// The dtype in which the gradients of weight and bias are summed.
at::ScalarType sum_type(const at::Tensor& x) { return loss_type(x); }

void check_head(const char* name, const LinearHead& head, c10::SymIntArrayRef rows, const c10::SymInt& classes) {
  const auto type = head.hidden.scalar_type();
  TORCH_CHECK_TYPE(type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || type == at::kHalf,
                   "[linear_distillation_loss] ", name, "_hidden must be float32, float64, bfloat16 or float16, got ",
                   type);
  TORCH_CHECK_VALUE(head.hidden.dim() >= 1, "[linear_distillation_loss] ", name,
                    "_hidden must have shape [..., size], got a scalar");
  TORCH_CHECK_VALUE(head.hidden.sym_sizes().slice(0, static_cast<size_t>(head.hidden.dim()) - 1) == rows,
                    "[linear_distillation_loss] ", name, "_hidden must have the student's rows ", rows, ", got ",
                    head.hidden.sym_sizes());
  TORCH_CHECK_VALUE(head.weight.dim() == 2 && head.weight.sym_size(0) == classes &&
                        head.weight.sym_size(1) == head.hidden.sym_size(-1),
                    "[linear_distillation_loss] ", name, "_weight must have shape [", classes, ", ",
                    head.hidden.sym_size(-1), "] (classes, size), got ", head.weight.sym_sizes());
  const auto check_alike = [&](const char* part, const at::Tensor& x) {
    TORCH_CHECK_TYPE(x.scalar_type() == type, "[linear_distillation_loss] ", name, "_", part,
                     " must have the dtype of ", name, "_hidden, ", type, ", got ", x.scalar_type());
  };
  check_alike("weight", head.weight);
  if (head.bias.has_value()) {
    check_alike("bias", *head.bias);
    TORCH_CHECK_VALUE(head.bias->dim() == 1 && head.bias->sym_size(0) == classes, "[linear_distillation_loss] ", name,
                      "_bias must have shape [", classes, "], got ", head.bias->sym_sizes());
  }
}

void check_device(const char* name, const at::Tensor& x, const at::Tensor& student) {
  TORCH_CHECK_VALUE(x.device() == student.device(), "[linear_distillation_loss] ", name,
                    " must be on the device of student_hidden, ", student.device(), ", got ", x.device());
}

at::Tensor rows_of(const at::Tensor& x) { return x.reshape({-1, x.size(-1)}); }

/// The power of two by which h is divided so that no sum of products in g^T h overflows float16, at least 1: float64, on the
/// device. g may be the gradient of many rows and h may have large columns; what h loses is far below its largest.
at::Tensor overflow_divisor(const at::Tensor& g, const at::Tensor& h) {
  const auto largest = [](const at::Tensor& x) {
    const auto [low, high] = at::aminmax(x);
    return at::maximum(high, low.neg()).to(at::kDouble);
  };
  const auto bound = largest(g) * largest(h) * static_cast<double>(g.size(0));
  return bound.div_(kLargestHalf).log2_().ceil_().exp2_().clamp_min_(1.0);
}

/// total = (first ? 0 : total) + g^T h.
void add_weight_gradient(const at::Tensor& total, const at::Tensor& g, const at::Tensor& h, bool first) {
  const auto transposed = g.t();
  if (total.scalar_type() == g.scalar_type()) {
    if (first) {
      auto out = total;
      at::mm_out(out, transposed, h);
    } else {
      total.addmm_(transposed, h);
    }
    return;
  }
  const bool half = g.scalar_type() == at::kHalf;
  const auto divisor = half ? overflow_divisor(g, h) : at::Tensor();
  const auto rows = half ? h.to(at::kFloat).div_(divisor).to(at::kHalf) : h;
  for (int64_t begin = 0; begin < total.size(0); begin += kClassBlock) {
    const int64_t count = std::min(kClassBlock, total.size(0) - begin);
    auto product = at::mm(transposed.narrow(0, begin, count), rows);
    if (half) {
      product = product.to(total.scalar_type()).mul_(divisor);
    }
    auto part = total.narrow(0, begin, count);
    first ? part.copy_(product) : part.add_(product);
  }
}

}  // namespace

void check_linear_distillation_loss(const LinearDistillationArguments& arguments, const DistillationRule& rule) {
  const auto& [student, teacher, labels, row_weights, settings] = arguments;
  TORCH_CHECK_VALUE(rule.reduction != Reduction::none,
                    "[linear_distillation_loss] reduction must be 'mean' or 'sum', got 'none'");
  TORCH_CHECK_VALUE(student.hidden.dim() >= 1, "[linear_distillation_loss] student_hidden must have shape [..., size]");
  TORCH_CHECK_VALUE(student.weight.dim() == 2 && student.weight.sym_size(0) >= 1,
                    "[linear_distillation_loss] student_weight must have shape [classes, size], got ",
                    student.weight.sym_sizes());
  const auto rows = student.hidden.sym_sizes().slice(0, static_cast<size_t>(student.hidden.dim()) - 1);
  const auto classes = student.weight.sym_size(0);
  check_head("student", student, rows, classes);
  check_head("teacher", teacher, rows, classes);
  TORCH_CHECK_VALUE(student.hidden.sym_numel() >= 1,
                    "[linear_distillation_loss] student_hidden must have at least one row and one column, got ",
                    student.hidden.sym_sizes());
  check_device("student_weight", student.weight, student.hidden);
  check_device("teacher_hidden", teacher.hidden, student.hidden);
  check_device("teacher_weight", teacher.weight, student.hidden);
  if (student.bias.has_value()) {
    check_device("student_bias", *student.bias, student.hidden);
  }
  if (teacher.bias.has_value()) {
    check_device("teacher_bias", *teacher.bias, student.hidden);
  }
  TORCH_CHECK_VALUE(labels.has_value() || !rule.hard(),
                    "[linear_distillation_loss] labels must be given when alpha is below 1, got none with alpha ",
                    rule.alpha);
  if (labels.has_value()) {
    TORCH_CHECK_TYPE(labels->scalar_type() == at::kLong, "[linear_distillation_loss] labels must be int64, got ",
                     labels->scalar_type());
    TORCH_CHECK_VALUE(labels->sym_sizes() == rows, "[linear_distillation_loss] labels must have the student's rows ",
                      rows, ", got ", labels->sym_sizes());
    check_device("labels", *labels, student.hidden);
  }
  if (row_weights.has_value()) {
    TORCH_CHECK_TYPE(row_weights->is_floating_point(),
                     "[linear_distillation_loss] row_weights must be floating point, got ", row_weights->scalar_type());
    TORCH_CHECK_VALUE(row_weights->sym_sizes() == rows,
                      "[linear_distillation_loss] row_weights must have the student's rows ", rows, ", got ",
                      row_weights->sym_sizes());
    check_device("row_weights", *row_weights, student.hidden);
  }
}

LinearDistillationGradients empty_gradients(const LinearDistillationArguments& arguments,
                                            const LinearDistillationWants& wants) {
  const auto& student = arguments.student;
  const auto options = student.hidden.options();
  const auto sums = options.dtype(sum_type(student.hidden));
  const auto nothing = [](const at::TensorOptions& of) { return at::empty({0}, of); };
  return {at::empty({}, sums), wants.hidden ? at::empty_symint(student.hidden.sym_sizes(), options) : nothing(options),
          wants.weight ? at::empty_symint(student.weight.sym_sizes(), sums) : nothing(sums),
          wants.bias ? at::empty_symint({student.weight.sym_size(0)}, sums) : nothing(sums), at::empty({}, sums)};
}

LinearDistillationGradients linear_distillation_in_chunks(const LinearDistillationArguments& arguments,
                                                          const LinearDistillationWants& wants,
                                                          const LinearDistillationDevice& device,
                                                          const at::Tensor& weights, const at::Tensor& scale) {
  const at::AutoDispatchBelowADInplaceOrView below;  // the operator's gradient is its own
  const auto& student = arguments.student;
  const auto& teacher = arguments.teacher;
  const auto student_rows = rows_of(student.hidden), teacher_rows = rows_of(teacher.hidden);
  const auto labels = arguments.labels.has_value() ? arguments.labels->reshape({-1}) : at::Tensor();
  const int64_t classes = student.weight.size(0), count = student_rows.size(0);
  const auto type = student_rows.scalar_type(), sums = sum_type(student_rows);
  const auto options = student_rows.options();

  LinearDistillationGradients out;
  out.scale = scale;
  out.hidden = wants.hidden ? device.allocate(student.hidden.sizes(), type) : at::empty({0}, options);
  out.weight = wants.weight ? device.allocate(student.weight.sizes(), sums) : at::empty({0}, options.dtype(sums));
  out.bias = wants.bias ? at::zeros({classes}, options.dtype(sums)) : at::empty({0}, options.dtype(sums));
  const auto hidden_out = wants.hidden ? out.hidden.view({-1, student_rows.size(1)}) : at::Tensor();

  const auto logits_of = [&](const at::Tensor& rows, const LinearHead& head) {
    auto logits = device.matmul_transposed(rows, head.weight);
    return head.bias.has_value() ? logits.add_(*head.bias) : logits;
  };
  // 16 bits do not hold the logits of a teacher of another dtype.
  const auto logits_type = type == teacher_rows.scalar_type() ? type : sums;
  const int64_t row_bytes = 2 * classes * static_cast<int64_t>(c10::elementSize(logits_type));
  // Chunks of one size: the last is not a small one.
  const int64_t most = std::max(kLeastRows, device.chunk_bytes / row_bytes);
  const int64_t chunks = (count + most - 1) / most;
  const int64_t step = (count + chunks - 1) / chunks;
  auto total = at::zeros({}, options.dtype(at::kDouble));
  for (int64_t first = 0; first < count; first += step) {
    const int64_t size = std::min(step, count - first);
    const auto part = [&](const at::Tensor& x) { return x.defined() ? x.narrow(0, first, size) : x; };
    const auto rows = part(student_rows);
    auto logits = logits_of(rows, student).to(logits_type);
    total.add_(device.distill(logits, logits_of(part(teacher_rows), teacher).to(logits_type), part(labels),
                              part(weights), wants.any()));
    if (wants.any()) {
      logits = logits.to(type);
    }
    if (wants.hidden) {
      part(hidden_out).copy_(device.matmul_transposed(logits, student.weight.t()));
    }
    if (wants.weight) {
      add_weight_gradient(out.weight, logits, rows, first == 0);
    }
    if (wants.bias) {
      out.bias.add_(logits.sum(0, /*keepdim=*/false, sums));
    }
  }
  // Where the gradients wait for the scale, the sum does too.
  out.loss = total.mul_(scale).to(sums);
  return out;
}

}  // namespace rarefy::ops
