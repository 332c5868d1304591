#pragma once

#include <rarefy/nn/weighted.h>
#include <torch/nn/modules/common.h>
#include <torch/nn/modules/container/any.h>
#include <torch/nn/options/embedding.h>

namespace rarefy::nn {

using EmbeddingOptions = torch::nn::EmbeddingOptions;

/// Takes the place of torch::nn::Embedding: indices of any shape to [..., embedding_dim]. Floating point until
/// rarefy::quantization::prepare_qat or prepare; a table of int8 rows after convert. Only the weight is quantized, per row
/// where the configuration says per channel; then only the rows that are looked up are rounded and observed, so that a step
/// costs as much as its batch, not as the table.
class RAREFY_API EmbeddingImpl : public WeightedModule<EmbeddingImpl> {
 public:
  EmbeddingImpl(int64_t num_embeddings, int64_t embedding_dim)
      : EmbeddingImpl(EmbeddingOptions(num_embeddings, embedding_dim)) {}
  /// Throws c10::ValueError for max_norm (it rewrites the weight in forward) and for sparse gradients.
  explicit EmbeddingImpl(EmbeddingOptions options);
  /// Over a weight that exists: [num_embeddings, embedding_dim].
  EmbeddingImpl(EmbeddingOptions options, const torch::Tensor& given_weight);

  /// Why an embedding with these options cannot be quantized; unset when it can.
  static std::optional<std::string> unsupported(const EmbeddingOptions& options);

  void reset_parameters();
  void pretty_print(std::ostream& stream) const override;
  std::string kind() const override { return "Embedding"; }
  void prepare(const quantization::LayerConfig& config, const quantization::Observer& default_observer) override;
  torch::Tensor forward(const torch::Tensor& indices);

  EmbeddingOptions options;

 protected:
  void register_floating() override;
  bool quantizes_input() const override { return false; }
  torch::Tensor compute(const torch::Tensor& indices, const torch::Tensor& w, const torch::Tensor& b) override;
  torch::Tensor run_prepared(const torch::Tensor& indices) override;
  torch::Tensor execute(const torch::Tensor& indices) override;
  torch::Tensor compute_packed(const torch::Tensor& indices, const quantization::QuantizedTensorParts& w,
                               const torch::Tensor& /*b*/) override {
    return quantization::packed_embedding(indices, w);
  }
};
TORCH_MODULE(Embedding);

using EmbeddingBagOptions = torch::nn::EmbeddingBagOptions;

/// Takes the place of torch::nn::EmbeddingBag: sums, means or largest values of rows, [bags, embedding_dim]. Quantized as
/// Embedding is.
class RAREFY_API EmbeddingBagImpl : public WeightedModule<EmbeddingBagImpl> {
 public:
  EmbeddingBagImpl(int64_t num_embeddings, int64_t embedding_dim)
      : EmbeddingBagImpl(EmbeddingBagOptions(num_embeddings, embedding_dim)) {}
  /// Throws c10::ValueError for max_norm (it rewrites the weight in forward) and for sparse gradients.
  explicit EmbeddingBagImpl(EmbeddingBagOptions options);
  /// Over a weight that exists: [num_embeddings, embedding_dim].
  EmbeddingBagImpl(EmbeddingBagOptions options, const torch::Tensor& given_weight);

  /// Why an embedding with these options cannot be quantized; unset when it can.
  static std::optional<std::string> unsupported(const EmbeddingBagOptions& options);

  void reset_parameters();
  void pretty_print(std::ostream& stream) const override;
  std::string kind() const override { return "EmbeddingBag"; }
  void prepare(const quantization::LayerConfig& config, const quantization::Observer& default_observer) override;
  torch::Tensor forward(const torch::Tensor& input, const torch::Tensor& offsets = {},
                        const torch::Tensor& per_sample_weights = {});

  EmbeddingBagOptions options;

 protected:
  void register_floating() override;
  bool quantizes_input() const override { return false; }
  torch::Tensor compute(const torch::Tensor& indices, const torch::Tensor& w, const torch::Tensor& b) override;
  torch::Tensor run_prepared(const torch::Tensor& indices) override;
  torch::Tensor execute(const torch::Tensor& indices) override;
  torch::Tensor compute_packed(const torch::Tensor& indices, const quantization::QuantizedTensorParts& w,
                               const torch::Tensor& /*b*/) override {
    return quantization::packed_embedding(indices, w);
  }
  FORWARD_HAS_DEFAULT_ARGS({1, torch::nn::AnyValue(torch::Tensor())}, {2, torch::nn::AnyValue(torch::Tensor())})
};
TORCH_MODULE(EmbeddingBag);

}  // namespace rarefy::nn
