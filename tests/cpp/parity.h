// The networks of tests/python/test_parity.py, for tests that hold both languages equal.
#pragma once

#include <rarefy/rarefy.h>
#include <torch/torch.h>

/// A small one, of images alone.
struct ParityImpl : torch::nn::Module {
  rarefy::nn::ConvBn2d conv{nullptr};
  rarefy::nn::Conv2d plain{nullptr};
  rarefy::nn::Add add{nullptr};
  rarefy::nn::Linear fc{nullptr};

  ParityImpl()
      : conv(register_module("conv", rarefy::nn::ConvBn2d(2, 4, 3))),
        plain(register_module("plain", rarefy::nn::Conv2d(4, 4, 1))),
        add(register_module("add", rarefy::nn::Add())),
        fc(register_module("fc", rarefy::nn::Linear(4, 3))) {}

  torch::Tensor forward(const torch::Tensor& x) {
    const auto y = torch::relu(conv(x));
    return fc(add(y, plain(y)).mean({2, 3}));
  }
};
TORCH_MODULE(Parity);

/// One layer of every kind, some with a ReLU fused: words [N, 5] of a vocabulary of 7 and volumes [N, 2, 4, 6, 6] to scores
/// [N, 3].
struct EveryLayerImpl : torch::nn::Module {
  rarefy::nn::Embedding words{nullptr};
  rarefy::nn::ConvBn1d conv_bn1{nullptr};
  rarefy::nn::Conv1d conv1{nullptr};
  rarefy::nn::Mul mul{nullptr};
  rarefy::nn::ConvBn3d conv_bn3{nullptr};
  rarefy::nn::Conv3d conv3{nullptr};
  rarefy::nn::ConvBn2d conv_bn2{nullptr};
  rarefy::nn::Conv2d conv2{nullptr};
  rarefy::nn::Add add{nullptr};
  rarefy::nn::Cat cat{nullptr};
  rarefy::nn::Linear hidden{nullptr}, out{nullptr};

  EveryLayerImpl()
      : words(register_module("words", rarefy::nn::Embedding(7, 4))),
        conv_bn1(register_module("conv_bn1", rarefy::nn::ConvBn1d(4, 6, 3))),
        conv1(register_module("conv1", rarefy::nn::Conv1d(6, 6, 1))),
        mul(register_module("mul", rarefy::nn::Mul())),
        conv_bn3(register_module("conv_bn3", rarefy::nn::ConvBn3d(2, 4, 3))),
        conv3(register_module("conv3", rarefy::nn::Conv3d(4, 4, torch::ExpandingArray<3>({2, 1, 1})))),
        conv_bn2(register_module("conv_bn2", rarefy::nn::ConvBn2d(4, 4, 3))),
        conv2(register_module("conv2", rarefy::nn::Conv2d(4, 4, 1))),
        add(register_module("add", rarefy::nn::Add())),
        cat(register_module("cat", rarefy::nn::Cat(1))),
        hidden(register_module("hidden", rarefy::nn::Linear(34, 8))),
        out(register_module("out", rarefy::nn::Linear(8, 3))) {
    conv_bn1->set_relu(true);
    conv_bn3->set_relu(true);
    conv2->set_relu(true);
    hidden->set_relu(true);
  }

  torch::Tensor forward(const torch::Tensor& ids, const torch::Tensor& volumes) {
    auto a = conv_bn1(words(ids).transpose(1, 2));
    a = mul(a, conv1(a));
    auto b = conv_bn2(conv3(conv_bn3(volumes)).squeeze(2));
    b = add(b, conv2(b));
    return out(hidden(cat(std::vector<torch::Tensor>{a.flatten(1), b.flatten(1)})));
  }
};
TORCH_MODULE(EveryLayer);

/// The layers that EveryLayer has not: the same words and volumes to scores [N, 3].
struct MoreLayersImpl : torch::nn::Module {
  rarefy::nn::Embedding words{nullptr};
  rarefy::nn::LSTM lstm{nullptr};
  rarefy::nn::GRU gru{nullptr};
  rarefy::nn::LSTMCell lstm_cell{nullptr};
  rarefy::nn::GRUCell gru_cell{nullptr};
  rarefy::nn::EmbeddingBag bag{nullptr};
  rarefy::nn::ConvTranspose3d up3{nullptr};
  rarefy::nn::ConvTranspose2d up2{nullptr};
  rarefy::nn::ConvTranspose1d up1{nullptr};
  rarefy::nn::SDPA attention{nullptr};
  rarefy::nn::MultiheadAttention heads{nullptr};
  rarefy::nn::LayerNorm norm{nullptr};
  rarefy::nn::Linear out{nullptr};

  MoreLayersImpl()
      : words(register_module("words", rarefy::nn::Embedding(7, 4))),
        lstm(register_module("lstm",
                             rarefy::nn::LSTM(rarefy::nn::LSTMOptions(4, 3).bidirectional(true).batch_first(true)))),
        gru(register_module("gru", rarefy::nn::GRU(rarefy::nn::GRUOptions(6, 4).num_layers(2).batch_first(true)))),
        lstm_cell(register_module("lstm_cell", rarefy::nn::LSTMCell(4, 4))),
        gru_cell(register_module("gru_cell", rarefy::nn::GRUCell(4, 4))),
        bag(register_module(
            "bag", rarefy::nn::EmbeddingBag(rarefy::nn::EmbeddingBagOptions(7, 4).mode(torch::kSum).padding_idx(1)))),
        up3(register_module("up3", rarefy::nn::ConvTranspose3d(2, 2, torch::ExpandingArray<3>({1, 2, 2})))),
        up2(register_module("up2", rarefy::nn::ConvTranspose2d(
                                       rarefy::nn::ConvTranspose2dOptions(8, 4, 3).stride(2).padding(1).groups(2)))),
        up1(register_module(
            "up1", rarefy::nn::ConvTranspose1d(rarefy::nn::ConvTranspose1dOptions(4, 4, 4).stride(2).padding(1)))),
        attention(register_module("attention", rarefy::nn::SDPA())),
        heads(register_module(
            "heads", rarefy::nn::MultiheadAttention(rarefy::nn::MultiheadAttentionOptions(4, 2).batch_first(true)))),
        norm(register_module("norm", rarefy::nn::LayerNorm(torch::nn::LayerNormOptions({4})))),
        out(register_module("out", rarefy::nn::Linear(12, 3))) {
    up2->set_relu(true);
  }

  torch::Tensor forward(const torch::Tensor& ids, const torch::Tensor& volumes) {
    auto states = std::get<0>(gru(std::get<0>(lstm(words(ids)))));
    states = norm(attention(states, states, states));
    states = states + std::get<0>(heads->forward(states, states, states, {}, /*need_weights=*/false));
    const auto a = gru_cell(std::get<0>(lstm_cell(states.select(1, 4))));
    const auto b = up1(up2(up3(volumes).flatten(1, 2)).mean(3)).mean(2);
    return out(torch::cat({a, b, bag(ids)}, 1));
  }
};
TORCH_MODULE(MoreLayers);
