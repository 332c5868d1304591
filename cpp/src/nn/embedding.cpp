#include <ATen/ops/aminmax.h>
#include <ATen/ops/embedding.h>
#include <rarefy/nn/embedding.h>
#include <rarefy/ops/fake_quantize.h>
#include <torch/nn/init.h>

#include <ostream>

namespace rarefy::nn {
namespace {

EmbeddingOptions checked(EmbeddingOptions options) {
  const auto reason = EmbeddingImpl::unsupported(options);
  TORCH_CHECK_VALUE(!reason.has_value(), "[Embedding] ", reason.value_or(""));
  // As torch's does: a negative index counts from the end.
  if (options.padding_idx().has_value() && *options.padding_idx() < 0) {
    options.padding_idx(options.num_embeddings() + *options.padding_idx());
  }
  return options;
}

}  // namespace

std::optional<std::string> EmbeddingImpl::unsupported(const EmbeddingOptions& options) {
  if (options.max_norm().has_value()) {
    return "max_norm is not supported: it rewrites the weight in forward";
  }
  return options.sparse() ? std::optional<std::string>("sparse gradients are not supported") : std::nullopt;
}

EmbeddingImpl::EmbeddingImpl(EmbeddingOptions options_) : options(checked(std::move(options_))) {
  reset();
  if (options._weight().defined()) {
    const torch::NoGradGuard no_grad;
    weight.copy_(options._weight());
  } else {
    reset_parameters();
  }
}

EmbeddingImpl::EmbeddingImpl(EmbeddingOptions options_, const torch::Tensor& given_weight)
    : options(checked(std::move(options_))) {
  reset();
  adopt(given_weight, {});
}

void EmbeddingImpl::register_floating() {
  weight = register_parameter("weight", torch::empty({options.num_embeddings(), options.embedding_dim()}));
}

void EmbeddingImpl::reset_parameters() {
  torch::nn::init::normal_(weight);
  if (options.padding_idx().has_value()) {
    const torch::NoGradGuard no_grad;
    weight[*options.padding_idx()].fill_(0);
  }
}

void EmbeddingImpl::pretty_print(std::ostream& stream) const {
  stream << "rarefy::nn::Embedding(num_embeddings=" << options.num_embeddings()
         << ", embedding_dim=" << options.embedding_dim() << ")";
}

void EmbeddingImpl::prepare(const quantization::LayerConfig& config, const quantization::Observer& default_observer) {
  WeightedModule::prepare(config, default_observer);
  if (quant_state() != nullptr) {
    // Rows that no batch reaches have a range from the start.
    const torch::NoGradGuard no_grad;
    quant->find("weight")->forward(weight);
  }
}

torch::Tensor EmbeddingImpl::compute(const torch::Tensor& indices, const torch::Tensor& w, const torch::Tensor&) {
  return at::embedding(w, indices, options.padding_idx().value_or(-1), options.scale_grad_by_freq(),
                       /*sparse=*/false);
}

torch::Tensor EmbeddingImpl::run_prepared(const torch::Tensor& indices) {
  auto& quantizer = *quant->find("weight");
  if (!quantizer.options.scheme.is_plain()) {
    return compute(indices, quantizer.forward(weight), {});
  }
  const auto rows = compute(indices, weight, {});
  if (!quantizer.quantize || rows.numel() == 0) {
    return rows;
  }
  const auto& scheme = quantizer.options.scheme;
  if (!scheme.axis().has_value()) {
    if (quantizer.observe) {
      const torch::NoGradGuard no_grad;
      quantizer.forward(weight);
    }
    return ops::fake_quantize(rows, quantizer.scale, quantizer.zero_point, std::nullopt, scheme.qmin(), scheme.qmax());
  }
  const auto flat = rows.reshape({-1, options.embedding_dim()});
  const auto index = indices.reshape({-1});
  torch::Tensor scale, zero_point;
  {
    const torch::NoGradGuard no_grad;
    if (quantizer.observe) {
      const auto [low, high] = at::aminmax(flat.detach().to(torch::kFloat32), 1);
      std::tie(scale, zero_point) = ops::choose_qparams(low, high, scheme.qmin(), scheme.qmax(), scheme.symmetric);
      quantizer.min_val.index_put_({index}, low);
      quantizer.max_val.index_put_({index}, high);
      quantizer.scale.index_put_({index}, scale);
      quantizer.zero_point.index_put_({index}, zero_point);
    } else {
      scale = quantizer.scale.index_select(0, index);
      zero_point = quantizer.zero_point.index_select(0, index);
    }
  }
  return ops::fake_quantize(flat, scale, zero_point, 0, scheme.qmin(), scheme.qmax()).view(rows.sizes());
}

torch::Tensor EmbeddingImpl::execute(const torch::Tensor& indices) {
  const auto rows = compute(indices, weight, {}).to(torch::kFloat32);
  const auto& quantizer = *quant->find("weight");
  if (!quantizer.options.scheme.axis().has_value()) {
    return rows * quantizer.scale;
  }
  return rows * quantizer.scale.index({indices}).unsqueeze(-1);
}

torch::Tensor EmbeddingImpl::forward(const torch::Tensor& indices) {
  return mode_ == Mode::converted ? execute(indices) : run(indices);
}

}  // namespace rarefy::nn
