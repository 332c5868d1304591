// Convolutions: chains, residual streams, concatenation, pieces, groups, shuffles.
#include "structures.h"

namespace structures {
namespace nn = torch::nn;
namespace F = torch::nn::functional;
using torch::cat;
using torch::indexing::None;
using torch::indexing::Slice;

namespace {

Tensor max_pool(const Tensor& x) { return F::max_pool2d(x, F::MaxPool2dFuncOptions(2)); }
Tensor average(const Tensor& x) { return torch::adaptive_avg_pool2d(x, {1, 1}); }

nn::ConvTranspose2d up(Net& net, const std::string& name, int64_t inputs, int64_t outputs, int64_t size = 2,
                       int64_t stride = 2, int64_t groups = 1) {
  return net.add(name,
                 nn::ConvTranspose2d(nn::ConvTranspose2dOptions(inputs, outputs, size).stride(stride).groups(groups)));
}

nn::Conv2d without_bias(Net& net, const std::string& name, int64_t inputs, int64_t outputs, int64_t size = 3,
                        int64_t groups = 1) {
  return net.conv(name, inputs, outputs, size, 1, groups, false);
}

Tensor shuffled(const Tensor& x, int64_t groups) {
  const auto b = x.size(0), c = x.size(1), h = x.size(2), w = x.size(3);
  return x.view({b, groups, c / groups, h, w}).transpose(1, 2).contiguous().view({b, -1, h, w});
}

void add_chains(Table& table) {
  define(table, "chain", image(), [](Net& net) {
    return [conv1 = net.conv("conv1", 3, 8), conv2 = net.conv("conv2", 8, 6),
            fc = net.linear("fc", 6, 4)](const Tensor& x) mutable { return fc(pool(conv2(conv1(x).relu()).relu())); };
  });
  define(table, "chain_batch_norm", image(), [](Net& net) {
    auto conv2 = net.add("conv2", nn::Conv2d(8, 6, 3));
    auto bn2 = net.add("bn2", nn::BatchNorm2d(nn::BatchNorm2dOptions(6).affine(false)));
    return [=, conv1 = without_bias(net, "conv1", 3, 8), bn1 = net.batch_norm("bn1", 8), fc = net.linear("fc", 6, 4)](
               const Tensor& x) mutable { return fc(pool(torch::silu(bn2(conv2(bn1(conv1(x)).sigmoid()))))); };
  });
  define(
      table, "chain_conv1d", [] { return Tensors{torch::randn({2, 3, 12}, torch::kFloat64)}; },
      [](Net& net) {
        auto conv1 = net.add("conv1", nn::Conv1d(nn::Conv1dOptions(3, 8, 3).stride(2).padding(1)));
        auto bn = net.add("bn", nn::BatchNorm1d(8));
        auto conv2 = net.add("conv2", nn::Conv1d(nn::Conv1dOptions(8, 6, 3).dilation(2)));
        return [=, fc = net.linear("fc", 6, 4)](const Tensor& x) mutable {
          return fc(conv2(bn(conv1(x)).relu()).amax(2));
        };
      });
  define(
      table, "chain_conv3d", [] { return Tensors{torch::randn({2, 2, 4, 5, 6}, torch::kFloat64)}; },
      [](Net& net) {
        auto conv1 = net.add("conv1", nn::Conv3d(nn::Conv3dOptions(2, 8, 3).padding(1)));
        auto bn = net.add("bn", nn::BatchNorm3d(8));
        auto conv2 = net.add("conv2", nn::Conv3d(nn::Conv3dOptions(8, 6, {1, 3, 3})));
        return [=, fc = net.linear("fc", 6, 4)](const Tensor& x) mutable {
          auto y = F::max_pool3d(bn(conv1(x)).relu(), F::MaxPool3dFuncOptions(2));
          y = F::interpolate(y, F::InterpolateFuncOptions().scale_factor(std::vector<double>{2, 2, 2}));
          return fc(torch::adaptive_avg_pool3d(conv2(y).relu(), {1, 1, 1}).flatten(1));
        };
      });
  define(table, "transposed_conv", image(), [](Net& net) {
    return [down = net.conv("down", 3, 8, 3, 2), up = up(net, "up", 8, 6),
            out = net.conv("out", 6, 3, 1)](const Tensor& x) mutable { return out(up(down(x).relu()).relu()); };
  });
  define(table, "flatten_linear", image(3, 6), [](Net& net) {
    return [conv = net.conv("conv", 3, 7), hidden = net.linear("hidden", 63, 10), out = net.linear("out", 10, 3)](
               const Tensor& x) mutable { return out(hidden(max_pool(conv(x)).flatten(1)).relu()); };
  });
  define(table, "adaptive_pooling", image(), [](Net& net) {
    return [conv = net.conv("conv", 3, 7), fc = net.linear("fc", 42, 3)](const Tensor& x) mutable {
      return fc(torch::adaptive_avg_pool2d(conv(x), {2, 3}).flatten(1));
    };
  });
  define(table, "dropout", image(), [](Net& net) {
    auto drop = net.add("drop", nn::Dropout2d(0.5));
    return [=, conv = net.conv("conv", 3, 8), fc = net.linear("fc", 8, 6),
            out = net.linear("out", 6, 3)](const Tensor& x) mutable {
      return out(torch::dropout(fc(pool(drop(conv(x).relu()))), 0.5, drop->is_training()).relu());
    };
  });
  define(table, "prelu", image(), [](Net& net) {
    auto act1 = net.add("act1", nn::PReLU(nn::PReLUOptions().num_parameters(8)));
    auto act2 = net.add("act2", nn::PReLU());
    return [=, conv1 = net.conv("conv1", 3, 8), conv2 = net.conv("conv2", 8, 6),
            fc = net.linear("fc", 6, 3)](const Tensor& x) mutable { return fc(pool(act2(conv2(act1(conv1(x)))))); };
  });
  define(table, "frozen", image(), [](Net& net) {
    auto conv1 = net.conv("conv1", 3, 8);
    auto bn = net.batch_norm("bn", 8);
    for (auto& parameter : conv1->parameters()) parameter.set_requires_grad(false);
    for (auto& parameter : bn->parameters()) parameter.set_requires_grad(false);
    return [=, conv2 = net.conv("conv2", 8, 6), fc = net.linear("fc", 6, 4)](const Tensor& x) mutable {
      return fc(pool(conv2(bn(conv1(x)).relu()).relu()));
    };
  });
  define(table, "nested_dict", image(), [](Net& net) {
    return [conv = net.conv("conv", 3, 8), left = net.linear("left", 8, 6), right = net.linear("right", 8, 4),
            head = net.linear("head", 6, 2)](const Tensors& inputs) mutable -> Tensors {
      const auto x = pool(conv(inputs[0]).relu()) * 0.5;
      return {head(left(x).relu()), right(x)};
    };
  });
}

void add_residual(Table& table) {
  define(table, "residual_basic", image(), [](Net& net) {
    return [stem = net.conv("stem", 3, 8), conv1 = without_bias(net, "conv1", 8, 6), bn1 = net.batch_norm("bn1", 6),
            conv2 = without_bias(net, "conv2", 6, 8), bn2 = net.batch_norm("bn2", 8),
            fc = net.linear("fc", 8, 4)](const Tensor& input) mutable {
      const auto x = stem(input).relu();
      return fc(pool((bn2(conv2(bn1(conv1(x)).relu())) + x).relu()));
    };
  });
  define(table, "residual_bottleneck", image(), [](Net& net) {
    return [stem = net.conv("stem", 3, 12), conv1 = without_bias(net, "conv1", 12, 4, 1),
            bn1 = net.batch_norm("bn1", 4), conv2 = without_bias(net, "conv2", 4, 5), bn2 = net.batch_norm("bn2", 5),
            conv3 = without_bias(net, "conv3", 5, 12, 1), bn3 = net.batch_norm("bn3", 12),
            fc = net.linear("fc", 12, 4)](const Tensor& input) mutable {
      const auto x = stem(input);
      const auto y = bn2(conv2(bn1(conv1(x)).relu())).relu();
      return fc(pool((x + bn3(conv3(y))).relu()));
    };
  });
  define(table, "residual_projection", image(), [](Net& net) {
    auto shortcut = net.add(
        "shortcut", nn::Sequential(nn::Conv2d(nn::Conv2dOptions(8, 10, 1).stride(2).bias(false)), nn::BatchNorm2d(10)));
    return [=, stem = net.conv("stem", 3, 8), conv1 = net.conv("conv1", 8, 6, 3, 2), conv2 = net.conv("conv2", 6, 10),
            fc = net.linear("fc", 10, 4)](const Tensor& input) mutable {
      const auto x = stem(input).relu();
      return fc(pool(torch::add(conv2(conv1(x).relu()), shortcut->forward(x), 0.5).relu()));
    };
  });
  define(table, "residual_pre_activation", image(), [](Net& net) {
    return [stem = net.conv("stem", 3, 8), bn1 = net.batch_norm("bn1", 8), conv1 = net.conv("conv1", 8, 6),
            bn2 = net.batch_norm("bn2", 6), conv2 = net.conv("conv2", 6, 8), bn3 = net.batch_norm("bn3", 8),
            fc = net.linear("fc", 8, 4)](const Tensor& input) mutable {
      auto x = stem(input);
      x = x + conv2(bn2(conv1(bn1(x).relu())).relu());
      return fc(pool(bn3(x).relu()));
    };
  });
  define(table, "residual_post_activation", image(), [](Net& net) {
    return [stem = net.conv("stem", 3, 8), conv1 = net.conv("conv1", 8, 6), conv2 = net.conv("conv2", 6, 8),
            fc = net.linear("fc", 8, 4)](const Tensor& input) mutable {
      auto x = stem(input).sigmoid();
      x = x + conv2(conv1(x).relu()).sigmoid();
      return fc(pool(x - 0.5 * conv2(conv1(x))));
    };
  });
  define(table, "residual_padding", image(), [](Net& net) {
    return [stem = net.conv("stem", 3, 8), conv1 = net.conv("conv1", 8, 6, 3, 2), conv2 = net.conv("conv2", 6, 12),
            fc = net.linear("fc", 12, 4)](const Tensor& input) mutable {
      const auto x = stem(input).relu();
      const auto shortcut = torch::constant_pad_nd(
          x.index({Slice(), Slice(), Slice(None, None, 2), Slice(None, None, 2)}), {0, 0, 0, 0, 2, 2});
      return fc(pool((conv2(conv1(x).relu()) + shortcut).relu()));
    };
  });
  define(table, "feature_pyramid", image(), [](Net& net) {
    return [stage1 = net.conv("stage1", 3, 6, 3, 2), stage2 = net.conv("stage2", 6, 8, 3, 2),
            lateral1 = net.conv("lateral1", 6, 5, 1), lateral2 = net.conv("lateral2", 8, 5, 1),
            out = net.conv("out", 5, 2)](const Tensors& inputs) mutable -> Tensors {
      const auto a = stage1(inputs[0]).relu();
      const auto b = stage2(a).relu();
      const auto q = lateral2(b);
      const auto larger = F::interpolate(
          q, F::InterpolateFuncOptions().size(std::vector<int64_t>{a.size(2), a.size(3)}).mode(torch::kNearest));
      return {out(lateral1(a) + larger), out(q)};
    };
  });
}

void add_concatenation(Table& table) {
  define(table, "concat_nested", image(), [](Net& net) {
    return [a = net.conv("a", 3, 4), b = net.conv("b", 3, 5, 1), c = net.conv("c", 9, 6), bn = net.batch_norm("bn", 19),
            d = net.conv("d", 19, 7), fc = net.linear("fc", 7, 3)](const Tensor& input) mutable {
      const auto x = a(input);
      const auto both = cat({x, b(input).relu()}, 1);
      return fc(pool(d(bn(cat({both, cat({c(both), x}, 1)}, 1)).relu())));
    };
  });
  define(table, "concat_flattened", image(), [](Net& net) {
    return [a = net.conv("a", 3, 4, 3, 2), b = net.conv("b", 3, 5, 3, 4), hidden = net.linear("hidden", 84, 6),
            out = net.linear("out", 6, 3)](const Tensor& x) mutable {
      return out(hidden(cat({a(x).relu().flatten(1), b(x).relu().flatten(1)}, 1)).relu());
    };
  });
  define(table, "concat_residual", image(), [](Net& net) {
    return [a = net.conv("a", 3, 4), b = net.conv("b", 3, 5), c = net.conv("c", 3, 9),
            out = net.conv("out", 9, 2)](const Tensor& x) mutable { return out((cat({a(x), b(x)}, 1) + c(x)).relu()); };
  });
  define(table, "dense_block", image(), [](Net& net) {
    std::vector<nn::BatchNorm2d> norms;
    std::vector<nn::Conv2d> convs;
    for (int64_t i = 0; i < 3; ++i) {
      norms.push_back(net.batch_norm("norm" + std::to_string(i), 6 + 4 * i));
      convs.push_back(without_bias(net, "conv" + std::to_string(i), 6 + 4 * i, 4));
    }
    return [=, stem = net.conv("stem", 3, 6), fc = net.linear("fc", 18, 3)](const Tensor& input) mutable {
      auto x = stem(input);
      for (size_t i = 0; i < convs.size(); ++i) x = cat({x, convs[i](norms[i](x).relu())}, 1);
      return fc(pool(x));
    };
  });
  define(table, "unet", image(), [](Net& net) {
    return [down1 = net.conv("down1", 3, 4), down2 = net.conv("down2", 4, 6), middle = net.conv("middle", 6, 8),
            up2 = net.conv("up2", 14, 5), up1 = up(net, "up1", 5, 4),
            out = net.conv("out", 8, 2, 1)](const Tensor& x) mutable {
      const auto a = down1(x).relu();
      const auto b = down2(torch::avg_pool2d(a, 2)).relu();
      auto c = middle(max_pool(b)).relu();
      c = F::interpolate(c, F::InterpolateFuncOptions()
                                .scale_factor(std::vector<double>{2, 2})
                                .mode(torch::kBilinear)
                                .align_corners(false));
      c = up2(cat({c, b}, 1)).relu();
      return out(cat({up1(c), a}, 1));
    };
  });
}

void add_pieces(Table& table) {
  define(table, "chunk_two", image(), [](Net& net) {
    return [conv = net.conv("conv", 3, 12), left = net.conv("left", 6, 2),
            right = net.conv("right", 6, 2)](const Tensor& x) mutable {
      const auto parts = conv(x).relu().chunk(2, 1);
      return left(parts[0]) + right(parts[1]);
    };
  });
  define(table, "split_reuse", image(), [](Net& net) {
    return [conv = net.conv("conv", 3, 12), mix = net.conv("mix", 4, 5), whole = net.conv("whole", 12, 5),
            out = net.conv("out", 5, 2)](const Tensor& x) mutable {
      const auto y = conv(x).relu();
      const auto parts = torch::split(y, y.size(1) / 3, 1);
      return out((mix(parts[0] + parts[1]) * mix(parts[2]) + whole(y)).relu());
    };
  });
  define(table, "split_sizes", image(), [](Net& net) {
    return [conv = net.conv("conv", 3, 12), left = net.conv("left", 4, 5), right = net.conv("right", 8, 5),
            out = net.conv("out", 5, 2)](const Tensor& x) mutable {
      const auto parts = conv(x).relu().split_with_sizes({4, 8}, 1);
      return out((left(parts[0]) + right(parts[1])).relu());
    };
  });
  define(table, "slice_literal", image(), [](Net& net) {
    return [conv = net.conv("conv", 3, 12), next = net.conv("next", 8, 6), out = net.conv("out", 6, 2)](
               const Tensor& x) mutable { return out(next(conv(x).slice(1, 0, 8).relu()).relu()); };
  });
  define(table, "slice_half", image(), [](Net& net) {
    return [conv = net.conv("conv", 3, 12), out = net.conv("out", 6, 2)](const Tensor& input) mutable {
      const auto x = conv(input);
      const auto half = x.size(1) / 2;
      return out(x.slice(1, 0, half) * x.slice(1, half).sigmoid());
    };
  });
  define(table, "select_channel", image(), [](Net& net) {
    return [conv = net.conv("conv", 3, 7), next = net.conv("next", 7, 6),
            out = net.conv("out", 6, 2)](const Tensor& input) mutable {
      const auto x = conv(input);
      return out((next(x) * x.slice(1, 3, 4)).relu()) + x.select(1, 0).unsqueeze(1);
    };
  });
  define(table, "view_literal", image(), [](Net& net) {
    return [conv = net.conv("conv", 3, 4), hidden = net.linear("hidden", 64, 6), out = net.linear("out", 6, 3)](
               const Tensor& x) mutable { return out(hidden(max_pool(conv(x)).view({-1, 64})).relu()); };
  });
  define(table, "preallocated", image(), [](Net& net) {
    return [a = net.conv("a", 3, 4), b = net.conv("b", 3, 5), next = net.conv("next", 9, 6),
            out = net.conv("out", 6, 2)](const Tensor& x) mutable {
      const auto first = a(x), second = b(x);
      auto both = first.new_zeros({x.size(0), first.size(1) + second.size(1), x.size(2), x.size(3)});
      both.slice(1, 0, first.size(1)).copy_(first);
      both.slice(1, first.size(1)).copy_(second);
      return out(next(both.relu_()).relu());
    };
  });
  define(table, "in_place", image(), [](Net& net) {
    return [conv1 = net.conv("conv1", 3, 8), conv2 = net.conv("conv2", 8, 8),
            out = net.conv("out", 8, 2)](const Tensor& input) mutable {
      const auto x = conv1(input).relu_();
      auto y = conv2(x);
      y += x;
      y.mul_(0.5);
      y.select(2, 0).fill_(0);
      return out(y.sigmoid_());
    };
  });
  define(table, "repeat_tile", image(), [](Net& net) {
    return [conv = net.conv("conv", 3, 5), next = net.conv("next", 10, 6),
            out = net.conv("out", 12, 2)](const Tensor& x) mutable {
      return out(torch::tile(next(conv(x).repeat({1, 2, 1, 1})).relu(), {1, 2, 1, 1}));
    };
  });
  define(table, "flip_roll_index", image(), [](Net& net) {
    auto order = net.register_buffer("order", torch::tensor({3, 1, 4, 0, 7, 5, 2, 6}, torch::kLong));
    return [order, conv = net.conv("conv", 3, 6), next = net.conv("next", 6, 8), out = net.conv("out", 8, 2)](
               const Tensor& x) mutable { return out(next(conv(x).flip({1}).relu()).index({Slice(), order})); };
  });
}

void add_groups(Table& table) {
  define(table, "grouped_conv", image(), [](Net& net) {
    return [conv = net.conv("conv", 3, 12), grouped = net.conv("grouped", 12, 16, 3, 1, 4),
            out = net.conv("out", 16, 2)](const Tensor& x) mutable { return out(grouped(conv(x).relu()).relu()); };
  });
  define(table, "grouped_residual", image(), [](Net& net) {
    return [stem = net.conv("stem", 3, 6), reduce = net.conv("reduce", 6, 8, 1),
            grouped = net.conv("grouped", 8, 8, 3, 1, 2), bn = net.batch_norm("bn", 8),
            expand = net.conv("expand", 8, 6, 1), out = net.conv("out", 6, 2)](const Tensor& input) mutable {
      const auto x = stem(input);
      return out((x + expand(bn(grouped(reduce(x).relu())).relu())).relu());
    };
  });
  define(table, "depthwise", image(), [](Net& net) {
    return [conv = net.conv("conv", 3, 8), depthwise = net.conv("depthwise", 8, 8, 3, 1, 8),
            out = net.conv("out", 8, 2)](const Tensor& x) mutable { return out(depthwise(conv(x).relu()).relu()); };
  });
  define(table, "depthwise_multiplier", image(), [](Net& net) {
    return [conv = net.conv("conv", 3, 8), depthwise = net.conv("depthwise", 8, 16, 3, 1, 8),
            bn = net.batch_norm("bn", 16), out = net.conv("out", 16, 2)](const Tensor& x) mutable {
      return out(bn(depthwise(conv(x).relu())).relu());
    };
  });
  define(table, "depthwise_separable", image(), [](Net& net) {
    return [conv = without_bias(net, "conv", 3, 8), bn1 = net.batch_norm("bn1", 8),
            depthwise = without_bias(net, "depthwise", 8, 8, 3, 8), bn2 = net.batch_norm("bn2", 8),
            pointwise = without_bias(net, "pointwise", 8, 6, 1), bn3 = net.batch_norm("bn3", 6),
            fc = net.linear("fc", 6, 3)](const Tensor& x) mutable {
      const auto y = torch::relu6(bn2(depthwise(torch::relu6(bn1(conv(x))))));
      return fc(pool(torch::hardswish(bn3(pointwise(y)))));
    };
  });
  define(table, "inverted_residual", image(), [](Net& net) {
    return [stem = net.conv("stem", 3, 5), expand = without_bias(net, "expand", 5, 10, 1),
            bn1 = net.batch_norm("bn1", 10), depthwise = without_bias(net, "depthwise", 10, 10, 3, 10),
            bn2 = net.batch_norm("bn2", 10), project = without_bias(net, "project", 10, 5, 1),
            bn3 = net.batch_norm("bn3", 5), fc = net.linear("fc", 5, 3)](const Tensor& input) mutable {
      const auto x = stem(input);
      const auto y = torch::relu6(bn2(depthwise(torch::relu6(bn1(expand(x))))));
      return fc(pool(x + bn3(project(y))));
    };
  });
  define(table, "transposed_conv_grouped", image(), [](Net& net) {
    return [conv = net.conv("conv", 3, 8), depthwise = up(net, "depthwise", 8, 8, 2, 2, 8),
            grouped = up(net, "grouped", 8, 12, 3, 1, 4), out = net.conv("out", 12, 2)](const Tensor& x) mutable {
      return out(grouped(depthwise(conv(x)).relu()).relu());
    };
  });
  define(table, "squeeze_excite", image(), [](Net& net) {
    return [conv = net.conv("conv", 3, 8), squeeze = net.conv("squeeze", 8, 4, 1), excite = net.conv("excite", 4, 8, 1),
            out = net.conv("out", 8, 2)](const Tensor& input) mutable {
      const auto x = conv(input).relu();
      return out(x * excite(torch::silu(squeeze(average(x)))).sigmoid());
    };
  });
  define(table, "spatial_attention", image(), [](Net& net) {
    return [conv = net.conv("conv", 3, 8), attend = net.conv("attend", 2, 1),
            out = net.conv("out", 8, 2)](const Tensor& input) mutable {
      const auto x = conv(input);
      return out(x * attend(cat({x.mean(1, true), x.amax(1, true)}, 1)).sigmoid());
    };
  });
  define(table, "glu_functional", image(), [](Net& net) {
    return [conv = net.conv("conv", 3, 12), out = net.conv("out", 6, 2)](const Tensor& x) mutable {
      return out(torch::glu(conv(x), 1));
    };
  });
  define(table, "channel_shuffle_view", image(), [](Net& net) {
    return [conv = net.conv("conv", 3, 12), next = net.conv("next", 12, 6),
            out = net.conv("out", 6, 2)](const Tensor& x) mutable { return out(next(shuffled(conv(x), 3)).relu()); };
  });
  define(table, "channel_shuffle_module", image(), [](Net& net) {
    return [a = net.conv("a", 3, 4), b = net.conv("b", 3, 4), depthwise = net.conv("depthwise", 8, 8, 3, 1, 8),
            out = net.conv("out", 8, 2)](const Tensor& x) mutable {
      return out(depthwise(torch::channel_shuffle(cat({a(x), b(x)}, 1), 2)).relu());
    };
  });
  define(table, "pixel_shuffle", image(3, 4), [](Net& net) {
    return [conv = net.conv("conv", 3, 20), out = net.conv("out", 5, 2)](const Tensor& x) mutable {
      return out(torch::pixel_shuffle(conv(x), 2));
    };
  });
  define(table, "pixel_unshuffle", image(), [](Net& net) {
    return [conv = net.conv("conv", 3, 5), next = net.conv("next", 20, 6), out = net.conv("out", 6, 2)](
               const Tensor& x) mutable { return out(next(torch::pixel_unshuffle(conv(x), 2)).relu()); };
  });
}

void add_raw(Table& table) {
  define(table, "functional_conv", image(), [](Net& net) {
    return [weight1 = net.parameter("weight1", {8, 3, 3, 3}), bias1 = net.parameter("bias1", {8}),
            weight2 = net.parameter("weight2", {6, 8, 3, 3}), out = net.conv("out", 6, 2)](const Tensor& x) mutable {
      return out(torch::conv2d(torch::conv2d(x, weight1, bias1, 1, 1).relu(), weight2).relu());
    };
  });
  define(table, "raw_scale", image(), [](Net& net) {
    return [conv = net.conv("conv", 3, 8), scale = net.parameter("scale", {8, 1, 1}),
            shift = net.parameter("shift", {1, 8, 1, 1}),
            out = net.conv("out", 8, 2)](const Tensor& x) mutable { return out((scale * conv(x) + shift).relu()); };
  });
  define(table, "buffer_scale", image(), [](Net& net) {
    return [conv = net.conv("conv", 3, 8), mean = net.register_buffer("mean", torch::randn({8, 1, 1})),
            std = net.register_buffer("std", 0.5 + torch::rand({8, 1, 1})),
            out = net.conv("out", 8, 2)](const Tensor& x) mutable { return out(((conv(x) - mean) / std).relu()); };
  });
  define(table, "numpy_constant", image(), [](Net& net) {
    return [conv = net.conv("conv", 3, 8), next = net.conv("next", 8, 6), out = net.conv("out", 6, 2),
            constant = torch::linspace(0.5, 1.5, 8, torch::kFloat64).view({8, 1, 1})](const Tensor& x) mutable {
      return out(next(conv(x) * constant).relu());
    };
  });
  define(table, "weight_standardization", image(), [](Net& net) {
    return [conv1 = net.conv("conv1", 3, 8), conv2 = net.conv("conv2", 8, 6),
            out = net.conv("out", 6, 2)](const Tensor& x) mutable {
      auto w = conv2->weight;
      w = (w - w.mean({1, 2, 3}, true)) / (w.std({1, 2, 3}, true, true) + 1e-5);
      return out(torch::conv2d(conv1(x).relu(), w, conv2->bias, 1, 1).relu());
    };
  });
  define(table, "weight_norm", image(), [](Net& net) {
    return [g1 = net.parameter("g1", {8, 1, 1, 1}), v1 = net.parameter("v1", {8, 3, 3, 3}),
            bias1 = net.parameter("bias1", {8}), g2 = net.parameter("g2", {6, 1, 1, 1}),
            v2 = net.parameter("v2", {6, 8, 3, 3}), out = net.conv("out", 6, 2)](const Tensor& x) mutable {
      const auto y = torch::conv2d(x, torch::_weight_norm(v1, g1, 0), bias1, 1, 1).relu();
      return out(torch::conv2d(y, torch::_weight_norm(v2, g2, 0), {}, 1, 1).relu());
    };
  });
}

}  // namespace

void add_image_structures(Table& table) {
  add_chains(table);
  add_residual(table);
  add_concatenation(table);
  add_pieces(table);
  add_groups(table);
  add_raw(table);
}

}  // namespace structures
