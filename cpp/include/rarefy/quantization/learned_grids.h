// The arithmetic of learned quantizers (rarefy/quantization/learned.h) on tensors, for the modules of both languages: Python calls
// torch.ops.rarefy.learned_fake_quantize, learned_qparams, learned_range and learned_start.
#pragma once

#include <ATen/core/Tensor.h>
#include <rarefy/export.h>
#include <rarefy/quantization/scheme.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace rarefy::quantization {

/// "lsq", "lsq_plus", "pact", "tqt", "bits"; empty for observers of ranges.
RAREFY_API std::string learned_kind(const Observer& observer);
/// The names of its parameters, in the order in which the functions below take them.
RAREFY_API std::vector<std::string> learned_names(const std::string& kind);
/// Throws c10::ValueError for a scheme that a learned quantizer cannot have.
RAREFY_API void check_learned_scheme(const char* function, const Observer& observer, const Scheme& scheme,
                                     bool is_weight);

/// x on the grid that the parameters give, differentiable in both.
///   zero_point      int32; read by lsq and tqt
///   gradient_scale  unset: that of LSQ's paper
RAREFY_API at::Tensor learned_fake_quantize(const at::Tensor& x, at::TensorList parameters,
                                            const at::Tensor& zero_point, const std::string& kind,
                                            std::optional<double> gradient_scale, bool is_weight,
                                            std::optional<int64_t> axis, int64_t qmin, int64_t qmax, bool symmetric);

/// Scale (float32) and zero point (int32) of that grid, without a gradient.
RAREFY_API std::tuple<at::Tensor, at::Tensor> learned_qparams(at::TensorList parameters, const at::Tensor& zero_point,
                                                              const std::string& kind, int64_t qmin, int64_t qmax,
                                                              bool symmetric);

/// The range of a finite batch that training may begin with. Where the grid begins at 0, low is the batch's least value.
RAREFY_API std::tuple<at::Tensor, at::Tensor> learned_range(const at::Tensor& x, const std::string& kind,
                                                            std::optional<int64_t> axis, int64_t qmin, int64_t qmax,
                                                            bool symmetric);

/// The parameters, and last the zero point, that such a range gives.
RAREFY_API std::vector<at::Tensor> learned_start(const at::Tensor& low, const at::Tensor& high, const std::string& kind,
                                                 int64_t qmin, int64_t qmax, bool symmetric);

/// Whether the grid of this kind begins at 0, so that values must not be negative.
inline bool learned_from_zero(const std::string& kind, bool symmetric) {
  return kind == "pact" || (kind == "bits" && !symmetric);
}

}  // namespace rarefy::quantization
