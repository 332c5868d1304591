#include <ATen/ops/cat.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/dropout.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/zeros_like.h>
#include <rarefy/nn/attention.h>
#include <rarefy/ops/integer.h>
#include <rarefy/ops/quantized.h>
#include <torch/nn/init.h>

#include <array>
#include <cmath>
#include <limits>
#include <ostream>

namespace rarefy::nn {
namespace {

constexpr std::array kParts = {"query", "key", "value"};
constexpr std::array kWeights = {"q_proj_weight", "k_proj_weight", "v_proj_weight"};
constexpr std::array kHeads = {"query", "key", "probabilities", "value"};

std::optional<torch::Tensor> optional(const torch::Tensor& x) { return x.defined() ? std::optional(x) : std::nullopt; }

std::string input_of(size_t part) { return std::string("input_") + kParts[part]; }
std::string weight_of(size_t part) { return std::string("weight_") + kParts[part]; }

MultiheadAttentionOptions checked(MultiheadAttentionOptions o) {
  TORCH_CHECK_VALUE(o.num_heads() >= 1 && (o.head_dim().has_value() || o.embed_dim() % o.num_heads() == 0),
                    "[MultiheadAttention] num_heads must divide embed_dim where head_dim is not given, got ",
                    o.num_heads(), " heads for ", o.embed_dim());
  o.head_dim(o.head_dim().value_or(o.embed_dim() / o.num_heads()));
  o.v_head_dim(o.v_head_dim().value_or(*o.head_dim()));
  o.kdim(o.kdim().value_or(o.embed_dim()));
  o.vdim(o.vdim().value_or(o.embed_dim()));
  TORCH_CHECK_VALUE(
      o.embed_dim() >= 1 && *o.head_dim() >= 1 && *o.v_head_dim() >= 1 && *o.kdim() >= 1 && *o.vdim() >= 1,
      "[MultiheadAttention] sizes must be at least 1, got embed_dim ", o.embed_dim(), ", head_dim ", *o.head_dim(),
      ", v_head_dim ", *o.v_head_dim(), ", kdim ", *o.kdim(), ", vdim ", *o.vdim());
  o.scale(o.scale().value_or(1.0 / std::sqrt(static_cast<double>(*o.head_dim()))));
  return o;
}

/// A mask as what is added to the scores: true becomes -inf.
torch::Tensor additive(const torch::Tensor& mask, const char* name, c10::ScalarType dtype) {
  if (!mask.defined() || mask.is_floating_point()) {
    return mask;
  }
  TORCH_CHECK_TYPE(mask.scalar_type() == torch::kBool, "[MultiheadAttention] ", name,
                   " must be bool or floating point, got ", mask.scalar_type());
  return at::zeros_like(mask, mask.options().dtype(dtype)).masked_fill(mask, -std::numeric_limits<double>::infinity());
}

}  // namespace

MultiheadAttentionOptions::MultiheadAttentionOptions(int64_t embed_dim, int64_t num_heads)
    : embed_dim_(embed_dim), num_heads_(num_heads) {}

MultiheadAttentionOptions::MultiheadAttentionOptions(const torch::nn::MultiheadAttentionOptions& options)
    : embed_dim_(options.embed_dim()),
      num_heads_(options.num_heads()),
      dropout_(options.dropout()),
      bias_(options.bias()),
      add_bias_kv_(options.add_bias_kv()),
      add_zero_attn_(options.add_zero_attn()),
      kdim_(options.kdim()),
      vdim_(options.vdim()) {}

MultiheadAttentionImpl::MultiheadAttentionImpl(const MultiheadAttentionOptions& options_) : options(checked(options_)) {
  reset();
  reset_parameters();
}

std::vector<int64_t> MultiheadAttentionImpl::rows() const {
  const auto keys = options.num_heads() * head_dim();
  return {keys, keys, options.num_heads() * v_head_dim()};
}

void MultiheadAttentionImpl::reset() {
  const auto sizes = rows();
  const int64_t all = sizes[0] + sizes[1] + sizes[2];
  const bool converted = mode_ == Mode::converted;
  const auto make = [&](const char* name, at::IntArrayRef shape, bool is_weight) {
    if (!converted) {
      return register_parameter(name, torch::empty(shape));
    }
    return register_buffer(name, torch::empty(shape, is_weight ? torch::kInt8 : torch::kFloat32));
  };
  in_proj_weight = torch::Tensor();
  if (is_packed() && !converted) {
    in_proj_weight = make("in_proj_weight", {all, options.embed_dim()}, true);
  } else {
    q_proj_weight = make("q_proj_weight", {sizes[0], options.embed_dim()}, true);
    k_proj_weight = make("k_proj_weight", {sizes[1], *options.kdim()}, true);
    v_proj_weight = make("v_proj_weight", {sizes[2], *options.vdim()}, true);
  }
  if (options.bias()) {
    in_proj_bias = make("in_proj_bias", {all}, false);
  }
  if (options.add_bias_kv()) {
    bias_k = make("bias_k", {1, 1, sizes[1]}, false);
    bias_v = make("bias_v", {1, 1, sizes[2]}, false);
  }
  out_proj = register_module("out_proj", Linear(LinearOptions(sizes[2], options.embed_dim()).bias(options.bias())));
  if (!specs_.empty()) {
    quant = register_module("quant", QuantState(specs_));
  }
}

void MultiheadAttentionImpl::reset_parameters() {
  const torch::NoGradGuard no_grad;
  for (const auto& weight : {in_proj_weight, q_proj_weight, k_proj_weight, v_proj_weight}) {
    if (weight.defined()) {
      torch::nn::init::xavier_uniform_(weight);
    }
  }
  if (in_proj_bias.defined()) {
    in_proj_bias.zero_();
    out_proj->bias.zero_();
  }
  for (const auto& bias : {bias_k, bias_v}) {
    if (bias.defined()) {
      torch::nn::init::xavier_normal_(bias);
    }
  }
}

void MultiheadAttentionImpl::pretty_print(std::ostream& stream) const {
  stream << "rarefy::nn::MultiheadAttention(embed_dim=" << options.embed_dim() << ", num_heads=" << options.num_heads()
         << ", batch_first=" << std::boolalpha << options.batch_first() << ")";
}

std::vector<torch::Tensor> MultiheadAttentionImpl::projections() const {
  return in_proj_weight.defined() ? in_proj_weight.split_with_sizes(rows())
                                  : std::vector<torch::Tensor>{q_proj_weight, k_proj_weight, v_proj_weight};
}

void MultiheadAttentionImpl::prepare(const quantization::LayerConfig& config,
                                     const quantization::Observer& default_observer) {
  TORCH_CHECK_VALUE(mode_ == Mode::floating, "[prepare] ", kind(), " must be floating point, but is already prepared");
  if (!config.weight.has_value()) {
    return;
  }
  const auto observer = config.observer.value_or(default_observer);
  if (config.activation.has_value()) {
    for (size_t part = 0; part < kParts.size(); ++part) {
      specs_.push_back({input_of(part), {*config.activation, observer, 1}});
    }
    for (const auto* name : kHeads) {
      specs_.push_back({name, {*config.activation, observer, 1}});
    }
  }
  const auto weights = projections();
  for (size_t part = 0; part < kParts.size(); ++part) {
    specs_.push_back({weight_of(part),
                      {*config.weight, config.weight_observer.value_or(quantization::Latest{}), weights[part].size(0),
                       weights[part].sizes().vec()}});
  }
  quant = register_module("quant", QuantState(specs_));
  quant->train(is_training());
  quant->to(weights[0].device());
  execution = config.execution;
  gradient_dtype = config.gradient_dtype;
  float_reason_ = config.why_not_integer();
  if (!float_reason_.has_value() && !ops::has_exact_integer_products()) {
    float_reason_ = "the processor sums products of bytes in 16 bits";
  }
  mode_ = Mode::prepared;
}

void MultiheadAttentionImpl::become_integer(const std::vector<std::pair<std::string, torch::Tensor>>& tensors) {
  for (const auto& name : named_parameters(/*recurse=*/false).keys()) {
    parameters_.erase(name);
  }
  in_proj_weight = torch::Tensor();
  for (const auto& [name, place] : {std::pair("q_proj_weight", &q_proj_weight),
                                    {"k_proj_weight", &k_proj_weight},
                                    {"v_proj_weight", &v_proj_weight},
                                    {"in_proj_bias", &in_proj_bias},
                                    {"bias_k", &bias_k},
                                    {"bias_v", &bias_v}}) {
    for (const auto& [key, tensor] : tensors) {
      if (key == name) {
        *place = register_buffer(name, tensor);
      }
    }
  }
  mode_ = Mode::converted;
}

void MultiheadAttentionImpl::convert() {
  TORCH_CHECK_VALUE(mode_ == Mode::prepared, "[convert] ", kind(), " must be prepared");
  for (const auto& [name, quantizer] : quant->quantizers()) {
    if (!quantizer->options.scheme.is_plain()) {  // stays as it is, simulated
      return;
    }
  }
  const torch::NoGradGuard no_grad;
  std::vector<std::pair<std::string, torch::Tensor>> tensors;
  const auto weights = projections();
  for (size_t part = 0; part < kParts.size(); ++part) {
    auto* quantizer = quant->find(weight_of(part));
    if (quantizer->observe) {
      quantizer->forward(weights[part]);
    }
    tensors.emplace_back(kWeights[part], quantizer->quantize_to_integer(weights[part]));
  }
  for (const auto& [name, tensor] : {std::pair("in_proj_bias", in_proj_bias), {"bias_k", bias_k}, {"bias_v", bias_v}}) {
    if (tensor.defined()) {
      tensors.emplace_back(name, tensor.detach().to(torch::kFloat32).clone());
    }
  }
  become_integer(tensors);
}

void MultiheadAttentionImpl::restore(const ConvertedState& state) {
  TORCH_CHECK_VALUE(mode_ == Mode::floating, "[restore] ", kind(), " must be floating point");
  specs_ = state.quantizers;
  quant = register_module("quant", QuantState(specs_));
  quant->train(is_training());
  quant->to(projections()[0].device());
  target = state.target;
  become_integer(state.tensors);
}

std::vector<std::string> MultiheadAttentionImpl::tensor_names() const {
  std::vector<std::string> names(kWeights.begin(), kWeights.end());
  if (options.bias()) {
    names.emplace_back("in_proj_bias");
  }
  if (options.add_bias_kv()) {
    names.insert(names.end(), {"bias_k", "bias_v"});
  }
  return names;
}

std::map<std::string, std::vector<int64_t>> MultiheadAttentionImpl::converted_shapes() const {
  const auto sizes = rows();
  std::map<std::string, std::vector<int64_t>> shapes{{"q_proj_weight", {sizes[0], options.embed_dim()}},
                                                     {"k_proj_weight", {sizes[1], *options.kdim()}},
                                                     {"v_proj_weight", {sizes[2], *options.vdim()}}};
  if (options.bias()) {
    shapes["in_proj_bias"] = {sizes[0] + sizes[1] + sizes[2]};
  }
  if (options.add_bias_kv()) {
    shapes["bias_k"] = {1, 1, sizes[1]};
    shapes["bias_v"] = {1, 1, sizes[2]};
  }
  return shapes;
}

bool MultiheadAttentionImpl::trains_in_integers(size_t part, const torch::Tensor& x) const {
  const auto *input = quant->find(input_of(part)), *weight = quant->find(weight_of(part));
  if (execution == quantization::Execution::simulated || input == nullptr || !input->quantize || !weight->quantize) {
    return false;
  }
  std::string reason = float_reason_.value_or("");
  if (reason.empty() && x.size(-1) > ops::kLongestSum) {
    reason = "int32 does not hold sums of " + std::to_string(x.size(-1)) + " products";
  }
  if (reason.empty() && x.scalar_type() == torch::kFloat64) {
    reason = "float64 has no integer kernels";
  }
  if (reason.empty() && !x.device().is_cpu() && !x.device().is_cuda()) {
    reason = "there are no integer kernels on " + x.device().str();
  }
  TORCH_CHECK_VALUE(reason.empty() || execution != quantization::Execution::integer, "[", kind(),
                    "] execution = integer must be possible for its input, but ", reason);
  return reason.empty();
}

torch::Tensor MultiheadAttentionImpl::project(size_t part, const torch::Tensor& x, const torch::Tensor& weight,
                                              const torch::Tensor& bias) {
  if (mode_ == Mode::floating) {
    return at::linear(x, weight, optional(bias));
  }
  const auto input_name = input_of(part), weight_name = weight_of(part);
  if (mode_ == Mode::converted) {
    const auto& scale = quant->find(weight_name)->scale;
    if (quant->has_bytes(input_name)) {
      return ops::quantized_linear(x, weight, scale, optional(bias), quant->grid(input_name));
    }
    return at::linear(quant->apply(input_name, x), weight.to(torch::kFloat32) * scale.view({-1, 1}), optional(bias));
  }
  if (trains_in_integers(part, x)) {
    auto *input = quant->find(input_name), *weights = quant->find(weight_name);
    input->update(x);
    weights->update(weight);
    const auto &xs = input->options.scheme, &ws = weights->options.scheme;
    const ops::IntegerGrids grids{input->scale,   input->zero_point,   xs.qmin(), xs.qmax(),
                                  weights->scale, weights->zero_point, ws.qmin(), ws.qmax()};
    return ops::integer_linear(x, weight, optional(bias), grids, /*transposed=*/false,
                               {false, gradient_dtype == c10::ScalarType::BFloat16, std::nullopt});
  }
  return at::linear(quant->apply(input_name, x), quant->apply(weight_name, weight), optional(bias));
}

torch::Tensor MultiheadAttentionImpl::mask_of(const torch::Tensor& key_padding_mask, const torch::Tensor& attn_mask,
                                              int64_t batch, int64_t target, int64_t source,
                                              const torch::Tensor& like) const {
  const auto pairs = additive(attn_mask, "attn_mask", like.scalar_type());
  const auto padding = additive(key_padding_mask, "key_padding_mask", like.scalar_type());
  const std::vector<int64_t> shared{target, source}, per_head{batch * options.num_heads(), target, source};
  TORCH_CHECK_VALUE(
      !pairs.defined() || pairs.sizes() == at::IntArrayRef(shared) || pairs.sizes() == at::IntArrayRef(per_head),
      "[MultiheadAttention] attn_mask must have shape ", at::IntArrayRef(shared), " or ", at::IntArrayRef(per_head),
      ", got ", pairs.sizes());
  const std::vector<int64_t> of_keys{batch, source};
  TORCH_CHECK_VALUE(!padding.defined() || padding.sizes() == at::IntArrayRef(of_keys),
                    "[MultiheadAttention] key_padding_mask must have shape ", at::IntArrayRef(of_keys), ", got ",
                    padding.sizes());
  const int64_t more = (options.add_bias_kv() ? 1 : 0) + (options.add_zero_attn() ? 1 : 0);
  const auto padded = [more](const torch::Tensor& mask) {
    return more == 0 ? mask : at::constant_pad_nd(mask, {0, more});
  };
  torch::Tensor mask;  // broadcast to [batch, heads, target, source]
  if (pairs.defined()) {
    mask = padded(pairs);
    mask = mask.dim() == 2 ? mask : mask.unflatten(0, {batch, options.num_heads()});
  }
  if (padding.defined()) {
    const auto keys = padded(padding).unsqueeze(1).unsqueeze(1);
    mask = mask.defined() ? mask + keys : keys;
  }
  return mask;
}

torch::Tensor MultiheadAttentionImpl::quantized(const std::string& name, const torch::Tensor& x) const {
  return mode_ == Mode::floating ? x : quant->apply(name, x);
}

std::tuple<torch::Tensor, torch::Tensor> MultiheadAttentionImpl::forward(
    const torch::Tensor& query, const torch::Tensor& key, const torch::Tensor& value,
    const torch::Tensor& key_padding_mask, bool need_weights, const torch::Tensor& attn_mask,
    bool average_attn_weights) {
  const bool batched = query.dim() == 3;
  TORCH_CHECK_VALUE((query.dim() == 2 || batched) && key.dim() == query.dim() && value.dim() == query.dim(),
                    "[MultiheadAttention] query, key and value must all have 3 dimensions, or 2 without a batch, got ",
                    query.dim(), ", ", key.dim(), " and ", value.dim());
  const auto sizes = rows();
  const auto biases =
      in_proj_bias.defined() ? in_proj_bias.split_with_sizes(sizes) : std::vector<torch::Tensor>(kParts.size());
  const auto weights = projections();
  const std::array given{query, key, value};
  std::array<torch::Tensor, kParts.size()> heads;
  for (size_t part = 0; part < kParts.size(); ++part) {
    const auto y = project(part, given[part], weights[part], biases[part]);
    heads[part] = !batched ? y.unsqueeze(0) : options.batch_first() ? y : y.transpose(0, 1);
  }
  auto& [q, k, v] = heads;
  const int64_t batch = q.size(0);
  const auto padding = batched || !key_padding_mask.defined() ? key_padding_mask : key_padding_mask.unsqueeze(0);
  const auto mask = mask_of(padding, attn_mask, batch, q.size(1), k.size(1), q);
  if (options.add_bias_kv()) {
    k = at::cat({k, bias_k.expand({batch, 1, -1})}, 1);
    v = at::cat({v, bias_v.expand({batch, 1, -1})}, 1);
  }
  if (options.add_zero_attn()) {
    k = at::constant_pad_nd(k, {0, 0, 0, 1});
    v = at::constant_pad_nd(v, {0, 0, 0, 1});
  }
  const auto split = [&](const torch::Tensor& x, int64_t width) {
    return x.unflatten(-1, {options.num_heads(), width}).transpose(1, 2);
  };
  auto scores =
      at::matmul(quantized("query", split(q, head_dim())), quantized("key", split(k, head_dim())).transpose(-2, -1));
  scores = scores * *options.scale();
  if (mask.defined()) {
    scores = scores + mask;
  }
  const auto dropout = is_training() ? options.dropout() : 0.0;
  const auto probabilities = at::dropout(at::softmax(scores, -1), dropout, dropout > 0);
  auto y = at::matmul(quantized("probabilities", probabilities), quantized("value", split(v, v_head_dim())));
  y = out_proj->forward(y.transpose(1, 2).flatten(2));
  torch::Tensor shown;
  if (need_weights) {
    shown = average_attn_weights ? probabilities.mean(1) : probabilities;
    shown = batched ? shown : shown.squeeze(0);
  }
  y = !batched ? y.squeeze(0) : options.batch_first() ? y : y.transpose(0, 1);
  return {y, shown};
}

}  // namespace rarefy::nn
