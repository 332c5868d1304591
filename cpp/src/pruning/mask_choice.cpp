#include <ATen/core/grad_mode.h>
#include <ATen/ops/bitwise_and.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>
#include <rarefy/ops/mask.h>
#include <rarefy/pruning/mask_choice.h>

#include <algorithm>
#include <cmath>
#include <optional>

#include "ops/mask_checks.h"
#include "pruning/patterns.h"
#include "pruning/unit_mask.h"

namespace rarefy::pruning {
namespace {

using Members = std::vector<const Candidate*>;

/// The largest number below 1: as a sparsity it prunes everything.
constexpr double kAll = 1.0 - 0x1p-53;
/// How far a sparsity may be above 1 - n / m, for one that was computed as m - n over m.
constexpr double kSlack = 1e-9;

double fraction_of(int64_t count, int64_t elements) {
  return elements == 0 ? 0.0 : std::min(kAll, static_cast<double>(count) / static_cast<double>(elements));
}

/// Candidates that compete with each other.
struct Share {
  std::vector<size_t> members;
  double sparsity = 0.0;
};

void check_candidate(const Candidate& candidate, const Pattern& pattern) {
  const auto& [name, value, score, mask] = candidate;
  TORCH_CHECK_VALUE(value.defined(), "[choose_masks] '", name, "' must have a value, got an undefined tensor");
  ops::check_float("choose_masks", value, ("the value of '" + name + "'").c_str());
  if (score.defined()) {
    ops::check_float("choose_masks", score, ("the score of '" + name + "'").c_str());
    TORCH_CHECK_VALUE(score.sizes() == value.sizes(), "[choose_masks] the score of '", name, "' must have its shape ",
                      value.sizes(), ", got ", score.sizes());
    TORCH_CHECK_VALUE(score.device() == value.device(), "[choose_masks] the score of '", name,
                      "' must be on its device ", value.device(), ", got ", score.device());
  }
  if (mask.defined()) {
    TORCH_CHECK_VALUE(mask.scalar_type() == at::kByte && mask.numel() == ops::mask_bytes(value.numel()),
                      "[choose_masks] the mask of '", name, "' must hold ", ops::mask_bytes(value.numel()),
                      " bytes (uint8) for shape ", value.sizes(), ", got ", mask.numel(), " of ", mask.scalar_type());
    TORCH_CHECK_VALUE(mask.device() == value.device(), "[choose_masks] the mask of '", name, "' must be on its device ",
                      value.device(), ", got ", mask.device());
  }
  const auto why = misfit(pattern, value.sizes());
  TORCH_CHECK_VALUE(why.empty(), "[choose_masks] '", name, "' cannot have the pattern: ", why);
}

std::vector<Share> divide(const std::vector<Candidate>& candidates, const MaskChoice& choice) {
  std::vector<Share> shares;
  std::vector<size_t> rest;
  std::vector<char> used(choice.layers.size(), 0);
  for (size_t i = 0; i < candidates.size(); ++i) {
    std::optional<double> own;
    for (size_t k = 0; k < choice.layers.size(); ++k) {
      if (matches_parameter(choice.layers[k].first, candidates[i].name)) {
        used[k] = 1;
        own = own.has_value() ? own : choice.layers[k].second;
      }
    }
    if (own.has_value()) {
      shares.push_back({{i}, *own});
    } else {
      rest.push_back(i);
    }
  }
  for (size_t k = 0; k < used.size(); ++k) {
    TORCH_CHECK_VALUE(used[k], "[choose_masks] layers: '", choice.layers[k].first, "' matches no weight");
  }
  if (choice.scope == Scope::global) {
    if (!rest.empty()) {
      shares.push_back({rest, choice.sparsity});
    }
    return shares;
  }
  std::vector<std::vector<int64_t>> sizes;
  for (const size_t i : rest) {
    sizes.push_back(candidates[i].value.sizes().vec());
  }
  const auto counts = choice.scope == Scope::erk ? erk_counts(sizes, choice.sparsity) : std::vector<int64_t>();
  for (size_t k = 0; k < rest.size(); ++k) {
    shares.push_back(
        {{rest[k]}, counts.empty() ? choice.sparsity : fraction_of(counts[k], candidates[rest[k]].value.numel())});
  }
  return shares;
}

/// Throws the error of an operator about NaN with the name of the weight instead of its number.
void check_no_nan(const Members& members) {
  for (const auto* candidate : members) {
    const bool is_score = candidate->score.defined();
    const auto bad = (is_score ? candidate->score : candidate->value).isnan().flatten().nonzero();
    TORCH_CHECK_VALUE(bad.numel() == 0, "[choose_masks] ", is_score ? "scores" : "weights", " must not be NaN, got ",
                      bad.size(0), " NaN in '", candidate->name, "', the first at flat index ", bad[0].item<int64_t>());
  }
}

/// The operator's masks of these tensors, one of `members` each.
template <typename Operator>
auto named_errors(const Members& members, const Operator& call) {
  try {
    return call();
  } catch (const c10::ValueError&) {
    check_no_nan(members);
    throw;
  }
}

bool has_mask(const Candidate& candidate, bool regrow) { return candidate.mask.defined() && !regrow; }

/// What competes, as tensors of one meaning: magnitudes of weights, or scores.
struct Competitors {
  std::vector<at::Tensor> values;
  bool magnitude = true;

  explicit Competitors(const Members& members) {
    magnitude = std::none_of(members.begin(), members.end(), [](const auto* c) { return c->score.defined(); });
    for (const auto* candidate : members) {
      values.push_back(magnitude                    ? candidate->value
                       : candidate->score.defined() ? candidate->score
                                                    : candidate->value.abs());
    }
  }
};

std::vector<at::Tensor> element_masks(const Members& members, double sparsity, bool regrow) {
  const Competitors competitors(members);
  std::vector<at::Tensor> masks;
  if (std::any_of(members.begin(), members.end(), [&](const auto* c) { return has_mask(*c, regrow); })) {
    for (const auto* candidate : members) {
      masks.push_back(has_mask(*candidate, regrow) ? candidate->mask : ops::full_mask(candidate->value));
    }
  }
  const auto existing = masks.empty() ? std::nullopt : std::optional<at::TensorList>(masks);
  return named_errors(members, [&] {
    return competitors.magnitude ? ops::magnitude_mask(competitors.values, sparsity, existing)
                                 : ops::score_mask(competitors.values, sparsity, existing);
  });
}

/// How many elements an N:M mask of these sizes prunes.
int64_t nm_count(const NM& nm, at::IntArrayRef sizes) {
  const int64_t size = sizes[1], rest = size % nm.m;
  const int64_t per_line = size / nm.m * (nm.m - nm.n) + std::max<int64_t>(0, rest - nm.n);
  return c10::multiply_integers(sizes) / size * per_line;
}

std::vector<at::Tensor> nm_masks(const Members& members, const NM& nm, double sparsity, bool regrow) {
  const Competitors competitors(members);
  std::vector<at::Tensor> complete;  // N:M masks
  int64_t prunable = 0, total = 0;
  for (size_t i = 0; i < members.size(); ++i) {
    const auto mask = has_mask(*members[i], regrow) ? std::optional(members[i]->mask) : std::nullopt;
    complete.push_back(named_errors(
        {members[i]}, [&] { return ops::nm_mask(competitors.values[i], nm.n, nm.m, 1, mask, competitors.magnitude); }));
    prunable += nm_count(nm, members[i]->value.sizes());
    total += members[i]->value.numel();
  }
  const double final_sparsity = *implied_sparsity(nm);
  if (sparsity >= final_sparsity - kSlack) {
    return complete;
  }
  // On the way there: the least important of those that the complete masks prune.
  const bool is_exact = prunable * nm.m == total * (nm.m - nm.n);
  const int64_t count =
      is_exact ? ops::elements_to_prune(sparsity, total) : ops::elements_to_prune(sparsity / final_sparsity, prunable);
  std::vector<at::Tensor> alive, candidates, scores;
  int64_t dead = 0, competing = 0;
  for (size_t i = 0; i < members.size(); ++i) {
    const auto sizes = members[i]->value.sizes();
    alive.push_back(has_mask(*members[i], regrow) ? ops::unpack_mask(members[i]->mask, sizes)
                                                  : at::ones(sizes, complete[i].options().dtype(at::kBool)));
    candidates.push_back(at::bitwise_and(alive[i], ops::unpack_mask(complete[i], sizes).logical_not()));
    const auto score = competitors.values[i].masked_select(candidates[i]);
    scores.push_back(competitors.magnitude ? score.abs() : score);
    dead += members[i]->value.numel() - alive[i].sum().item<int64_t>();
    competing += scores[i].numel();
  }
  const int64_t more = std::clamp<int64_t>(count - dead, 0, competing);
  const auto chosen = ops::score_mask(scores, fraction_of(more, competing));
  std::vector<at::Tensor> out;
  for (size_t i = 0; i < members.size(); ++i) {
    out.push_back(
        ops::pack_mask(alive[i].masked_scatter(candidates[i], ops::unpack_mask(chosen[i], scores[i].sizes()))));
  }
  return out;
}

}  // namespace

Scope parse_scope(const std::string& name) {
  TORCH_CHECK_VALUE(name == "local" || name == "global" || name == "erk",
                    "[parse_scope] scope must be 'local', 'global' or 'erk', got '", name, "'");
  return name == "local" ? Scope::local : name == "global" ? Scope::global : Scope::erk;
}

const char* name(Scope scope) { return scope == Scope::local ? "local" : scope == Scope::global ? "global" : "erk"; }

void MaskChoice::validate() const {
  std::visit([](const auto& p) { p.validate(); }, pattern);
  const auto limit = implied_sparsity(pattern);
  const auto check = [&](double value, const std::string& what) {
    TORCH_CHECK_VALUE(value >= 0.0 && value < 1.0, "[MaskChoice] ", what, " must be in [0, 1), got ", value);
    TORCH_CHECK_VALUE(!limit.has_value() || value <= *limit + kSlack, "[MaskChoice] ", what,
                      " must be at most 1 - n / m = ", limit.value_or(0.0), " for ", short_name(pattern), ", got ",
                      value);
  };
  check(sparsity, "sparsity");
  for (const auto& [layer, own] : layers) {
    check(own, "the sparsity of layers '" + layer + "'");
  }
  TORCH_CHECK_VALUE(!limit.has_value() || scope != Scope::erk,
                    "[MaskChoice] scope 'erk' has other sparsities than 1 - n / m, got it for ", short_name(pattern));
}

std::vector<at::Tensor> choose_masks(const std::vector<Candidate>& candidates, const MaskChoice& choice) {
  choice.validate();
  const at::NoGradGuard no_grad;
  for (const auto& candidate : candidates) {
    check_candidate(candidate, choice.pattern);
  }
  std::vector<at::Tensor> out(candidates.size());
  for (const auto& share : divide(candidates, choice)) {
    Members members;
    for (const size_t i : share.members) {
      members.push_back(&candidates[i]);
      TORCH_CHECK_VALUE(candidates[i].value.device() == members[0]->value.device(),
                        "[choose_masks] weights that compete must be on one device, got ", members[0]->value.device(),
                        " of '", members[0]->name, "' and ", candidates[i].value.device(), " of '", candidates[i].name,
                        "'");
    }
    const auto* nm = std::get_if<NM>(&choice.pattern);
    const auto masks = std::holds_alternative<Unstructured>(choice.pattern)
                           ? element_masks(members, share.sparsity, choice.regrow)
                       : nm != nullptr ? nm_masks(members, *nm, share.sparsity, choice.regrow)
                                       : unit_masks(members, choice.pattern, share.sparsity, choice.regrow);
    for (size_t k = 0; k < masks.size(); ++k) {
      out[share.members[k]] = masks[k];
    }
  }
  return out;
}

}  // namespace rarefy::pruning
