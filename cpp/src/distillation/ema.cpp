#include <ATen/core/grad_mode.h>
#include <ATen/ops/_foreach_lerp.h>
#include <c10/util/Exception.h>
#include <rarefy/distillation/ema.h>
#include <rarefy/masks.h>

#include <algorithm>
#include <map>
#include <string>
#include <utility>

namespace rarefy::distillation {
namespace {

using Named = torch::OrderedDict<std::string, torch::Tensor>;

/// The tensors of `values` in the order of `averages`.
std::vector<torch::Tensor> matched(const char* kind, const Named& averages, const Named& values) {
  std::vector<torch::Tensor> result;
  for (const auto& item : averages) {
    const torch::Tensor* value = values.find(item.key());
    TORCH_CHECK_VALUE(value != nullptr, "[Ema] both modules must have the same ", kind, ", got '", item.key(),
                      "' in the average alone");
    TORCH_CHECK_VALUE(
        value->defined() == item.value().defined() && (!value->defined() || value->sizes() == item.value().sizes()),
        "[Ema] ", kind, " must keep their shapes, got '", item.key(), "' of shape ",
        item.value().defined() ? item.value().sizes() : at::IntArrayRef{}, " in the average and ",
        value->defined() ? value->sizes() : at::IntArrayRef{});
    result.push_back(*value);
  }
  for (const auto& item : values) {
    TORCH_CHECK_VALUE(averages.contains(item.key()), "[Ema] both modules must have the same ", kind, ", got '",
                      item.key(), "' in the value alone");
  }
  return result;
}

void check(const std::vector<torch::Tensor>& averages, const std::vector<torch::Tensor>& values) {
  TORCH_CHECK_VALUE(averages.size() == values.size(), "[Ema] there must be one value per average, got ", values.size(),
                    " values for ", averages.size(), " averages");
  for (size_t i = 0; i < averages.size(); ++i) {
    const auto& average = averages[i];
    const auto& value = values[i];
    TORCH_CHECK_VALUE(average.defined() && value.defined(), "[Ema] tensors must be defined, got an undefined one at ",
                      i);
    TORCH_CHECK_TYPE(average.scalar_type() == at::kFloat || average.scalar_type() == at::kDouble,
                     "[Ema] averages must be float32 or float64, got ", average.scalar_type(), " at ", i);
    TORCH_CHECK_TYPE(at::isFloatingType(value.scalar_type()), "[Ema] values must be floating point, got ",
                     value.scalar_type(), " at ", i);
    TORCH_CHECK_VALUE(average.sizes() == value.sizes(), "[Ema] values must have the shapes of the averages, got ",
                      value.sizes(), " for ", average.sizes(), " at ", i);
  }
}

}  // namespace

void EmaOptions::validate() const {
  TORCH_CHECK_VALUE(decay >= 0.0 && decay < 1.0, "[Ema] decay must be in [0, 1), got ", decay);
  TORCH_CHECK_VALUE(warmup >= 0.0 && warmup <= 1e18, "[Ema] warmup must be 0 or more and finite, got ", warmup);
}

Ema::Ema(EmaOptions options) : options_(options) { options_.validate(); }

double Ema::next_decay() const {
  if (options_.warmup == 0.0) {
    return options_.decay;
  }
  const auto done = static_cast<double>(updates_);
  return std::min(options_.decay, done / (done + options_.warmup));
}

void Ema::set_updates(int64_t updates) {
  TORCH_CHECK_VALUE(updates >= 0, "[Ema] updates must be 0 or more, got ", updates);
  updates_ = updates;
}

void Ema::update(const std::vector<torch::Tensor>& averages, const std::vector<torch::Tensor>& values) {
  check(averages, values);
  const at::NoGradGuard no_grad;
  const double weight = 1.0 - next_decay();
  // One call per device and dtype: lists of one kind take the fused path of _foreach_lerp_.
  std::map<std::pair<std::string, at::ScalarType>, std::pair<std::vector<at::Tensor>, std::vector<at::Tensor>>> groups;
  for (size_t i = 0; i < averages.size(); ++i) {
    auto& [to, from] = groups[{averages[i].device().str(), averages[i].scalar_type()}];
    to.push_back(averages[i]);
    from.push_back(values[i].detach().to(averages[i].options()));
  }
  for (auto& [_, group] : groups) {
    at::_foreach_lerp_(group.first, group.second, weight);
  }
  ++updates_;
}

void Ema::update(torch::nn::Module& average, const torch::nn::Module& value) {
  const auto parameters = average.named_parameters();
  const auto buffers = average.named_buffers();
  const auto new_parameters = matched("parameters", parameters, value.named_parameters());
  const auto new_buffers = matched("buffers", buffers, value.named_buffers());
  update(parameters.values(), new_parameters);
  const at::NoGradGuard no_grad;
  for (size_t i = 0; i < new_buffers.size(); ++i) {
    if (new_buffers[i].defined()) {
      buffers[i].value().copy_(new_buffers[i]);
    }
  }
  remask(average);  // what was pruned on the way is in the average still
}

}  // namespace rarefy::distillation
