// One-shot scores of torch::nn modules: which parameters, and everything as it was afterwards.
#include <ATen/core/grad_mode.h>
#include <ATen/ops/zeros_like.h>
#include <rarefy/pruning/one_shot_score.h>
#include <torch/nn/module.h>

#include <utility>

namespace rarefy::pruning {
namespace {

std::vector<NamedParameter> chosen_parameters(const torch::nn::Module& model,
                                              const std::optional<std::vector<std::string>>& include,
                                              const std::vector<std::string>& exclude) {
  std::vector<NamedParameter> all, chosen;
  for (const auto& parameter : model.named_parameters()) {
    if (parameter.value().defined()) {
      all.push_back({parameter.key(), parameter.value()});
    }
  }
  for (const size_t i : select_parameters(all, include, exclude).chosen) {
    chosen.push_back(all[i]);
  }
  return chosen;
}

/// Writes buffers back: those of batch normalizations move in training mode.
class BufferGuard {
 public:
  explicit BufferGuard(const torch::nn::Module& model) {
    for (const auto& buffer : model.buffers()) {
      if (buffer.defined()) {
        saved_.emplace_back(buffer, buffer.detach().clone());
      }
    }
  }
  ~BufferGuard() {
    const at::NoGradGuard no_grad;
    for (auto& [buffer, value] : saved_) {
      buffer.copy_(value);
    }
  }
  BufferGuard(const BufferGuard&) = delete;
  BufferGuard& operator=(const BufferGuard&) = delete;
  BufferGuard(BufferGuard&&) = delete;
  BufferGuard& operator=(BufferGuard&&) = delete;

 private:
  std::vector<std::pair<at::Tensor, at::Tensor>> saved_;
};

/// A model in evaluation mode whose floating-point tensors are float64 and non-negative; running means are zero.
class PositiveModel {
 public:
  explicit PositiveModel(torch::nn::Module& model) {
    model.apply([this](torch::nn::Module& module) { modes_.emplace_back(&module, module.is_training()); });
    for (auto& [module, training] : modes_) {
      module->eval();
    }
    for (const auto& parameter : model.named_parameters()) {
      take(parameter.value(), false);
    }
    for (const auto& buffer : model.named_buffers()) {
      take(buffer.value(), buffer.key().ends_with("running_mean"));
    }
  }
  ~PositiveModel() {
    for (auto& [tensor, data, requires_grad] : saved_) {
      tensor.set_data(data);
      tensor.set_requires_grad(requires_grad);
    }
    for (auto& [module, training] : modes_) {
      module->train(training);
    }
  }
  PositiveModel(const PositiveModel&) = delete;
  PositiveModel& operator=(const PositiveModel&) = delete;
  PositiveModel(PositiveModel&&) = delete;
  PositiveModel& operator=(PositiveModel&&) = delete;

 private:
  struct Saved {
    at::Tensor tensor;
    at::Tensor data;  // the original memory, not a copy
    bool requires_grad;
  };

  void take(const at::Tensor& tensor, bool is_mean) {
    if (!tensor.defined() || !tensor.is_floating_point()) {
      return;
    }
    auto data = tensor.detach().to(at::kDouble).abs();
    saved_.push_back({tensor, tensor.variable_data(), tensor.requires_grad()});
    tensor.set_data(is_mean ? at::zeros_like(data) : data);
  }

  std::vector<std::pair<torch::nn::Module*, bool>> modes_;
  std::vector<Saved> saved_;
};

}  // namespace

ElementScores snip(torch::nn::Module& model, const std::vector<LossFunction>& losses,
                   const std::optional<std::vector<std::string>>& include, const std::vector<std::string>& exclude) {
  const BufferGuard buffers(model);
  return snip(chosen_parameters(model, include, exclude), losses);
}

ElementScores grasp(torch::nn::Module& model, const std::vector<LossFunction>& losses,
                    const std::optional<std::vector<std::string>>& include, const std::vector<std::string>& exclude) {
  const BufferGuard buffers(model);
  return grasp(chosen_parameters(model, include, exclude), losses);
}

ElementScores synflow(torch::nn::Module& model, const std::function<at::Tensor()>& forward,
                      const SynFlowOptions& options, const std::optional<std::vector<std::string>>& include,
                      const std::vector<std::string>& exclude) {
  options.validate();
  const auto parameters = chosen_parameters(model, include, exclude);
  const BufferGuard buffers(model);
  const PositiveModel positive(model);
  for (const auto& parameter : parameters) {
    parameter.value.set_requires_grad(true);
  }
  return synflow(parameters, forward, options);
}

}  // namespace rarefy::pruning
