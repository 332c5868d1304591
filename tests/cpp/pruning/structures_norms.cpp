// Normalization and gates.
#include "structures.h"

namespace structures {
namespace nn = torch::nn;
namespace F = torch::nn::functional;

namespace {

void add_norms(Table& table) {
  define(table, "layer_norm_residual", sequence(), [](Net& net) {
    return [embed = net.linear("embed", 5, 8), norm = net.layer_norm("norm", {8}), up = net.linear("up", 8, 12),
            down = net.linear("down", 12, 8), final = net.layer_norm("final", {8}, false),
            out = net.linear("out", 8, 3)](const Tensor& input) mutable {
      const auto x = embed(input);
      return out(final(x + down(torch::gelu(up(norm(x))))));
    };
  });
  define(table, "layer_norm_channels_last", image(), [](Net& net) {
    auto stem = net.add("stem", nn::Conv2d(nn::Conv2dOptions(3, 8, 2).stride(2)));
    return [=, depthwise = net.conv("depthwise", 8, 8, 3, 1, 8), norm = net.layer_norm("norm", {8}),
            up = net.linear("up", 8, 12), down = net.linear("down", 12, 8), scale = net.parameter("scale", {8}),
            out = net.linear("out", 8, 3)](const Tensor& input) mutable {
      const auto x = stem(input);
      const auto y = scale * down(torch::gelu(up(norm(depthwise(x).permute({0, 2, 3, 1})))));
      return out((x + y.permute({0, 3, 1, 2})).mean({-2, -1}));
    };
  });
  define(table, "layer_norm_image", image(3, 4), [](Net& net) {
    return [conv = net.conv("conv", 3, 6), norm = net.layer_norm("norm", {6, 4, 4}),
            out = net.conv("out", 6, 2)](const Tensor& x) mutable { return out(norm(conv(x)).relu()); };
  });
  define(table, "layer_norm_by_hand", image(), [](Net& net) {
    return [conv = net.conv("conv", 3, 6), weight = net.parameter("weight", {6}), bias = net.parameter("bias", {6}),
            out = net.conv("out", 6, 2)](const Tensor& input) mutable {
      auto x = conv(input);
      const auto u = x.mean(1, true);
      const auto s = (x - u).pow(2).mean(1, true);
      x = (x - u) / torch::sqrt(s + 1e-6);
      return out(weight.unsqueeze(1).unsqueeze(2) * x + bias.unsqueeze(1).unsqueeze(2));
    };
  });
  define(table, "group_norm", image(), [](Net& net) {
    auto norm1 = net.add("norm1", nn::GroupNorm(3, 12));
    auto norm2 = net.add("norm2", nn::GroupNorm(1, 6));
    return [=, conv1 = net.conv("conv1", 3, 12), conv2 = net.conv("conv2", 12, 6), out = net.conv("out", 6, 2)](
               const Tensor& x) mutable { return out(norm2(conv2(norm1(conv1(x)).relu())).relu()); };
  });
  define(table, "instance_norm", image(), [](Net& net) {
    auto norm1 = net.add("norm1", nn::InstanceNorm2d(nn::InstanceNorm2dOptions(8).affine(true)));
    auto norm2 = net.add("norm2", nn::InstanceNorm2d(nn::InstanceNorm2dOptions(6).track_running_stats(true)));
    return [=, conv1 = net.conv("conv1", 3, 8), conv2 = net.conv("conv2", 8, 6), out = net.conv("out", 6, 2)](
               const Tensor& x) mutable { return out(norm2(conv2(norm1(conv1(x)).relu())).relu()); };
  });
  for (const auto* name : {"rms_norm_module", "rms_norm_functional"}) {  // torch::nn has no module of it
    define(table, name, sequence(), [](Net& net) {
      return [embed = net.linear("embed", 5, 8), weight = net.parameter("weight", {8}),
              out = net.linear("out", 8, 3)](const Tensor& input) mutable {
        const auto x = embed(input);
        return out(torch::rms_norm(x, {x.size(-1)}, weight, 1e-6));
      };
    });
  }
  define(table, "rms_norm_by_hand", sequence(), [](Net& net) {
    return [embed = net.linear("embed", 5, 8), weight = net.parameter("weight", {8}),
            out = net.linear("out", 8, 3)](const Tensor& input) mutable {
      const auto x = embed(input);
      return out(weight * (x * torch::rsqrt(x.pow(2).mean(-1, true) + 1e-6)));
    };
  });
  define(table, "normalize", sequence(), [](Net& net) {
    return [embed = net.linear("embed", 5, 8), out = net.linear("out", 8, 3)](const Tensor& x) mutable {
      return out(F::normalize(embed(x), F::NormalizeFuncOptions().dim(-1)));
    };
  });
  define(table, "softmax_channels", sequence(), [](Net& net) {
    return [embed = net.linear("embed", 5, 8), mix = net.linear("mix", 8, 6),
            out = net.linear("out", 6, 3)](const Tensor& x) mutable { return out(mix(embed(x).softmax(-1)).relu()); };
  });
}

void add_gates(Table& table) {
  define(table, "glu_chunk", sequence(), [](Net& net) {
    return [up = net.linear("up", 5, 14), out = net.linear("out", 7, 3)](const Tensor& x) mutable {
      const auto parts = up(x).chunk(2, -1);
      return out(parts[0] * torch::gelu(parts[1]));
    };
  });
  define(table, "gated_mlp", sequence(), [](Net& net) {
    return [embed = net.linear("embed", 5, 6, false), gate = net.linear("gate", 6, 9, false),
            up = net.linear("up", 6, 9, false), down = net.linear("down", 9, 6, false),
            out = net.linear("out", 6, 3)](const Tensor& input) mutable {
      const auto x = embed(input);
      return out(x + down(torch::silu(gate(x)) * up(x)));
    };
  });
}

}  // namespace

void add_norm_structures(Table& table) {
  add_norms(table);
  add_gates(table);
}

}  // namespace structures
