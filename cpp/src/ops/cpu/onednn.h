// LibTorch's oneDNN operators, which its C++ headers do not declare: reached through the dispatcher.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/util/Exception.h>

namespace rarefy::ops {

template <typename Signature>
c10::TypedOperatorHandle<Signature> onednn(const char* name) {
  const auto schema = c10::Dispatcher::singleton().findSchema({name, ""});
  TORCH_CHECK_NOT_IMPLEMENTED(schema.has_value(), "this LibTorch has no operator ", name,
                              ": int8 execution on the CPU needs a build with oneDNN");
  return schema->typed<Signature>();
}

}  // namespace rarefy::ops
