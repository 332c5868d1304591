#include <ATen/Functions.h>

#include <algorithm>
#include <unordered_map>

#include "propagation.h"

// How fields meet: element by element, in a sum, in a product that is summed.
namespace rarefy::pruning {

namespace {

/// Labels numbered by their first place: equal for fields that divide a tensor alike.
at::Tensor pattern(const Field& field) {
  auto out = field.labels.clone(at::MemoryFormat::Contiguous);
  std::unordered_map<int32_t, int32_t> numbers;
  auto* data = out.mutable_data_ptr<int32_t>();
  for (int64_t i = 0; i < out.numel(); ++i) {
    data[i] = numbers.try_emplace(data[i], static_cast<int32_t>(numbers.size())).first->second;
  }
  return out;
}

/// The fields of another operand that a field meets. Where several lie along one dimension, as heads and their width do
/// once they are flattened, each meets the one that divides it alike.
std::vector<Field*> partners(const Field& field, const Operand& own, Operand& other) {
  std::vector<Field*> met;
  for (auto& candidate : other.fields) {
    if (overlap(field, candidate)) {
      met.push_back(&candidate);
    }
  }
  const auto own_count =
      std::count_if(own.fields.begin(), own.fields.end(), [&](const Field& mine) { return overlap(field, mine); });
  if (met.size() > 1 || (met.size() == 1 && own_count > 1)) {
    const auto mine = pattern(field);
    for (auto* candidate : met) {
      if (at::equal(mine, pattern(*candidate))) {
        return {candidate};
      }
    }
  }
  return met;
}

}  // namespace

Propagator::Fields Propagator::combine(std::vector<Operand> operands) {
  const auto refresh = [&](Operand& operand) {
    std::erase_if(operand.fields, [&](Field& field) { return !update(labels_, field, one_unit()); });
  };
  for (int64_t before = -1; before != labels_.version();) {
    before = labels_.version();
    for (size_t i = 0; i < operands.size(); ++i) {
      refresh(operands[i]);
      for (auto& field : operands[i].fields) {
        for (size_t j = 0; j < operands.size(); ++j) {
          if (j == i) {
            continue;
          }
          std::vector<int64_t> full;  // dimensions of the field on which the other operand has places of its own
          const auto dims = field.dims();
          for (auto d : dims) {
            if (operands[j].sizes[d] > 1) {
              full.push_back(d);
            }
          }
          if (full.empty()) {
            continue;
          }
          const bool part = full.size() < dims.size();
          // A vector of parameters that all heads share says nothing against removing a head.
          const bool shared = part && operands[j].constant;
          bool matched = false;
          for (auto* other : partners(field, operands[i], operands[j])) {
            if (!shared && overlap(field, *other)) {
              unite(labels_, field, *other);
              matched = true;
              if (!update(labels_, field, one_unit())) {
                break;
              }
            }
          }
          if (matched) {
            continue;
          }
          if (part) {
            unite_along(labels_, field, full);
          } else {
            pin(labels_, field, reason("meets a tensor whose places there cannot be removed"));
          }
          if (!update(labels_, field, one_unit())) {
            break;
          }
        }
      }
    }
  }
  Fields out;
  for (auto& operand : operands) {
    refresh(operand);
    for (auto& field : operand.fields) {
      const auto same = std::find_if(out.begin(), out.end(),
                                     [&](const Field& other) { return at::equal(field.labels, other.labels); });
      if (same == out.end()) {
        out.push_back(field);
      } else {
        same->weak = same->weak && field.weak;
        if (same->leaf < 0 || field.leaf < 0) {
          same->leaf = -1;
        }
      }
    }
  }
  return out;
}

void Propagator::reduce(Fields& fields, const std::vector<int64_t>& dims, bool may_consume) {
  for (auto& field : fields) {
    std::vector<int64_t> inside;
    const auto varying = field.dims();
    for (auto d : varying) {
      if (std::find(dims.begin(), dims.end(), d) != dims.end()) {
        inside.push_back(d);
      }
    }
    if (inside.empty()) {
      continue;
    }
    if (inside.size() < varying.size()) {
      unite_along(labels_, field, inside);
    } else {
      if (!may_consume) {
        pin(labels_, field, reason("depends on how many channels there are"));
      }
      field.labels = at::Tensor();
    }
  }
  std::erase_if(fields, [&](Field& field) { return !field.labels.defined() || !update(labels_, field, one_unit()); });
}

Propagator::Fields Propagator::contract(std::vector<Operand> operands, double factor, bool may_consume) {
  const auto rank = static_cast<int64_t>(operands[0].sizes.size());
  // Which parameter dimensions are consumed, and which remain, is known before labels unite.
  for (const auto& operand : operands) {
    for (const auto& field : operand.fields) {
      set_role(field, field.varies(rank - 1) ? Role::input : Role::output);
    }
  }
  // What meets along the sum goes with its head, as heads keep their width.
  for (auto& operand : operands) {
    for (auto& field : operand.fields) {
      if (field.varies(rank - 1) && field.dims().size() > 1) {
        unite_along(labels_, field, {rank - 1});
      }
    }
  }
  // One head of keys and values for all heads of the queries: heads of queries go, and what they share keeps its width.
  for (size_t i = 0; i < 2; ++i) {
    const auto &mine = operands[i], &other = operands[1 - i];
    if (mine.constant || other.constant) {
      continue;
    }
    for (const auto& field : mine.fields) {
      for (int64_t d = 0; d + 3 < rank; ++d) {
        if (field.varies(d) && other.sizes[d] == 1) {
          pin_all(other.fields, reason("shares them among heads, whose width stays"));
        }
      }
    }
  }
  std::vector<int64_t> full(rank, 1);
  for (const auto& operand : operands) {
    for (int64_t d = 0; d < rank; ++d) {
      full[d] = std::max(full[d], operand.sizes[d]);
    }
  }
  auto fields = combine(std::move(operands));
  LabelledCost cost{current_, factor, {}};
  for (int64_t d = 0; d < rank; ++d) {
    cost.factor *= static_cast<double>(full[d]);
  }
  for (const auto& field : fields) {
    cost.axes.push_back(field.labels.reshape({-1}));
    cost.factor /= static_cast<double>(field.labels.numel());
  }
  out_.costs.push_back(std::move(cost));
  reduce(fields, {rank - 1}, may_consume);
  for (auto& field : fields) {
    field.labels = field.labels.squeeze(rank - 1);
    field.leaf = -1;
  }
  return fields;
}

}  // namespace rarefy::pruning
