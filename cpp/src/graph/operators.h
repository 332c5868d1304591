#pragma once

#include <ATen/core/operator_name.h>

namespace rarefy::graph {

/// What an operator does to the places of its elements. Everything that reads a graph asks this one table.
enum class Kind {
  unknown,
  identity,       // the first tensor, as it is or converted: contiguous, clone, to, dropout
  like,           // a constant of the first tensor's shape: zeros_like
  factory,        // a constant of a shape that is given as numbers: zeros, new_ones
  range,          // values that depend on their place: arange
  elementwise,    // each output element depends on the input elements in its place, broadcast
  copy,           // self takes the values of another tensor, in place: copy_
  movement,       // puts elements of the first tensor elsewhere: view, permute, split, pixel_shuffle
  concatenation,  // cat
  stacking,       // stack
  padding,        // pads with a constant
  reduction,      // over the dimensions `dim`: sum, mean, amax
  along,          // mixes elements along the dimension `dim`: softmax, cumsum
  spatial1,
  spatial2,
  spatial3,  // mixes along the last n dimensions: pooling, interpolation, padding by reflection
  query,     // reads facts or values and gives no tensor that depends on channels: size, item
  linear,
  addmm,
  matmul,
  baddbmm,
  convolution,
  transposed_convolution,
  general_convolution,  // the latter says by an argument whether it is transposed
  attention,            // scaled_dot_product_attention
  batch_norm,
  instance_norm,
  layer_norm,
  group_norm,
  rms_norm,
  embedding,
  index,
  glu,
  prelu,
  recurrent,
  fake_quantize,
  weight_norm,  // a direction scaled to a length per index of one dimension
};

/// Kind::unknown for what is not in the table and not tagged as pointwise.
Kind kind_of(const c10::OperatorName& op);

inline bool is_known(const c10::OperatorName& op) { return kind_of(op) != Kind::unknown; }

}  // namespace rarefy::graph
