#include "quantization/link.h"

#include <ATen/ops/equal.h>
#include <rarefy/graph/record.h>
#include <rarefy/nn/boundaries.h>
#include <rarefy/nn/quantizable.h>

#include <algorithm>
#include <array>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <utility>

#include "graph/evaluation.h"
#include "quantization/replace.h"

namespace rarefy::quantization {
namespace {

using graph::Graph;
using graph::Node;
using nn::Quantizable;

// Operators that do with the bytes of a grid what they do with its values: they move them, or take the largest. Not
// aten::max_pool2d and aten::max_pool3d, which refuse bytes of images with more than 127 pixels: see replace_max_pools.
constexpr std::array<std::string_view, 19> kMovesBytes{"rarefy::max_pool2d_bytes",
                                                       "aten::flatten",
                                                       "aten::reshape",
                                                       "aten::view",
                                                       "aten::permute",
                                                       "aten::transpose",
                                                       "aten::contiguous",
                                                       "aten::squeeze",
                                                       "aten::unsqueeze",
                                                       "aten::dropout",
                                                       "aten::clone",
                                                       "aten::detach",
                                                       "aten::chunk",
                                                       "aten::split",
                                                       "aten::select",
                                                       "aten::slice",
                                                       "aten::narrow",
                                                       "aten::t",
                                                       "aten::alias"};

/// An argument that lies on a grid, and the argument that has the scale of the grid.
struct Operand {
  size_t tensor, scale;
};

/// The operands of the operators of converted layers; empty for other operators.
std::vector<Operand> operands_of(const Node& node) {
  if (node.op.name == "rarefy::quantized_linear" || node.op.name == "rarefy::quantized_conv" ||
      node.op.name == "rarefy::quantized_conv_transpose") {
    return {{0, 4}};
  }
  if (node.op.name == "rarefy::quantized_add") {
    return {{0, 2}, {1, 6}};
  }
  return node.op.name == "rarefy::requantize" ? std::vector<Operand>{{0, 1}} : std::vector<Operand>{};
}

bool is_relu(const Node& node) { return node.op.name == "aten::relu" || node.op.name == "aten::relu_"; }

// The module that a recording gives to the operators of poolings which take bytes.
constexpr const char* kMaxPool = "max_pool";

bool moves_bytes(const Node& node) {
  return (node.op.name == "aten::max_pool2d" && node.module == kMaxPool) ||
         std::find(kMovesBytes.begin(), kMovesBytes.end(), node.op.name) != kMovesBytes.end();
}

bool has_relu_kernel(const Quantizable& layer) {
  const auto kind = layer.kind();
  return kind == "Linear" || kind == "Add" || kind.starts_with("Conv");
}

/// Why a layer gives floats.
struct NotLinked {
  std::string reason;
};

class Linker {
 public:
  Linker(std::map<std::string, Quantizable*> layers, Graph graph)
      : layers_(std::move(layers)), graph_(std::move(graph)) {
    for (size_t i = 0; i < graph_.nodes.size(); ++i) {
      const auto& node = graph_.nodes[i];
      if (node.parent == -1 && !operands_of(node).empty()) {
        if (const auto read = quantizer_of(node, operands_of(node)[0]); read.has_value()) {
          calls_[read->first].push_back(static_cast<int64_t>(i));
        }
      }
    }
  }

  void link() {
    for (const auto& [name, layer] : layers_) {
      if (takes_relu(name, *layer)) {
        layer->set_relu(true);
      }
    }
    std::map<std::string, const FakeQuantizerImpl*> grids;
    for (const auto& [name, layer] : layers_) {
      layer->note.clear();
      try {
        grids[name] = &grid_of_readers(name, *layer);
      } catch (const NotLinked& error) {
        layer->note = "gives floats: " + error.reason;
      }
    }
    const torch::NoGradGuard no_grad;
    for (const auto& [name, quantizer] : grids) {
      const auto& scheme = quantizer->options.scheme;
      auto grid = std::make_shared<nn::ByteGridImpl>(scheme.qmin(), scheme.qmax());
      grid->to(quantizer->scale.device());
      grid->scale.copy_(quantizer->scale);
      grid->zero_point.copy_(quantizer->zero_point);
      layers_.at(name)->quant_state()->set_next(grid);
    }
  }

 private:
  using Reading = std::pair<std::string, const FakeQuantizerImpl*>;  // layer, quantizer

  /// Whose grid an operand is read on: told by the name of the buffer that has the scale.
  std::optional<Reading> quantizer_of(const Node& node, const Operand& operand) const {
    const auto value = node.input(operand.scale);
    if (value < 0) {
      return std::nullopt;
    }
    const auto& name = graph_.values[static_cast<size_t>(value)].name;
    constexpr std::string_view kQuant = ".quant.", kScale = ".scale";
    const auto at = name.rfind(kQuant);
    if (at == std::string::npos || !name.ends_with(kScale)) {
      return std::nullopt;
    }
    const auto layer = layers_.find(name.substr(0, at));
    if (layer == layers_.end()) {
      return std::nullopt;
    }
    const auto begin = at + kQuant.size();
    const auto* quantizer = layer->second->quant_state()->find(name.substr(begin, name.size() - kScale.size() - begin));
    return quantizer == nullptr ? std::nullopt : std::optional<Reading>({layer->first, quantizer});
  }

  /// The operator that the model called, of one that runs inside of it.
  int64_t called(int64_t node) const {
    while (graph_.nodes[static_cast<size_t>(node)].parent != -1) {
      node = graph_.nodes[static_cast<size_t>(node)].parent;
    }
    return node;
  }

  /// The operators that the model called which read a value; what runs inside of them is theirs. The one that made the value
  /// is none of them, whatever it did with it on the way (changed its layout, say).
  std::vector<const Node*> readers_of(int64_t value) const {
    const auto producer = graph_.values[static_cast<size_t>(value)].producer;
    std::set<int64_t> nodes;
    for (const auto node : graph_.values[static_cast<size_t>(value)].consumers) {
      nodes.insert(called(node));
    }
    if (producer >= 0) {
      nodes.erase(called(producer));
    }
    std::vector<const Node*> readers;
    for (const auto node : nodes) {
      readers.push_back(&graph_.nodes[static_cast<size_t>(node)]);
    }
    return readers;
  }

  /// The value that the one call of a layer gave; -1 when it ran not at all or several times.
  int64_t result_of(const std::string& name) const {
    const auto calls = calls_.find(name);
    if (calls == calls_.end() || calls->second.size() != 1) {
      return -1;
    }
    return graph_.nodes[static_cast<size_t>(calls->second[0])].outputs.at(0);
  }

  bool takes_relu(const std::string& name, const Quantizable& layer) const {
    const auto result = result_of(name);
    if (result < 0 || layer.relu() || !has_relu_kernel(layer) || layer.quant_state()->find("output") != nullptr ||
        graph_.values[static_cast<size_t>(result)].is_output) {
      return false;
    }
    // What comes after a ReLU in place reads what that has left.
    const auto readers = readers_of(result);
    return !readers.empty() && is_relu(*readers[0]) && (readers.size() == 1 || readers[0]->outputs.at(0) == result);
  }

  const FakeQuantizerImpl& grid_of_readers(const std::string& name, const Quantizable& layer) const {
    const auto& quant = *layer.quant_state();
    if (layer.packed_weight() != nullptr) {
      throw NotLinked{"its weight is packed, and it computes in floating point"};
    }
    if (layer.kind() == "Embedding" || layer.kind() == "EmbeddingBag") {
      throw NotLinked{"a table's rows lie on grids of their own"};
    }
    if (layer.kind() == "Mul" || layer.kind() == "SDPA") {
      throw NotLinked{"there is no integer product of two activations"};
    }
    if (layer.kind() == "MultiheadAttention") {
      throw NotLinked{"its output projection gives its result"};
    }
    if (dynamic_cast<const nn::Boundary*>(&layer) != nullptr) {
      throw NotLinked{"it computes in floating point"};
    }
    const bool on_bytes =
        layer.kind() == "Add" ? quant.has_bytes("input0") && quant.has_bytes("input1") : quant.has_bytes("input");
    if (!on_bytes) {
      throw NotLinked{"its input is not of bytes"};
    }
    if (quant.find("output") != nullptr) {
      throw NotLinked{"its result is rounded for what reads it in floating point"};
    }
    const auto result = result_of(name);
    if (result < 0) {
      throw NotLinked{"forward calls it not once"};
    }
    std::vector<const FakeQuantizerImpl*> found;
    std::set<int64_t> seen;
    follow(result, layer.relu(), found, seen);
    if (found.empty()) {
      throw NotLinked{"nothing reads its result"};
    }
    const auto& first = *found[0];
    for (const auto* other : found) {
      const auto &a = first.options.scheme, &b = other->options.scheme;
      if (a.qmin() != b.qmin() || a.qmax() != b.qmax() || !at::equal(first.scale, other->scale) ||
          !at::equal(first.zero_point, other->zero_point)) {
        throw NotLinked{"its readers have different grids"};
      }
    }
    return first;
  }

  /// Adds the quantizers with which layers read a value and what only moves it.
  void follow(int64_t value, bool relu, std::vector<const FakeQuantizerImpl*>& found, std::set<int64_t>& seen) const {
    if (!seen.insert(value).second) {
      return;
    }
    if (graph_.values[static_cast<size_t>(value)].is_output) {
      throw NotLinked{"the model returns its result"};
    }
    for (const auto* reader : readers_of(value)) {
      // A ReLU finds nothing below zero in bytes, as its layer has left nothing there.
      if (moves_bytes(*reader) || (relu && is_relu(*reader)) || is_cat_of_layer(*reader)) {
        for (const auto output : reader->outputs) {
          follow(output, relu, found, seen);
        }
        continue;
      }
      const auto before = found.size();
      for (const auto& operand : operands_of(*reader)) {
        if (reader->input(operand.tensor) == value) {
          if (const auto read = quantizer_of(*reader, operand); read.has_value()) {
            found.push_back(read->second);
          }
        }
      }
      if (found.size() == before) {
        throw NotLinked{reader->op.name + " reads its result in floating point"};
      }
    }
  }

  /// Whether a concatenation is that of a Cat, which rounds what it gives and takes bytes beside floats.
  bool is_cat_of_layer(const Node& node) const {
    if (node.op.name != "aten::cat" || node.outputs.size() != 1) {
      return false;
    }
    const auto readers = readers_of(node.outputs[0]);
    return readers.size() == 1 && readers[0]->op.name == "rarefy::requantize" &&
           quantizer_of(*readers[0], operands_of(*readers[0])[0]).has_value();
  }

  std::map<std::string, Quantizable*> layers_;
  Graph graph_;
  std::map<std::string, std::vector<int64_t>> calls_;  // of each layer: its operators
};

std::map<std::string, Quantizable*> converted_layers(torch::nn::Module& model) {
  std::map<std::string, Quantizable*> layers;
  std::set<const Quantizable*> seen;  // one with several names under the first, as a recording has it
  for (const auto& item : model.named_modules("", /*include_self=*/false)) {
    if (auto* layer = dynamic_cast<Quantizable*>(item.value().get());
        layer != nullptr && layer->mode() == Quantizable::Mode::converted && seen.insert(layer).second) {
      layers.emplace(item.key(), layer);
    }
  }
  return layers;
}

/// The layout of the weights of 2-d convolutions, which the results take over.
class Layout {
 public:
  explicit Layout(torch::nn::Module& model) {
    for (auto& buffer : model.named_buffers()) {
      if (buffer.value().scalar_type() == torch::kInt8 && buffer.value().dim() == 4) {
        weights_.emplace_back(buffer.value(), buffer.value().detach().clone(at::MemoryFormat::Contiguous));
      }
    }
  }
  void set(at::MemoryFormat format) {
    for (auto& [weight, values] : weights_) {
      weight.set_data(values.contiguous(format));
    }
  }

 private:
  std::vector<std::pair<torch::Tensor, torch::Tensor>> weights_;
};

Graph record_calls(torch::nn::Module& model, const std::function<std::vector<torch::Tensor>()>& forward) {
  const graph::Evaluation evaluation(model);
  graph::RecordOptions options;
  options.location = [] { return graph::Location{in_max_pool_of_bytes() ? kMaxPool : "", ""}; };
  return graph::record(forward, graph::named_tensors(model), options);
}

}  // namespace

void link(torch::nn::Module& model, const std::function<std::vector<torch::Tensor>()>& forward) {
  replace_max_pools(model);
  Layout layout(model);
  Graph recording;
  layout.set(at::MemoryFormat::ChannelsLast);
  try {
    recording = record_calls(model, forward);
  } catch (const c10::Error&) {  // Tensor::view, say, may refuse the layout
    layout.set(at::MemoryFormat::Contiguous);
    recording = record_calls(model, forward);
  }
  Linker(converted_layers(model), std::move(recording)).link();
}

}  // namespace rarefy::quantization
