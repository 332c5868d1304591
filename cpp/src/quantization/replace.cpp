#include "quantization/replace.h"

#include <rarefy/nn/conv.h>
#include <rarefy/nn/conv_bn.h>
#include <rarefy/nn/conv_transpose.h>
#include <rarefy/nn/embedding.h>
#include <rarefy/nn/linear.h>
#include <rarefy/ops/quantized.h>
#include <torch/nn/modules/activation.h>
#include <torch/nn/modules/batchnorm.h>
#include <torch/nn/modules/container/sequential.h>
#include <torch/nn/modules/conv.h>
#include <torch/nn/modules/embedding.h>
#include <torch/nn/modules/linear.h>
#include <torch/nn/modules/pooling.h>

#include <algorithm>
#include <map>
#include <typeinfo>

#include "nn/slots.h"

namespace rarefy::quantization {
namespace {

using torch::nn::AnyModule;
using torch::nn::Module;

using nn::put;
using nn::Slot;
using nn::Slots;
using nn::slots_below;

/// The module that a Sequential runs after the one in `slot`, if it runs there only.
std::shared_ptr<Module> next_in_sequential(const Slot& slot, const Slots& slots) {
  auto* sequential = dynamic_cast<torch::nn::SequentialImpl*>(slot.parent);
  if (sequential == nullptr || slot.index + 1 >= sequential->size()) {
    return nullptr;
  }
  auto next = sequential->ptr(slot.index + 1);
  return slots.at(next.get()).size() == 1 ? next : nullptr;
}

template <typename Type>
std::shared_ptr<Type> exactly(const std::shared_ptr<Module>& module) {
  return module != nullptr && typeid(*module) == typeid(Type) ? std::dynamic_pointer_cast<Type>(module) : nullptr;
}

thread_local bool in_pool = false;

/// torch::nn::MaxPool2d that takes bytes too: torch's own kernel refuses those of channels-last images with more than 127
/// pixels.
class MaxPool2dImpl : public torch::nn::Cloneable<MaxPool2dImpl> {
 public:
  explicit MaxPool2dImpl(const torch::nn::MaxPool2dOptions& options) : options_(options) {}

  void reset() override {}
  void pretty_print(std::ostream& stream) const override { torch::nn::MaxPool2dImpl(options_).pretty_print(stream); }

  torch::Tensor forward(const torch::Tensor& x) {
    if (x.scalar_type() != torch::kUInt8) {
      const InPool guard;
      return torch::nn::functional::max_pool2d(x, options_);
    }
    if (x.dim() == 3) {  // one image without a batch dimension
      return forward(x.unsqueeze(0)).squeeze(0);
    }
    return ops::max_pool2d_bytes(x, *options_.kernel_size(), *options_.stride(), *options_.padding(),
                                 *options_.dilation(), options_.ceil_mode());
  }

 private:
  struct InPool {
    InPool() { in_pool = true; }
    InPool(const InPool&) = delete;
    InPool& operator=(const InPool&) = delete;
    ~InPool() { in_pool = false; }
  };

  torch::nn::MaxPool2dOptions options_;
};

/// What becomes of one layer.
struct Plan {
  AnyModule twin;
  std::shared_ptr<nn::Quantizable> layer;
  AnyModule folded;  // in the place of the batch normalization; empty where that stays
  bool fuses_relu = false;
};

template <typename Twin>
void set(Plan& plan, const std::shared_ptr<Twin>& twin, const Module& old) {
  twin->train(old.is_training());
  for (const auto& buffer : old.named_buffers(/*recurse=*/false)) {
    twin->register_buffer(buffer.key(),
                          buffer.value());  // such as the mask of a pruner: the layers have none of their own
  }
  plan.twin = AnyModule(twin);
  plan.layer = twin;
}

template <size_t D>
struct FloatTypes;
template <>
struct FloatTypes<1> {
  using Conv = torch::nn::Conv1dImpl;
  using ConvTranspose = torch::nn::ConvTranspose1dImpl;
  using BatchNorm = torch::nn::BatchNorm1dImpl;
};
template <>
struct FloatTypes<2> {
  using Conv = torch::nn::Conv2dImpl;
  using ConvTranspose = torch::nn::ConvTranspose2dImpl;
  using BatchNorm = torch::nn::BatchNorm2dImpl;
};
template <>
struct FloatTypes<3> {
  using Conv = torch::nn::Conv3dImpl;
  using ConvTranspose = torch::nn::ConvTranspose3dImpl;
  using BatchNorm = torch::nn::BatchNorm3dImpl;
};

template <size_t D>
nn::ConvOptions<D> conv_options(const typename FloatTypes<D>::Conv& module) {
  const auto& o = module.options;
  return nn::ConvOptions<D>(o.in_channels(), o.out_channels(), o.kernel_size())
      .stride(o.stride())
      .padding(o.padding())
      .dilation(o.dilation())
      .groups(o.groups())
      .bias(o.bias())
      .padding_mode(o.padding_mode());
}

template <size_t D>
nn::ConvTransposeOptions<D> transposed_options(const typename FloatTypes<D>::ConvTranspose& module) {
  const auto& o = module.options;
  return nn::ConvTransposeOptions<D>(o.in_channels(), o.out_channels(), o.kernel_size())
      .stride(o.stride())
      .padding(std::get<torch::ExpandingArray<D>>(o.padding()))
      .output_padding(o.output_padding())
      .dilation(o.dilation())
      .groups(o.groups())
      .bias(o.bias());
}

class Finder {
 public:
  explicit Finder(Module& model) : slots_(slots_below(model)) {}

  std::vector<FloatLayer> find(Module& model) {
    std::vector<FloatLayer> found;
    std::map<const Module*, bool> seen;
    for (const auto& item : model.named_modules("", /*include_self=*/false)) {
      if (std::exchange(seen[item.value().get()], true)) {
        continue;
      }
      FloatLayer layer;
      layer.name = item.key();
      if (is_of_attention(item.value())) {
        continue;
      }
      if (dynamic_cast<const torch::nn::MultiheadAttentionImpl*>(item.value().get()) != nullptr) {
        layer.kind = "MultiheadAttention";
        layer.reason = "it cannot be replaced: make it a rarefy::nn::MultiheadAttention";
        found.push_back(std::move(layer));
        continue;
      }
      if (describe<torch::nn::LinearImpl>(item.value(), "Linear", layer) ||
          describe<torch::nn::EmbeddingImpl>(item.value(), "Embedding", layer) ||
          describe<torch::nn::EmbeddingBagImpl>(item.value(), "EmbeddingBag", layer) || conv<1>(item.value(), layer) ||
          conv<2>(item.value(), layer) || conv<3>(item.value(), layer) || transposed<1>(item.value(), layer) ||
          transposed<2>(item.value(), layer) || transposed<3>(item.value(), layer)) {
        found.push_back(std::move(layer));
      }
    }
    return found;
  }

 private:
  const std::vector<Slot>& slots_of(const std::shared_ptr<Module>& module) const { return slots_.at(module.get()); }

  /// Whether a module is the output projection of torch's attention, which reads its weight and does not call it.
  bool is_of_attention(const std::shared_ptr<Module>& module) const {
    const auto& slots = slots_of(module);
    return std::any_of(slots.begin(), slots.end(), [](const Slot& slot) {
      return dynamic_cast<const torch::nn::MultiheadAttentionImpl*>(slot.parent) != nullptr;
    });
  }

  /// Fills in what kinds share; false for other kinds.
  template <typename Float>
  bool describe(const std::shared_ptr<Module>& module, const char* kind, FloatLayer& layer) {
    const auto typed = std::dynamic_pointer_cast<Float>(module);
    if (typed == nullptr) {
      return false;
    }
    layer.kind = kind;
    if (typeid(*module) != typeid(Float)) {
      layer.reason = std::string("a subclass of torch::nn::") + kind;
      return true;
    }
    for (const auto& slot : slots_of(module)) {
      if (!nn::is_replaceable(*slot.parent)) {
        layer.reason = std::string("a typed member cannot be replaced: make it a rarefy::nn::") + kind;
        return true;
      }
    }
    const auto plan = std::make_shared<Plan>();
    std::shared_ptr<torch::nn::ReLUImpl> relu;
    if constexpr (std::is_same_v<Float, torch::nn::LinearImpl>) {
      relu = only_after<torch::nn::ReLUImpl>(module);
      layer.make = [plan, typed, fused = relu != nullptr] {
        const auto options =
            nn::LinearOptions(typed->options.in_features(), typed->options.out_features()).bias(typed->options.bias());
        auto twin = std::make_shared<nn::LinearImpl>(options, typed->weight, typed->bias);
        twin->set_relu(fused);
        set(*plan, twin, *typed);
        plan->fuses_relu = fused;
        return plan->layer;
      };
      layer.make_alone = [plan, typed] {
        const auto options =
            nn::LinearOptions(typed->options.in_features(), typed->options.out_features()).bias(typed->options.bias());
        set(*plan, std::make_shared<nn::LinearImpl>(options, typed->weight, typed->bias), *typed);
        return plan->layer;
      };
    } else if constexpr (std::is_same_v<Float, torch::nn::EmbeddingImpl>) {
      layer.reason = nn::EmbeddingImpl::unsupported(typed->options).value_or("");
      layer.make = [plan, typed] {
        set(*plan, std::make_shared<nn::EmbeddingImpl>(typed->options, typed->weight), *typed);
        return plan->layer;
      };
      layer.make_alone = layer.make;
    } else if constexpr (std::is_same_v<Float, torch::nn::EmbeddingBagImpl>) {
      layer.reason = nn::EmbeddingBagImpl::unsupported(typed->options).value_or("");
      layer.make = [plan, typed] {
        set(*plan, std::make_shared<nn::EmbeddingBagImpl>(typed->options, typed->weight), *typed);
        return plan->layer;
      };
      layer.make_alone = layer.make;
    }
    finish(module, layer, plan, nullptr, relu);
    return true;
  }

  template <size_t D>
  bool conv(const std::shared_ptr<Module>& module, FloatLayer& layer) {
    using Float = typename FloatTypes<D>::Conv;
    using BatchNorm = typename FloatTypes<D>::BatchNorm;
    const std::string kind = "Conv" + std::to_string(D) + "d";
    if (!describe<Float>(module, kind.c_str(), layer)) {
      return false;
    }
    if (!layer.reason.empty()) {
      return true;
    }
    const auto typed = std::dynamic_pointer_cast<Float>(module);
    auto bn = only_after<BatchNorm>(module);
    if (bn != nullptr &&
        !(bn->options.affine() && bn->options.track_running_stats() && bn->options.momentum().has_value() &&
          bn->options.num_features() == typed->options.out_channels())) {
      bn = nullptr;
    }
    const auto relu = only_after<torch::nn::ReLUImpl>(bn != nullptr ? std::shared_ptr<Module>(bn) : module);
    const auto plan = std::make_shared<Plan>();
    layer.make_alone = [plan, typed] {
      set(*plan, std::make_shared<nn::ConvImpl<D>>(conv_options<D>(*typed), typed->weight, typed->bias), *typed);
      return plan->layer;
    };
    layer.make = [plan, typed, bn, fused = relu != nullptr]() -> std::shared_ptr<nn::Quantizable> {
      plan->fuses_relu = fused;
      if (bn == nullptr) {
        auto twin = std::make_shared<nn::ConvImpl<D>>(conv_options<D>(*typed), typed->weight, typed->bias);
        twin->set_relu(fused);
        set(*plan, twin, *typed);
        return plan->layer;
      }
      auto folded = std::make_shared<nn::FoldedBatchNormImpl<D>>(bn->options);
      folded->adopt(*bn);
      plan->folded = AnyModule(folded);
      auto twin = std::make_shared<nn::ConvBnImpl<D>>(conv_options<D>(*typed), typed->weight, typed->bias, folded);
      twin->set_relu(fused);
      set(*plan, twin, *typed);
      return plan->layer;
    };
    finish(module, layer, plan, bn, relu);
    return true;
  }

  template <size_t D>
  bool transposed(const std::shared_ptr<Module>& module, FloatLayer& layer) {
    using Float = typename FloatTypes<D>::ConvTranspose;
    const std::string kind = "ConvTranspose" + std::to_string(D) + "d";
    if (!describe<Float>(module, kind.c_str(), layer)) {
      return false;
    }
    if (!layer.reason.empty()) {
      return true;
    }
    const auto typed = std::dynamic_pointer_cast<Float>(module);
    const auto relu = only_after<torch::nn::ReLUImpl>(module);
    const auto plan = std::make_shared<Plan>();
    const auto twin_of = [typed] {
      return std::make_shared<nn::ConvTransposeImpl<D>>(transposed_options<D>(*typed), typed->weight, typed->bias);
    };
    layer.make_alone = [plan, typed, twin_of] {
      set(*plan, twin_of(), *typed);
      return plan->layer;
    };
    layer.make = [plan, typed, twin_of, fused = relu != nullptr] {
      auto twin = twin_of();
      twin->set_relu(fused);
      set(*plan, twin, *typed);
      plan->fuses_relu = fused;
      return plan->layer;
    };
    finish(module, layer, plan, nullptr, relu);
    return true;
  }

  /// The module of this type that alone follows `module` in a Sequential, where `module` stands there only.
  template <typename Type>
  std::shared_ptr<Type> only_after(const std::shared_ptr<Module>& module) {
    const auto& slots = slots_of(module);
    return slots.size() == 1 ? exactly<Type>(next_in_sequential(slots[0], slots_)) : nullptr;
  }

  void finish(const std::shared_ptr<Module>& module, FloatLayer& layer, const std::shared_ptr<Plan>& plan,
              const std::shared_ptr<Module>& bn, const std::shared_ptr<Module>& relu) {
    layer.relu = relu != nullptr;
    const auto own = slots_of(module);
    const auto norm = bn == nullptr ? std::vector<Slot>() : slots_of(bn);
    const auto activation = relu == nullptr ? std::vector<Slot>() : slots_of(relu);
    layer.bn = norm.empty() ? "" : norm[0].name;
    layer.insert = [plan, own, norm, activation] {
      for (const auto& slot : own) {
        put(slot, plan->twin);
      }
      if (!plan->folded.is_empty()) {
        for (const auto& slot : norm) {
          put(slot, plan->folded);
        }
      }
      if (plan->fuses_relu) {
        for (const auto& slot : activation) {
          put(slot, AnyModule(std::make_shared<torch::nn::IdentityImpl>()));
        }
      }
    };
  }

  Slots slots_;
};

/// Where the model holds the module called `name`, under that name and others.
std::vector<Slot> slots_of(Module& model, const std::string& name) {
  const auto slots = slots_below(model);
  for (const auto& [module, places] : slots) {
    if (std::any_of(places.begin(), places.end(), [&](const Slot& slot) { return slot.name == name; })) {
      return places;
    }
  }
  return {};
}

}  // namespace

void remove_spent_batch_norms(Module& model) {
  const auto slots = slots_below(model);
  const auto spent = [](const Module* module) {
    const auto is = [module](auto* typed) { return typed != nullptr && typed->spent; };
    return is(dynamic_cast<const nn::FoldedBatchNorm1dImpl*>(module)) ||
           is(dynamic_cast<const nn::FoldedBatchNorm2dImpl*>(module)) ||
           is(dynamic_cast<const nn::FoldedBatchNorm3dImpl*>(module));
  };
  for (const auto& [module, places] : slots) {
    if (spent(module)) {
      for (const auto& slot : places) {
        put(slot, AnyModule(std::make_shared<nn::SpentBatchNormImpl>()));
      }
    }
  }
}

std::optional<std::string> why_not_removable(Module& model, const std::string& name) {
  for (const auto& slot : slots_of(model, name)) {
    if (!nn::is_replaceable(*slot.parent)) {
      return name + " is a typed member, which cannot be taken out: make it and its convolution one rarefy::nn::ConvBn";
    }
  }
  return std::nullopt;
}

void remove_batch_norm(Module& model, const std::string& name) {
  for (const auto& slot : slots_of(model, name)) {
    put(slot, AnyModule(std::make_shared<nn::SpentBatchNormImpl>()));
  }
}

void remove_fused_relus(Module& model) {
  const auto slots = slots_below(model);
  for (const auto& [module, places] : slots) {
    const auto* layer = dynamic_cast<const nn::Quantizable*>(module);
    if (layer == nullptr || !layer->relu() || places.size() != 1) {
      continue;
    }
    auto slot = places[0];
    auto next = next_in_sequential(slot, slots);
    while (exactly<nn::SpentBatchNormImpl>(next) != nullptr) {
      slot.index += 1;
      next = next_in_sequential(slot, slots);
    }
    if (exactly<torch::nn::ReLUImpl>(next) != nullptr) {
      put(slots.at(next.get())[0], AnyModule(std::make_shared<torch::nn::IdentityImpl>()));
    }
  }
}

void replace_max_pools(Module& model) {
  const auto slots = slots_below(model);
  for (const auto& [module, places] : slots) {
    const auto in_sequential = [](const Slot& slot) {
      return typeid(*slot.parent) == typeid(torch::nn::SequentialImpl);
    };
    if (typeid(*module) != typeid(torch::nn::MaxPool2dImpl) ||
        !std::all_of(places.begin(), places.end(), in_sequential)) {
      continue;
    }
    const auto& pool = dynamic_cast<const torch::nn::MaxPool2dImpl&>(*module);
    const auto twin = std::make_shared<MaxPool2dImpl>(pool.options);
    twin->train(pool.is_training());
    const auto own = places;
    for (const auto& slot : own) {
      put(slot, AnyModule(twin));
    }
  }
}

bool in_max_pool_of_bytes() { return in_pool; }

std::vector<FloatLayer> float_layers(Module& model) { return Finder(model).find(model); }

}  // namespace rarefy::quantization
