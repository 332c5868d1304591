#pragma once

#include <rarefy/export.h>
#include <torch/nn/module.h>

#include <functional>

// How much an element's error counts to weights with the observer MSE, from data: fills FakeQuantizer::importance of a prepared
// model, which importance-weighted searches read. The quantizers neither observe nor round meanwhile, and the model is in
// evaluation mode; both are as before afterwards, also when something throws. What was collected replaces what was there.
namespace rarefy::quantization {

/// The mean squared input of each input channel over all that `run` feeds the model: an error of w costs E[x^2] times its square in
/// the layer's output. For linear layers and convolutions, transposed ones included.
/// Throws c10::ValueError where the model is not prepared, has no such layer with an observer MSE, or one of these sees no input,
/// or an input that is not finite (they are listed). Then nothing has changed.
RAREFY_API void collect_importance(torch::nn::Module& model, const std::function<void()>& run);

/// The mean over calls of the squared gradient of `loss` with respect to each element that is rounded (the diagonal of the
/// empirical Fisher matrix): `loss` is called `batches` times and gives a scalar of one batch. Gradients of parameters stay as they
/// are. For the same layers.
/// Throws as above, and for batches < 1.
RAREFY_API void collect_gradient_importance(torch::nn::Module& model, const std::function<torch::Tensor()>& loss,
                                            int64_t batches);

}  // namespace rarefy::quantization
