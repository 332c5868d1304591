// What the loss does with a student and a teacher that do not have the same classes.
#pragma once

#include <torch/types.h>

#include <string>

#include "ops/distillation_rule.h"

namespace rarefy::distillation {

enum class Vocabulary { error, truncate, pad, map };

/// Throws c10::ValueError for a name that is unknown, and for a label_map without "map" or the other way round; a map must be
/// int64 (c10::TypeError) with one axis.
Vocabulary vocabulary_of(const std::string& name, const torch::Tensor& label_map);

struct Aligned {
  torch::Tensor student;
  torch::Tensor teacher;
};

/// Logits [..., student classes] and [..., teacher classes] over the same classes: those of both for `truncate`, those of
/// either for `pad` (-inf where there is no logit), the student's for `map`. Throws c10::ValueError where they differ and the
/// policy is `error`, where the map does not fit, and where the divergence would be infinite whatever the logits are: p has
/// mass on a class that only the teacher has, q on one that only the student has.
Aligned align(const torch::Tensor& student, const torch::Tensor& teacher, Vocabulary vocabulary,
              const torch::Tensor& label_map, const ops::DistillationRule& rule);

}  // namespace rarefy::distillation
