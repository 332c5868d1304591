#include <ATen/core/grad_mode.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/zeros_like.h>
#include <c10/util/Exception.h>
#include <rarefy/ops/mask.h>
#include <rarefy/pruning/one_shot_score.h>
#include <torch/csrc/autograd/autograd.h>

#include <cmath>

namespace rarefy::pruning {
namespace {

using Tensors = std::vector<at::Tensor>;

/// Makes parameters require a gradient, and gives them back as they were.
class Differentiable {
 public:
  explicit Differentiable(const Tensors& parameters) {
    for (const auto& parameter : parameters) {
      if (!parameter.requires_grad()) {
        frozen_.push_back(parameter);
        parameter.set_requires_grad(true);
      }
    }
  }
  ~Differentiable() {
    for (const auto& parameter : frozen_) {
      parameter.set_requires_grad(false);
    }
  }
  Differentiable(const Differentiable&) = delete;
  Differentiable& operator=(const Differentiable&) = delete;
  Differentiable(Differentiable&&) = delete;
  Differentiable& operator=(Differentiable&&) = delete;

 private:
  Tensors frozen_;
};

Tensors check(const char* function, const std::vector<NamedParameter>& parameters) {
  TORCH_CHECK_VALUE(!parameters.empty(), "[", function, "] needs at least one parameter, got none");
  Tensors values;
  for (const auto& [name, value] : parameters) {
    TORCH_CHECK_VALUE(value.defined() && value.is_floating_point() && value.is_leaf(), "[", function, "] '", name,
                      "' must be a floating-point parameter");
    TORCH_CHECK_VALUE(at::isfinite(value.detach()).all().item<bool>(), "[", function,
                      "] weights must be finite, got NaN or infinity in '", name, "'");
    values.push_back(value);
  }
  return values;
}

at::Tensor checked_loss(const char* function, const LossFunction& loss) {
  auto value = loss();
  TORCH_CHECK_VALUE(value.defined() && value.numel() == 1 && value.is_floating_point(), "[", function,
                    "] a loss must be one number, got ",
                    value.defined() ? c10::str("sizes ", value.sizes()) : std::string("nothing"));
  TORCH_CHECK_VALUE(std::isfinite(value.item<double>()), "[", function, "] a loss must be finite, got ",
                    value.item<double>());
  TORCH_CHECK_VALUE(value.requires_grad(), "[", function, "] a loss must depend on the parameters");
  return value.reshape({});
}

/// Undefined gradients are those of parameters that take no part.
void add(Tensors& sums, const Tensors& terms) {
  for (size_t i = 0; i < sums.size(); ++i) {
    if (terms[i].defined()) {
      sums[i].add_(terms[i].detach());
    }
  }
}

Tensors zeros(const Tensors& like) {
  Tensors out;
  for (const auto& tensor : like) {
    out.push_back(at::zeros_like(
        tensor.detach(), tensor.options().dtype(tensor.scalar_type() == at::kDouble ? at::kDouble : at::kFloat)));
  }
  return out;
}

/// The gradient of the mean loss.
Tensors mean_gradient(const char* function, const Tensors& values, const std::vector<LossFunction>& losses) {
  TORCH_CHECK_VALUE(!losses.empty(), "[", function, "] needs at least one batch, got none");
  auto sums = zeros(values);
  for (const auto& loss : losses) {
    add(sums, torch::autograd::grad({checked_loss(function, loss)}, values, {}, /*retain_graph=*/std::nullopt,
                                    /*create_graph=*/false, /*allow_unused=*/true));
  }
  for (auto& sum : sums) {
    sum.div_(static_cast<double>(losses.size()));
  }
  return sums;
}

ElementScores named(const char* function, const std::vector<NamedParameter>& parameters, Tensors scores) {
  ElementScores out;
  for (size_t i = 0; i < parameters.size(); ++i) {
    TORCH_CHECK_VALUE(at::isfinite(scores[i]).all().item<bool>(), "[", function,
                      "] gradients must be finite, got NaN or infinity in that of '", parameters[i].name, "'");
    out.emplace(parameters[i].name, std::move(scores[i]));
  }
  return out;
}

}  // namespace

ElementScores snip(const std::vector<NamedParameter>& parameters, const std::vector<LossFunction>& losses) {
  const auto values = check("snip", parameters);
  const Differentiable differentiable(values);
  const at::AutoGradMode record(true);
  auto scores = mean_gradient("snip", values, losses);
  const at::NoGradGuard no_grad;
  double sum = 0;
  for (size_t i = 0; i < values.size(); ++i) {
    scores[i].mul_(values[i]).abs_();
    sum += scores[i].sum(at::kDouble).item<double>();
  }
  if (sum > 0) {
    for (auto& score : scores) {
      score.div_(sum);
    }
  }
  return named("snip", parameters, std::move(scores));
}

ElementScores grasp(const std::vector<NamedParameter>& parameters, const std::vector<LossFunction>& losses) {
  const auto values = check("grasp", parameters);
  const Differentiable differentiable(values);
  const at::AutoGradMode record(true);
  const auto gradient = mean_gradient("grasp", values, losses);
  auto products = zeros(values);
  for (const auto& loss : losses) {
    const auto own = torch::autograd::grad({checked_loss("grasp", loss)}, values, {}, /*retain_graph=*/true,
                                           /*create_graph=*/true, /*allow_unused=*/true);
    at::Tensor inner;  // <g, gradient of this batch>, g being constant: its gradient is H g
    for (size_t i = 0; i < values.size(); ++i) {
      if (own[i].defined() && own[i].requires_grad()) {
        const auto term = (own[i] * gradient[i]).sum();
        inner = inner.defined() ? inner + term : term;
      }
    }
    if (inner.defined()) {  // else the loss is linear in all parameters, and H is zero
      add(products, torch::autograd::grad({inner}, values, {}, /*retain_graph=*/std::nullopt, /*create_graph=*/false,
                                          /*allow_unused=*/true));
    }
  }
  const at::NoGradGuard no_grad;
  for (size_t i = 0; i < values.size(); ++i) {
    products[i].mul_(values[i]).div_(static_cast<double>(losses.size()));
  }
  return named("grasp", parameters, std::move(products));
}

void SynFlowOptions::validate() const {
  TORCH_CHECK_VALUE(sparsity >= 0.0 && sparsity < 1.0, "[synflow] sparsity must be in [0, 1), got ", sparsity);
  TORCH_CHECK_VALUE(rounds >= 1, "[synflow] rounds must be at least 1, got ", rounds);
}

ElementScores synflow(const std::vector<NamedParameter>& parameters, const std::function<at::Tensor()>& forward,
                      const SynFlowOptions& options) {
  options.validate();
  const auto values = check("synflow", parameters);
  Tensors masks;
  for (const auto& [name, value] : parameters) {
    TORCH_CHECK_VALUE(value.requires_grad() && value.numel() == value.detach().ge(0).sum().item<int64_t>(),
                      "[synflow] the working copy of '", name, "' must require a gradient and have no negative value");
    masks.push_back(ops::full_mask(value));
  }
  Tensors scores;
  for (int64_t round = 1; round <= options.rounds; ++round) {
    {
      const at::AutoGradMode record(true);
      const auto output = forward();
      TORCH_CHECK_VALUE(output.defined() && output.requires_grad(),
                        "[synflow] the output must depend on the parameters");
      const auto flow = output.sum();
      TORCH_CHECK_VALUE(std::isfinite(flow.item<double>()), "[synflow] the output must be finite, got a sum of ",
                        flow.item<double>());
      scores = zeros(values);
      add(scores, torch::autograd::grad({flow}, values, {}, /*retain_graph=*/std::nullopt, /*create_graph=*/false,
                                        /*allow_unused=*/true));
    }
    const at::NoGradGuard no_grad;
    for (size_t i = 0; i < values.size(); ++i) {
      scores[i].mul_(values[i]);
      // A network that is not positive everywhere can give negative flow, which is the least.
      scores[i].clamp_min_(0);
    }
    if (round == options.rounds) {
      break;
    }
    const double kept =
        std::pow(1.0 - options.sparsity, static_cast<double>(round) / static_cast<double>(options.rounds));
    masks = ops::magnitude_mask(scores, 1.0 - kept, at::TensorList(masks));
    for (size_t i = 0; i < values.size(); ++i) {
      auto data = values[i].detach();
      ops::apply_mask_(data, masks[i]);
    }
  }
  return named("synflow", parameters, std::move(scores));
}

}  // namespace rarefy::pruning
