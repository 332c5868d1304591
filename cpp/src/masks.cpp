#include <ATen/core/grad_mode.h>
#include <c10/util/Exception.h>
#include <fmt/format.h>
#include <rarefy/masks.h>
#include <rarefy/ops/apply_masks.h>
#include <torch/nn/module.h>

#include <string_view>
#include <unordered_set>

#include "ops/mask_checks.h"
#include "pruning/module_buffers.h"

namespace rarefy {
namespace {

constexpr std::string_view kMaskSuffix = "_mask_bits";
constexpr std::string_view kBeside[] = {kMaskSuffix, "_mask_score", "_mask_latent", "_mask_rewind"};
constexpr const char* kStepKey = "pruning_step";

/// Calls visit(path, module) for the model and every module in it once.
template <typename Visit>
void for_each_module(const torch::nn::Module& model, const Visit& visit) {
  std::unordered_set<const torch::nn::Module*> seen{&model};
  visit(std::string(), model);
  for (const auto& child : model.named_modules("", /*include_self=*/false)) {
    if (seen.insert(child.value().get()).second) {
      visit(child.key(), *child.value());
    }
  }
}

}  // namespace

std::vector<MaskedTensor> masked_tensors(const torch::nn::Module& model) {
  std::vector<MaskedTensor> result;
  for_each_module(model, [&](const std::string& path, const torch::nn::Module& module) {
    const auto parameters = module.named_parameters(/*recurse=*/false);
    for (const auto& buffer : module.named_buffers(/*recurse=*/false)) {
      if (!buffer.key().ends_with(kMaskSuffix)) {
        continue;
      }
      const std::string parameter = buffer.key().substr(0, buffer.key().size() - kMaskSuffix.size());
      const std::string prefix = path.empty() ? "" : path + ".";
      const auto* value = parameters.find(parameter);
      TORCH_CHECK_VALUE(value != nullptr && value->defined(), "[masks] the mask '", prefix, buffer.key(),
                        "' must be beside a parameter '", parameter, "', but its module has none");
      result.push_back({prefix + parameter, *value, buffer.value()});
    }
  });
  return result;
}

void check_fit(const std::vector<MaskedTensor>& tensors) {  // the operators check too, but know no names
  for (const auto& item : tensors) {
    const auto& value = item.value;
    const auto& mask = item.mask;
    TORCH_CHECK_VALUE(mask.defined() && mask.scalar_type() == at::kByte && mask.dim() == 1 &&
                          mask.numel() == ops::mask_bytes(value.numel()),
                      "[masks] the mask of '", item.name, "' must hold ", ops::mask_bytes(value.numel()),
                      " bytes (uint8) for shape ", value.sizes(), ", got ", mask.defined() ? mask.numel() : 0, " of ",
                      mask.scalar_type());
    TORCH_CHECK_VALUE(mask.device() == value.device(), "[masks] the mask of '", item.name,
                      "' must be on the parameter's device ", value.device(), ", got ", mask.device());
  }
}

std::vector<Stray> stray_values(const std::vector<MaskedTensor>& tensors) {
  std::vector<at::Tensor> values, masks;
  check_fit(tensors);
  for (const auto& item : tensors) {
    values.push_back(item.value);
    masks.push_back(item.mask);
  }
  const auto found = ops::stray_values(values, masks).cpu();
  const auto rows = found.accessor<int64_t, 2>();
  std::vector<Stray> result;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const auto row = static_cast<int64_t>(i);
    if (rows[row][0] > 0) {
      result.push_back({tensors[i].name, rows[row][0], rows[row][1]});
    }
  }
  return result;
}

void check_masks(const std::vector<MaskedTensor>& tensors, const char* function) {
  const auto stray = stray_values(tensors);
  if (stray.empty()) {
    return;
  }
  const auto& [parameter, count, first] = stray[0];
  TORCH_CHECK_VALUE(
      false, "[", function, "] '", parameter, "' must be zero where its mask prunes, but ", count,
      count == 1 ? " value is not, at flat index " : " values are not, the first at flat index ", first,
      stray.size() == 1 ? std::string() : fmt::format(", and so in {} more of its parameters", stray.size() - 1),
      ". Something wrote weights after the masks were applied: let the pruner step after the optimizer, or call remask() "
      "where weights were merged, averaged or loaded");
}

void check_masks(const torch::nn::Module& model, const char* function) { check_masks(masked_tensors(model), function); }

int64_t remask(torch::nn::Module& model) {
  const auto tensors = masked_tensors(model);
  int64_t count = 0;
  for (const auto& stray : stray_values(tensors)) {
    count += stray.count;
  }
  if (count > 0) {
    const at::NoGradGuard no_grad;
    std::vector<at::Tensor> values, masks;
    for (const auto& item : tensors) {
      values.push_back(item.value);
      masks.push_back(item.mask);
    }
    ops::apply_masks_(values, masks);
  }
  return count;
}

void remove_masks(torch::nn::Module& model) {
  for_each_module(model, [&](const std::string& path, const torch::nn::Module& visited) {
    auto& module = const_cast<torch::nn::Module&>(visited);  // of a model that is not const
    for (const auto& buffer : module.named_buffers(/*recurse=*/false)) {
      bool is_beside = path.empty() && buffer.key() == kStepKey;
      for (const auto suffix : kBeside) {
        is_beside = is_beside || buffer.key().ends_with(suffix);
      }
      if (is_beside) {
        pruning::unregister_buffer(module, buffer.key());
      }
    }
  });
}

}  // namespace rarefy
