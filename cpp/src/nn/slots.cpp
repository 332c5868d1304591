#include "nn/slots.h"

#include <torch/nn/modules/container/moduledict.h>
#include <torch/nn/modules/container/modulelist.h>
#include <torch/nn/modules/container/sequential.h>

#include <cstddef>
#include <typeinfo>

namespace rarefy::nn {
namespace {

void collect(torch::nn::Module& module, const std::string& prefix, Slots& slots) {
  size_t index = 0;
  for (const auto& child : module.named_children()) {
    const auto name = prefix.empty() ? child.key() : prefix + "." + child.key();
    slots[child.value().get()].push_back({&module, index++, child.key(), name});
    collect(*child.value(), name, slots);
  }
}

}  // namespace

Slots slots_below(torch::nn::Module& model) {
  Slots slots;
  collect(model, "", slots);
  return slots;
}

bool is_replaceable(const torch::nn::Module& parent) {
  return typeid(parent) == typeid(torch::nn::SequentialImpl) || typeid(parent) == typeid(torch::nn::ModuleListImpl) ||
         typeid(parent) == typeid(torch::nn::ModuleDictImpl);
}

void put(const Slot& slot, const torch::nn::AnyModule& module) {
  const auto offset = static_cast<std::ptrdiff_t>(slot.index);
  if (auto* sequential = dynamic_cast<torch::nn::SequentialImpl*>(slot.parent)) {
    *(sequential->begin() + offset) = module;
  } else if (auto* list = dynamic_cast<torch::nn::ModuleListImpl*>(slot.parent)) {
    *(list->begin() + offset) = module.ptr();
  } else if (auto* dict = dynamic_cast<torch::nn::ModuleDictImpl*>(slot.parent)) {
    (dict->begin() + offset)->value() = module.ptr();
  }
  slot.parent->replace_module(slot.key, module.ptr());
}

}  // namespace rarefy::nn
