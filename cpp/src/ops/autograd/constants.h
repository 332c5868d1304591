// Errors for derivatives that an operator does not have, where leaving them out would be a derivative of 0.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <c10/util/Exception.h>

#include <initializer_list>
#include <optional>

namespace rarefy::ops {

/// Throws c10::NotImplementedError where one of the inputs has a tangent of forward-mode differentiation.
inline void check_no_tangent(const char* function, std::initializer_list<std::optional<at::Tensor>> inputs) {
  for (const auto& input : inputs) {
    TORCH_CHECK_NOT_IMPLEMENTED(!input.has_value() || !input->defined() || !input->_fw_grad(/*level=*/0).defined(), "[",
                                function,
                                "] has no derivative in forward mode, got an input with a tangent; use backward()");
  }
}

/// Throws c10::ValueError where a gradient in the weights of rows is asked for.
inline void check_constant_weights(const char* function, const std::optional<at::Tensor>& row_weights) {
  TORCH_CHECK_VALUE(!at::GradMode::is_enabled() || !row_weights.has_value() || !row_weights->requires_grad(), "[",
                    function,
                    "] row_weights must not require a gradient: the loss has none in them; detach() them, or ",
                    "multiply the rows' losses of reduction 'none' by them");
}

}  // namespace rarefy::ops
