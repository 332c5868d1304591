// Rules and layouts that wanda, sparse_gpt and refit share.
#pragma once

#include <ATen/core/Tensor.h>
#include <rarefy/pruning/pattern.h>

#include <optional>
#include <string>

namespace rarefy::pruning {

/// Throws c10::ValueError unless the pattern is unstructured or N:M and the sparsity fits it; gives the sparsity.
double resolved_sparsity(const char* function, std::optional<double> sparsity, const Pattern& pattern);

/// Throws c10::ValueError unless 0 <= damping <= most, both finite.
void check_damping(const char* function, double damping, double most);

/// A copy of a weight as [groups, out / groups, features] on the CPU. Throws c10::ValueError for a weight that is not
/// floating point, has fewer than 2 dimensions or no elements, or is not finite.
at::Tensor grouped_rows(const char* function, const std::string& name, const at::Tensor& weight, int64_t groups,
                        at::ScalarType type);

/// The statistics of a weight's inputs with their first dimension, on the CPU in float64 or else float32.
///   dims  1 for norms, 2 for Hessians
at::Tensor checked_statistics(const char* function, const std::string& name, const at::Tensor& weight,
                              const at::Tensor& statistics, int64_t dims);

/// Grouped rows in the type, device and sizes of the weight.
at::Tensor ungrouped(const at::Tensor& rows, const at::Tensor& weight);

/// Adds to a note, after a semicolon where there is one already.
void add_note(std::string& note, const std::string& more);

}  // namespace rarefy::pruning
