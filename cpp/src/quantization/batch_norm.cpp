#include <fmt/ranges.h>
#include <rarefy/nn/conv_bn.h>
#include <rarefy/quantization/batch_norm.h>
#include <torch/nn/modules/batchnorm.h>
#include <torch/types.h>

#include <array>
#include <optional>
#include <string>
#include <vector>

namespace rarefy::quantization {
namespace {

/// What batch normalizations of all kinds have.
struct Norm {
  std::string name;
  torch::nn::Module* module;
  torch::nn::BatchNormOptions* options;
  std::array<torch::Tensor, 3> state;  // running_mean, running_var, num_batches_tracked
  bool* frozen = nullptr;
};

template <typename Type>
std::optional<Norm> norm_as(const std::string& name, torch::nn::Module& module) {
  auto* bn = dynamic_cast<Type*>(&module);
  if (bn == nullptr || !bn->running_mean.defined()) {
    return std::nullopt;
  }
  return Norm{name, bn, &bn->options, {bn->running_mean, bn->running_var, bn->num_batches_tracked}};
}

template <size_t D>
std::optional<Norm> folded_as(const std::string& name, torch::nn::Module& module) {
  auto norm = norm_as<nn::FoldedBatchNormImpl<D>>(name, module);
  if (norm.has_value()) {
    norm->frozen = &dynamic_cast<nn::FoldedBatchNormImpl<D>&>(module).frozen;
  }
  return norm;
}

std::vector<Norm> norms_of(torch::nn::Module& model) {
  std::vector<Norm> norms;
  const auto add = [&](const std::string& name, torch::nn::Module& module) {
    for (auto find : {&folded_as<1>, &folded_as<2>, &folded_as<3>, &norm_as<torch::nn::BatchNorm1dImpl>,
                      &norm_as<torch::nn::BatchNorm2dImpl>, &norm_as<torch::nn::BatchNorm3dImpl>}) {
      if (auto norm = find(name, module)) {
        norms.push_back(std::move(*norm));
        return;
      }
    }
  };
  add("", model);
  for (const auto& item : model.named_modules("", /*include_self=*/false)) {
    add(item.key(), *item.value());
  }
  return norms;
}

void put(const Norm& norm, const std::array<torch::Tensor, 3>& values) {
  for (size_t i = 0; i < values.size(); ++i) {
    auto state = norm.state[i];
    state.copy_(values[i]);
  }
}

}  // namespace

void freeze_batch_norm(torch::nn::Module& model, bool frozen) {
  bool any = false;
  for (const auto& norm : norms_of(model)) {
    if (norm.frozen != nullptr) {
      *norm.frozen = frozen;
      any = true;
    }
  }
  TORCH_CHECK_VALUE(any,
                    "[freeze_batch_norm] the model must have a batch normalization that is folded into a convolution");
}

void reestimate_batch_norm(torch::nn::Module& model, int64_t batches, const std::function<void(int64_t)>& run) {
  TORCH_CHECK_VALUE(batches >= 1, "[reestimate_batch_norm] batches must be at least 1, got ", batches);
  const auto norms = norms_of(model);
  TORCH_CHECK_VALUE(!norms.empty(),
                    "[reestimate_batch_norm] the model must have a batch normalization with running statistics");
  const torch::NoGradGuard no_grad;
  struct Before {
    std::array<torch::Tensor, 3> state;
    std::optional<double> momentum;
    bool frozen;
  };
  std::vector<Before> before;
  std::vector<std::array<torch::Tensor, 2>> sums;
  std::vector<int64_t> counts(norms.size(), 0);
  for (const auto& norm : norms) {
    before.push_back({{norm.state[0].clone(), norm.state[1].clone(), norm.state[2].clone()},
                      norm.options->momentum(),
                      norm.frozen != nullptr && *norm.frozen});
    sums.push_back(
        {torch::zeros_like(norm.state[0], torch::kFloat64), torch::zeros_like(norm.state[1], torch::kFloat64)});
  }
  std::vector<std::pair<torch::nn::Module*, bool>> modes;
  for (const auto& module : model.modules()) {
    modes.emplace_back(module.get(), module->is_training());
  }
  const auto restore = [&] {
    for (size_t i = 0; i < norms.size(); ++i) {
      put(norms[i], before[i].state);
      norms[i].options->momentum(before[i].momentum);
      if (norms[i].frozen != nullptr) {
        *norms[i].frozen = before[i].frozen;
      }
    }
    // train() reaches children too: parents come first in modules(), so that each ends with its own mode.
    for (const auto& [module, training] : modes) {
      module->train(training);
    }
  };
  try {
    model.eval();
    for (const auto& norm : norms) {
      // Without momentum, batch norm averages over its calls since num_batches_tracked was 0.
      norm.module->train();
      norm.options->momentum(std::nullopt);
      if (norm.frozen != nullptr) {
        *norm.frozen = false;
      }
    }
    for (int64_t batch = 0; batch < batches; ++batch) {
      for (const auto& norm : norms) {
        norm.state[2].zero_();
      }
      run(batch);
      for (size_t i = 0; i < norms.size(); ++i) {
        if (norms[i].state[2].item<int64_t>() > 0) {
          sums[i][0] += norms[i].state[0];
          sums[i][1] += norms[i].state[1];
          ++counts[i];
        }
        put(norms[i], before[i].state);  // what is folded in, for the next batch
      }
    }
    std::vector<std::string> missed;
    for (size_t i = 0; i < norms.size(); ++i) {
      if (counts[i] == 0) {
        missed.push_back(norms[i].name);
      }
    }
    TORCH_CHECK_VALUE(missed.empty(),
                      "[reestimate_batch_norm] every batch normalization must see data, but none reached: ",
                      fmt::format("{}", fmt::join(missed, ", ")));
  } catch (...) {
    restore();
    throw;
  }
  restore();
  for (size_t i = 0; i < norms.size(); ++i) {
    const auto count = static_cast<double>(counts[i]);
    put(norms[i], {sums[i][0] / count, sums[i][1] / count, torch::tensor(counts[i])});
  }
}

}  // namespace rarefy::quantization
