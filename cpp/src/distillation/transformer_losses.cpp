#include <ATen/ops/log_softmax.h>
#include <ATen/ops/matmul.h>
#include <rarefy/distillation/transformer_losses.h>
#include <torch/library.h>

#include <cmath>
#include <limits>

#include "distillation/loss_math.h"

namespace rarefy::distillation {
namespace {

/// What a masked score becomes: its exponential is 0, and a row of nothing else is still free of NaN.
constexpr double kMasked = -1e30;

constexpr double kInfinity = std::numeric_limits<double>::infinity();

/// Log-probabilities of scores [B, heads, N, N] over the keys that are not padding.
at::Tensor log_attention(const at::Tensor& scores, const std::optional<at::Tensor>& mask) {
  const auto kept =
      mask.has_value() ? scores.masked_fill(mask->logical_not().unsqueeze(1).unsqueeze(1), kMasked) : scores;
  return at::log_softmax(kept, -1);
}

/// The mask of tokens for rows [B, heads, N].
std::optional<at::Tensor> row_mask(const std::optional<at::Tensor>& mask, const at::Tensor& rows) {
  return mask.has_value() ? std::optional<at::Tensor>(mask->unsqueeze(1).expand_as(rows)) : std::nullopt;
}

/// log R of x [B, N, D], as [B, heads, N, N].
at::Tensor log_relations(const at::Tensor& x, const std::optional<at::Tensor>& mask, int64_t heads) {
  const auto kept = mask.has_value() ? x.masked_fill(mask->logical_not().unsqueeze(-1), 0.0) : x;
  const auto parts = kept.unflatten(-1, {heads, -1}).transpose(1, 2);
  const auto width = static_cast<double>(parts.sym_size(-1).guard_int(__FILE__, __LINE__));
  return log_attention(at::matmul(parts, parts.transpose(-1, -2)) / std::sqrt(width), mask);
}

}  // namespace

at::Tensor attention_relation_loss(const at::Tensor& student, const at::Tensor& teacher,
                                   const std::optional<at::Tensor>& mask, int64_t relation_heads) {
  const FullPrecision full_precision;
  constexpr auto function = "attention_relation_loss";
  const auto [s, t] = check_pair(function, student, teacher, 3);
  TORCH_CHECK_VALUE(relation_heads >= 1, "[", function, "] relation_heads must be at least 1, got ", relation_heads);
  for (const auto& x : {student, teacher}) {
    TORCH_CHECK_VALUE(x.dim() == 3 && x.sym_size(1) == student.sym_size(1), "[", function,
                      "] student and teacher must have shape [batch, tokens, width] with equal tokens, got ",
                      student.sym_sizes(), " and ", teacher.sym_sizes());
    TORCH_CHECK_VALUE(x.sym_size(2) % relation_heads == 0, "[", function, "] width must be a multiple of ",
                      relation_heads, " relation heads, got ", x.sym_size(2));
  }
  if (mask.has_value()) {
    check_mask(function, *mask, student.sym_sizes().slice(0, 2));
  }
  const auto rows = kl_divergence(log_relations(t, mask, relation_heads), log_relations(s, mask, relation_heads));
  return masked_mean(rows, row_mask(mask, rows));
}

at::Tensor attention_map_loss(const at::Tensor& student, const at::Tensor& teacher,
                              const std::optional<at::Tensor>& mask, std::string_view loss, bool scores) {
  const FullPrecision full_precision;
  constexpr auto function = "attention_map_loss";
  check_choice(function, "loss", loss, {"mse", "kl"});
  const auto [s, t] = check_equal_pair(function, student, teacher, 4);
  TORCH_CHECK_VALUE(student.dim() == 4 && student.sym_size(2) == student.sym_size(3), "[", function,
                    "] maps must have shape [batch, heads, tokens, tokens], got ", student.sym_sizes());
  if (mask.has_value()) {
    check_mask(function, *mask, c10::SymIntArrayRef{student.sym_size(0), student.sym_size(2)});
  }
  auto pairs = std::optional<at::Tensor>();
  auto a = s, b = t;
  if (mask.has_value()) {
    pairs = mask->unsqueeze(1).logical_and(mask->unsqueeze(2)).unsqueeze(1).expand_as(s);
    a = s.masked_fill(pairs->logical_not(), 0.0);
    b = t.masked_fill(pairs->logical_not(), 0.0);
  }
  if (loss == "mse") {
    // Scores of -inf on both sides, as above the diagonal of causal attention, agree.
    const auto absent = (a == -kInfinity).logical_and(b == -kInfinity);
    return masked_mean((a.masked_fill(absent, 0.0) - b.masked_fill(absent, 0.0)).square(), pairs);
  }
  const auto log_probability = [](const at::Tensor& x) { return x.clamp_min(1e-12).log(); };
  const auto rows = scores ? kl_divergence(log_attention(b, mask), log_attention(a, mask))
                           : (b * (log_probability(b) - log_probability(a))).sum(-1);
  return masked_mean(rows, row_mask(mask, rows));
}

TORCH_LIBRARY_FRAGMENT(rarefy, m) {
  m.def("attention_relation_loss(Tensor student, Tensor teacher, Tensor? mask, int relation_heads) -> Tensor");
  m.def(
      "attention_map_loss(Tensor student, Tensor teacher, Tensor? mask=None, *, str loss='mse', bool scores=False) -> "
      "Tensor");
}

TORCH_LIBRARY_IMPL(rarefy, CompositeImplicitAutograd, m) {
  m.impl("attention_relation_loss", &attention_relation_loss);
  m.impl("attention_map_loss", &attention_map_loss);
}

void MiniLMRelationsOptions::validate() const {
  TORCH_CHECK_VALUE(relation_heads >= 1, "[MiniLMRelations] relation_heads must be at least 1, got ", relation_heads);
  for (const double weight : weights) {
    check_not_negative("MiniLMRelations", "weights", weight);
  }
  TORCH_CHECK_VALUE(weights[0] + weights[1] + weights[2] > 0.0,
                    "[MiniLMRelations] weights must not all be 0, got 0, 0, 0");
}

MiniLMRelationsImpl::MiniLMRelationsImpl(const MiniLMRelationsOptions& options) : options(options) {
  options.validate();
}

torch::Tensor MiniLMRelationsImpl::forward(const QueryKeyValue& student, const QueryKeyValue& teacher,
                                           const torch::Tensor& mask) {
  torch::Tensor total;
  const auto add = [&](double weight, const torch::Tensor& s, const torch::Tensor& t) {
    if (weight > 0.0) {
      const auto loss = attention_relation_loss(s, t, given(mask), options.relation_heads) * weight;
      total = total.defined() ? total + loss : loss;
    }
  };
  add(options.weights[0], student.query, teacher.query);
  add(options.weights[1], student.key, teacher.key);
  add(options.weights[2], student.value, teacher.value);
  return total;
}

void MiniLMRelationsImpl::pretty_print(std::ostream& stream) const {
  stream << "rarefy::distillation::MiniLMRelations(relation_heads=" << options.relation_heads << ")";
}

void AttentionMapsOptions::validate() const { check_choice("AttentionMaps", "loss", loss, {"mse", "kl"}); }

AttentionMapsImpl::AttentionMapsImpl(const AttentionMapsOptions& options) : options(options) { options.validate(); }

torch::Tensor AttentionMapsImpl::forward(const torch::Tensor& student, const torch::Tensor& teacher,
                                         const torch::Tensor& mask) {
  return attention_map_loss(student, teacher, given(mask), options.loss, options.scores);
}

void AttentionMapsImpl::pretty_print(std::ostream& stream) const {
  stream << "rarefy::distillation::AttentionMaps(loss=" << options.loss << (options.scores ? ", scores" : "") << ")";
}

}  // namespace rarefy::distillation
