#include <ATen/ops/equal.h>
#include <rarefy/checkpoint.h>
#include <rarefy/masks.h>
#include <rarefy/quantization/fake_quantizer.h>

#include <algorithm>
#include <sstream>
#include <tuple>
#include <unordered_map>
#include <utility>

#include "checkpoint_state.h"

namespace rarefy {
namespace {

/// Equal for names of one tensor: the same elements of the same memory, read in the same way.
auto identity(const torch::Tensor& tensor) {
  return std::tuple(tensor.unsafeGetTensorImpl()->storage().unsafeGetStorageImpl(), tensor.storage_offset(),
                    tensor.scalar_type(), tensor.sizes().vec(), tensor.strides().vec());
}
using Identity = decltype(identity(torch::Tensor()));

std::string listed(const std::vector<std::string>& names) {
  std::string text;
  for (const auto& name : names) {
    text += (text.empty() ? "" : ", ") + name;
  }
  return text;
}

bool fits(const torch::Tensor& from, const torch::Tensor& into) {
  const bool types = from.scalar_type() == into.scalar_type() || (from.is_floating_point() && into.is_floating_point());
  return types && from.sizes() == into.sizes();
}

std::string described(const torch::Tensor& tensor) {
  std::ostringstream text;
  text << tensor.scalar_type() << " " << tensor.sizes();
  return text.str();
}

}  // namespace

State state_of(const torch::nn::Module& model) {
  State state;
  for (const auto& items : {model.named_parameters(), model.named_buffers()}) {
    for (const auto& item : items) {
      if (item.value().defined()) {
        state.emplace_back(item.key(), item.value());
      }
    }
  }
  return state;
}

NamedTensors without_duplicates(State state, Metadata& metadata) {
  std::sort(state.begin(), state.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
  NamedTensors kept;
  std::map<Identity, std::string> names;
  for (const auto& [name, tensor] : state) {
    if (tensor.numel() > 0) {
      const auto [position, is_new] = names.emplace(identity(tensor), name);
      if (!is_new) {
        metadata.emplace(name, position->second);
        continue;
      }
    }
    kept.insert(name, tensor);
  }
  return kept;
}

void save_safetensors(const torch::nn::Module& model, const std::filesystem::path& path, const Metadata& metadata) {
  check_masks(model, "save_safetensors");
  Metadata text = metadata;
  const auto tensors = without_duplicates(state_of(model), text);
  save_safetensors(tensors, path, text);
}

LoadResult load_safetensors(torch::nn::Module& model, const std::filesystem::path& path, bool strict) {
  return load_into(model, load_safetensors(path), path.string(), strict);
}

LoadResult load_into(torch::nn::Module& model, const Checkpoint& checkpoint, const std::string& file, bool strict,
                     const std::function<void()>& before_copying) {
  auto result = load_into(state_of(model), checkpoint, file, strict, before_copying);
  model.apply([](torch::nn::Module& module) {
    if (auto* quantizer = dynamic_cast<quantization::FakeQuantizerImpl*>(&module)) {
      quantizer->refresh();
    }
  });
  return result;
}

LoadResult load_into(const State& state, const Checkpoint& checkpoint, const std::string& file, bool strict,
                     const std::function<void()>& before_copying, const char* function) {
  LoadResult result;
  std::vector<std::pair<torch::Tensor, const torch::Tensor*>> copies;  // into, from
  std::unordered_map<std::string, torch::Tensor> targets;
  std::map<Identity, const std::string*> sources;  // name in the file of what fills a tensor of the model
  std::vector<std::string> unfit;
  for (const auto& [name, target] : state) {
    targets.emplace(name, target);
    const auto* source = checkpoint.tensors.find(name);
    if (source == nullptr) {
      continue;
    }
    if (!fits(*source, target)) {
      unfit.push_back(name + " (" + described(*source) + " into " + described(target) + ")");
      continue;
    }
    const auto [position, is_new] = sources.emplace(identity(target), &name);
    TORCH_CHECK_VALUE(is_new || at::equal(checkpoint.tensors[*position->second], *source), "[", function, "] ", file,
                      ": ", *position->second, " and ", name,
                      " are one tensor of the model and must be equal in the file");
    copies.emplace_back(target, source);
  }
  TORCH_CHECK_VALUE(unfit.empty(), "[", function, "] ", file,
                    ": shapes and types must be those of the model, but are not for: ", listed(unfit));
  for (const auto& [name, target] : state) {
    if (!checkpoint.tensors.contains(name) && sources.count(identity(target)) == 0) {
      result.missing.push_back(name);
    }
  }
  for (const auto& item : checkpoint.tensors) {
    if (targets.count(item.key()) == 0) {
      result.unexpected.push_back(item.key());
    }
  }
  TORCH_CHECK_VALUE(!strict || (result.missing.empty() && result.unexpected.empty()), "[", function, "] ", file,
                    ": names must be those of the model, but missing are: ", listed(result.missing),
                    "; unexpected are: ", listed(result.unexpected));

  if (before_copying != nullptr) {
    before_copying();
  }
  const torch::NoGradGuard no_grad;
  for (auto& [target, source] : copies) {
    target.copy_(*source);
  }
  return result;
}

}  // namespace rarefy
