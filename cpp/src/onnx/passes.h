// Rewrites of a translated model, so that a runtime's kernels find the patterns that they run in integers. Each keeps the
// function that the model computes: bit for bit, or, where it says so, up to the order of a float sum. What they are for is
// in docs/export.md.
#pragma once

#include "onnx/model.h"

namespace rarefy::onnx {

/// Makes one of the equal quantizers (and their clips and dequantizers) that read the same tensor. A QuantizeLinear behind a
/// DequantizeLinear of equal parameters gives the integers back and goes too. Returns how many went.
int64_t merge_duplicates(Model& model);

/// Removes a Relu whose input cannot be negative: the model's own behind a layer that has applied it.
void drop_idle_relus(Model& model);

/// Writes the mean over the two last axes of dequantized images as GlobalAveragePool (its sum has another order).
void mean_to_global_pool(Model& model);

/// Quantizes before operators that only move values (and each input of a Concat) where all readers quantize alike, and
/// returns how often. The pair behind the operator stays, unless it has no effect.
int64_t hoist_quantizers(Model& model);

/// Moves Relu and Clip behind the quantizers that read them, as limits of the integers where those do not saturate:
/// rounding is monotone, so Q(clip(x, a, b)) = clip(Q(x), Q(a), Q(b)).
/// Without `integers`, only what saturation does goes.
void absorb_clipping(Model& model, bool integers);

/// Writes a Relu or Clip before a quantizer to FP8 as Max and Min: ONNX Runtime drops those before a quantizer whose type it does not
/// ask for.
void keep_clipping(Model& model);

/// Writes the bias of a quantized linear layer so that its product runs in integers: into a Gemm where the product is 2-D and
/// goes straight to one quantizer, as Sum(product, bias) elsewhere.
void split_linear_bias(Model& model);

/// Gives the bias behind a product of integers of three dimensions or more the product's rank, [1, 1, N] say: ONNX Runtime
/// makes a Gemm of that product and a bias [N], which it cannot load with int8 activations from operator set 21 on.
void widen_linear_bias(Model& model);

/// Writes the addition of two results before a LayerNormalization as Sum, which adds the same two numbers.
void residual_to_sum(Model& model);

/// Stores the weights of products with a float input as INT4 where their integers fit.
void pack_int4(Model& model);

}  // namespace rarefy::onnx
