#include <c10/core/GradMode.h>
#include <c10/util/Exception.h>
#include <rarefy/pruning/importance.h>
#include <torch/nn/module.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <unordered_map>

#include "pruning/slice_sums.h"
#include "pruning/unit_values.h"

namespace rarefy::pruning {
namespace {

Values reduced(const std::vector<Values>& members, Reduction reduction) {
  Values out = members.front();
  for (size_t m = 1; m < members.size(); ++m) {
    for (size_t unit = 0; unit < out.size(); ++unit) {
      out[unit] = reduction == Reduction::max ? std::max(out[unit], members[m][unit]) : out[unit] + members[m][unit];
    }
  }
  if (reduction == Reduction::mean) {
    for (auto& value : out) {
      value /= static_cast<double>(members.size());
    }
  }
  return out;
}

void normalize(Values& values, Normalization normalization) {
  if (values.empty() || normalization == Normalization::none) {
    return;
  }
  double sum = 0, smallest = values.front(), largest = values.front();
  for (const double value : values) {
    sum += value;
    smallest = std::min(smallest, value);
    largest = std::max(largest, value);
  }
  const double shift = normalization == Normalization::min_max ? smallest : 0.0;
  const double divisor = normalization == Normalization::mean  ? sum / static_cast<double>(values.size())
                         : normalization == Normalization::max ? largest
                         : normalization == Normalization::sum ? sum
                                                               : largest - smallest;
  for (auto& value : values) {
    value = divisor == 0.0 ? 0.0 : (value - shift) / divisor;
  }
}

void to_lamp(Values& values) {
  Values ascending = values;
  std::sort(ascending.begin(), ascending.end());
  Values not_smaller(ascending.size() + 1, 0.0);  // the sum of squares from each place on
  for (size_t i = ascending.size(); i-- > 0;) {
    not_smaller[i] = not_smaller[i + 1] + ascending[i] * ascending[i];
  }
  for (auto& value : values) {
    const auto first =
        static_cast<size_t>(std::lower_bound(ascending.begin(), ascending.end(), value) - ascending.begin());
    value = value == 0.0 ? 0.0 : value * value / not_smaller[first];
  }
}

GroupScore finished(const Group& group, Values values) {
  TORCH_CHECK_VALUE(all_finite(values), "[importance] scores must be finite, got NaN or infinity in group ",
                    group.name);
  return {to_tensor(values), ""};
}

std::vector<GroupScore> combined(const Structure& structure, const std::vector<std::vector<Values>>& members,
                                 const ImportanceOptions& options) {
  const bool is_lamp = std::holds_alternative<Lamp>(options.criterion);
  const bool is_random = std::holds_alternative<Random>(options.criterion);
  const char* missing = std::holds_alternative<BatchNormScale>(options.criterion) ? "no normalization with a scale"
                        : std::holds_alternative<Activation>(options.criterion)   ? "no activation statistics"
                                                                                  : "no parameters";
  std::vector<GroupScore> scores;
  bool any = structure.groups.empty();
  for (size_t g = 0; g < structure.groups.size(); ++g) {
    if (members[g].empty()) {
      scores.push_back({{}, missing});
      continue;
    }
    any = true;
    auto values = reduced(members[g], options.reduction);
    if (is_lamp) {
      to_lamp(values);
    } else if (!is_random) {
      normalize(values, options.normalization);
    }
    scores.push_back(finished(structure.groups[g], std::move(values)));
  }
  TORCH_CHECK_VALUE(any, "[importance] at least one group must have a score, got ", missing, " in any of ",
                    structure.groups.size(), " groups");
  return scores;
}

}  // namespace

ParameterLookup parameter_lookup(const torch::nn::Module& model) {
  auto parameters = std::make_shared<std::unordered_map<std::string, at::Tensor>>();
  for (const auto& parameter : model.named_parameters()) {
    parameters->emplace(parameter.key(), parameter.value());
  }
  return [parameters](const std::string& name) {
    const auto found = parameters->find(name);
    return found == parameters->end() ? at::Tensor() : found->second;
  };
}

std::vector<GroupScore> importance(const Structure& structure, const ParameterLookup& parameters,
                                   const ImportanceOptions& options, const Statistics& statistics) {
  options.validate();
  const c10::NoGradGuard no_grad;
  return combined(structure, member_values(structure, parameters, options.criterion, statistics), options);
}

std::vector<GroupScore> importance(const Structure& structure, const std::function<at::Tensor(const Group&)>& score,
                                   Normalization normalization) {
  std::vector<GroupScore> scores;
  for (const auto& group : structure.groups) {
    const auto given = score(group);
    TORCH_CHECK_VALUE(given.defined() && given.dim() == 1 && given.size(0) == group.units,
                      "[importance] the scores of group ", group.name, " must be 1-D with ", group.units,
                      " values, one per unit, got ", given.defined() ? c10::str("sizes ", given.sizes()) : "none");
    auto values = to_doubles(given);
    TORCH_CHECK_VALUE(all_finite(values), "[importance] scores must be finite, got NaN or infinity in group ",
                      group.name);
    normalize(values, normalization);
    scores.push_back(finished(group, std::move(values)));
  }
  return scores;
}

FisherAccumulator::FisherAccumulator(Structure structure) : structure_(std::move(structure)) {}

void FisherAccumulator::update(const ParameterLookup& parameters) {
  const c10::NoGradGuard no_grad;
  auto values = member_values(structure_, parameters, Fisher{}, {});
  if (batches_ > 0) {
    for (size_t g = 0; g < values.size(); ++g) {
      TORCH_CHECK_VALUE(values[g].size() == sums_[g].size(), "[FisherAccumulator.update] group ",
                        structure_.groups[g].name, " must have ", sums_[g].size(),
                        " parameters as in the first update, got ", values[g].size());
      for (size_t m = 0; m < values[g].size(); ++m) {
        std::transform(values[g][m].begin(), values[g][m].end(), sums_[g][m].begin(), values[g][m].begin(),
                       std::plus<>());
      }
    }
  }
  sums_ = std::move(values);
  ++batches_;
}

std::vector<GroupScore> FisherAccumulator::importance(Reduction reduction, Normalization normalization) const {
  TORCH_CHECK_VALUE(batches_ > 0, "[FisherAccumulator] update() must run at least once, after a backward pass, got ",
                    batches_, " updates");
  auto means = sums_;
  for (auto& group : means) {
    for (auto& member : group) {
      std::for_each(member.begin(), member.end(), [&](double& sum) { sum /= static_cast<double>(batches_); });
    }
  }
  return combined(structure_, means, {Fisher{}, reduction, normalization});
}

}  // namespace rarefy::pruning
