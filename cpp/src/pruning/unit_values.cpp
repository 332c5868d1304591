#include "pruning/unit_values.h"

#include <ATen/Functions.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <unordered_map>

#include "pruning/finite.h"
#include "pruning/random_key.h"
#include "pruning/slice_sums.h"

namespace rarefy::pruning {
namespace {

/// True for the scale of a normalization; its shift and its running statistics say nothing about the channel.
bool is_scale(const Member& member) {
  const auto last = member.tensor.substr(member.tensor.rfind('.') + 1);
  return member.role == Role::affine && (last == "weight" || last == "gamma" || last == "scale");
}

/// Adds the values of a unit's indices.
Values to_units(const Values& of_index, const Member& member, int64_t units, bool maximum = false) {
  Values out(static_cast<size_t>(units), 0.0);
  for (size_t i = 0; i < of_index.size(); ++i) {
    if (const auto unit = member.unit_of_index[i]; unit >= 0) {
      auto& value = out[static_cast<size_t>(unit)];
      value = maximum ? std::max(value, of_index[i]) : value + of_index[i];
    }
  }
  return out;
}

/// The parameters of a structure, found once each, checked, and with the sums over their slices.
class Parameters {
 public:
  Parameters(const Structure& structure, const ParameterLookup& lookup) {
    for (const auto& group : structure.groups) {
      for (const auto& member : group.members) {
        add(group, member, lookup);
      }
    }
  }

  /// Undefined for a buffer.
  const at::Tensor& value(const Member& member) const { return entries_.at(member.tensor).value; }

  /// Throws for a parameter with NaN or infinite values. `power`: by way of the sums that Magnitude needs anyhow.
  void check_finite(std::optional<double> power) {
    for (const auto& name : order_) {
      auto& entry = entries_.at(name);
      if (!entry.value.defined()) {
        continue;
      }
      if (power.has_value() && !entry.dims.empty()) {
        compute(entry, Term::power, *power, {});
        if (std::all_of(entry.sums.begin(), entry.sums.end(), [](const auto& sums) { return all_finite(sums); })) {
          continue;
        }
      }
      TORCH_CHECK_VALUE(is_finite(entry.value),
                        "[importance] the values of every parameter must be finite, got NaN or infinity in ", name);
    }
  }

  /// Names the dimensions of a member whose sums will be asked for.
  void request(const Member& member) {
    auto& dims = entries_.at(member.tensor).dims;
    if (std::find(dims.begin(), dims.end(), member.dim) == dims.end()) {
      dims.push_back(member.dim);
    }
  }

  const Values& sums(const Member& member, Term term, double p) {
    auto& entry = entries_.at(member.tensor);
    if (entry.sums.empty()) {
      at::Tensor gradient;
      if (term != Term::power) {
        gradient = entry.value.grad();
        TORCH_CHECK_VALUE(gradient.defined(),
                          "[importance] every parameter that takes part must have a gradient (call backward() first), "
                          "got none for ",
                          member.tensor);
      }
      compute(entry, term, p, gradient);
      // The weights are finite: sums that are not come from the gradient. Reading it by itself would cost as much.
      const bool finite =
          std::all_of(entry.sums.begin(), entry.sums.end(), [](const auto& sums) { return all_finite(sums); });
      TORCH_CHECK_VALUE(finite || !gradient.defined() || is_finite(gradient),
                        "[importance] gradients must be finite, got NaN or infinity in that of ", member.tensor);
    }
    const auto at = std::find(entry.dims.begin(), entry.dims.end(), member.dim) - entry.dims.begin();
    return entry.sums[static_cast<size_t>(at)];
  }

 private:
  struct Entry {
    at::Tensor value;
    std::vector<int64_t> dims;
    std::vector<Values> sums;  // of each of dims
  };

  static void compute(Entry& entry, Term term, double p, const at::Tensor& gradient) {
    entry.sums = slice_sums(term, p, entry.value, gradient, entry.dims);
  }

  void add(const Group& group, const Member& member, const ParameterLookup& lookup) {
    const auto [found, is_new] = entries_.try_emplace(member.tensor);
    auto& value = found->second.value;
    if (is_new) {
      order_.push_back(member.tensor);
      value = lookup(member.tensor);
    }
    if (!value.defined()) {
      return;
    }
    TORCH_CHECK_VALUE(value.is_floating_point(), "[importance] parameters must be floating point, got ",
                      value.scalar_type(), " for ", member.tensor);
    TORCH_CHECK_VALUE(member.dim >= 0 && member.dim < value.dim() &&
                          value.size(member.dim) == static_cast<int64_t>(member.unit_of_index.size()),
                      "[importance] ", member.tensor, " must have ", member.unit_of_index.size(),
                      " slices along dimension ", member.dim, " as in the structure, got sizes ", value.sizes());
    for (const auto unit : member.unit_of_index) {
      TORCH_CHECK_INDEX(unit >= -1 && unit < group.units, "[importance] units of group ", group.name,
                        " must be less than ", group.units, " or -1, got ", unit, " in ", member.tensor);
    }
  }

  std::vector<std::string> order_;
  std::unordered_map<std::string, Entry> entries_;
};

/// The members that take part; importance.h has the rule.
std::vector<const Member*> chosen_members(const Group& group, const Parameters& parameters,
                                          const Criterion& criterion) {
  std::vector<const Member*> present, weights;
  const bool filters_only = std::holds_alternative<GeometricMedian>(criterion);
  for (const auto& member : group.members) {
    if (!parameters.value(member).defined()) {
      continue;
    }
    present.push_back(&member);
    const bool is_weight = member.role != Role::affine && parameters.value(member).dim() >= 2;
    if (filters_only ? is_weight && member.role == Role::output : is_weight || is_scale(member)) {
      weights.push_back(&member);
    }
  }
  return weights.empty() ? present : weights;
}

Values magnitude(const Member& member, int64_t units, double p, Parameters& parameters) {
  auto norms = to_units(parameters.sums(member, Term::power, p), member, units, std::isinf(p));
  if (p != 1.0 && !std::isinf(p)) {
    for (auto& norm : norms) {
      norm = p == 2.0 ? std::sqrt(norm) : std::pow(norm, 1.0 / p);
    }
  }
  return norms;
}

/// Distances come from inner products, in float64 around the mean filter so that little cancels.
Values geometric_median(const Member& member, int64_t units, const at::Tensor& weight) {
  const auto rows =
      weight.detach().movedim(member.dim, 0).to(at::kCPU, at::kDouble).reshape({weight.size(member.dim), -1});
  std::vector<std::vector<int64_t>> indices(static_cast<size_t>(units));
  for (size_t i = 0; i < member.unit_of_index.size(); ++i) {
    if (const auto unit = member.unit_of_index[i]; unit >= 0) {
      indices[static_cast<size_t>(unit)].push_back(static_cast<int64_t>(i));
    }
  }
  // Units of unequal extent are filled up with zeros.
  size_t most = 0;
  for (const auto& own : indices) {
    most = std::max(most, own.size());
  }
  auto filters = at::zeros({units, static_cast<int64_t>(most), rows.size(1)}, rows.options());
  for (size_t unit = 0; unit < indices.size(); ++unit) {
    const auto& own = indices[unit];
    filters[static_cast<int64_t>(unit)]
        .narrow(0, 0, static_cast<int64_t>(own.size()))
        .copy_(rows.index_select(0, at::tensor(own, at::kLong)));
  }
  filters = filters.flatten(1);
  filters = filters - filters.mean(0, true);
  const auto squares = filters.square().sum(1);
  auto distances = (squares.unsqueeze(0) + squares.unsqueeze(1) - 2 * filters.mm(filters.t())).clamp_min(0).sqrt();
  distances.fill_diagonal_(0);
  return to_doubles(distances.sum(1));
}

Values activation(const Member& member, int64_t units, const at::Tensor& statistic) {
  TORCH_CHECK_VALUE(statistic.dim() == 1 && statistic.size(0) == static_cast<int64_t>(member.unit_of_index.size()),
                    "[importance] the statistic of ", member.tensor, " must have ", member.unit_of_index.size(),
                    " values, one per index of dimension ", member.dim, ", got sizes ", statistic.sizes());
  const auto of_index = to_doubles(statistic);
  TORCH_CHECK_VALUE(all_finite(of_index), "[importance] statistics must be finite, got NaN or infinity in that of ",
                    member.tensor);
  auto sums = to_units(of_index, member, units);
  const auto counts = to_units(Values(of_index.size(), 1.0), member, units);
  for (size_t unit = 0; unit < sums.size(); ++unit) {
    sums[unit] = counts[unit] > 0.0 ? sums[unit] / counts[unit] : 0.0;
  }
  return sums;
}

Values random_values(const Group& group, uint64_t seed) {
  const auto key = random_key(group.name, seed);
  Values out(static_cast<size_t>(group.units));
  for (size_t unit = 0; unit < out.size(); ++unit) {
    out[unit] = static_cast<double>(random_bits(key, unit) >> 11U) * 0x1p-53;
  }
  return out;
}

}  // namespace

bool all_finite(const Values& values) {
  return std::all_of(values.begin(), values.end(), [](double v) { return std::isfinite(v); });
}

std::vector<std::vector<Values>> member_values(const Structure& structure, const ParameterLookup& lookup,
                                               const Criterion& criterion, const Statistics& statistics) {
  Parameters parameters(structure, lookup);
  std::vector<std::vector<const Member*>> chosen;
  for (const auto& group : structure.groups) {
    chosen.push_back(chosen_members(group, parameters, criterion));
    for (const auto* member : chosen.back()) {
      parameters.request(*member);
    }
  }
  const auto* norm = std::get_if<Magnitude>(&criterion);
  const bool is_lamp = std::holds_alternative<Lamp>(criterion);
  const double p = norm ? norm->p : 2.0;
  parameters.check_finite(norm || is_lamp ? std::optional(p) : std::nullopt);

  std::vector<std::vector<Values>> out;
  for (size_t g = 0; g < structure.groups.size(); ++g) {
    const auto& group = structure.groups[g];
    auto& values = out.emplace_back();
    if (const auto* random = std::get_if<Random>(&criterion)) {
      values.push_back(random_values(group, random->seed));
    } else if (std::holds_alternative<Activation>(criterion)) {
      for (const auto& member : group.members) {
        const auto found = statistics.find({member.tensor, member.dim});
        if (found != statistics.end()) {
          values.push_back(activation(member, group.units, found->second));
        }
      }
    } else if (std::holds_alternative<BatchNormScale>(criterion)) {
      for (const auto& member : group.members) {
        if (is_scale(member) && parameters.value(member).defined()) {
          values.push_back(to_units(parameters.sums(member, Term::power, 1.0), member, group.units));
        }
      }
    } else {
      for (const auto* member : chosen[g]) {
        if (norm || is_lamp) {
          values.push_back(magnitude(*member, group.units, p, parameters));
        } else if (const auto* taylor = std::get_if<Taylor>(&criterion)) {
          auto& sums = values.emplace_back(
              to_units(parameters.sums(*member, taylor->joint ? Term::product : Term::absolute_product, 1.0), *member,
                       group.units));
          std::for_each(sums.begin(), sums.end(), [](double& sum) { sum = std::abs(sum); });
        } else if (std::holds_alternative<Fisher>(criterion)) {
          auto& sums =
              values.emplace_back(to_units(parameters.sums(*member, Term::product, 1.0), *member, group.units));
          std::for_each(sums.begin(), sums.end(), [](double& sum) { sum = 0.5 * sum * sum; });
        } else {
          values.push_back(geometric_median(*member, group.units, parameters.value(*member)));
        }
      }
    }
  }
  return out;
}

}  // namespace rarefy::pruning
