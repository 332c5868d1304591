// What a model computes when some of its channels are not there: the reference for structured pruning, as in
// tests/python/absence.py, which says how it works.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "structures.h"

namespace absence {

using torch::Tensor;
/// Of each tensor and dimension: the slices that stay.
using Kept = std::map<std::string, std::map<int64_t, std::vector<int64_t>>>;

/// Parameters and buffers by name, one tensor under several names as often.
std::map<std::string, Tensor> named_tensors(const torch::nn::Module& model);

/// The outputs of the model where every slice that is not kept is not there. Overwrites these slices with NaN.
std::vector<Tensor> run_without(structures::Model& model, const Kept& kept, const std::vector<Tensor>& inputs);

/// What is wrong with outputs; empty when they are the expected ones to within 1e-9.
std::string difference(const std::vector<Tensor>& expected, const std::vector<Tensor>& got);

}  // namespace absence
