#pragma once

#include <ATen/core/Tensor.h>
#include <rarefy/export.h>
#include <rarefy/ops/quantized.h>

#include <cstdint>
#include <optional>
#include <tuple>

// One direction of one recurrent layer, step by step (docs/dev/numerics.md, "Recurrent layers"). Also
// torch.ops.rarefy.recurrence.
namespace rarefy::ops {

/// The product of the hidden state with its weight.
struct HiddenProduct {
  /// [gates * H, H]: floating point, on its grid already where it has one; or int8, for inference in integers.
  at::Tensor weight;
  /// Of an int8 weight: float32, [gates * H] or one element.
  std::optional<at::Tensor> weight_scale = std::nullopt;
  /// [gates * H] or none.
  std::optional<at::Tensor> bias = std::nullopt;
  /// The grid that the hidden state is rounded to before it is multiplied; unset: it is not.
  std::optional<ByteGrid> grid = std::nullopt;
};

/// An LSTM with c0, a GRU without. The rows of all steps lie one after the other, step t having batch_sizes[t] of them, which
/// never grow: a packed sequence, or an ordinary one, where all sizes are equal.
///
///   LSTM  a = gates[t] + (W h + b), in the order i, f, g, o;  c' = s(f) c + s(i) tanh(g);  h' = s(o) tanh(c')
///   GRU   a = gates[t], d = W h + b, in the order r, z, n;  n = tanh(a_n + s(a_r + d_r) d_n);  h' = n + s(a_z + d_z) (h - n)
///
///   gates        [sum of batch_sizes, 4 H or 3 H]: the input's share, its bias included
///   h0, c0       [batch_sizes[0], H], floating point of the type of gates
///   reverse      from the last step of each sequence to the first
/// Returns the hidden states [sum of batch_sizes, H] in the order of the input, and the last hidden state and cell state
/// [batch_sizes[0], H] of each sequence (an empty tensor for the cell state of a GRU).
/// Differentiable where the weight is floating point. Throws c10::ValueError for what does not fit.
RAREFY_API std::tuple<at::Tensor, at::Tensor, at::Tensor> recurrence(const at::Tensor& gates,
                                                                     const HiddenProduct& hidden, const at::Tensor& h0,
                                                                     const std::optional<at::Tensor>& c0,
                                                                     at::IntArrayRef batch_sizes, bool reverse);

}  // namespace rarefy::ops
