#pragma once

#include <ATen/core/Tensor.h>
#include <rarefy/export.h>
#include <rarefy/pruning/report.h>

#include <optional>
#include <string>
#include <vector>

namespace rarefy::pruning {

struct NamedParameter {
  std::string name;  // "<module path>.<parameter>"
  at::Tensor value;
};

/// Which parameters to prune, as indices into the parameters given, and why the others are not.
struct Selection {
  std::vector<size_t> chosen;
  std::vector<LeftAlone> left_alone;
};

/// Chooses the parameters to prune.
///   parameters  all of a model's, in order; a tensor that comes again under another name is taken once, by its first
///   name. include     unset: every floating-point parameter that is called `weight` and has 2 or more dimensions.
///               set: those that a pattern matches, of 2 or more dimensions, or of any shape when given by full name.
///   exclude     patterns that are taken out again.
/// A pattern is compared with the parameter's full name ("layer1.0.conv1.weight") and its module's ("layer1.0.conv1");
/// * stands for any characters, dots too, and ? for one. Throws c10::ValueError for a pattern that matches no parameter
/// at all, and when nothing is chosen.
RAREFY_API Selection select_parameters(const std::vector<NamedParameter>& parameters,
                                       const std::optional<std::vector<std::string>>& include,
                                       const std::vector<std::string>& exclude);

}  // namespace rarefy::pruning
