// Places of a model that hold a module, and how another one takes its place.
#pragma once

#include <torch/nn/module.h>
#include <torch/nn/modules/container/any.h>

#include <map>
#include <string>
#include <vector>

namespace rarefy::nn {

/// One place where a parent holds a child.
struct Slot {
  torch::nn::Module* parent;
  size_t index;
  std::string key;
  std::string name;  // of the child, dotted
};

/// Every place of a module.
using Slots = std::map<const torch::nn::Module*, std::vector<Slot>>;

/// The places of all modules below `model`.
Slots slots_below(torch::nn::Module& model);

/// Whether a parent's children can be replaced: containers hold them by name, where a typed member would still hold the old.
bool is_replaceable(const torch::nn::Module& parent);

/// Puts a module into a place. A container keeps its own list beside the registered children; both change.
void put(const Slot& slot, const torch::nn::AnyModule& module);

}  // namespace rarefy::nn
