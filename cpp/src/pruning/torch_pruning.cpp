#include <ATen/ops/ones_like.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <rarefy/pruning/sparse_file.h>
#include <rarefy/pruning/state.h>
#include <rarefy/pruning/torch_pruning.h>

#include <optional>

#include "ops/fake_quantize_checks.h"
#include "pruning/sparse_codec.h"

namespace rarefy::pruning {
namespace {

constexpr const char* kOriginal = "_orig";
constexpr const char* kMask = "_mask";

/// The name without an ending; unset when it ends otherwise.
std::optional<std::string> without(const std::string& name, const std::string& ending) {
  return name.size() > ending.size() && name.ends_with(ending)
             ? std::optional(name.substr(0, name.size() - ending.size()))
             : std::nullopt;
}

at::Tensor on_host(const at::Tensor& x) { return x.detach().to(at::kCPU).contiguous(); }

}  // namespace

NamedTensors import_torch_pruning(const NamedTensors& state) {
  constexpr const char* function = "[import_torch_pruning] ";
  NamedTensors out;
  std::vector<std::pair<std::string, at::Tensor>> masks;
  const auto original_of = [&](const std::string& name) -> std::optional<std::string> {
    const auto base = without(name, kOriginal);
    if (!base.has_value() || (state.contains(*base + "_u") && !state.contains(*base + kMask))) {
      return std::nullopt;
    }
    return base;
  };
  for (const auto& item : state) {
    const auto& name = item.key();
    if (const auto base = original_of(name)) {
      const auto* mask = state.find(*base + kMask);
      TORCH_CHECK_VALUE(mask != nullptr, function, "'", name, "' must come with '", *base, kMask, "', got none");
      TORCH_CHECK_VALUE(!state.contains(*base), function, "'", *base, "' must not be there beside '", name, "'");
      TORCH_CHECK_VALUE(mask->sizes() == item.value().sizes(), function, "'", *base, kMask,
                        "' must have the shape of '", name, "', ", item.value().sizes(), ", got ", mask->sizes());
      const auto kept = mask->ne(0);
      TORCH_CHECK_VALUE(kept.eq(mask->eq(1)).all().item<bool>(), function, "'", *base, kMask,
                        "' must be 0 or 1 everywhere, and is not");
      const auto value = item.value().detach();
      out.insert(*base, at::where(kept.to(value.device()), value, at::zeros_like(value)));
      masks.emplace_back(mask_key(*base), bits_of(on_host(kept)).to(value.device()));
      continue;
    }
    if (const auto base = without(name, kMask); base.has_value() && state.contains(*base + kOriginal)) {
      continue;
    }
    out.insert(name, item.value());
  }
  TORCH_CHECK_VALUE(!masks.empty(), function,
                    "the state must be that of a model pruned by torch.nn.utils.prune, with '<name>_orig' and "
                    "'<name>_mask', got none of them among ",
                    state.size(), " tensors");
  for (auto& [name, mask] : masks) {
    TORCH_CHECK_VALUE(!out.contains(name), function, "'", name, "' must not be there already");
    out.insert(name, std::move(mask));
  }
  if (!out.contains(kStepKey)) {
    out.insert(kStepKey, at::zeros({}, at::TensorOptions().dtype(at::kLong)));
  }
  return out;
}

NamedTensors export_torch_pruning(const NamedTensors& state) {
  constexpr const char* function = "[export_torch_pruning] ";
  NamedTensors out;
  bool any = false;
  for (const auto& item : state) {
    const auto& name = item.key();
    if (is_pruning_state(name)) {
      if (const auto base = without(name, mask_key(""))) {
        TORCH_CHECK_VALUE(state.contains(*base), function, "'", name, "' must come with '", *base, "', got none");
      }
      continue;
    }
    const auto* mask = state.find(mask_key(name));
    if (mask == nullptr) {
      out.insert(name, item.value());
      continue;
    }
    const auto& value = item.value();
    TORCH_CHECK_VALUE(mask->scalar_type() == at::kByte && mask->numel() == ops::mask_bytes(value.numel()), function,
                      "'", mask_key(name), "' must hold ", ops::mask_bytes(value.numel()), " bytes (uint8) for shape ",
                      value.sizes(), ", got ", mask->numel(), " of ", mask->scalar_type());
    const auto bits = on_host(*mask);
    TORCH_CHECK_VALUE(count_kept(bits.const_data_ptr<uint8_t>(), value.numel()) >= 0, function, "the padding of '",
                      mask_key(name), "' must be zero");
    out.insert(name + kOriginal, value);
    out.insert(name + kMask,
               unpacked(bits.const_data_ptr<uint8_t>(), value.sizes()).to(value.device(), value.scalar_type()));
    any = true;
  }
  TORCH_CHECK_VALUE(any, function, "the state must have masks, '<name>_mask_bits', got none among ", state.size(),
                    " tensors");
  return out;
}

}  // namespace rarefy::pruning
