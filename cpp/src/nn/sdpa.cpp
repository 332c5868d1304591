#include <ATen/ops/dropout.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/scaled_dot_product_attention.h>
#include <ATen/ops/softmax.h>
#include <rarefy/nn/sdpa.h>

#include <cmath>
#include <limits>
#include <ostream>

namespace rarefy::nn {

void SDPAImpl::pretty_print(std::ostream& stream) const { stream << "rarefy::nn::SDPA()"; }

torch::Tensor SDPAImpl::forward(const torch::Tensor& query, const torch::Tensor& key, const torch::Tensor& value,
                                const torch::Tensor& attn_mask, double dropout_p, bool is_causal,
                                std::optional<double> scale) {
  if (mode_ == Mode::floating) {
    return at::scaled_dot_product_attention(
        query, key, value, attn_mask.defined() ? std::optional(attn_mask) : std::nullopt, dropout_p, is_causal, scale);
  }
  TORCH_CHECK_VALUE(!is_causal || !attn_mask.defined(), "[SDPA] attn_mask must not be given beside is_causal");
  auto scores = at::matmul(quantized("query", query), quantized("key", key).transpose(-2, -1));
  scores = scores * scale.value_or(1.0 / std::sqrt(static_cast<double>(query.size(-1))));
  const auto mask = is_causal ? at::ones({scores.size(-2), scores.size(-1)},
                                         scores.options().dtype(torch::kBool).requires_grad(false))
                                    .tril()
                              : attn_mask;
  if (mask.defined()) {
    scores = mask.scalar_type() == torch::kBool
                 ? scores.masked_fill(mask.logical_not(), -std::numeric_limits<double>::infinity())
                 : scores + mask;
  }
  const auto weights = at::dropout(at::softmax(scores, -1), dropout_p, dropout_p > 0);
  return at::matmul(quantized("probabilities", weights), quantized("value", value));
}

}  // namespace rarefy::nn
