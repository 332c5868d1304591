// Removing a buffer from a torch::nn::Module, which has register_buffer but no counterpart.
#pragma once

#include <torch/nn/cloneable.h>

namespace rarefy::nn::detail {
struct BufferAccess;
}

/// torch::nn::Module names every Cloneable<T> its friend; this one is only that.
template <>
class torch::nn::Cloneable<rarefy::nn::detail::BufferAccess> {
 public:
  static void unregister_buffer(torch::nn::Module& module, const std::string& name) { module.buffers_.erase(name); }
};

namespace rarefy::nn {

inline void unregister_buffer(torch::nn::Module& module, const std::string& name) {
  torch::nn::Cloneable<detail::BufferAccess>::unregister_buffer(module, name);
}

}  // namespace rarefy::nn
