#include "operators.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/enum_tag.h>

#include <string>
#include <string_view>
#include <unordered_map>

namespace rarefy::graph {
namespace {

using Table = std::unordered_map<std::string_view, Kind>;

const Table& table() {
  static const Table kinds = [] {
    Table out;
    const auto add = [&](Kind kind, std::initializer_list<std::string_view> names) {
      for (auto name : names) {
        out[name] = kind;
      }
    };
    add(Kind::identity, {"contiguous", "clone", "to", "_to_copy", "detach", "alias", "dropout", "feature_dropout",
                         "alpha_dropout", "lift_fresh", "lift_fresh_copy", "float", "type_as", "detach_", "dropout_",
                         "resolve_conj", "resolve_neg", "positive", "native_dropout"});
    add(Kind::like, {"zeros_like", "ones_like", "full_like", "empty_like"});
    add(Kind::factory,
        {"zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty", "scalar_tensor"});
    add(Kind::range, {"arange", "linspace", "eye", "tril_indices", "triu_indices", "meshgrid", "range"});
    add(Kind::copy, {"copy_", "copy"});
    add(Kind::movement, {"view",
                         "reshape",
                         "_unsafe_view",
                         "_reshape_alias",
                         "flatten",
                         "unflatten",
                         "permute",
                         "transpose",
                         "t",
                         "numpy_T",
                         "mT",
                         "movedim",
                         "moveaxis",
                         "swapaxes",
                         "swapdims",
                         "unsqueeze",
                         "squeeze",
                         "expand",
                         "slice",
                         "select",
                         "narrow",
                         "chunk",
                         "split",
                         "split_with_sizes",
                         "tensor_split",
                         "unbind",
                         "repeat",
                         "tile",
                         "repeat_interleave",
                         "roll",
                         "flip",
                         "pixel_shuffle",
                         "pixel_unshuffle",
                         "channel_shuffle",
                         "native_channel_shuffle",
                         "index_select",
                         "unfold",
                         "diagonal",
                         "unsafe_chunk",
                         "unsafe_split",
                         "unsafe_split_with_sizes",
                         "hsplit",
                         "vsplit",
                         "dsplit",
                         "ravel",
                         "rot90",
                         "take_along_dim",
                         "gather"});
    add(Kind::index, {"index", "_unsafe_index"});
    add(Kind::concatenation, {"cat", "concat", "concatenate"});
    add(Kind::stacking, {"stack"});
    add(Kind::padding, {"constant_pad_nd"});
    add(Kind::reduction, {"sum", "mean", "amax", "amin", "var", "std", "var_mean", "std_mean", "linalg_vector_norm",
                          "norm", "logsumexp", "all", "any", "nansum"});
    add(Kind::along, {"softmax", "log_softmax", "_softmax", "_log_softmax", "cumsum", "cumprod", "argmax", "argmin",
                      "argsort", "sort", "topk", "max", "min", "_safe_softmax"});
    add(Kind::spatial1, {"max_pool1d", "avg_pool1d", "adaptive_avg_pool1d", "adaptive_max_pool1d", "upsample_linear1d",
                         "upsample_nearest1d", "reflection_pad1d", "replication_pad1d", "max_pool1d_with_indices"});
    add(Kind::spatial2, {"max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d",
                         "_adaptive_avg_pool2d", "upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d",
                         "_upsample_nearest_exact2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa",
                         "reflection_pad2d", "replication_pad2d", "max_pool2d_with_indices"});
    add(Kind::spatial3, {"max_pool3d", "avg_pool3d", "adaptive_avg_pool3d", "adaptive_max_pool3d", "upsample_nearest3d",
                         "upsample_trilinear3d", "replication_pad3d", "reflection_pad3d", "max_pool3d_with_indices"});
    add(Kind::query, {"size",
                      "stride",
                      "item",
                      "is_floating_point",
                      "is_complex",
                      "is_nonzero",
                      "_local_scalar_dense",
                      "sym_size",
                      "sym_numel",
                      "sym_stride",
                      "sym_storage_offset",
                      "dim",
                      "equal",
                      "allclose",
                      "result_type",
                      "can_cast",
                      "is_contiguous",
                      "numel",
                      "is_same_size",
                      "_has_compatible_shallow_copy_type",
                      "_assert_async",
                      "_assert_tensor_metadata",
                      "is_inference"});
    add(Kind::linear, {"linear"});
    add(Kind::addmm, {"addmm"});
    add(Kind::matmul, {"matmul", "mm", "bmm", "mv", "dot"});
    add(Kind::baddbmm, {"baddbmm"});
    add(Kind::convolution, {"conv1d", "conv2d", "conv3d"});
    add(Kind::transposed_convolution, {"conv_transpose1d", "conv_transpose2d", "conv_transpose3d"});
    add(Kind::general_convolution, {"convolution", "_convolution"});
    add(Kind::attention, {"scaled_dot_product_attention"});
    add(Kind::batch_norm,
        {"batch_norm", "native_batch_norm", "cudnn_batch_norm", "_native_batch_norm_legit_no_training"});
    add(Kind::instance_norm, {"instance_norm"});
    add(Kind::layer_norm, {"layer_norm", "native_layer_norm"});
    add(Kind::group_norm, {"group_norm", "native_group_norm"});
    add(Kind::rms_norm, {"rms_norm", "_fused_rms_norm"});
    add(Kind::embedding, {"embedding", "embedding_bag", "_embedding_bag"});
    add(Kind::glu, {"glu"});
    add(Kind::weight_norm, {"_weight_norm_interface"});
    add(Kind::prelu, {"prelu", "_prelu_kernel"});
    add(Kind::recurrent,
        {"lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"});
    // Pointwise in what they do to places, whether or not torch tags them.
    add(Kind::elementwise,
        {"where",        "masked_fill", "masked_fill_", "clamp",       "relu",        "relu_",      "relu6",
         "relu6_",       "hardtanh_",   "selu",         "celu",        "fill_",       "zero_",      "triu",
         "tril",         "normal_",     "uniform_",     "bernoulli_",  "logical_not", "silu",       "silu_",
         "mish",         "gelu",        "gelu_",        "rsub",        "add_",        "sub_",       "mul_",
         "div_",         "addcmul",     "addcdiv",      "lerp",        "hardswish",   "hardswish_", "hardsigmoid",
         "hardsigmoid_", "nan_to_num",  "true_divide",  "divide",      "multiply",    "subtract",   "square",
         "float_power",  "bitwise_not", "isin",         "leaky_relu_", "elu_",        "rrelu",      "bitwise_and"});
    return out;
  }();
  return kinds;
}

Kind rarefy_kind(std::string_view name) {
  if (name == "relu" || name == "inverse_std") {
    return Kind::elementwise;
  }
  if (name == "reduce_bags") {
    return Kind::embedding;
  }
  return name == "fake_quantize" ? Kind::fake_quantize : Kind::unknown;
}

}  // namespace

Kind kind_of(const c10::OperatorName& op) {
  const std::string_view full = op.name;
  if (full.starts_with("rarefy::")) {
    return rarefy_kind(full.substr(8));
  }
  if (full.starts_with("aten::")) {
    const auto found = table().find(full.substr(6));
    if (found != table().end()) {
      return found->second;
    }
  }
  const auto handle = c10::Dispatcher::singleton().findSchema(op);
  return handle && handle->hasTag(at::Tag::pointwise) ? Kind::elementwise : Kind::unknown;
}

}  // namespace rarefy::graph
