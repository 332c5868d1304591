#include <fmt/format.h>
#include <fmt/ranges.h>
#include <rarefy/nn/conv.h>
#include <rarefy/nn/conv_bn.h>
#include <rarefy/nn/embedding.h>
#include <rarefy/nn/linear.h>
#include <rarefy/pruning/resize.h>
#include <torch/nn/modules/activation.h>
#include <torch/nn/modules/batchnorm.h>
#include <torch/nn/modules/conv.h>
#include <torch/nn/modules/embedding.h>
#include <torch/nn/modules/instancenorm.h>
#include <torch/nn/modules/linear.h>
#include <torch/nn/modules/normalization.h>
#include <torch/nn/modules/rnn.h>

#include <algorithm>
#include <functional>
#include <optional>
#include <unordered_map>
#include <unordered_set>
#include <utility>

namespace rarefy::pruning {
namespace {

std::string json(int64_t value) { return std::to_string(value); }
std::string json(const std::optional<int64_t>& value) { return value ? std::to_string(*value) : "null"; }
std::string json(const std::vector<int64_t>& value) { return fmt::format("[{}]", fmt::join(value, ", ")); }

/// How many of `groups` equal ranges of `size` indices keep some; all of those must keep equally many.
int64_t groups_left(const std::vector<int64_t>* kept, int64_t size, int64_t groups, const char* what) {
  if (kept == nullptr) {
    return groups;
  }
  std::map<int64_t, int64_t> counts;
  for (const int64_t index : *kept) {
    ++counts[index / (size / groups)];
  }
  const int64_t first = counts.begin()->second;
  for (const auto& [group, count] : counts) {
    TORCH_CHECK_VALUE(count == first, "[resize_modules] ", what,
                      " must keep equally many slices in each group that is left, got ", count, " in group ", group,
                      " and ", first, " in group ", counts.begin()->first);
  }
  return static_cast<int64_t>(counts.size());
}

/// Sets the options of one module.
class Resizer {
 public:
  Resizer(Surgery& surgery, std::map<std::string, std::string>& changed) : surgery_(surgery), changed_(changed) {}

  template <typename Type>
  void set(const char* name, Type& option, Type value) {
    if (option == value) {
      return;
    }
    surgery_.on_rollback([&option, before = option] { option = before; });
    changed_[name] = json(value);
    option = std::move(value);
  }

  /// A copy of an option that another one holds too.
  template <typename Type>
  void copy(Type& option, Type value) {
    surgery_.on_rollback([&option, before = option] { option = before; });
    option = std::move(value);
  }

  const std::vector<int64_t>* kept(const at::Tensor& tensor, int64_t dim) const { return surgery_.kept(tensor, dim); }

  template <typename Module>
  void linear(Module& module) {
    set("in_features", module.options.in_features(), module.weight.size(1));
    set("out_features", module.options.out_features(), module.weight.size(0));
  }

  template <typename Module>
  void conv(Module& module, bool transposed) {
    auto& options = module.options;
    const int64_t size = transposed ? options.in_channels() : options.out_channels();
    const int64_t groups = groups_left(kept(module.weight, 0), size, options.groups(), "a convolution");
    const int64_t first = module.weight.size(0), second = module.weight.size(1) * groups;
    set("in_channels", options.in_channels(), transposed ? first : second);
    set("out_channels", options.out_channels(), transposed ? second : first);
    set("groups", options.groups(), groups);
  }

  template <typename Module>
  void norm(Module& module) {
    if (const auto& values = module.weight.defined() ? module.weight : module.running_mean; values.defined()) {
      set("num_features", module.options.num_features(), values.size(0));
    }
  }

  template <typename Module>
  void embedding(Module& module) {
    auto& options = module.options;
    set("num_embeddings", options.num_embeddings(), module.weight.size(0));
    set("embedding_dim", options.embedding_dim(), module.weight.size(1));
    const auto* rows = kept(module.weight, 0);
    if (rows != nullptr && options.padding_idx().has_value()) {
      const auto position = std::lower_bound(rows->begin(), rows->end(), *options.padding_idx());
      const bool stays = position != rows->end() && *position == *options.padding_idx();
      set("padding_idx", options.padding_idx(),
          stays ? std::optional<int64_t>(position - rows->begin()) : std::nullopt);
    }
  }

  template <typename Module>
  void recurrent(Module& module, int64_t gates) {
    auto& options = module.options_base;
    const auto parameters = module.named_parameters(/*recurse=*/false);
    const int64_t hidden = parameters["weight_hh_l0"].size(0) / gates, inputs = parameters["weight_ih_l0"].size(1);
    const int64_t result = parameters["weight_hh_l0"].size(1), directions = options.bidirectional() ? 2 : 1;
    const auto check = [&](const std::string& name, const std::vector<int64_t>& expected) {
      TORCH_CHECK_VALUE(
          parameters[name].sizes() == at::IntArrayRef(expected),
          "[resize_modules] all layers and directions of a recurrent layer must keep one hidden size, but ", name,
          " must be ", at::IntArrayRef(expected), " by the first layer, got ", parameters[name].sizes());
    };
    for (int64_t layer = 0; layer < options.num_layers(); ++layer) {
      for (int64_t direction = 0; direction < directions; ++direction) {
        const auto suffix = "_l" + std::to_string(layer) + (direction == 1 ? "_reverse" : "");
        check("weight_ih" + suffix, {gates * hidden, layer == 0 ? inputs : result * directions});
        check("weight_hh" + suffix, {gates * hidden, result});
        if (options.proj_size() > 0) {
          check("weight_hr" + suffix, {result, hidden});
        }
      }
    }
    set("input_size", options.input_size(), inputs);
    set("hidden_size", options.hidden_size(), hidden);
    copy(module.options.input_size(), inputs);
    copy(module.options.hidden_size(), hidden);
    if (options.proj_size() > 0) {
      set("proj_size", options.proj_size(), result);
      if constexpr (requires { module.options.proj_size(); }) {
        copy(module.options.proj_size(), result);
      }
    }
    if (module.parameters().front().is_cuda()) {
      const torch::NoGradGuard no_grad;
      module.flatten_parameters();  // cuDNN wants the weights in one piece of memory
    }
  }

  template <typename Module>
  void cell(Module& module) {
    set("input_size", module.options_base.input_size(), module.weight_ih.size(1));
    set("hidden_size", module.options_base.hidden_size(), module.weight_hh.size(1));
    copy(module.options.input_size(), module.weight_ih.size(1));
    copy(module.options.hidden_size(), module.weight_hh.size(1));
  }

  void attention(torch::nn::MultiheadAttentionImpl& module) {
    auto& options = module.options;
    const bool packed = module._qkv_same_embed_dim;
    const auto& query = packed ? module.in_proj_weight : module.q_proj_weight;
    const auto& out = module.out_proj->weight;
    const int64_t heads = groups_left(kept(out, 1), options.embed_dim(), options.num_heads(), "MultiheadAttention");
    const int64_t width = query.size(1), inner = out.size(1);
    const int64_t rows = packed ? (query.size(0) - inner) / 2 : query.size(0);
    TORCH_CHECK_VALUE(width == inner && out.size(0) == width && rows == inner && inner == heads * module.head_dim,
                      "[resize_modules] torch::nn::MultiheadAttention must keep heads of ", module.head_dim,
                      " channels that add up to its width, got ", heads, " heads, ", rows, " query and ", inner,
                      " value channels for inputs of ", width, " and results of ", out.size(0));
    set("embed_dim", options.embed_dim(), width);
    set("num_heads", options.num_heads(), heads);
    set("kdim", options.kdim(), packed ? width : module.k_proj_weight.size(1));
    set("vdim", options.vdim(), packed ? width : module.v_proj_weight.size(1));
  }

 private:
  Surgery& surgery_;
  std::map<std::string, std::string>& changed_;
};

/// Calls `resize` when the module is of the type; true then.
template <typename Type, typename Resize>
bool with(torch::nn::Module& module, const Resize& resize) {
  if (auto* typed = dynamic_cast<Type*>(&module)) {
    resize(*typed);
    return true;
  }
  return false;
}

void resize(torch::nn::Module& module, Resizer& to) {
  using namespace torch::nn;
  if (const auto* layer = dynamic_cast<const rarefy::nn::Quantizable*>(&module)) {
    TORCH_CHECK_VALUE(layer->mode() != rarefy::nn::Quantizable::Mode::converted, "[resize_modules] ", layer->kind(),
                      " must not be converted yet: prune before convert");
  }
  const auto linear = [&](auto& m) { to.linear(m); };
  const auto conv = [&](auto& m) { to.conv(m, /*transposed=*/false); };
  const auto transposed = [&](auto& m) { to.conv(m, /*transposed=*/true); };
  const auto norm = [&](auto& m) { to.norm(m); };
  const auto embedding = [&](auto& m) { to.embedding(m); };
  const auto cell = [&](auto& m) { to.cell(m); };
  const auto recurrent = [&](int64_t gates) { return [&to, gates](auto& m) { to.recurrent(m, gates); }; };
  // The first type that fits does it.
  static_cast<void>(
      with<LinearImpl>(module, linear) || with<rarefy::nn::LinearImpl>(module, linear) ||
      with<Conv1dImpl>(module, conv) || with<Conv2dImpl>(module, conv) || with<Conv3dImpl>(module, conv) ||
      with<rarefy::nn::Conv1dImpl>(module, conv) || with<rarefy::nn::Conv2dImpl>(module, conv) ||
      with<rarefy::nn::Conv3dImpl>(module, conv) || with<rarefy::nn::ConvBn1dImpl>(module, conv) ||
      with<rarefy::nn::ConvBn2dImpl>(module, conv) || with<rarefy::nn::ConvBn3dImpl>(module, conv) ||
      with<ConvTranspose1dImpl>(module, transposed) || with<ConvTranspose2dImpl>(module, transposed) ||
      with<ConvTranspose3dImpl>(module, transposed) || with<BatchNorm1dImpl>(module, norm) ||
      with<BatchNorm2dImpl>(module, norm) || with<BatchNorm3dImpl>(module, norm) ||
      with<rarefy::nn::FoldedBatchNorm1dImpl>(module, norm) || with<rarefy::nn::FoldedBatchNorm2dImpl>(module, norm) ||
      with<rarefy::nn::FoldedBatchNorm3dImpl>(module, norm) || with<InstanceNorm1dImpl>(module, norm) ||
      with<InstanceNorm2dImpl>(module, norm) || with<InstanceNorm3dImpl>(module, norm) ||
      with<EmbeddingImpl>(module, embedding) || with<EmbeddingBagImpl>(module, embedding) ||
      with<rarefy::nn::EmbeddingImpl>(module, embedding) || with<LSTMImpl>(module, recurrent(4)) ||
      with<GRUImpl>(module, recurrent(3)) || with<RNNImpl>(module, recurrent(1)) || with<LSTMCellImpl>(module, cell) ||
      with<GRUCellImpl>(module, cell) || with<RNNCellImpl>(module, cell) ||
      with<MultiheadAttentionImpl>(module, [&](auto& m) { to.attention(m); }) ||
      with<BilinearImpl>(module,
                         [&](auto& m) {
                           to.set("out_features", m.options.out_features(), m.weight.size(0));
                           to.set("in1_features", m.options.in1_features(), m.weight.size(1));
                           to.set("in2_features", m.options.in2_features(), m.weight.size(2));
                         }) ||
      with<LayerNormImpl>(
          module, [&](auto& m) { to.set("normalized_shape", m.options.normalized_shape(), m.weight.sizes().vec()); }) ||
      with<GroupNormImpl>(module,
                          [&](auto& m) {
                            auto& options = m.options;
                            to.set("num_groups", options.num_groups(),
                                   groups_left(to.kept(m.weight, 0), options.num_channels(), options.num_groups(),
                                               "a group norm"));
                            to.set("num_channels", options.num_channels(), m.weight.size(0));
                          }) ||
      with<PReLUImpl>(module,
                      [&](auto& m) { to.set("num_parameters", m.options.num_parameters(), m.weight.size(0)); }) ||
      with<quantization::FakeQuantizerImpl>(module, [&](auto& m) { to.copy(m.options.channels, m.scale.size(0)); }));
}

bool any_cut(const torch::nn::Module& module, const Surgery& surgery) {
  const auto cut = [&](const auto& tensors) {
    return std::any_of(tensors.begin(), tensors.end(), [&](const auto& t) { return surgery.is_cut(t); });
  };
  return cut(module.parameters(/*recurse=*/false)) || cut(module.buffers(/*recurse=*/false));
}

std::vector<std::pair<std::string, torch::nn::Module*>> modules_of(torch::nn::Module& model) {
  std::vector<std::pair<std::string, torch::nn::Module*>> modules{{"", &model}};
  for (const auto& item : model.named_modules("", /*include_self=*/false)) {
    modules.emplace_back(item.key(), item.value().get());
  }
  return modules;
}

}  // namespace

std::vector<Cut> quantizer_cuts(const torch::nn::Module& model, const std::vector<Cut>& cuts) {
  std::unordered_map<std::string, at::Tensor> by_name;
  for (const auto& item : graph::named_tensors(model)) {
    by_name.emplace(item.name, item.value);
  }
  std::vector<Cut> result;
  for (const auto& [path, module] : modules_of(const_cast<torch::nn::Module&>(model))) {
    const auto* layer = dynamic_cast<const nn::Quantizable*>(module);
    const auto* weights =
        layer != nullptr && layer->quant_state() != nullptr ? layer->quant_state()->find("weight") : nullptr;
    if (weights == nullptr || !weights->options.scheme.axis().has_value()) {
      continue;
    }
    const auto prefix = path.empty() ? path : path + ".";
    const auto& weight = by_name.at(prefix + "weight");
    for (const auto& cut : cuts) {
      const auto tensor = by_name.find(cut.tensor);
      if (tensor == by_name.end() || !tensor->second.is_same(weight) || cut.dim != *weights->options.scheme.axis()) {
        continue;
      }
      for (const auto* name : {"scale", "zero_point", "min_val", "max_val"}) {
        const auto key = prefix + "quant.weight." + name;
        if (std::none_of(cuts.begin(), cuts.end(), [&](const Cut& c) { return c.tensor == key; })) {
          result.push_back({key, 0, cut.kept});
        }
      }
    }
  }
  return result;
}

Attributes resize_modules(torch::nn::Module& model, Surgery& surgery) {
  Attributes changed;
  for (const auto& [path, module] : modules_of(model)) {
    auto* attention = dynamic_cast<torch::nn::MultiheadAttentionImpl*>(module);
    if (any_cut(*module, surgery) || (attention != nullptr && any_cut(*attention->out_proj, surgery))) {
      std::map<std::string, std::string> attributes;
      Resizer to(surgery, attributes);
      resize(*module, to);
      if (!attributes.empty()) {
        changed.emplace(path, std::move(attributes));
      }
    }
  }
  return changed;
}

}  // namespace rarefy::pruning
