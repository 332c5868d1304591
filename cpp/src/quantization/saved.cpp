#include <fmt/format.h>
#include <rarefy/masks.h>
#include <rarefy/nn/conv_bn.h>
#include <rarefy/nn/quantizable.h>
#include <rarefy/quantization/packed_weight.h>
#include <rarefy/quantization/saved.h>

#include <algorithm>
#include <map>
#include <memory>
#include <string_view>
#include <utility>
#include <vector>

#include "checkpoint_state.h"
#include "quantization/replace.h"

namespace rarefy::quantization {
namespace {

using nn::Quantizable;
using torch::nn::Module;

/// The kind in a file, which does not tell what has been folded in: "ConvBn2d" is "Conv2d".
std::string saved_kind(const std::string& kind) {
  constexpr std::string_view kFolding = "ConvBn";
  return kind.starts_with(kFolding) ? "Conv" + kind.substr(kFolding.size()) : kind;
}

/// A parameter or buffer of the module itself, or an undefined tensor.
torch::Tensor own_tensor(const Module& module, const std::string& name) {
  for (const auto& items : {module.named_parameters(/*recurse=*/false), module.named_buffers(/*recurse=*/false)}) {
    if (const auto* tensor = items.find(name)) {
      return *tensor;
    }
  }
  return {};
}

bool is_channels_last(const torch::Tensor& weight) {
  return weight.defined() && weight.dim() == 4 && !weight.is_contiguous() &&
         weight.is_contiguous(c10::MemoryFormat::ChannelsLast);
}

SavedLayer description_of(const Quantizable& layer, const Module& module) {
  SavedLayer saved{
      saved_kind(layer.kind()), layer.relu(), is_channels_last(own_tensor(module, "weight")), {}, {}, {}, {}};
  for (const auto& [name, quantizer] : layer.quant_state()->quantizers()) {
    saved.quantizers.emplace(name, quantizer->options.scheme);
  }
  saved.target = layer.target;
  if (const auto* packed = layer.packed_weight()) {
    saved.packed = SavedPacking{packed->scheme, packed->shape, packed->dtype};
  }
  if (const auto& next = layer.quant_state()->next()) {
    saved.next = IntegerRange{next->qmin, next->qmax};
  }
  return saved;
}

bool is_batch_norm(const Module& module) {
  return dynamic_cast<const torch::nn::BatchNorm1dImpl*>(&module) != nullptr ||
         dynamic_cast<const torch::nn::BatchNorm2dImpl*>(&module) != nullptr ||
         dynamic_cast<const torch::nn::BatchNorm3dImpl*>(&module) != nullptr;
}

/// Whether a tensor called `tensor` is of the module called `module` or below it.
bool is_below(const std::string& tensor, const std::string& module) {
  return tensor.size() > module.size() && tensor.starts_with(module) && tensor[module.size()] == '.';
}

/// Puts what a folder holds into a model: decides everything in its constructor, and changes the model in load().
class Loader {
 public:
  Loader(Module& model, const QuantizedCheckpoint& checkpoint, std::string file)
      : model_(model), checkpoint_(checkpoint), file_(std::move(file)), floating_(float_layers(model)) {
    for (const auto& item : model_.named_modules("", /*include_self=*/false)) {
      modules_.emplace(item.key(), item.value());
    }
    for (const auto& [name, saved] : checkpoint_.layers) {
      add_step(name, saved);
    }
    for (const auto& name : checkpoint_.folded) {
      add_batch_norm(name);
    }
  }

  void load() {
    for (auto& step : steps_) {
      if (step.floating != nullptr) {
        step.layer = step.floating->make_alone();
      }
    }
    load_into(rest_of_model(), rest_of_file(), file_, /*strict=*/true, [this] { change(); }, "load_quantized");
    model_.eval();
  }

 private:
  struct Step {
    std::string name;
    const SavedLayer* saved;
    const FloatLayer* floating;          // of torch::nn; null for a layer of rarefy::nn
    std::shared_ptr<Quantizable> layer;  // of torch::nn: null until the twin is made
    torch::Device device;
  };

  template <typename... Rule>
  void require(bool condition, const Rule&... rule) const {
    TORCH_CHECK_VALUE(condition, "[load_quantized] ", file_, ": ", rule...);
  }

  torch::Tensor saved_tensor(const std::string& name) const {
    const auto* tensor = checkpoint_.tensors.find(name);
    return tensor == nullptr ? torch::Tensor() : *tensor;
  }

  void add_step(const std::string& name, const SavedLayer& saved) {
    const auto module = modules_.find(name);
    require(module != modules_.end(), "layer ", name, " (", saved.kind, ") must be of the model, which has none");
    const auto [first, is_new] = names_.emplace(module->second.get(), name);
    if (!is_new) {  // one module with two names
      require(saved == checkpoint_.layers.at(first->second), "layers ", first->second, " and ", name,
              " are one in the model and must be equal in the file");
      return;
    }
    Step step{name, &saved, nullptr, std::dynamic_pointer_cast<Quantizable>(module->second), torch::kCPU};
    std::string kind;
    if (step.layer != nullptr) {
      require(step.layer->mode() == Quantizable::Mode::floating, "layer ", name,
              " must be floating point in the model, but is already ",
              step.layer->mode() == Quantizable::Mode::prepared ? "prepared" : "converted");
      kind = step.layer->kind();
    } else {
      for (const auto& layer : floating_) {
        step.floating = modules_.at(layer.name) == module->second ? &layer : step.floating;
      }
      kind = step.floating == nullptr ? module->second->name() : step.floating->kind;
      require(step.floating == nullptr || step.floating->reason.empty(), "layer ", name, " of the model is ",
              step.floating == nullptr ? "" : step.floating->reason);
    }
    require(saved_kind(kind) == saved.kind, "layer ", name, " must be a ", saved.kind, " in the model, got a ", kind);
    check_tensors(step, *module->second);
    if (const auto parameters = module->second->parameters(/*recurse=*/false); !parameters.empty()) {
      step.device = parameters.front().device();
    }
    steps_.push_back(std::move(step));
  }

  /// Of a layer with several weights: the model's own tensors, all of them and no other.
  void check_several(const Step& step, const Module& module) const {
    auto shapes = step.layer->converted_shapes();
    if (shapes.empty()) {
      for (const auto& item : module.named_parameters(/*recurse=*/false)) {
        shapes[item.key()] = item.value().sizes().vec();
      }
    }
    for (const auto& [name, shape] : shapes) {
      const auto given = saved_tensor(step.name + "." + name);
      require(given.defined() && given.sizes() == at::IntArrayRef(shape), name, " of layer ", step.name,
              " must have the model's shape ", at::IntArrayRef(shape), ", got ",
              given.defined() ? c10::str(given.sizes()) : "nothing");
      const auto quantizer = weight_quantizer(step.saved->kind, name);
      require(!quantizer.has_value() || step.saved->quantizers.count(*quantizer) == 1, "layer ", step.name,
              " must have a grid for ", name);
    }
    for (const auto& item : checkpoint_.tensors) {
      if (is_below(item.key(), step.name) && !is_below(item.key(), step.name + ".quant") &&
          !is_of_child(item.key(), step.name, module)) {
        require(shapes.count(item.key().substr(step.name.size() + 1)) == 1, "layer ", step.name, " has no ", item.key(),
                " in the model");
      }
    }
  }

  /// Whether a tensor is of a module below a layer that is no part of it: the output projection of an attention.
  static bool is_of_child(const std::string& tensor, const std::string& layer, const Module& module) {
    const auto children = module.named_children();
    return std::any_of(children.begin(), children.end(), [&](const auto& child) {
      return child.key() != "quant" && is_below(tensor, layer + "." + child.key());
    });
  }

  void check_tensors(const Step& step, const Module& module) const {
    if (step.layer != nullptr && !step.layer->tensor_names().empty()) {
      check_several(step, module);
      return;
    }
    const auto weight = own_tensor(module, "weight"), integers = saved_tensor(step.name + ".weight");
    if (step.saved->packed.has_value()) {
      check_packed(step, module, *step.saved->packed);
      return;
    }
    const bool has_integers = step.saved->quantizers.count("weight") == 1;
    require(weight.defined() == has_integers, "layer ", step.name, " (", step.saved->kind, ") must have ",
            weight.defined() ? "a" : "no", " weight");
    if (!weight.defined()) {
      return;
    }
    require(weight.sizes() == integers.sizes(), "the weight of layer ", step.name, " must have the model's shape ",
            weight.sizes(), ", got ", integers.sizes());
    const bool transposed = step.saved->kind.starts_with("ConvTranspose");
    const int64_t expected = transposed ? 1 : 0;
    const auto axis = step.saved->quantizers.at("weight").axis().value_or(expected);
    require(axis == expected, "the weight of layer ", step.name, " must have its output channels on axis ", expected,
            ", got axis ", axis);
    const auto bias = own_tensor(module, "bias"), given = saved_tensor(step.name + ".bias");
    // A batch normalization that is folded gives a bias.
    const bool folds = step.saved->kind.starts_with("Conv") && !transposed;
    require(bias.defined() == given.defined() || (folds && given.defined()), "layer ", step.name, " must have ",
            bias.defined() ? "a" : "no", " bias, as in the model");
    const auto channels = transposed && bias.defined() ? bias.size(0) : weight.size(expected);
    require(!given.defined() || given.size(0) == channels, "the bias of layer ", step.name, " must have ", channels,
            " elements, got ", given.defined() ? given.size(0) : 0);
  }

  void check_packed(const Step& step, const Module& module, const SavedPacking& packed) const {
    const auto weight = own_tensor(module, "weight");
    const bool transposed = step.saved->kind.starts_with("ConvTranspose");  // packed with all channels on one axis
    require(weight.defined() && (weight.sizes() == at::IntArrayRef(packed.shape) ||
                                 (transposed && weight.numel() == c10::multiply_integers(packed.shape))),
            "the weight of layer ", step.name, " must have the model's shape ",
            weight.defined() ? c10::str(weight.sizes()) : "", ", got ", at::IntArrayRef(packed.shape));
    const auto bias = own_tensor(module, "bias"), given = saved_tensor(step.name + ".bias");
    const bool folds = step.saved->kind.starts_with("Conv") && !transposed;
    require(bias.defined() == given.defined() || (folds && given.defined()), "layer ", step.name, " must have ",
            bias.defined() ? "a" : "no", " bias, as in the model");
    const auto channels = transposed && bias.defined() ? bias.size(0) : packed.shape[0];
    require(!given.defined() || given.size(0) == channels, "the bias of layer ", step.name, " must have ", channels,
            " elements, got ", given.defined() ? given.size(0) : 0);
  }

  void add_batch_norm(const std::string& name) {
    const auto module = modules_.find(name);
    if (module == modules_.end()) {
      return;  // a ConvBn has it
    }
    require(is_batch_norm(*module->second), name,
            " must be a batch normalization in the model, as it was folded, got a ", module->second->name());
    const auto reason = why_not_removable(model_, name);
    require(!reason.has_value(), "the batch normalization ", reason.value_or(""));
    norms_.insert(module->second.get());
  }

  /// Whether a tensor is of a module that stays as it is below a layer that changes: the output projection of an attention.
  bool is_of_floating_child(const std::string& tensor) const {
    return std::any_of(steps_.begin(), steps_.end(), [&](const Step& step) {
      const auto projection = step.name + ".out_proj";
      return step.saved->kind == "MultiheadAttention" && is_below(tensor, projection) &&
             names_.count(modules_.at(projection).get()) == 0;
    });
  }

  /// The model's state without the layers and batch normalizations that change.
  State rest_of_model() const {
    std::vector<std::string> changing;
    for (const auto& [name, module] : modules_) {
      if (names_.count(module.get()) != 0 || norms_.count(module.get()) != 0) {
        changing.push_back(name);
      }
    }
    State rest;
    for (const auto& [name, tensor] : state_of(model_)) {
      const auto& key = name;
      const auto changes = [&](const auto& module) { return is_below(key, module); };
      if (std::none_of(changing.begin(), changing.end(), changes) || is_of_floating_child(key)) {
        rest.emplace_back(name, tensor);
      }
    }
    return rest;
  }

  /// The file's tensors without those of its layers.
  Checkpoint rest_of_file() const {
    Checkpoint rest;
    for (const auto& item : checkpoint_.tensors) {
      const auto is_of = [&](const auto& layer) {
        const auto& name = layer.first;
        if (has_several_weights(layer.second.kind) && is_below(item.key(), name)) {
          return !is_of_floating_child(item.key());
        }
        if (layer.second.packed.has_value() && item.key().starts_with(name + ".weight_")) {
          return true;
        }
        return is_below(item.key(), name + ".quant") || item.key() == name + ".weight" || item.key() == name + ".bias";
      };
      if (std::none_of(checkpoint_.layers.begin(), checkpoint_.layers.end(), is_of)) {
        rest.tensors.insert(item.key(), item.value());
      }
    }
    return rest;
  }

  void change() {
    for (auto& step : steps_) {
      restore(step);
      if (step.floating != nullptr) {
        step.floating->insert();
      }
    }
    for (const auto& name : checkpoint_.folded) {
      if (modules_.count(name) != 0) {
        remove_batch_norm(model_, name);
      }
    }
    remove_fused_relus(model_);
    if (std::any_of(checkpoint_.layers.begin(), checkpoint_.layers.end(),
                    [](const auto& item) { return item.second.next.has_value(); })) {
      replace_max_pools(model_);
    }
  }

  void restore(Step& step) {
    nn::ConvertedState state;
    // The class may have the ReLU, where the model that was saved computed it beside the layer.
    state.relu = step.saved->relu || step.layer->relu();
    for (const auto& own : step.layer->tensor_names()) {
      state.tensors.emplace_back(own, saved_tensor(step.name + "." + own).to(step.device));
    }
    if (auto weight = saved_tensor(step.name + ".weight"); weight.defined() && state.tensors.empty()) {
      state.weight = weight.to(step.device)
                         .contiguous(step.saved->channels_last && weight.dim() == 4 ? c10::MemoryFormat::ChannelsLast
                                                                                    : c10::MemoryFormat::Contiguous);
      const auto bias = saved_tensor(step.name + ".bias");
      state.bias = bias.defined() ? bias.to(step.device) : bias;
    }
    if (const auto& packed = step.saved->packed) {
      state.packed = QuantizedTensorParts{packed->scheme, packed->shape, packed->dtype, {}};
      for (const auto& part : part_names(packed->scheme)) {
        state.packed->tensors[part] = saved_tensor(fmt::format("{}.weight_{}", step.name, part)).to(step.device);
      }
      const auto bias = saved_tensor(step.name + ".bias");
      state.bias = bias.defined() ? bias.to(step.device) : bias;
    }
    for (const auto& [name, scheme] : step.saved->quantizers) {
      const int64_t channels = saved_tensor(fmt::format("{}.quant.{}.scale", step.name, name)).size(0);
      const bool is_weight = name.starts_with("weight");
      state.quantizers.push_back({name, {scheme, is_weight ? Observer(Latest{}) : Observer(MinMax{}), channels}});
    }
    if (const auto& next = step.saved->next) {
      state.next = std::make_shared<nn::ByteGridImpl>(next->qmin, next->qmax);
    }
    state.target = step.saved->target;
    step.layer->restore(state);
    const torch::NoGradGuard no_grad;
    for (auto& buffer : step.layer->quant_state()->named_buffers()) {
      buffer.value().copy_(saved_tensor(fmt::format("{}.quant.{}", step.name, buffer.key())));
    }
    for (const auto& [name, quantizer] : step.layer->quant_state()->quantizers()) {
      quantizer->name = fmt::format("{}.quant.{}", step.name, name);
      quantizer->observe = false;
      quantizer->refresh();
    }
  }

  Module& model_;
  const QuantizedCheckpoint& checkpoint_;
  std::string file_;
  std::vector<FloatLayer> floating_;
  std::map<std::string, std::shared_ptr<Module>> modules_;
  std::map<const Module*, std::string> names_;  // of the layers that change: the first name in the file
  std::vector<Step> steps_;
  std::set<const Module*> norms_;  // that are taken out
};

}  // namespace

void save_quantized(const Module& model, const std::filesystem::path& folder) {
  check_masks(model, "save_quantized");
  QuantizedCheckpoint checkpoint;
  for (const auto& item : model.named_modules("", /*include_self=*/false)) {
    if (const auto* layer = dynamic_cast<const Quantizable*>(item.value().get());
        layer != nullptr && layer->mode() != Quantizable::Mode::floating) {
      TORCH_CHECK_VALUE(layer->mode() == Quantizable::Mode::converted, "[save_quantized] layer ", item.key(),
                        " must be converted, but is only prepared: call convert first");
      checkpoint.layers.emplace(item.key(), description_of(*layer, *item.value()));
    } else if (dynamic_cast<const nn::SpentBatchNormImpl*>(item.value().get()) != nullptr) {
      checkpoint.folded.insert(item.key());
    }
  }
  TORCH_CHECK_VALUE(!checkpoint.layers.empty(),
                    "[save_quantized] the model must have converted layers; call convert first");
  for (const auto& [name, tensor] : state_of(model)) {
    checkpoint.tensors.insert(name, tensor);
  }
  write_quantized(checkpoint, folder);
}

void load_quantized(Module& model, const std::filesystem::path& folder) {
  const auto checkpoint = read_quantized(folder);
  Loader(model, checkpoint, folder.string()).load();
}

}  // namespace rarefy::quantization
