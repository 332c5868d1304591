#include <ATen/core/grad_mode.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/tensor.h>
#include <c10/util/Exception.h>
#include <fmt/format.h>
#include <rarefy/pruning/permutation.h>
#include <rarefy/pruning/resize.h>
#include <rarefy/pruning/state.h>
#include <torch/nn/module.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <memory>
#include <numeric>
#include <set>

#include "../graph/evaluation.h"
#include "diagnosis.h"
#include "nm_search.h"

namespace rarefy::pruning {
namespace {

bool is_identity(const std::vector<int32_t>& order) {
  for (size_t i = 0; i < order.size(); ++i) {
    if (order[i] != static_cast<int32_t>(i)) {
      return false;
    }
  }
  return true;
}

/// The places of each unit along a member's dimension, unit by unit; empty when units have different numbers of them.
std::vector<int64_t> places_of(const Member& member, int64_t units, int64_t& each) {
  std::vector<std::vector<int64_t>> by_unit(static_cast<size_t>(units));
  for (size_t i = 0; i < member.unit_of_index.size(); ++i) {
    if (member.unit_of_index[i] >= 0) {
      by_unit[static_cast<size_t>(member.unit_of_index[i])].push_back(static_cast<int64_t>(i));
    }
  }
  std::vector<int64_t> out;
  each = by_unit.empty() ? 0 : static_cast<int64_t>(by_unit[0].size());
  for (const auto& places : by_unit) {
    if (static_cast<int64_t>(places.size()) != each) {
      return {};
    }
    out.insert(out.end(), places.begin(), places.end());
  }
  return out;
}

/// Whether every unit fills whole stripes, so that its order among units does not matter.
bool fills_stripes(const std::vector<int64_t>& places, int64_t each, const NM& pattern) {
  if (each % pattern.m != 0) {
    return false;
  }
  for (size_t i = 0; i < places.size(); i += static_cast<size_t>(pattern.m)) {
    for (int64_t k = 0; k < pattern.m; ++k) {
      if (places[i + static_cast<size_t>(k)] != places[i] + k) {
        return false;
      }
    }
    if (places[i] % pattern.m != 0) {
      return false;
    }
  }
  return true;
}

/// Gives each tensor its slices in the new order, in its own memory, and puts them back unless commit() is called.
class Reordering {
 public:
  explicit Reordering(const PermutableModel& model) : model_(model) {}
  Reordering(const Reordering&) = delete;
  Reordering& operator=(const Reordering&) = delete;
  ~Reordering() { rollback(); }

  void apply(const std::vector<Reorder>& changes) {
    std::vector<Cut> all;
    for (const auto& change : changes) {
      all.push_back({change.tensor, change.dim, change.source});
    }
    if (model_.also) {
      const auto more = model_.also(all);
      all.insert(all.end(), more.begin(), more.end());
    }
    std::map<std::string, Kept> by_tensor;
    for (const auto& [tensor, dim, source] : all) {
      by_tensor[tensor].emplace(dim, source);
    }
    std::set<std::pair<const void*, int64_t>> done;  // memory: two names of a tensor are one
    std::vector<std::pair<at::Tensor, Kept>> todo;
    const auto add = [&](const at::Tensor& tensor, const Kept& sources) {
      if (!sources.empty() && done.emplace(tensor.const_data_ptr(), tensor.numel()).second) {
        todo.emplace_back(tensor, sources);
      }
    };
    std::map<std::string, at::Tensor> tensors;
    for (const auto& [name, value, origin] : model_.tensors) {
      tensors.emplace(name, value);
    }
    for (const auto& [name, sources] : by_tensor) {
      const auto found = tensors.find(name);
      TORCH_CHECK_VALUE(found != tensors.end(),
                        "[permute_for_nm] the recording must use tensors of the model only, got '", name, "'");
      const auto& tensor = found->second;
      add(tensor, sources);
      if (tensor.is_leaf() && tensor.grad().defined()) {
        TORCH_CHECK_VALUE(tensor.grad().layout() == at::kStrided, "[permute_for_nm] the gradient of ", name,
                          " must be dense, got layout ", tensor.grad().layout());
        add(tensor.grad(), sources);
      }
    }
    for (const auto& state : model_.state) {
      if (const auto found = by_tensor.find(state.parameter); found != by_tensor.end()) {
        add(state.value, kept_of_state(state, tensors.at(state.parameter).sizes(), found->second));
      }
    }
    for (const auto& [tensor, sources] : todo) {
      permute(tensor, sources);
      done_.emplace_back(tensor, sources);
    }
  }

  void rollback() noexcept {
    for (auto change = done_.rbegin(); change != done_.rend(); ++change) {
      Kept inverse;
      for (const auto& [dim, source] : change->second) {
        std::vector<int64_t> back(source.size());
        for (size_t i = 0; i < source.size(); ++i) {
          back[static_cast<size_t>(source[i])] = static_cast<int64_t>(i);
        }
        inverse.emplace(dim, std::move(back));
      }
      permute(change->first, inverse);
    }
    done_.clear();
  }

  void commit() { done_.clear(); }

 private:
  static void permute(const at::Tensor& tensor, const Kept& sources) {
    auto ordered = tensor.detach();
    for (const auto& [dim, source] : sources) {
      ordered =
          ordered.index_select(dim, at::tensor(source, at::TensorOptions().dtype(at::kLong).device(tensor.device())));
    }
    at::Tensor target = tensor;
    target.copy_(ordered);
  }

  const PermutableModel& model_;
  std::vector<std::pair<at::Tensor, Kept>> done_;
};

std::vector<at::Tensor> outputs_of(const graph::Graph& graph) {
  std::vector<at::Tensor> out;
  for (const auto id : graph.outputs) {
    out.push_back(graph.values[static_cast<size_t>(id)].tensor.clone());
  }
  return out;
}

}  // namespace

void PermutationOptions::validate() const {
  pattern.validate();
  TORCH_CHECK_VALUE(escapes >= 0, "[permute_for_nm] escapes must not be negative, got ", escapes);
  TORCH_CHECK_VALUE(effort > 0 && std::isfinite(effort), "[permute_for_nm] effort must be positive and finite, got ",
                    effort);
  TORCH_CHECK_VALUE(tolerance >= 0, "[permute_for_nm] tolerance must not be negative, got ", tolerance);
}

std::string GroupOrder::to_string() const {
  return reason.empty() ? fmt::format("{}: {} units in a new order, {:.6g} kept of its consumers, was {:.6g}", name,
                                      units, after, before)
                        : fmt::format("{}: {} units stay: {}", name, units, reason);
}

std::string PermutationReport::to_string() const {
  const double whole = total > 0 ? total : 1;
  auto text = fmt::format("{} keeps {:.4f} of the magnitude, {:.4f} before\n", short_name(pattern), after / whole,
                          before / whole);
  if (attempts > 0) {
    text += fmt::format("outputs are the same: largest difference {:.1e} of the largest value\n", difference);
  }
  for (const auto& group : groups) {
    text += group.to_string() + "\n";
  }
  return text;
}

double nm_kept_magnitude(const at::Tensor& weight, const NM& pattern) {
  pattern.validate();
  const auto why = misfit(pattern, weight.sizes());
  TORCH_CHECK_VALUE(why.empty(), "[nm_kept_magnitude] ", why);
  const at::NoGradGuard no_grad;
  return NMWeight(weight, pattern).kept();
}

PermutationReport find_nm_permutation(const Structure& structure, const std::vector<NamedParameter>& parameters,
                                      const PermutationOptions& options) {
  options.validate();
  const at::NoGradGuard no_grad;
  std::map<std::string, NMWeight> weights;
  PermutationReport report;
  report.pattern = options.pattern;
  for (const size_t i : select_parameters(parameters, options.include, options.exclude).chosen) {
    const auto& [name, value] = parameters[i];
    if (misfit(options.pattern, value.sizes()).empty()) {
      TORCH_CHECK_VALUE(value.isfinite().all().item<bool>(),
                        "[find_nm_permutation] weights must be finite, got NaN or "
                        "infinity in '",
                        name, "'");
      const auto& weight = weights.emplace(name, NMWeight(value, options.pattern)).first->second;
      report.total += weight.total();
      report.before += weight.kept();
    }
  }
  for (size_t g = 0; g < structure.groups.size(); ++g) {
    const auto& group = structure.groups[g];
    GroupOrder result{group.name, group.units, {}, {}, 0, 0, ""};
    std::vector<UnitPlaces> where;
    bool uneven = false;
    for (const auto& member : group.members) {
      int64_t each = 0;
      auto places = places_of(member, group.units, each);
      uneven = uneven || places.empty();
      const auto weight = weights.find(member.tensor);
      if (member.dim == 1 && weight != weights.end() && !fills_stripes(places, each, options.pattern)) {
        result.weights.push_back(member.tensor);
        where.push_back({&weight->second, std::move(places), each});
      }
    }
    const auto kept = [&] {
      double sum = 0;
      for (const auto& units : where) {
        sum += units.weight->kept();
      }
      return sum;
    };
    result.before = result.after = kept();
    if (where.empty()) {
      result.reason = "no weight whose N:M mask depends on their order";
    } else if (uneven) {
      result.reason = "its units have different numbers of slices";
    } else {
      SearchOptions search{options.escapes, options.effort, options.seed + g};
      result.order = search_order(where, group.units, search);
      result.after = kept();
      if (is_identity(result.order)) {
        result.order.clear();
        result.reason = "no exchange of two units gains";
      }
    }
    report.groups.push_back(std::move(result));
  }
  for (const auto& [name, weight] : weights) {
    report.after += weight.kept();
  }
  return report;
}

std::vector<Reorder> reorders(const Structure& structure, const std::vector<GroupOrder>& groups) {
  TORCH_CHECK_VALUE(groups.size() == structure.groups.size(), "[reorders] must have one order per group (",
                    structure.groups.size(), "), got ", groups.size());
  std::map<std::pair<std::string, int64_t>, std::vector<int64_t>> sources;
  for (size_t g = 0; g < groups.size(); ++g) {
    const auto& group = structure.groups[g];
    const auto& order = groups[g].order;
    if (order.empty()) {
      continue;
    }
    std::vector<char> seen(static_cast<size_t>(group.units), 0);
    TORCH_CHECK_VALUE(static_cast<int64_t>(order.size()) == group.units, "[reorders] the order of group '", group.name,
                      "' must have ", group.units, " units, got ", order.size());
    for (const auto unit : order) {
      TORCH_CHECK_VALUE(unit >= 0 && unit < group.units && !seen[static_cast<size_t>(unit)],
                        "[reorders] the order of group '", group.name, "' must have every unit in [0, ", group.units,
                        ") once, got ", unit);
      seen[static_cast<size_t>(unit)] = 1;
    }
    for (const auto& member : group.members) {
      int64_t each = 0;
      const auto places = places_of(member, group.units, each);
      TORCH_CHECK_VALUE(!places.empty(), "[reorders] units of group '", group.name, "' must have as many slices of ",
                        member.tensor, " each");
      auto& source = sources[{member.tensor, member.dim}];
      if (source.empty()) {
        source.resize(member.unit_of_index.size());
        std::iota(source.begin(), source.end(), int64_t{0});
      }
      for (int64_t unit = 0; unit < group.units; ++unit) {
        for (int64_t k = 0; k < each; ++k) {
          source[static_cast<size_t>(places[static_cast<size_t>(unit * each + k)])] =
              places[static_cast<size_t>(order[static_cast<size_t>(unit)] * each + k)];
        }
      }
    }
  }
  std::vector<Reorder> out;
  for (auto& [place, source] : sources) {
    if (!std::is_sorted(source.begin(), source.end())) {
      out.push_back({place.first, place.second, std::move(source)});
    }
  }
  return out;
}

PermutationReport permute_for_nm(const PermutableModel& model, const PermutationOptions& options) {
  options.validate();
  const at::NoGradGuard no_grad;
  std::vector<NamedParameter> parameters;
  std::map<std::string, at::Tensor> by_name;
  for (const auto& [name, value, origin] : model.tensors) {
    by_name.emplace(name, value);
    if (origin == graph::Origin::parameter) {
      parameters.push_back({name, value});
    }
  }
  for (const auto& parameter : parameters) {
    TORCH_CHECK_VALUE(by_name.count(mask_key(parameter.name)) == 0, "[permute_for_nm] ", parameter.name,
                      " must have no mask of a MagnitudePruner: permute first, prune second");
  }
  const auto recording = model.record();
  TORCH_CHECK_VALUE(recording.failure.empty(),
                    "[permute_for_nm] the model must run on its example inputs: ", recording.failure);
  const auto structure = find_structure(recording.graph);
  auto report = find_nm_permutation(structure, parameters, options);
  const auto expected = outputs_of(recording.graph);

  // Permutes some groups, and keeps it when the outputs are the same.
  Reordering reordering(model);
  const auto attempt = [&](const std::vector<GroupOrder>& groups) {
    reordering.apply(reorders(structure, groups));
    ++report.attempts;
    const auto after = model.record();
    const auto comparison = after.failure.empty() ? compare(expected, outputs_of(after.graph), options.tolerance)
                                                  : Comparison{0, after.failure};
    if (comparison.failure.empty()) {
      report.difference = comparison.difference;
      reordering.commit();
    } else {
      reordering.rollback();
    }
    return comparison.failure;
  };
  const auto has_order = [](const GroupOrder& group) { return !group.order.empty(); };
  if (std::none_of(report.groups.begin(), report.groups.end(), has_order) || attempt(report.groups).empty()) {
    return report;
  }
  std::vector<GroupOrder> none = report.groups;
  for (auto& group : none) {
    group.order.clear();
  }
  for (size_t g = 0; g < report.groups.size(); ++g) {
    auto& group = report.groups[g];
    if (group.order.empty()) {
      continue;
    }
    auto only = none;
    only[g].order = group.order;
    if (const auto failure = attempt(only); !failure.empty()) {
      group.order.clear();
      group.reason = "the model computes something else in another order: " + failure;
    }
  }
  // What is kept now, of the weights as they are.
  const auto kept = [&](const std::string& name) { return nm_kept_magnitude(by_name.at(name), options.pattern); };
  report.after = 0;
  for (auto& group : report.groups) {
    group.after = 0;
    for (const auto& weight : group.weights) {
      group.after += kept(weight);
    }
  }
  for (const size_t i : select_parameters(parameters, options.include, options.exclude).chosen) {
    if (misfit(options.pattern, parameters[i].value.sizes()).empty()) {
      report.after += kept(parameters[i].name);
    }
  }
  return report;
}

PermutationReport permute_for_nm(torch::nn::Module& model, std::function<std::vector<at::Tensor>()> forward,
                                 std::vector<at::Tensor> inputs, const PermutationOptions& options,
                                 const std::vector<torch::optim::Optimizer*>& optimizers) {
  PermutableModel subject;
  subject.tensors = graph::named_tensors(model);
  for (const auto* optimizer : optimizers) {
    auto more = optimizer_tensors(*optimizer, subject.tensors);
    subject.state.insert(subject.state.end(), std::make_move_iterator(more.begin()),
                         std::make_move_iterator(more.end()));
  }
  subject.also = [&](const std::vector<Cut>& changes) { return quantizer_cuts(model, changes); };
  subject.record = [&] {
    auto tensors = graph::named_tensors(model);
    for (size_t i = 0; i < inputs.size(); ++i) {
      tensors.push_back({"input." + std::to_string(i), inputs[i], graph::Origin::input});
    }
    const graph::Evaluation evaluation(model);
    Recording out;
    graph::Graph partial;
    try {
      out.graph = graph::record(forward, tensors, {}, &partial);
    } catch (const std::exception& error) {  // of the model's own code: the transaction reports it
      out.graph = std::move(partial);
      out.failure = error.what();
      out.failure = out.failure.substr(0, out.failure.find('\n'));
    }
    return out;
  };
  return permute_for_nm(subject, options);
}

}  // namespace rarefy::pruning
