// Networks for the tests of export_onnx, in C++ and in Python (tests/python/test_cpp_onnx.py).
#pragma once

#include <rarefy/rarefy.h>
#include <torch/torch.h>

namespace onnx_models {

namespace rnn = rarefy::nn;
using torch::Tensor;

/// Images [N, 3, 12, 12]: a stem with max pooling, a residual block, a strided one with a projection, the mean, a classifier.
struct ResidualImpl : torch::nn::Module {
  rnn::ConvBn2d stem{nullptr}, conv1{nullptr}, conv2{nullptr}, conv3{nullptr}, shortcut{nullptr};
  rnn::Add add1{nullptr}, add2{nullptr};
  rnn::Linear fc{nullptr};

  ResidualImpl()
      : stem(register_module("stem", rnn::ConvBn2d(options(3, 8, 3).padding(1)))),
        conv1(register_module("conv1", rnn::ConvBn2d(options(8, 8, 3).padding(1)))),
        conv2(register_module("conv2", rnn::ConvBn2d(options(8, 8, 3).padding(1)))),
        conv3(register_module("conv3", rnn::ConvBn2d(options(8, 16, 3).stride(2).padding(1)))),
        shortcut(register_module("shortcut", rnn::ConvBn2d(options(8, 16, 1).stride(2)))),
        add1(register_module("add1", rnn::Add())),
        add2(register_module("add2", rnn::Add())),
        fc(register_module("fc", rnn::Linear(16, 5))) {
    conv1->set_relu(true);
  }
  static rnn::Conv2dOptions options(int64_t in, int64_t out, int64_t kernel) {
    return rnn::Conv2dOptions(in, out, kernel).bias(false);
  }
  Tensor forward(const Tensor& x) {
    auto y = torch::max_pool2d(torch::relu(stem(x)), 2);
    y = torch::relu(add1(conv2(conv1(y)), y));
    y = add2(conv3(y), shortcut(y));
    y.relu_();
    return fc(y.mean({2, 3}));
  }
};
TORCH_MODULE(Residual);

/// Words [N, 6] of 11 to scores [N, 4]: embeddings, two heads of attention, a feed-forward part, layer normalization.
struct TransformerImpl : torch::nn::Module {
  rnn::Embedding words{nullptr}, places{nullptr};
  rnn::Linear query{nullptr}, key{nullptr}, value{nullptr}, out{nullptr}, up{nullptr}, down{nullptr}, head{nullptr};
  torch::nn::LayerNorm norm0{nullptr}, norm1{nullptr}, norm2{nullptr};
  torch::nn::Dropout dropout{nullptr};

  TransformerImpl()
      : words(register_module("words", rnn::Embedding(11, 16))),
        places(register_module("places", rnn::Embedding(6, 16))),
        query(register_module("query", rnn::Linear(16, 16))),
        key(register_module("key", rnn::Linear(16, 16))),
        value(register_module("value", rnn::Linear(16, 16))),
        out(register_module("out", rnn::Linear(16, 16))),
        up(register_module("up", rnn::Linear(16, 32))),
        down(register_module("down", rnn::Linear(32, 16))),
        head(register_module("head", rnn::Linear(16, 4))),
        norm0(register_module("norm0", torch::nn::LayerNorm(torch::nn::LayerNormOptions({16})))),
        norm1(register_module("norm1", torch::nn::LayerNorm(torch::nn::LayerNormOptions({16})))),
        norm2(register_module("norm2", torch::nn::LayerNorm(torch::nn::LayerNormOptions({16})))),
        dropout(register_module("dropout", torch::nn::Dropout(0.1))) {}

  static Tensor heads(const Tensor& x) { return x.view({x.size(0), x.size(1), 2, 8}).transpose(1, 2); }
  Tensor forward(const Tensor& ids) {
    const auto positions = torch::arange(ids.size(1), torch::kLong).expand({ids.size(0), ids.size(1)});
    auto x = dropout(norm0(words(ids) + places(positions)));
    const auto y = torch::scaled_dot_product_attention(heads(query(x)), heads(key(x)), heads(value(x)));
    x = norm1(x + out(y.transpose(1, 2).reshape({x.size(0), x.size(1), 16})));
    x = norm2(x + down(torch::gelu(up(x))));
    return head(x.select(1, 0));
  }
};
TORCH_MODULE(Transformer);

/// Signals [N, 3, 20] and volumes [N, 2, 4, 6, 6] to scores [N, 3] and the signals' features: convolutions in one and three
/// dimensions, both paddings, concatenation, pooling.
struct SignalsImpl : torch::nn::Module {
  rnn::Conv1d first{nullptr}, second{nullptr};
  rnn::ConvBn3d volume{nullptr};
  rnn::Conv3d volume2{nullptr};
  rnn::Cat cat{nullptr};
  rnn::Mul gate{nullptr};
  rnn::Linear fc{nullptr};

  SignalsImpl()
      : first(register_module("first", rnn::Conv1d(rnn::Conv1dOptions(3, 6, 4).padding(torch::kSame)))),
        second(register_module("second",
                               rnn::Conv1d(rnn::Conv1dOptions(6, 6, 3).padding(1).padding_mode(torch::kReflect)))),
        volume(register_module("volume", rnn::ConvBn3d(2, 4, 3))),
        volume2(register_module("volume2", rnn::Conv3d(4, 6, 2))),
        cat(register_module("cat", rnn::Cat(1))),
        gate(register_module("gate", rnn::Mul())),
        fc(register_module("fc", rnn::Linear(60, 3))) {
    volume->set_relu(true);
  }
  std::tuple<Tensor, Tensor> forward(const Tensor& signals, const Tensor& volumes) {
    auto a = torch::hardswish(first(signals));
    a = gate(a, torch::sigmoid(second(a)));
    const auto features = torch::avg_pool1d(a, 4, 4);
    const auto b = torch::relu6(volume2(volume(volumes))).flatten(2).mean(2, /*keepdim=*/true).expand({-1, 6, 5});
    return {fc(cat(std::vector<Tensor>{features, b}).flatten(1)), features};
  }
};
TORCH_MODULE(Signals);

/// Images [N, 3, 8, 8] to [N, 4, 6, 6]: branches with a ReLU, the function and the layer, and without, concatenated.
struct JoinedImpl : torch::nn::Module {
  rnn::Conv2d first{nullptr}, second{nullptr}, last{nullptr};
  torch::nn::Sequential third;
  rnn::Cat cat{nullptr};
  bool plain_first;

  explicit JoinedImpl(bool plain_first)
      : first(register_module("first", conv(3))),
        second(register_module("second", conv(3))),
        last(register_module("last", rnn::Conv2d(rnn::Conv2dOptions(12, 4, 3)))),
        third(register_module("third", torch::nn::Sequential(conv(3), torch::nn::ReLU()))),
        cat(register_module("cat", rnn::Cat(1))),
        plain_first(plain_first) {}
  static rnn::Conv2d conv(int64_t in) { return rnn::Conv2d(rnn::Conv2dOptions(in, 4, 3).padding(1)); }
  Tensor forward(const Tensor& x) {
    const auto a = torch::relu(first(x)), b = second(x), c = third->forward(x);
    return last(cat(plain_first ? std::vector<Tensor>{b, a, c} : std::vector<Tensor>{a, b, c}));
  }
};
TORCH_MODULE(Joined);

/// [N, 10] to [N, 4]: what is added to the first product is wider than it, and no bias.
struct WidenedImpl : torch::nn::Module {
  rnn::Linear narrow{nullptr}, wide{nullptr};

  WidenedImpl()
      : narrow(register_module("narrow", rnn::Linear(torch::nn::LinearOptions(10, 1).bias(false)))),
        wide(register_module("wide", rnn::Linear(5, 4))) {}
  Tensor forward(const Tensor& x) { return wide(narrow(x) + torch::arange(5).to(torch::kFloat)); }
};
TORCH_MODULE(Widened);

/// [N, 10] to [N, 4], of torch's own layers in a Sequential.
inline torch::nn::Sequential make_mlp() {
  return torch::nn::Sequential(torch::nn::Linear(10, 16), torch::nn::ReLU(), torch::nn::Linear(16, 16),
                               torch::nn::Tanh(), torch::nn::Linear(16, 4));
}

/// Images [N, 3, 8, 8] to scores [N, 4]: patches, a class token, torch's attention.
struct PatchesImpl : torch::nn::Module {
  rnn::Conv2d patch{nullptr};
  torch::nn::TransformerEncoderLayer block{nullptr};
  rnn::Linear head{nullptr};
  Tensor token;

  PatchesImpl()
      : patch(register_module("patch", rnn::Conv2d(rnn::Conv2dOptions(3, 8, 4).stride(4)))),
        block(register_module("block", torch::nn::TransformerEncoderLayer(
                                           torch::nn::TransformerEncoderLayerOptions(8, 2).dim_feedforward(16)))),
        head(register_module("head", rnn::Linear(8, 4))),
        token(register_parameter("token", torch::randn({1, 1, 8}))) {}
  Tensor forward(const Tensor& x) {
    const auto patches = patch(x).flatten(2).transpose(1, 2);
    const auto sequence = torch::cat({token.expand({x.size(0), -1, -1}), patches}, 1);
    return head(block(sequence.transpose(0, 1)).index({0}));
  }
};
TORCH_MODULE(Patches);

/// Every operator that has a rule and that the others do not use, on x [N, 4, 6, 6] and i [N, 5] (0 to 3), one output each.
inline std::vector<std::pair<std::string, Tensor>> every_operator(const Tensor& x, const Tensor& i) {
  const auto positive = x.abs() + 0.5;
  const auto weight = torch::linspace(-1, 1, 4 * 3 * 3 * 3).view({4, 3, 3, 3});
  const auto flat = x.flatten(2);
  auto in_place = x * 1.0;
  in_place.add_(1.0).mul_(2.0).clamp_(-1.0, 3.0);
  return {
      {"sub", x.sub(positive, 2.0)},
      {"rsub", 1.0 - x},
      {"number_minus", 1.0 - x + 1.0 / positive + torch::rsub(x, positive, 0.5)},
      {"filled", x * torch::full_like(x, 2.0) + torch::ones_like(x) + x.new_zeros({x.size(0), 1, 6, 6})},
      {"div", x / positive},
      {"divide_int", i / 2},
      {"neg_exp_log", torch::log(torch::exp(-x) + 1)},
      {"sqrt_rsqrt", torch::sqrt(positive) + torch::rsqrt(positive)},
      {"reciprocal", positive.reciprocal()},
      {"pow", x.pow(2) + positive.pow(1.5)},
      {"trigonometry", x.sin() + x.cos() + x.erf()},
      {"round", x.round() + x.floor() + x.ceil() + x.sign()},
      {"minimum", torch::minimum(x, positive - 1) + torch::maximum(x, x * 0.5)},
      {"clamp", x.clamp(-0.5, 0.5) + x.clamp_min(0.25) + x.clamp_max(0.1)},
      {"hardtanh", torch::hardtanh(x, -0.3, 0.4)},
      {"leaky_relu", torch::leaky_relu(x, 0.1) + torch::elu(x) + torch::softplus(x)},
      {"silu", torch::silu(x) + torch::mish(x) + torch::hardsigmoid(x)},
      {"hardswish", torch::hardswish(x)},
      {"gelu", torch::gelu(x) + torch::gelu(x, "tanh")},
      {"where", torch::where(x > 0, x, -2 * x)},
      {"masked_fill", x.masked_fill(x.le(0.5).logical_and(x.ge(-0.5)), 9.0)},
      {"comparisons", (x < 0.1).to(torch::kFloat) + x.ne(0).to(torch::kLong) + x.gt(0).logical_not().to(torch::kFloat)},
      {"sum", x.sum({1, 3}) + x.amax({1, 3}) + x.amin({1, 3})},
      {"mean_all_but_batch", x.mean({1, 2, 3}, /*keepdim=*/true)},
      {"argmax", x.argmax(1)},
      {"softmax", torch::softmax(x, 1) + torch::log_softmax(x, -1)},
      {"chunk", torch::cat({x.chunk(2, 1)[1], x.split(3, 1)[0]}, 1)},
      {"unbind", x.unbind(2)[2] + x.select(2, -1)},
      {"stack", torch::stack({x, positive}, 1)},
      {"slice", x.slice(2, 1, 5, 2) + x.narrow(2, 2, 2)},
      {"negative_slice", x.slice(3, -4)},
      {"permute", x.permute({0, 3, 2, 1}) + x.transpose(1, 3)},
      {"squeeze", x.mean({2}, true).squeeze(2).unsqueeze(-1)},
      {"repeat", x.repeat({1, 2, 1, 1})},
      {"repeat_wider", flat.select(2, 0).repeat({2, 1, 1})},
      {"index_select", x.index_select(1, torch::tensor({2, 0, 2}))},
      {"index", x.index({torch::indexing::Slice(), torch::tensor({1, 3})})},
      {"gather", flat.slice(2, 0, 5).gather(1, i.unsqueeze(1))},
      {"pixel_shuffle", torch::pixel_shuffle(x, 2)},
      {"pad", torch::constant_pad_nd(x, {1, 2, 0, 1}, 0.5)},
      {"pad_modes", torch::reflection_pad2d(x, {1, 1, 2, 2}) + torch::replication_pad2d(x, {1, 1, 2, 2})},
      {"max_pool_ceil", torch::max_pool2d(x, 4, 3, 1, 1, /*ceil_mode=*/true)},
      {"avg_pool", torch::avg_pool2d(x, 3, 2, 1) + torch::avg_pool2d(x, 3, 2, 1, false, /*count_include_pad=*/false)},
      {"adaptive", torch::adaptive_avg_pool2d(x, {3, 2})},
      {"adaptive_one", torch::adaptive_avg_pool2d(x, {1, 1})},
      {"layer_norm", torch::layer_norm(x, {6, 6})},
      {"group_norm", torch::group_norm(x, 2, torch::linspace(0.5, 2, 4), torch::linspace(-1, 1, 4))},
      {"batch_norm",
       torch::batch_norm(x, {}, {}, torch::linspace(-1, 1, 4), torch::linspace(0.5, 2, 4), false, 0.1, 1e-5, false)},
      {"conv_transpose", torch::conv_transpose2d(x, weight, {}, 2, 1, 1)},
      {"matmul", x.matmul(x.transpose(-1, -2))},
      {"bmm",
       flat.bmm(flat.transpose(1, 2)) + torch::baddbmm(torch::ones({4, 4}), flat, flat.transpose(1, 2), 0.5, 2.0)},
      {"addmm", torch::addmm(torch::ones({3}), flat.select(1, 0), torch::linspace(-1, 1, 108).view({36, 3}))},
      {"causal", torch::scaled_dot_product_attention(x, x, x, {}, 0.0, /*is_causal=*/true)},
      {"masked",
       torch::scaled_dot_product_attention(x, x, x, torch::ones({6, 6}, torch::kBool).tril(1), 0.0, false, 0.7)},
      {"zeros", torch::cat({torch::zeros({x.size(0), 1, 6, 6}), x}, 1)},
      {"prelu", torch::prelu(x, torch::linspace(0.1, 0.4, 4))},
      {"to_rows", x.view({-1, 36}).reshape({x.size(0), 2, 72}) * 1},
      {"batch_twice", x.view({x.size(0) * 2, 2, 36})},
      {"in_place", in_place},
      {"float16", x.to(torch::kHalf).to(torch::kFloat)},
      {"constant", torch::arange(6, torch::kFloat)},
      {"input", x},
  };
}

/// Codes [N, 8, 3, 3] to images: grouped transposed convolutions.
struct DecoderImpl : torch::nn::Module {
  rnn::ConvTranspose2d up1{nullptr}, up2{nullptr};
  rnn::Conv2d out{nullptr};

  DecoderImpl()
      : up1(register_module("up1",
                            rnn::ConvTranspose2d(rnn::ConvTranspose2dOptions(8, 8, 4).stride(2).padding(1).groups(2)))),
        up2(register_module(
            "up2", rnn::ConvTranspose2d(rnn::ConvTranspose2dOptions(8, 6, 3).stride(2).padding(1).output_padding(1)))),
        out(register_module("out", rnn::Conv2d(rnn::Conv2dOptions(6, 3, 3).padding(1)))) {
    up1->set_relu(true);
    up2->set_relu(true);
  }
  Tensor forward(const Tensor& x) { return out(up2(up1(x))); }
};
TORCH_MODULE(Decoder);

/// Words [N, 5] to scores of tags [N, 5, 3]: a bidirectional LSTM and a GRU.
struct TaggerImpl : torch::nn::Module {
  rnn::Embedding words{nullptr};
  rnn::LSTM lstm{nullptr};
  rnn::GRU gru{nullptr};
  rnn::Linear tags{nullptr};

  TaggerImpl()
      : words(register_module("words", rnn::Embedding(11, 6))),
        lstm(register_module("lstm", rnn::LSTM(rnn::LSTMOptions(6, 5).bidirectional(true).batch_first(true)))),
        gru(register_module("gru", rnn::GRU(rnn::GRUOptions(10, 8).batch_first(true)))),
        tags(register_module("tags", rnn::Linear(8, 3))) {}
  Tensor forward(const Tensor& x) { return tags(std::get<0>(gru->forward(std::get<0>(lstm->forward(words(x)))))); }
};
TORCH_MODULE(Tagger);

/// Words [N, 6] to scores [N, 6, 3]: attention over the words up to each, and over memory of another width.
struct DecoderLayerImpl : torch::nn::Module {
  rnn::Embedding words{nullptr}, kept{nullptr};
  rnn::MultiheadAttention self_attention{nullptr}, cross_attention{nullptr};
  rnn::LayerNorm norm{nullptr};
  rnn::Linear out{nullptr};

  DecoderLayerImpl()
      : words(register_module("words", rnn::Embedding(11, 8))),
        kept(register_module("kept", rnn::Embedding(11, 6))),
        self_attention(register_module(
            "self_attention", rnn::MultiheadAttention(rnn::MultiheadAttentionOptions(8, 2).batch_first(true)))),
        cross_attention(register_module(
            "cross_attention",
            rnn::MultiheadAttention(
                rnn::MultiheadAttentionOptions(8, 2).batch_first(true).kdim(6).vdim(6).add_bias_kv(true)))),
        norm(register_module("norm", rnn::LayerNorm(torch::nn::LayerNormOptions({8})))),
        out(register_module("out", rnn::Linear(8, 3))) {}
  Tensor forward(const Tensor& ids) {
    auto x = words(ids);
    const auto causal = torch::ones({6, 6}, torch::kBool).triu(1);
    x = norm(x + std::get<0>(self_attention->forward(x, x, x, {}, /*need_weights=*/false, causal)));
    const auto memory = kept(ids);
    return out(x + std::get<0>(cross_attention->forward(x, memory, memory, {}, /*need_weights=*/false)));
  }
};
TORCH_MODULE(DecoderLayer);

}  // namespace onnx_models
