#pragma once

#include <rarefy/nn/linear.h>
#include <rarefy/nn/quantizable.h>
#include <torch/arg.h>
#include <torch/nn/modules/common.h>
#include <torch/nn/modules/container/any.h>
#include <torch/nn/options/activation.h>

#include <map>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

namespace rarefy::nn {

/// Options of a MultiheadAttention: those of torch's, and what its Python type has beside them.
struct RAREFY_API MultiheadAttentionOptions {
  MultiheadAttentionOptions(int64_t embed_dim, int64_t num_heads);
  /// Those of a torch::nn::MultiheadAttention.
  MultiheadAttentionOptions(
      const torch::nn::MultiheadAttentionOptions& options);  // NOLINT(google-explicit-constructor)

  /// Width of query and result.
  TORCH_ARG(int64_t, embed_dim);
  /// Number of heads; need not divide embed_dim where head_dim is given.
  TORCH_ARG(int64_t, num_heads);
  /// Probability with which a probability is zeroed while training, in [0, 1).
  TORCH_ARG(double, dropout) = 0.0;
  TORCH_ARG(bool, bias) = true;
  /// A learned key and value behind those of the input.
  TORCH_ARG(bool, add_bias_kv) = false;
  /// A key and a value of zeros behind those of the input.
  TORCH_ARG(bool, add_zero_attn) = false;
  /// Widths of key and value; unset: embed_dim.
  TORCH_ARG(std::optional<int64_t>, kdim);
  TORCH_ARG(std::optional<int64_t>, vdim);
  /// Whether inputs and results are [N, length, width] instead of [length, N, width].
  TORCH_ARG(bool, batch_first) = false;
  /// Width of a head's query and key, and of its value; unset: embed_dim / num_heads, and head_dim.
  TORCH_ARG(std::optional<int64_t>, head_dim);
  TORCH_ARG(std::optional<int64_t>, v_head_dim);
  /// What scores are multiplied with; unset: 1 / sqrt(head_dim).
  TORCH_ARG(std::optional<double>, scale);
};

/// Takes the place of torch::nn::MultiheadAttention, with the names and shapes of its parameters. With h heads,
///
///   head_i = softmax(scale * (x Wq_i)(x Wk_i)^T + mask) x Wv_i,    result = [head_1, ..., head_h] Wo
///
/// Prepared, the inputs of the projections (`quant.input_query`, `quant.input_key`, `quant.input_value`) are quantized per tensor and
/// their weights (`quant.weight_query`, ...: those rows of `in_proj_weight`) per output channel where the configuration says so,
/// computed in integers where it allows; and what the heads multiply (`quant.query`, `quant.key`, `quant.probabilities`,
/// `quant.value`), with scores, masks and softmax in floating point. `out_proj` is a Linear with quantizers of its own, which are those
/// of the attention's configuration where no override names it. bias_k, bias_v and the zeros of add_zero_attn go through the
/// quantizers of the heads beside the keys and values.
///
/// Converted, it has int8 buffers q_proj_weight, k_proj_weight and v_proj_weight, also where the parameters were packed; what the heads
/// multiply stays simulated.
class RAREFY_API MultiheadAttentionImpl : public torch::nn::Cloneable<MultiheadAttentionImpl>, public Quantizable {
 public:
  MultiheadAttentionImpl(int64_t embed_dim, int64_t num_heads)
      : MultiheadAttentionImpl(MultiheadAttentionOptions(embed_dim, num_heads)) {}
  /// Throws c10::ValueError for sizes below 1, and for heads that do not divide embed_dim without head_dim.
  explicit MultiheadAttentionImpl(const MultiheadAttentionOptions& options);

  void reset() override;
  void reset_parameters();
  void pretty_print(std::ostream& stream) const override;
  std::string kind() const override { return "MultiheadAttention"; }
  bool has_weight() const override { return true; }
  void prepare(const quantization::LayerConfig& config, const quantization::Observer& default_observer) override;
  void convert() override;
  void restore(const ConvertedState& state) override;
  std::vector<std::string> tensor_names() const override;
  std::map<std::string, std::vector<int64_t>> converted_shapes() const override;

  /// Results [target, N, embed_dim] and, unless need_weights is off, the probabilities [N, target, source], or [N, heads, target,
  /// source] where average_attn_weights is off; undefined otherwise.
  ///   query, key, value  [target, N, embed_dim], [source, N, kdim], [source, N, vdim]; the batch first where batch_first says so;
  ///                      without N for one sequence
  ///   key_padding_mask   [N, source]: true (or -inf, which is added to the scores) where a key counts for nothing
  ///   attn_mask          [target, source] or [N * heads, target, source], the same for pairs
  /// Throws c10::ValueError for masks and inputs of other shapes; c10::TypeError for a mask that is neither.
  std::tuple<torch::Tensor, torch::Tensor> forward(const torch::Tensor& query, const torch::Tensor& key,
                                                   const torch::Tensor& value,
                                                   const torch::Tensor& key_padding_mask = {}, bool need_weights = true,
                                                   const torch::Tensor& attn_mask = {},
                                                   bool average_attn_weights = true);

  MultiheadAttentionOptions options;
  /// Parameters; undefined where the other form, or converted ones, take their place. bias_k and bias_v are [1, 1, width].
  torch::Tensor in_proj_weight, q_proj_weight, k_proj_weight, v_proj_weight;
  torch::Tensor in_proj_bias, bias_k, bias_v;
  Linear out_proj{nullptr};

 protected:
  FORWARD_HAS_DEFAULT_ARGS({3, torch::nn::AnyValue(torch::Tensor())}, {4, torch::nn::AnyValue(true)},
                           {5, torch::nn::AnyValue(torch::Tensor())}, {6, torch::nn::AnyValue(true)})

 private:
  int64_t head_dim() const { return *options.head_dim(); }
  int64_t v_head_dim() const { return *options.v_head_dim(); }
  bool is_packed() const { return *options.kdim() == options.embed_dim() && *options.vdim() == options.embed_dim(); }
  /// Rows of the projections of query, key and value.
  std::vector<int64_t> rows() const;
  std::vector<torch::Tensor> projections() const;
  torch::Tensor project(size_t part, const torch::Tensor& x, const torch::Tensor& weight, const torch::Tensor& bias);
  bool trains_in_integers(size_t part, const torch::Tensor& x) const;
  torch::Tensor mask_of(const torch::Tensor& key_padding_mask, const torch::Tensor& attn_mask, int64_t batch,
                        int64_t target, int64_t source, const torch::Tensor& like) const;
  torch::Tensor quantized(const std::string& name, const torch::Tensor& x) const;
  void become_integer(const std::vector<std::pair<std::string, torch::Tensor>>& tensors);

  QuantStateImpl::Specs specs_;
  std::optional<std::string> float_reason_;
};
TORCH_MODULE(MultiheadAttention);

}  // namespace rarefy::nn
