#include <ATen/ops/aminmax.h>
#include <ATen/ops/dropout.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/zeros.h>
#include <rarefy/nn/lora.h>
#include <rarefy/ops/fake_quantize.h>
#include <torch/nn/init.h>
#include <torch/nn/options/linear.h>

#include <algorithm>
#include <cmath>
#include <ostream>
#include <utility>

namespace rarefy::nn {

LoRALinearImpl::LoRALinearImpl(const torch::nn::LinearImpl& linear, const LoRAOptions& options_)
    : options(options_),
      in_features(linear.options.in_features()),
      out_features(linear.options.out_features()),
      has_bias_(linear.bias.defined()) {
  const auto most = std::min(in_features, out_features);
  TORCH_CHECK_VALUE(options.rank >= 1 && options.rank <= most, "[LoRALinear] rank must be within [1, ", most, "], got ",
                    options.rank);
  TORCH_CHECK_VALUE(options.dropout >= 0 && options.dropout < 1, "[LoRALinear] dropout must be within [0, 1), got ",
                    options.dropout);
  const torch::NoGradGuard no_grad;
  if (options.base == LoRABase::floating) {
    weight = linear.weight;
  } else if (options.base == LoRABase::int8) {
    const auto values = linear.weight.detach().to(torch::kFloat32);
    const auto [low, high] = at::aminmax(values, 1);
    const auto [scale, zero_point] = ops::choose_qparams(low, high, -127, 127, /*symmetric=*/true);
    weight = ops::quantize(values, scale, zero_point, 0, -127, 127);
    weight_scale = scale;
  } else {
    packed = ops::pack_nf4(linear.weight);
  }
  bias = linear.bias;
  const auto of_weight = linear.weight.options().requires_grad(false);
  lora_a = at::empty({options.rank, in_features}, of_weight);
  lora_b = at::zeros({out_features, options.rank}, of_weight);
  torch::nn::init::kaiming_uniform_(lora_a, std::sqrt(5.0));
  LoRALinearImpl::reset();
}

void LoRALinearImpl::reset() {
  if (options.base == LoRABase::floating) {
    weight = register_parameter("weight", weight.detach(), /*requires_grad=*/false);
  } else if (options.base == LoRABase::int8) {
    weight = register_buffer("weight", weight);
    weight_scale = register_buffer("weight_scale", weight_scale);
  } else {
    packed.codes = register_buffer("weight_codes", packed.codes);
    packed.scale_codes = register_buffer("weight_scale_codes", packed.scale_codes);
    packed.scale_steps = register_buffer("weight_scale_steps", packed.scale_steps);
    packed.scale_mean = register_buffer("weight_scale_mean", packed.scale_mean);
  }
  if (has_bias_) {
    bias = register_parameter("bias", bias.detach(), /*requires_grad=*/false);
  }
  lora_a = register_parameter("lora_a", lora_a.detach());
  lora_b = register_parameter("lora_b", lora_b.detach());
}

void LoRALinearImpl::pretty_print(std::ostream& stream) const {
  constexpr const char* kNames[] = {"float", "int8", "nf4"};
  stream << "rarefy::nn::LoRALinear(in_features=" << in_features << ", out_features=" << out_features
         << ", rank=" << options.rank << ", base=" << kNames[static_cast<size_t>(options.base)] << ")";
}

torch::Tensor LoRALinearImpl::base_weight() const {
  switch (options.base) {
    case LoRABase::floating:
      return weight;
    case LoRABase::int8:
      return weight.to(torch::kFloat32) * weight_scale.unsqueeze(1);
    default:
      return ops::unpack_nf4(packed, in_features);
  }
}

torch::Tensor LoRALinearImpl::delta() const { return at::matmul(lora_b, lora_a) * scaling(); }

void LoRALinearImpl::merge() {
  const torch::NoGradGuard no_grad;
  merged_ = (base_weight() + delta()).detach();
}

torch::nn::Linear LoRALinearImpl::merged() const {
  torch::nn::Linear linear(torch::nn::LinearOptions(in_features, out_features).bias(has_bias_));
  linear->to(lora_a.device(), lora_a.scalar_type());
  const torch::NoGradGuard no_grad;
  linear->weight.copy_(base_weight() + delta());
  if (has_bias_) {
    linear->bias.copy_(bias);
  }
  linear->train(is_training());
  return linear;
}

torch::Tensor LoRALinearImpl::forward(const torch::Tensor& x) {
  const auto b = has_bias_ ? std::optional(bias) : std::nullopt;
  if (merged_.defined()) {
    return at::linear(x, merged_.to(x.scalar_type()), b);
  }
  const auto y = at::linear(x, base_weight().to(x.scalar_type()), b);
  return y + at::linear(at::linear(at::dropout(x, options.dropout, is_training()), lora_a), lora_b) * scaling();
}

}  // namespace rarefy::nn
