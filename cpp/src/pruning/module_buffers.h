// Removing a buffer from a torch::nn::Module.
#pragma once

#include "nn/module_buffers.h"

namespace rarefy::pruning {

using nn::unregister_buffer;

}  // namespace rarefy::pruning
