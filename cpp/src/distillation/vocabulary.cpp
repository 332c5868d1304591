#include "distillation/vocabulary.h"

#include <ATen/TensorSubclassLikeUtils.h>
#include <c10/util/Exception.h>
#include <torch/torch.h>

#include <limits>

namespace rarefy::distillation {
namespace {

constexpr double kNoClass = -std::numeric_limits<double>::infinity();

/// Throws where the distribution that the divergence averages over has mass that the other one lacks.
void check_finite(const ops::DistillationRule& rule, bool teacher_only, bool student_only, const char* policy) {
  const bool infinite = rule.soft() && ((teacher_only && rule.divergence == Divergence::kl) ||
                                        (student_only && rule.divergence == Divergence::reverse_kl));
  TORCH_CHECK_VALUE(
      !infinite, "[DistillationLoss] vocabulary '", policy, "' gives the ", teacher_only ? "student" : "teacher",
      " probability 0 on classes that the ", teacher_only ? "teacher" : "student", " has alone, where the divergence '",
      rule.divergence == Divergence::kl ? "kl" : "reverse_kl", "' is infinite; use 'truncate' or another divergence");
}

/// Throws where labels are smoothed over classes that the student lacks.
void check_smoothing(const ops::DistillationRule& rule, int64_t of_student, int64_t of_teacher) {
  TORCH_CHECK_VALUE(
      of_student >= of_teacher || !rule.hard() || rule.label_smoothing == 0.0,
      "[DistillationLoss] label_smoothing must be 0 with vocabulary 'pad' for a student of fewer classes, ", of_student,
      " beside ", of_teacher, ", whose probability of the others is 0, got ", rule.label_smoothing, "; use 'truncate'");
}

torch::Tensor padded(const torch::Tensor& logits, int64_t classes) {
  const int64_t missing = classes - logits.size(-1);
  return missing == 0 ? logits : torch::constant_pad_nd(logits, {0, missing}, kNoClass);
}

torch::Tensor mapped(const torch::Tensor& teacher, const torch::Tensor& given, int64_t student_classes,
                     const ops::DistillationRule& rule) {
  const auto map = given.to(teacher.device());
  TORCH_CHECK_VALUE(map.size(0) == student_classes, "[DistillationLoss] label_map must have one entry for each of the ",
                    student_classes, " student classes, got ", map.size(0));
  if (map.is_cpu() && !at::isTensorSubclassLike(map)) {  // not where reading it waits for a GPU or breaks a trace
    const auto greatest = map.max().item<int64_t>(), least = map.min().item<int64_t>();
    TORCH_CHECK_VALUE(least >= -1 && greatest < teacher.size(-1),
                      "[DistillationLoss] label_map must hold teacher classes in [0, ", teacher.size(-1),
                      ") or -1, got ", least < -1 ? least : greatest);
    check_finite(rule, false, least < 0, "map");
  }
  const auto out = teacher.index_select(-1, map.clamp_min(0));
  return out.masked_fill(map < 0, kNoClass);
}

}  // namespace

Vocabulary vocabulary_of(const std::string& name, const torch::Tensor& label_map) {
  TORCH_CHECK_VALUE(name == "error" || name == "truncate" || name == "pad" || name == "map",
                    "[DistillationLoss] vocabulary must be 'error', 'truncate', 'pad' or 'map', got '", name, "'");
  TORCH_CHECK_VALUE((name == "map") == label_map.defined(),
                    "[DistillationLoss] label_map must be given with vocabulary 'map' and only then, got ",
                    label_map.defined() ? "one" : "none", " with '", name, "'");
  if (label_map.defined()) {
    TORCH_CHECK_TYPE(label_map.scalar_type() == torch::kInt64, "[DistillationLoss] label_map must be int64, got ",
                     label_map.scalar_type());
    TORCH_CHECK_VALUE(label_map.dim() == 1 && label_map.size(0) > 0,
                      "[DistillationLoss] label_map must have shape [student classes], got ", label_map.sizes());
    return Vocabulary::map;
  }
  return name == "error" ? Vocabulary::error : name == "truncate" ? Vocabulary::truncate : Vocabulary::pad;
}

Aligned align(const torch::Tensor& student, const torch::Tensor& teacher, Vocabulary vocabulary,
              const torch::Tensor& label_map, const ops::DistillationRule& rule) {
  if (vocabulary == Vocabulary::map) {
    return {student, mapped(teacher, label_map, student.size(-1), rule)};
  }
  const int64_t of_student = student.size(-1), of_teacher = teacher.size(-1);
  if (of_student == of_teacher) {
    return {student, teacher};
  }
  TORCH_CHECK_VALUE(vocabulary != Vocabulary::error,
                    "[DistillationLoss] student and teacher must have the same number of classes, got ", of_student,
                    " and ", of_teacher, "; vocabulary 'truncate', 'pad' or 'map' says what becomes of the others");
  if (vocabulary == Vocabulary::truncate) {
    const int64_t both = std::min(of_student, of_teacher);
    return {student.narrow(-1, 0, both), teacher.narrow(-1, 0, both)};
  }
  check_finite(rule, of_teacher > of_student, of_student > of_teacher, "pad");
  check_smoothing(rule, of_student, of_teacher);
  const int64_t either = std::max(of_student, of_teacher);
  return {padded(student, either), padded(teacher, either)};
}

}  // namespace rarefy::distillation
