#include <fmt/format.h>
#include <fmt/ranges.h>
#include <rarefy/checkpoint.h>
#include <rarefy/ops/fake_quantize.h>
#include <rarefy/quantization/fake_quantizer.h>
#include <rarefy/quantization/statistics.h>
#include <rarefy/version.h>
#include <torch/types.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <limits>
#include <set>
#include <vector>

#include "json.h"

// metadata["rarefy.statistics"]:
//   {"format": 1, "rarefy": "0.1.0", "quantizers": {
//     "fc.quant.input": {"observer": "Percentile(percentile=99.99, bins=2048)", "scheme": "uint8 ...", "axis": null}}}
namespace rarefy::quantization {
namespace {

constexpr uint64_t kFormat = 1;
constexpr const char* kKey = "rarefy.statistics";
constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Part {
  const char* name;
  c10::ScalarType type;
};
constexpr std::array<Part, 9> kParts{{{"min_val", c10::kFloat},
                                      {"max_val", c10::kFloat},
                                      {"skipped", c10::kLong},
                                      {"hist", c10::kLong},
                                      {"hist_min", c10::kFloat},
                                      {"hist_max", c10::kFloat},
                                      {"batch_min", c10::kFloat},
                                      {"batch_max", c10::kFloat},
                                      {"batches", c10::kLong}}};

/// Checks the tensors of one quantizer. Messages begin with context and name.
class Check {
 public:
  Check(const QuantizerStatistics& saved, std::string context) : saved_(saved), context_(std::move(context)) {}

  void operator()() const {
    for (const auto& [key, tensor] : saved_.tensors) {
      const auto part = std::find_if(kParts.begin(), kParts.end(), [&](const Part& p) { return key == p.name; });
      require(part != kParts.end(), "has no tensor called '", key, "'");
      require(tensor.scalar_type() == part->type, key, " must be ", part->type, ", got ", tensor.scalar_type());
    }
    const auto low = tensor("min_val");
    require(low.dim() == 1 && low.numel() > 0, "min_val must have shape [rows], got ", low.sizes());
    const int64_t rows = low.numel();
    require(tensor("skipped").numel() == 1, "skipped must have 1 element, got ", tensor("skipped").numel());
    check_range(low, tensor("max_val"), "min_val and max_val");
    if (has("hist")) {
      const auto hist = tensor("hist");
      require(hist.dim() == 2 && hist.size(0) == rows && hist.size(1) >= 16 && hist.size(1) <= 65536,
              "hist must have shape [", rows, ", bins] with 16 to 65536 bins, got ", hist.sizes());
      require(hist.ge(0).all().item<bool>(), "counts must not be negative, got ", hist.min().item<int64_t>());
      check_range(tensor("hist_min"), tensor("hist_max"), "hist_min and hist_max");
      require(tensor("hist_min").sizes() == low.sizes(), "hist_min must have shape [", rows, "], got ",
              tensor("hist_min").sizes());
    }
    if (has("batches")) {
      const auto from = tensor("batch_min"), to = tensor("batch_max");
      require(from.dim() == 2 && from.size(1) == rows && from.size(0) >= 2 && from.size(0) % 2 == 0,
              "batch_min must have shape [n, ", rows, "] with an even n, got ", from.sizes());
      check_range(from, to, "batch_min and batch_max");
      require(tensor("batches").numel() == 3, "batches must have 3 elements, got ", tensor("batches").numel());
    }
  }

 private:
  template <typename... Rule>
  void require(bool condition, const Rule&... rule) const {
    TORCH_CHECK_VALUE(condition, context_, rule...);
  }
  bool has(const std::string& key) const { return saved_.tensors.count(key) == 1; }
  const at::Tensor& tensor(const std::string& key) const {
    require(has(key), key, " must be there, but is missing");
    return saved_.tensors.at(key);
  }
  void check_range(const at::Tensor& low, const at::Tensor& high, const char* what) const {
    require(low.sizes() == high.sizes(), what, " must have one shape, got ", low.sizes(), " and ", high.sizes());
    const auto finite = low.isfinite().logical_and(high.isfinite()).logical_and(low.le(high));
    const auto unset = low.eq(kInfinity).logical_and(high.eq(-kInfinity));
    require(finite.logical_or(unset).all().item<bool>(), what,
            " must be finite with min <= max, or (inf, -inf) for none");
  }

  const QuantizerStatistics& saved_;
  std::string context_;
};

std::string to_json(const Statistics& statistics) {
  const char* context = "[save_statistics] ";
  std::string json = fmt::format(R"({{"format": {}, "rarefy": )", kFormat);
  append_json(json, RAREFY_VERSION, context);
  json += ", \"quantizers\": {";
  const char* next = "";
  for (const auto& [name, saved] : statistics) {
    json += std::exchange(next, ", ");
    append_json(json, name, context);
    json += ": {\"observer\": ";
    append_json(json, saved.observer, context);
    json += ", \"scheme\": ";
    append_json(json, saved.scheme, context);
    json += fmt::format(", \"axis\": {}}}", saved.axis.has_value() ? std::to_string(*saved.axis) : "null");
  }
  return json + "}}";
}

std::optional<int64_t> read_axis(JsonReader& reader) {
  const auto text = reader.value();
  if (text == "null") {
    return std::nullopt;
  }
  int64_t axis = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), axis);
  reader.require(error == std::errc() && end == text.data() + text.size(), "must have an integer or null as axis, got ",
                 text);
  return axis;
}

Statistics from_json(const std::string& text, const std::string& context) {
  Statistics statistics;
  std::optional<uint64_t> format;
  JsonReader reader(text, context + "the description ");
  reader.object([&](const std::string& field) {
    if (field == "format") {
      format = reader.integer();
      reader.require(*format == kFormat, "must be of format ", kFormat, ", got ", *format,
                     " (made by another version of rarefy)");
    } else if (field == "quantizers") {
      reader.object([&](const std::string& name) {
        auto& saved = statistics[name];
        reader.object([&](const std::string& key) {
          if (key == "observer") {
            saved.observer = reader.string();
          } else if (key == "scheme") {
            saved.scheme = reader.string();
          } else if (key == "axis") {
            saved.axis = read_axis(reader);
          } else {
            reader.value();  // for readers of this format that know more
          }
        });
      });
    } else {
      reader.value();
    }
  });
  reader.end();
  reader.require(format.has_value(), "must say its format");
  return statistics;
}

// ---- models ----

using Quantizers = std::map<std::string, std::shared_ptr<FakeQuantizerImpl>>;

Quantizers activation_quantizers(const char* function, const torch::nn::Module& model) {
  Quantizers quantizers;
  bool prepared = false;
  for (const auto& item : model.named_modules("", /*include_self=*/false)) {
    auto quantizer = std::dynamic_pointer_cast<FakeQuantizerImpl>(item.value());
    prepared = prepared || quantizer != nullptr;
    if (quantizer != nullptr && !quantizer->is_weight()) {
      quantizers[item.key()] = quantizer;
    }
  }
  TORCH_CHECK_VALUE(prepared, "[", function, "] the model must have prepared layers; call prepare first");
  return quantizers;
}

}  // namespace

void write_statistics(const Statistics& statistics, const std::filesystem::path& path) {
  TORCH_CHECK_VALUE(!statistics.empty(), "[save_statistics] there must be a quantizer of activations, got none");
  NamedTensors tensors;
  for (const auto& [name, saved] : statistics) {
    Check(saved, fmt::format("[save_statistics] {}: ", name))();
    for (const auto& [key, tensor] : saved.tensors) {
      tensors.insert(name + "." + key, tensor);
    }
  }
  save_safetensors(tensors, path, {{kKey, to_json(statistics)}});
}

Statistics read_statistics(const std::filesystem::path& path) {
  const auto context = "[load_statistics] " + path.string() + ": ";
  auto file = load_safetensors(path);
  const auto description = file.metadata.find(kKey);
  TORCH_CHECK_VALUE(description != file.metadata.end(), context,
                    "must be a file that save_statistics has written, but has no description");
  auto statistics = from_json(description->second, context);
  for (const auto& item : file.tensors) {
    const auto dot = item.key().rfind('.');
    const auto found = dot == std::string::npos ? statistics.end() : statistics.find(item.key().substr(0, dot));
    TORCH_CHECK_VALUE(found != statistics.end(), context, "tensor ", item.key(),
                      " must be of a quantizer that the description names");
    found->second.tensors[item.key().substr(dot + 1)] = item.value();
  }
  for (const auto& [name, saved] : statistics) {
    Check(saved, context + name + ": ")();
  }
  return statistics;
}

std::map<std::string, at::Tensor> statistics_for(const std::string& name, const QuantizerStatistics& saved,
                                                 const Observer& observer, std::optional<int64_t> axis, int64_t rows) {
  const auto context = fmt::format("[load_statistics] {} ", name);
  const auto& all = saved.tensors;
  const int64_t saved_rows = all.at("min_val").numel();
  TORCH_CHECK_VALUE(saved.axis == axis && saved_rows == rows, context, "must have statistics for axis ",
                    axis.has_value() ? std::to_string(*axis) : "none", " with ", rows, " rows, got axis ",
                    saved.axis.has_value() ? std::to_string(*saved.axis) : "none", " with ", saved_rows, " (",
                    saved.scheme, ")");
  std::map<std::string, at::Tensor> result{
      {"min_val", all.at("min_val")}, {"max_val", all.at("max_val")}, {"skipped", all.at("skipped")}};
  const auto take = [&](std::initializer_list<const char*> keys) {
    for (const auto* key : keys) {
      result[key] = all.at(key);
    }
  };
  if (const auto bins = histogram_bins(observer)) {
    const auto found = all.find("hist");
    TORCH_CHECK_VALUE(found != all.end() && found->second.size(1) == *bins, context, "must have a histogram of ", *bins,
                      " bins, got the statistics of ", saved.observer);
    take({"hist", "hist_min", "hist_max"});
  } else if (const auto* mean = std::get_if<MeanNoOutliers>(&observer)) {
    const auto found = all.find("batch_min");
    TORCH_CHECK_VALUE(found != all.end() && found->second.size(0) == mean->batches, context,
                      "must have the ranges of up to ", mean->batches, " batches, got the statistics of ",
                      saved.observer);
    take({"batch_min", "batch_max", "batches"});
  } else if (all.count("hist") == 1) {
    result["min_val"] = all.at("hist_min");
    result["max_val"] = all.at("hist_max");
  } else if (all.count("batches") == 1) {
    TORCH_CHECK_VALUE(all.at("batches")[2].item<int64_t>() <= 1, context,
                      "must have the ranges of all batches for a running range, got every ",
                      all.at("batches")[2].item<int64_t>(), "th of ", saved.observer);
    result["min_val"] = std::get<0>(all.at("batch_min").min(0));
    result["max_val"] = std::get<0>(all.at("batch_max").max(0));
  }
  return result;
}

void save_statistics(const torch::nn::Module& model, const std::filesystem::path& path) {
  Statistics statistics;
  std::vector<std::string> empty;
  for (const auto& [name, quantizer] : activation_quantizers("save_statistics", model)) {
    if (!quantizer->calibrated()) {
      empty.push_back(name);
      continue;
    }
    auto& saved = statistics[name];
    saved = {str(quantizer->options.observer), quantizer->options.scheme.str(), quantizer->options.scheme.axis(), {}};
    if (const auto& kept = quantizer->statistics) {
      saved.tensors = kept->tensors();
    }
    saved.tensors["min_val"] = quantizer->min_val;
    saved.tensors["max_val"] = quantizer->max_val;
    saved.tensors["skipped"] = quantizer->skipped;
  }
  TORCH_CHECK_VALUE(empty.empty(), "[save_statistics] every quantizer must have seen data, but these have not: ",
                    fmt::format("{}", fmt::join(empty, ", ")));
  write_statistics(statistics, path);
}

void load_statistics(torch::nn::Module& model, const std::filesystem::path& path) {
  const auto quantizers = activation_quantizers("load_statistics", model);
  const auto saved = read_statistics(path);
  std::vector<std::string> missing, unexpected;
  for (const auto& [name, unused] : quantizers) {
    if (saved.count(name) == 0) {
      missing.push_back(name);
    }
  }
  for (const auto& [name, unused] : saved) {
    if (quantizers.count(name) == 0) {
      unexpected.push_back(name);
    }
  }
  TORCH_CHECK_VALUE(missing.empty() && unexpected.empty(), "[load_statistics] ", path.string(),
                    ": the quantizers must be those of the model; missing: [",
                    fmt::format("{}", fmt::join(missing, ", ")), "], unexpected: [",
                    fmt::format("{}", fmt::join(unexpected, ", ")), "]");
  std::map<std::string, std::map<std::string, at::Tensor>> buffers;
  for (const auto& [name, quantizer] : quantizers) {
    const auto& options = quantizer->options;
    buffers[name] =
        statistics_for(name, saved.at(name), options.observer, options.scheme.axis(), quantizer->scale.numel());
  }
  const torch::NoGradGuard no_grad;
  for (const auto& [name, quantizer] : quantizers) {
    quantizer->take_statistics(buffers.at(name));
    quantizer->observe = false;
    quantizer->quantize = true;
  }
}

}  // namespace rarefy::quantization
