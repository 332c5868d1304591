#include <ATen/ops/aminmax.h>
#include <ATen/ops/embedding.h>
#include <rarefy/nn/embedding.h>
#include <rarefy/ops/fake_quantize.h>
#include <torch/nn/init.h>

#include <ostream>

#include "ops/reduce_bags.h"

namespace rarefy::nn {
namespace {

/// Rows that were looked up, each on its grid; ranges follow the rows that are there.
torch::Tensor rows_on_grid(const torch::Tensor& rows, const torch::Tensor& indices, const torch::Tensor& weight,
                           quantization::FakeQuantizerImpl& quantizer) {
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
  const auto flat = rows.reshape({-1, weight.size(1)});
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

/// Rows of integers as the numbers that they stand for.
torch::Tensor dequantized_rows(const torch::Tensor& rows, const torch::Tensor& indices,
                               const quantization::FakeQuantizerImpl& quantizer) {
  const auto values = rows.to(torch::kFloat32);
  if (!quantizer.options.scheme.axis().has_value()) {
    return values * quantizer.scale;
  }
  return values * quantizer.scale.index({indices}).unsqueeze(-1);
}

template <typename Options>
std::optional<std::string> why_unsupported(const Options& options) {
  if (options.max_norm().has_value()) {
    return "max_norm is not supported: it rewrites the weight in forward";
  }
  return options.sparse() ? std::optional<std::string>("sparse gradients are not supported") : std::nullopt;
}

/// Whether rounding the rows that were looked up would not be what the quantizer does with the table.
bool needs_whole_table(const quantization::FakeQuantizerImpl& quantizer) {
  const auto& scheme = quantizer.options.scheme;
  return !scheme.is_plain() || !quantizer.learned.empty() || scheme.noise.has_value();
}

const char* name_of(const torch::nn::EmbeddingBagMode& mode) {
  if (std::holds_alternative<torch::enumtype::kMax>(mode)) {
    return "max";
  }
  return std::holds_alternative<torch::enumtype::kSum>(mode) ? "sum" : "mean";
}

EmbeddingBagOptions checked(EmbeddingBagOptions options) {
  const auto reason = why_unsupported(options);
  TORCH_CHECK_VALUE(!reason.has_value(), "[EmbeddingBag] ", reason.value_or(""));
  if (options.padding_idx().has_value() && *options.padding_idx() < 0) {
    options.padding_idx(options.num_embeddings() + *options.padding_idx());
  }
  return options;
}

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
  return why_unsupported(options);
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
  if (needs_whole_table(quantizer)) {
    return compute(indices, rounded().weight, {});
  }
  return rows_on_grid(compute(indices, weight, {}), indices, weight, quantizer);
}

torch::Tensor EmbeddingImpl::execute(const torch::Tensor& indices) {
  return dequantized_rows(compute(indices, weight, {}), indices, *quant->find("weight"));
}

torch::Tensor EmbeddingImpl::forward(const torch::Tensor& indices) {
  return mode_ == Mode::converted && packed_weight() == nullptr ? execute(indices) : run(indices);
}

std::optional<std::string> EmbeddingBagImpl::unsupported(const EmbeddingBagOptions& options) {
  return why_unsupported(options);
}

EmbeddingBagImpl::EmbeddingBagImpl(EmbeddingBagOptions options_) : options(checked(std::move(options_))) {
  reset();
  if (options._weight().defined()) {
    const torch::NoGradGuard no_grad;
    weight.copy_(options._weight());
  } else {
    reset_parameters();
  }
}

EmbeddingBagImpl::EmbeddingBagImpl(EmbeddingBagOptions options_, const torch::Tensor& given_weight)
    : options(checked(std::move(options_))) {
  reset();
  adopt(given_weight, {});
}

void EmbeddingBagImpl::register_floating() {
  weight = register_parameter("weight", torch::empty({options.num_embeddings(), options.embedding_dim()}));
}

void EmbeddingBagImpl::reset_parameters() {
  torch::nn::init::normal_(weight);
  if (options.padding_idx().has_value()) {
    const torch::NoGradGuard no_grad;
    weight[*options.padding_idx()].fill_(0);
  }
}

void EmbeddingBagImpl::pretty_print(std::ostream& stream) const {
  stream << "rarefy::nn::EmbeddingBag(num_embeddings=" << options.num_embeddings()
         << ", embedding_dim=" << options.embedding_dim() << ")";
}

void EmbeddingBagImpl::prepare(const quantization::LayerConfig& config,
                               const quantization::Observer& default_observer) {
  WeightedModule::prepare(config, default_observer);
  if (quant_state() != nullptr) {
    // Rows that no batch reaches have a range from the start.
    const torch::NoGradGuard no_grad;
    quant->find("weight")->forward(weight);
  }
}

torch::Tensor EmbeddingBagImpl::compute(const torch::Tensor& indices, const torch::Tensor& w, const torch::Tensor&) {
  return at::embedding(w, indices, -1, options.scale_grad_by_freq(), /*sparse=*/false);
}

torch::Tensor EmbeddingBagImpl::run_prepared(const torch::Tensor& indices) {
  auto& quantizer = *quant->find("weight");
  if (needs_whole_table(quantizer)) {
    return compute(indices, rounded().weight, {});
  }
  return rows_on_grid(compute(indices, weight, {}), indices, weight, quantizer);
}

torch::Tensor EmbeddingBagImpl::execute(const torch::Tensor& indices) {
  return dequantized_rows(compute(indices, weight, {}), indices, *quant->find("weight"));
}

torch::Tensor EmbeddingBagImpl::forward(const torch::Tensor& input, const torch::Tensor& offsets,
                                        const torch::Tensor& per_sample_weights) {
  const auto flat = input.reshape({-1});
  const auto rows = mode_ == Mode::converted && packed_weight() == nullptr ? execute(flat) : run(flat);
  const auto given = [](const torch::Tensor& x) { return x.defined() ? std::optional(x) : std::nullopt; };
  return ops::reduce_bags(rows, input, given(offsets), given(per_sample_weights), name_of(options.mode()),
                          options.include_last_offset(), options.padding_idx());
}

}  // namespace rarefy::nn
