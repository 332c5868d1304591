#include <fmt/format.h>
#include <fmt/ranges.h>
#include <rarefy/nn/embedding.h>
#include <rarefy/nn/quantizable.h>
#include <rarefy/onnx/export_onnx.h>
#include <rarefy/quantization/fake_quantizer.h>
#include <rarefy/quantization/packed.h>
#include <rarefy/quantization/target.h>
#include <rarefy/version.h>
#include <torch/nn/module.h>

#include <algorithm>
#include <map>
#include <ostream>
#include <set>

#include "graph/evaluation.h"
#include "onnx/file.h"
#include "onnx/passes.h"
#include "onnx/recording.h"

namespace rarefy {
namespace {

using quantization::FakeQuantizerImpl;

constexpr int64_t kOldestOpset = 13, kNewestOpset = 23;

// ---- arguments -------------------------------------------------------------------------------------------------------

int64_t check_opset(const OnnxOptions& options, const quantization::TargetProfile& profile) {
  const auto opset = options.opset.value_or(profile.default_opset);
  const auto oldest = std::max(kOldestOpset, profile.oldest_opset);
  TORCH_CHECK_VALUE(opset >= oldest && opset <= kNewestOpset, "[export_onnx] opset must be between ", oldest, " and ",
                    kNewestOpset, " for ", profile.name, ", got ", opset);
  return opset;
}

void check_inputs(const std::vector<at::Tensor>& inputs, bool dynamic_batch) {
  TORCH_CHECK_VALUE(!inputs.empty(), "[export_onnx] example_inputs must hold at least one tensor, got none");
  std::vector<std::string> shapes;
  bool shared = true;
  for (const auto& input : inputs) {
    TORCH_CHECK_VALUE(input.defined() && input.layout() == at::kStrided,
                      "[export_onnx] example_inputs must be dense tensors");
    shapes.push_back(fmt::format("[{}]", fmt::join(input.sizes(), ", ")));
    shared =
        shared && input.dim() > 0 && inputs[0].dim() > 0 && input.size(0) == inputs[0].size(0) && input.size(0) > 0;
  }
  TORCH_CHECK_VALUE(
      !dynamic_batch || shared,
      "[export_onnx] dynamic_batch needs inputs that share the size of their first dimension, at least 1, got "
      "shapes ",
      fmt::format("{}", fmt::join(shapes, ", ")), " (dynamic_batch = false fixes all sizes)");
}

void check_path(const std::filesystem::path& path) {
  TORCH_CHECK_VALUE(path.has_filename() && !std::filesystem::is_directory(path),
                    "[export_onnx] path must name a file, got '", path.string(), "'");
  const auto folder = path.has_parent_path() ? path.parent_path() : std::filesystem::path(".");
  TORCH_CHECK_VALUE(std::filesystem::is_directory(folder), "[export_onnx] path must be in a folder that exists, got '",
                    path.string(), "'");
}

std::vector<std::string> names(const char* option, const std::vector<std::string>& given, const std::string& stem,
                               size_t count) {
  auto out = given;
  for (size_t i = 0; given.empty() && i < count; ++i) {
    out.push_back(count == 1 ? stem : fmt::format("{}_{}", stem, i));
  }
  const std::set<std::string> different(out.begin(), out.end());
  TORCH_CHECK_VALUE(out.size() == count && different.size() == count && !different.contains(""), "[export_onnx] ",
                    option, " must be ", count, " different names, got ", fmt::format("{}", fmt::join(given, ", ")));
  return out;
}

// ---- the model -------------------------------------------------------------------------------------------------------

struct NamedQuantizer {
  std::string name;
  std::shared_ptr<torch::nn::Module> module;  // keeps it alive
  FakeQuantizerImpl* quantizer;
  bool is_weight() const { return quantizer->is_weight(); }
};

std::vector<NamedQuantizer> quantizers_of(const torch::nn::Module& model) {
  std::vector<NamedQuantizer> out;
  for (const auto& item : model.named_modules("", /*include_self=*/false)) {
    if (auto* quantizer = dynamic_cast<FakeQuantizerImpl*>(item.value().get())) {
      out.push_back({item.key(), item.value(), quantizer});
    }
  }
  return out;
}

void check_quantizers(const std::vector<NamedQuantizer>& quantizers, const quantization::TargetProfile& profile) {
  const auto refuse = [&](const char* rule, const auto& is_wrong) {
    std::vector<std::string> wrong;
    for (const auto& item : quantizers) {
      if (is_wrong(item)) {
        wrong.push_back(item.name);
      }
    }
    TORCH_CHECK_VALUE(wrong.empty(), "[export_onnx] every quantizer must ", rule, ", got ", wrong.size(), " of ",
                      quantizers.size(), ": ", fmt::format("{}", fmt::join(wrong, ", ")));
  };
  // A weight is observed when the model runs.
  refuse("have observed data (train a step, or calibrate), but these have not", [](const auto& item) {
    return !item.quantizer->calibrated() && !(item.is_weight() && item.quantizer->observe);
  });
  refuse("quantize (rarefy::quantization::set_state), but these are switched off",
         [](const auto& item) { return !item.quantizer->quantize; });
  for (const auto& item : quantizers) {
    const auto& scheme = item.quantizer->options.scheme;
    if (item.is_weight()) {
      const auto why = profile.why_weight_not_written(scheme);
      TORCH_CHECK_VALUE(!why.has_value(), "[export_onnx] ", item.name, ": ", why.value_or(""));
    }
    const auto smallest = item.quantizer->scale.min().item<double>(),
               largest = item.quantizer->scale.max().item<double>();
    TORCH_CHECK_VALUE(smallest > 0 && std::isfinite(largest), "[export_onnx] scales must be finite and positive, got ",
                      smallest, " to ", largest, " in ", item.name);
    if (!item.is_weight()) {
      const auto why = profile.why_not_written(scheme);
      TORCH_CHECK_VALUE(!why.has_value(), "[export_onnx] ", item.name, ": ", why.value_or(""));
    }
  }
}

/// For as long as it lives, the layers compute in floating point on the grid, and their quantizers stay as they are.
class Simulation {
 public:
  explicit Simulation(torch::nn::Module& model) : modules_(model.modules(/*include_self=*/false)) {
    add(model);
    for (const auto& module : modules_) {
      add(*module);
    }
  }
  Simulation(const Simulation&) = delete;
  Simulation& operator=(const Simulation&) = delete;
  ~Simulation() {
    for (const auto& [layer, execution] : executions_) {
      layer->execution = execution;
    }
    for (const auto& [quantizer, observe] : states_) {
      quantizer->observe = observe;
    }
  }

  /// From here on no range follows the data.
  void freeze() {
    for (const auto& state : states_) {
      state.quantizer->observe = false;
      state.quantizer->refresh();  // so that no run has to read its buffers
    }
  }

 private:
  struct State {
    FakeQuantizerImpl* quantizer;
    bool observe;
  };

  void add(torch::nn::Module& module) {
    if (auto* layer = dynamic_cast<nn::Quantizable*>(&module)) {
      executions_.emplace_back(layer, layer->execution);
      layer->execution = quantization::Execution::simulated;
    }
    if (auto* quantizer = dynamic_cast<FakeQuantizerImpl*>(&module)) {
      states_.push_back({quantizer, quantizer->observe});
    }
  }

  std::vector<std::shared_ptr<torch::nn::Module>> modules_;
  std::vector<std::pair<nn::Quantizable*, std::optional<quantization::Execution>>> executions_;
  std::vector<State> states_;
};

/// The integers of a table, of 9 to 16 bits too, which no integer kernel takes.
template <typename Table>
nn::IntegerWeight table_of(Table& layer, const FakeQuantizerImpl& quantizer) {
  const auto& scheme = quantizer.options.scheme;
  if (scheme.bits <= 8) {
    return layer.integer_weight();
  }
  const auto parts = quantization::quantize_to(layer.weight, scheme, quantizer.scale, quantizer.zero_point);
  return {(quantization::stored_codes(parts) + scheme.qmin()).to(at::kShort), quantizer.scale, {}};
}

using NamedTensors = torch::OrderedDict<std::string, at::Tensor>;

template <typename Table>
void take_table(const NamedTensors& parameters, const NamedTensors& buffers, Table& layer,
                onnx::TranslateOptions& options) {
  if (layer.mode() != nn::Quantizable::Mode::prepared) {
    return;
  }
  const auto& quantizer = *layer.quant->find("weight");
  if (!quantizer.options.scheme.is_plain()) {
    return;
  }
  auto integers = table_of(layer, quantizer);
  integers.scale = quantizer.options.scheme.axis().has_value() ? integers.scale : quantizer.scale;
  // What has several names has the one in the recording that comes first.
  for (const auto& item : parameters) {
    if (item.value().is_same(layer.weight)) {
      options.tables.emplace(item.key(), integers);
    }
  }
  for (const auto& item : buffers) {
    if (item.value().is_same(quantizer.scale)) {
      options.table_scales.insert(item.key());
    }
  }
}

/// Says what the tables of prepared embeddings are.
void take_tables(const torch::nn::Module& model, onnx::TranslateOptions& options) {
  const auto parameters = model.named_parameters(), buffers = model.named_buffers();
  for (const auto& module : model.modules(/*include_self=*/false)) {
    if (auto* words = dynamic_cast<nn::EmbeddingImpl*>(module.get())) {
      take_table(parameters, buffers, *words, options);
    } else if (auto* bag = dynamic_cast<nn::EmbeddingBagImpl*>(module.get())) {
      take_table(parameters, buffers, *bag, options);
    }
  }
}

/// The passes of the target, in the order in which they feed each other. A model without integers stays as it is.
void place_quantizers(onnx::Model& model, const quantization::TargetProfile& profile, int64_t opset) {
  if (model.nodes({"QuantizeLinear", "DequantizeLinear"}).empty()) {
    model.remove_unused();
    return;
  }
  onnx::merge_duplicates(model);
  onnx::drop_idle_relus(model);
  if (profile.pools_means) {
    onnx::mean_to_global_pool(model);
  }
  while (profile.quantizes_before_moves && onnx::hoist_quantizers(model) > 0) {
    onnx::merge_duplicates(model);
  }
  if (profile.clipping != quantization::Clipping::keep) {
    onnx::absorb_clipping(model, profile.clipping == quantization::Clipping::integers);
  }
  if (profile.clipping != quantization::Clipping::keep) {
    onnx::keep_clipping(model);
  }
  if (profile.splits_linear_bias) {
    onnx::split_linear_bias(model);
  } else {
    onnx::widen_linear_bias(model);
  }
  if (profile.residual_as_sum) {
    onnx::residual_to_sum(model);
  }
  if (profile.int4_weights && opset >= 21) {
    onnx::pack_int4(model);
  }
  model.remove_unused();
}

/// OpenVINO reads scales in blocks only where these divide the axis.
void check_whole_blocks(const onnx::Model& model) {
  for (const auto* node : model.nodes({"DequantizeLinear"})) {
    const auto block = node->integer("block_size", 0);
    const auto& sizes = node->inputs[0]->shape;
    const auto size = block == 0 ? 0 : sizes[static_cast<size_t>(node->integer("axis", 1))].size;
    TORCH_CHECK_VALUE(block == 0 || size % block == 0,
                      "[export_onnx] OpenVINO has scales of blocks that divide the axis alone, got blocks of ", block,
                      " along ", size, " in ", node->name);
  }
}

std::string describe(const onnx::Value& value) {
  std::vector<std::string> sizes;
  for (const auto& dim : value.shape) {
    sizes.push_back(dim.is_fixed()       ? std::to_string(dim.size)
                    : dim.per_batch == 1 ? "batch"
                    : dim.per_batch > 1  ? fmt::format("{}*batch", dim.per_batch)
                                         : "?");
  }
  return fmt::format("{}: {} [{}]", value.name, c10::getDtypeNames(value.dtype).first, fmt::join(sizes, ", "));
}

}  // namespace

OnnxReport export_onnx(torch::nn::Module& model, const OnnxForward& forward,
                       const std::vector<at::Tensor>& example_inputs, const std::filesystem::path& path,
                       const OnnxOptions& options) {
  const auto& profile = quantization::target_profile(options.target);
  const auto opset = check_opset(options, profile);
  check_inputs(example_inputs, options.dynamic_batch);
  check_path(path);
  onnx::TranslateOptions translation;
  translation.opset = opset;
  translation.unsigned_activations = profile.unsigned_activations;
  translation.weight_zero_points = profile.weight_zero_points;
  translation.input_names = names("input_names", options.input_names, "input", example_inputs.size());
  check_quantizers(quantizers_of(model), profile);

  const torch::NoGradGuard no_grad;
  Simulation simulation(model);
  const graph::Evaluation evaluation(model);
  const auto outputs = forward(example_inputs);  // the ranges of weights follow the weights
  translation.output_names = names("output_names", options.output_names, "output", outputs.size());
  for (const auto& name : translation.output_names) {
    TORCH_CHECK_VALUE(std::find(translation.input_names.begin(), translation.input_names.end(), name) ==
                          translation.input_names.end(),
                      "[export_onnx] inputs and outputs must have different names, got '", name, "' for both");
  }
  take_tables(model, translation);
  simulation.freeze();
  const auto recording = onnx::record_runs(model, forward, example_inputs, options.dynamic_batch);
  auto translated = onnx::Translator(recording, std::move(translation)).run();
  place_quantizers(translated, profile, opset);
  if (profile.name == "openvino") {
    check_whole_blocks(translated);
  }
  translated.name_outputs();

  OnnxReport report{path, 0, options.target, opset, {}, {}, {}};
  std::map<std::string, int64_t> counts;
  for (const auto& node : translated.nodes()) {
    ++counts[node->op];
  }
  report.nodes.assign(counts.begin(), counts.end());
  std::stable_sort(report.nodes.begin(), report.nodes.end(),
                   [](const auto& a, const auto& b) { return a.second > b.second; });
  for (const auto* value : translated.inputs) {
    report.inputs.push_back(describe(*value));
  }
  for (const auto* value : translated.outputs) {
    report.outputs.push_back(describe(*value));
  }
  report.bytes = onnx::write_file(translated, path, {opset, RAREFY_VERSION, options.external_data_above});
  return report;
}

std::string OnnxReport::str() const {
  std::vector<std::string> counts;
  for (const auto& [op, count] : nodes) {
    counts.push_back(fmt::format("{} {}", count, op));
  }
  const auto size = bytes < (1 << 20) ? fmt::format("{:.1f} KiB", static_cast<double>(bytes) / 1024)
                                      : fmt::format("{:.1f} MiB", static_cast<double>(bytes) / (1 << 20));
  return fmt::format(
      "OnnxReport\n  file     {} ({})\n  target   {}, opset {}\n  inputs   {}\n  outputs  {}\n  nodes    {}",
      path.string(), size, target, opset, fmt::join(inputs, "; "), fmt::join(outputs, "; "), fmt::join(counts, ", "));
}

std::ostream& operator<<(std::ostream& stream, const OnnxReport& report) { return stream << report.str(); }

}  // namespace rarefy
