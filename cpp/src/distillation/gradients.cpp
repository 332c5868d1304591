#include "distillation/gradients.h"

#include <ATen/ops/_amp_foreach_non_finite_check_and_unscale.h>
#include <ATen/ops/_foreach_mul.h>
#include <ATen/ops/_foreach_norm.h>
#include <ATen/ops/full.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/autograd.h>

#include <cmath>

namespace rarefy::distillation {
namespace {

torch::Tensor total_norm(const std::vector<torch::Tensor>& gradients) {
  auto norms = at::_foreach_norm(gradients, 2);
  for (auto& norm : norms) {
    norm = norm.to(norms.front().device());
  }
  return at::linalg_vector_norm(at::stack(norms), 2);
}

}  // namespace

std::vector<torch::Tensor> gradients_of(const std::vector<torch::Tensor>& parameters) {
  std::vector<torch::Tensor> all;
  for (const auto& parameter : parameters) {
    if (parameter.grad().defined()) {
      all.push_back(parameter.grad());
    }
  }
  return all;
}

bool unscale(const std::vector<torch::Tensor>& gradients, double scale) {
  if (gradients.empty()) {
    return true;
  }
  const torch::NoGradGuard no_grad;
  const auto options = gradients.front().options().dtype(torch::kFloat);
  auto found = at::zeros({1}, options);
  at::_amp_foreach_non_finite_check_and_unscale_(gradients, found, at::full({1}, 1.0 / scale, options));
  return found.item<float>() == 0.0f;
}

double clip_norm(const std::vector<torch::Tensor>& gradients, double max_norm) {
  if (gradients.empty()) {
    return 0.0;
  }
  const torch::NoGradGuard no_grad;
  const auto norm = total_norm(gradients);
  const double value = norm.item<double>();
  if (std::isfinite(value)) {
    at::_foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp_max(1.0));
  }
  return value;
}

std::vector<double> gradient_norms(const std::vector<torch::Tensor>& scalars,
                                   const std::vector<torch::Tensor>& parameters) {
  std::vector<torch::Tensor> trained;
  for (const auto& parameter : parameters) {
    if (parameter.requires_grad()) {
      trained.push_back(parameter);
    }
  }
  std::vector<double> norms;
  for (const auto& scalar : scalars) {
    if (!scalar.requires_grad() || trained.empty()) {
      norms.push_back(0.0);
      continue;
    }
    std::vector<torch::Tensor> found;
    for (auto& gradient : torch::autograd::grad({scalar}, trained, {}, /*retain_graph=*/true, /*create_graph=*/false,
                                                /*allow_unused=*/true)) {
      if (gradient.defined()) {
        found.push_back(gradient);
      }
    }
    norms.push_back(found.empty() ? 0.0 : total_norm(found).item<double>());
  }
  return norms;
}

}  // namespace rarefy::distillation
