// Attention: 4 heads of 3, or fewer for keys and values, on a residual stream.
#include <ATen/ops/scaled_dot_product_attention.h>

#include <cmath>
#include <optional>
#include <tuple>

#include "structures.h"

namespace structures {
namespace nn = torch::nn;

namespace {

Tensor split_heads(const Tensor& x, int64_t size) { return x.view({x.size(0), x.size(1), -1, size}).transpose(1, 2); }

Tensor merge_heads(const Tensor& x) { return x.transpose(1, 2).flatten(2); }

Tensor attend(const Tensor& q, const Tensor& k, const Tensor& v) {
  const auto scores = torch::matmul(q, k.transpose(-2, -1)) / std::sqrt(static_cast<double>(q.size(-1)));
  return torch::matmul(scores.softmax(-1), v);
}

Tensor fused(const Tensor& q, const Tensor& k, const Tensor& v, bool causal = false, bool grouped = false) {
  return at::scaled_dot_product_attention(q, k, v, std::nullopt, 0.0, causal, std::nullopt, grouped);
}

/// `attention` computes from queries, keys and values [B, heads, T, 3].
template <class Attention>
void add_attention(Table& table, const std::string& name, Attention attention, int64_t groups = 4, bool bias = true,
                   int64_t size = 3) {
  define(table, name, sequence(), [=](Net& net) {
    return [=, embed = net.linear("embed", 5, 8), q = net.linear("q", 8, 12, bias),
            k = net.linear("k", 8, groups * size, bias), v = net.linear("v", 8, groups * size, bias),
            o = net.linear("o", 12, 8, bias), out = net.linear("out", 8, 3)](const Tensor& input) mutable {
      const auto x = embed(input);
      const auto heads = attention(split_heads(q(x), size), split_heads(k(x), size), split_heads(v(x), size));
      return out(x + o(merge_heads(heads)));
    };
  });
}

Tensor expanded(const Tensor& x) { return x.unsqueeze(2).expand({-1, -1, 2, -1, -1}).flatten(1, 2); }

Tensor turned(const Tensor& x, const Tensor& angles) {
  const auto half = x.size(-1) / 2;
  const auto other = torch::cat({-x.slice(-1, half), x.slice(-1, 0, half)}, -1);
  return x * angles.cos() + other * angles.sin();
}

Tensor angles_of(const Tensor& x) {
  const auto frequencies = torch::tensor({1.0, 0.1}, torch::kFloat64);
  const auto angles = torch::arange(x.size(-2), torch::kFloat64).unsqueeze(1) * frequencies;
  return torch::cat({angles, angles}, -1);
}

void add_separate(Table& table) {
  add_attention(table, "attention_matmul", [](const Tensor& q, const Tensor& k, const Tensor& v) {
    return torch::matmul((torch::matmul(q, k.transpose(-2, -1)) * std::pow(3.0, -0.5)).softmax(-1), v);
  });
  add_attention(table, "attention_scaled_dot_product",
                [](const Tensor& q, const Tensor& k, const Tensor& v) { return fused(q, k, v, true); });
  add_attention(
      table, "grouped_query_expand",
      [](const Tensor& q, const Tensor& k, const Tensor& v) { return attend(q, expanded(k), expanded(v)); }, 2);
  add_attention(
      table, "grouped_query_repeat",
      [](const Tensor& q, const Tensor& k, const Tensor& v) {
        return attend(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1));
      },
      2);
  add_attention(
      table, "grouped_query_flag",
      [](const Tensor& q, const Tensor& k, const Tensor& v) { return fused(q, k, v, false, true); }, 2);
  add_attention(table, "multi_query", attend, 1);
  add_attention(
      table, "attention_rotary",
      [](const Tensor& q, const Tensor& k, const Tensor& v) {
        const auto angles = angles_of(q);
        return attend(turned(q, angles), turned(k, angles), v);
      },
      3, false, 4);
  define(table, "attention_heads_attribute", sequence(), [](Net& net) {
    return [embed = net.linear("embed", 5, 8), q = net.linear("q", 8, 12), k = net.linear("k", 8, 12),
            v = net.linear("v", 8, 12), o = net.linear("o", 12, 8),
            out = net.linear("out", 8, 3)](const Tensor& input) mutable {
      const auto x = embed(input);
      const auto b = x.size(0), t = x.size(1);
      const auto heads = [&](nn::Linear& layer) {
        const auto y = layer(x);
        return y.view({b, t, y.size(2) / 3, 3}).transpose(1, 2);
      };
      const auto y = fused(heads(q), heads(k), heads(v));
      return out(x + o(y.transpose(1, 2).reshape({b, t, y.size(1) * 3})));
    };
  });
  define(table, "attention_one_head", sequence(), [](Net& net) {
    return [q = net.linear("q", 5, 6), k = net.linear("k", 5, 6), v = net.linear("v", 5, 8),
            out = net.linear("out", 8, 3)](const Tensor& x) mutable {
      return out(torch::matmul((torch::matmul(q(x), k(x).mT()) * 0.4).softmax(-1), v(x)));
    };
  });
  define(table, "attention_relative_bias", sequence(), [](Net& net) {
    auto bias = net.add("bias", nn::Embedding(11, 4));
    return [=, embed = net.linear("embed", 5, 8), q = net.linear("q", 8, 12), k = net.linear("k", 8, 12),
            v = net.linear("v", 8, 12), o = net.linear("o", 12, 8),
            out = net.linear("out", 8, 3)](const Tensor& input) mutable {
      const auto x = embed(input);
      const auto place = torch::arange(x.size(1), torch::kLong);
      const auto offset = bias(place.unsqueeze(1) - place.unsqueeze(0) + 5).permute({2, 0, 1}).unsqueeze(0);
      const auto scores = torch::matmul(split_heads(q(x), 3), split_heads(k(x), 3).transpose(-2, -1)) + offset;
      return out(x + o(merge_heads(torch::matmul(scores.softmax(-1), split_heads(v(x), 3)))));
    };
  });
}

std::function<Tensors()> two_sequences() {
  return [] { return Tensors{sequence()()[0], sequence(4, 9)()[0]}; };
}

void add_fused(Table& table) {
  define(table, "attention_fused", sequence(), [](Net& net) {
    return [embed = net.linear("embed", 5, 8), qkv = net.linear("qkv", 8, 36), o = net.linear("o", 12, 8),
            out = net.linear("out", 8, 3)](const Tensor& input) mutable {
      const auto x = embed(input);
      const auto parts = qkv(x).view({x.size(0), x.size(1), 3, -1, 3}).permute({2, 0, 3, 1, 4}).unbind(0);
      return out(x + o(merge_heads(attend(parts[0], parts[1], parts[2]))));
    };
  });
  define(table, "attention_fused_chunk", sequence(), [](Net& net) {
    return [embed = net.linear("embed", 5, 8), qkv = net.linear("qkv", 8, 36), o = net.linear("o", 12, 8),
            out = net.linear("out", 8, 3)](const Tensor& input) mutable {
      const auto x = embed(input);
      const auto parts = qkv(x).chunk(3, -1);
      const auto y = fused(split_heads(parts[0], 3), split_heads(parts[1], 3), split_heads(parts[2], 3));
      return out(x + o(merge_heads(y)));
    };
  });
  define(table, "cross_attention", two_sequences(), [](Net& net) {
    return [embed = net.linear("embed", 5, 8), context = net.linear("context", 4, 10), q = net.linear("q", 8, 12),
            k = net.linear("k", 10, 12), v = net.linear("v", 10, 12), o = net.linear("o", 12, 8),
            out = net.linear("out", 8, 3)](const Tensors& inputs) mutable -> Tensors {
      const auto x = embed(inputs[0]);
      const auto y = context(inputs[1]).relu();
      return {out(x + o(merge_heads(fused(split_heads(q(x), 3), split_heads(k(y), 3), split_heads(v(y), 3)))))};
    };
  });
  define(table, "patch_merging", image(3, 8), [](Net& net) {
    auto embed = net.add("embed", nn::Conv2d(nn::Conv2dOptions(3, 5, 2).stride(2)));
    return [=, norm = net.layer_norm("norm", {20}), reduce = net.linear("reduce", 20, 8, false),
            out = net.linear("out", 8, 3)](const Tensor& input) mutable {
      const auto x = embed(input).permute({0, 2, 3, 1});
      const auto part = [&](int64_t i, int64_t j) {
        return x.slice(1, i, std::nullopt, 2).slice(2, j, std::nullopt, 2);
      };
      const auto merged = torch::cat({part(0, 0), part(1, 0), part(0, 1), part(1, 1)}, -1);
      return out(reduce(norm(merged)).mean({1, 2}));
    };
  });
  define(table, "window_roll", image(3, 8), [](Net& net) {
    auto embed = net.add("embed", nn::Conv2d(nn::Conv2dOptions(3, 8, 2).stride(2)));
    return [=, qkv = net.linear("qkv", 8, 24), o = net.linear("o", 8, 8),
            out = net.linear("out", 8, 3)](const Tensor& input) mutable {
      const auto x = embed(input).permute({0, 2, 3, 1});
      const auto b = x.size(0), h = x.size(1), w = x.size(2), c = x.size(3);
      auto y = torch::roll(x, {-1, -1}, {1, 2});
      y = y.view({b, h / 2, 2, w / 2, 2, c}).permute({0, 1, 3, 2, 4, 5}).reshape({-1, 4, c});
      const auto parts = qkv(y).reshape({y.size(0), 4, 3, -1, 4}).permute({2, 0, 3, 1, 4}).unbind(0);
      y = o(merge_heads(attend(parts[0], parts[1], parts[2])));
      y = y.view({b, h / 2, w / 2, 2, 2, c}).permute({0, 1, 3, 2, 4, 5}).reshape({b, h, w, c});
      return out((x + torch::roll(y, {1, 1}, {1, 2})).mean({1, 2}));
    };
  });
}

/// torch::nn's attention takes the sequence first.
void add_modules(Table& table) {
  define(table, "multihead_attention", sequence(), [](Net& net) {
    auto attention = net.add("attention", nn::MultiheadAttention(12, 4));
    return [=, embed = net.linear("embed", 5, 12), out = net.linear("out", 12, 3)](const Tensor& input) mutable {
      const auto x = embed(input).transpose(0, 1);
      return out(x + std::get<0>(attention(x, x, x, Tensor(), false)));
    };
  });
  define(table, "multihead_attention_cross", two_sequences(), [](Net& net) {
    auto attention = net.add("attention", nn::MultiheadAttention(nn::MultiheadAttentionOptions(8, 4).kdim(6).vdim(6)));
    return [=, embed = net.linear("embed", 5, 8), keys = net.linear("keys", 4, 6), values = net.linear("values", 4, 6),
            out = net.linear("out", 8, 3)](const Tensors& inputs) mutable -> Tensors {
      const auto x = embed(inputs[0]).transpose(0, 1), context = inputs[1].transpose(0, 1);
      const auto [y, weights] = attention(x, keys(context).relu(), values(context).relu());
      return {out(x + y), weights};
    };
  });
  define(table, "transformer_encoder", sequence(), [](Net& net) {
    const auto layer = nn::TransformerEncoderLayer(nn::TransformerEncoderLayerOptions(12, 3).dim_feedforward(10));
    auto encoder = net.add("encoder", nn::TransformerEncoder(nn::TransformerEncoderOptions(layer, 2)));
    return [=, embed = net.linear("embed", 5, 12), out = net.linear("out", 12, 3)](const Tensor& x) mutable {
      return out(encoder(embed(x).transpose(0, 1)));
    };
  });
  define(table, "transformer_decoder", two_sequences(), [](Net& net) {
    auto decoder =
        net.add("decoder", nn::TransformerDecoderLayer(
                               nn::TransformerDecoderLayerOptions(12, 3).dim_feedforward(10).activation(torch::kGELU)));
    return [=, embed = net.linear("embed", 5, 12), context = net.linear("context", 4, 12),
            out = net.linear("out", 12, 3)](const Tensors& inputs) mutable -> Tensors {
      return {out(decoder(embed(inputs[0]).transpose(0, 1), context(inputs[1]).transpose(0, 1)))};
    };
  });
}

}  // namespace

void add_attention_structures(Table& table) {
  add_separate(table);
  add_fused(table);
  add_modules(table);
}

}  // namespace structures
