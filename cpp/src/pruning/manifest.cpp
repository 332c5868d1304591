#include <fmt/format.h>
#include <fmt/ranges.h>
#include <rarefy/pruning/enforce.h>
#include <rarefy/pruning/manifest.h>
#include <rarefy/version.h>

#include <algorithm>
#include <numeric>
#include <utility>

#include "checkpoint_state.h"
#include "json.h"

// The text under kManifestKey:
//   {"format": 1, "rarefy": "0.1.0",
//    "kept": [[0, 2, 3], ...],
//    "tensors": {"conv.weight": {"shape": [8, 3, 3, 3], "kept": [[0, 0]]}, ...},    dimension and number of the list in "kept"
//    "modules": {"conv": {"out_channels": 3}, ...}}
// Many tensors keep the same indices: each list is there once.
namespace rarefy::pruning {
namespace {

constexpr uint64_t kFormat = 1;
constexpr const char* kWriter = "[save_pruned] names";

std::string listed(const std::vector<std::string>& items) { return fmt::format("{}", fmt::join(items, "; ")); }

int64_t index_of(JsonReader& reader) {
  const uint64_t value = reader.integer();
  reader.require(value <= static_cast<uint64_t>(INT64_MAX), "must have numbers below 2^63, got ", value);
  return static_cast<int64_t>(value);
}

std::vector<int64_t> integers(JsonReader& reader) {
  std::vector<int64_t> values;
  reader.array([&] { values.push_back(index_of(reader)); });
  return values;
}

/// The record of one tensor, and the numbers of its lists by dimension.
std::pair<TensorRecord, std::map<int64_t, size_t>> read_tensor(JsonReader& reader) {
  TensorRecord record;
  std::map<int64_t, size_t> lists;
  reader.object([&](const std::string& field) {
    if (field == "shape") {
      record.shape = integers(reader);
    } else if (field == "kept") {
      reader.array([&] {
        const auto pair = integers(reader);
        reader.require(pair.size() == 2, "must give pairs of a dimension and a list, got ", pair.size(), " numbers");
        lists[pair[0]] = static_cast<size_t>(pair[1]);
      });
    } else {
      reader.require(false, "must describe a tensor by shape and kept, got '", field, "'");
    }
  });
  return {std::move(record), std::move(lists)};
}

void check_record(const TensorRecord& record, const std::string& name, const JsonReader& reader) {
  for (const auto& [dim, indices] : record.kept) {
    const bool is_dim = dim < static_cast<int64_t>(record.shape.size());
    const bool ascends =
        std::adjacent_find(indices.begin(), indices.end(), std::greater_equal<>()) == indices.end() && !indices.empty();
    reader.require(is_dim && ascends && indices.back() < record.shape[static_cast<size_t>(dim)],
                   "must keep ascending indices of the dimensions of ", name, ", but does not in dimension ", dim);
  }
}

/// Sorted, so that messages are.
std::map<std::string, at::Tensor> by_name(const std::vector<graph::NamedTensor>& tensors) {
  std::map<std::string, at::Tensor> result;
  for (const auto& item : tensors) {
    result.emplace(item.name, item.value);
  }
  return result;
}

}  // namespace

void TensorRecord::cut(int64_t dim, const std::vector<int64_t>& indices) {
  std::vector<int64_t> before(static_cast<size_t>(shape.at(static_cast<size_t>(dim))));
  std::iota(before.begin(), before.end(), 0);
  if (const auto position = kept.find(dim); position != kept.end()) {
    before = position->second;
  }
  auto& after = kept[dim];
  after.clear();
  for (const int64_t index : indices) {
    after.push_back(before.at(static_cast<size_t>(index)));
  }
}

std::vector<int64_t> TensorRecord::current_shape() const {
  auto result = shape;
  for (const auto& [dim, indices] : kept) {
    result.at(static_cast<size_t>(dim)) = static_cast<int64_t>(indices.size());
  }
  return result;
}

void Manifest::record(const Surgery& surgery, const std::vector<graph::NamedTensor>& named, const Attributes& changed) {
  for (const auto& item : named) {
    if (!item.value.defined() || !surgery.is_cut(item.value)) {
      continue;
    }
    auto& tensor = tensors.try_emplace(item.name, TensorRecord{surgery.sizes_before(item.value), {}}).first->second;
    for (int64_t dim = 0; dim < item.value.dim(); ++dim) {
      if (const auto* kept = surgery.kept(item.value, dim)) {
        tensor.cut(dim, *kept);
      }
    }
  }
  for (const auto& [module, values] : changed) {
    for (const auto& [name, value] : values) {
      attributes[module][name] = value;
    }
  }
}

std::string Manifest::to_json() const {
  std::map<std::vector<int64_t>, size_t> numbers;
  std::vector<const std::vector<int64_t>*> lists;
  std::string of_tensors, of_modules;
  for (const auto& [name, tensor] : tensors) {
    std::vector<std::string> pairs;
    for (const auto& [dim, indices] : tensor.kept) {
      const auto [position, is_new] = numbers.emplace(indices, lists.size());
      if (is_new) {
        lists.push_back(&position->first);
      }
      pairs.push_back(fmt::format("[{}, {}]", dim, position->second));
    }
    of_tensors += of_tensors.empty() ? "" : ", ";
    append_json(of_tensors, name, kWriter);
    of_tensors +=
        fmt::format(R"(: {{"shape": [{}], "kept": [{}]}})", fmt::join(tensor.shape, ", "), fmt::join(pairs, ", "));
  }
  for (const auto& [module, values] : attributes) {
    of_modules += of_modules.empty() ? "" : ", ";
    append_json(of_modules, module, kWriter);
    of_modules += ": {";
    const char* separator = "";
    for (const auto& [name, value] : values) {
      of_modules += std::exchange(separator, ", ");
      append_json(of_modules, name, kWriter);
      of_modules += ": " + value;
    }
    of_modules += "}";
  }
  std::string kept;
  for (const auto* list : lists) {
    kept += fmt::format("{}[{}]", kept.empty() ? "" : ", ", fmt::join(*list, ", "));
  }
  return fmt::format(R"({{"format": {}, "rarefy": "{}", "kept": [{}], "tensors": {{{}}}, "modules": {{{}}}}})", kFormat,
                     RAREFY_VERSION, kept, of_tensors, of_modules);
}

Manifest Manifest::from_json(const std::string& json, const std::string& file) {
  JsonReader reader(json, "[load_pruned] " + file + ": the manifest ");
  Manifest result;
  std::optional<uint64_t> format;
  std::vector<std::vector<int64_t>> lists;
  std::map<std::string, std::map<int64_t, size_t>> numbers;
  reader.object([&](const std::string& field) {
    if (field == "format") {
      format = reader.integer();
      reader.require(*format == kFormat, "must be of format ", kFormat, ", got ", *format,
                     " (made by another version of rarefy)");
    } else if (field == "kept") {
      reader.array([&] { lists.push_back(integers(reader)); });
    } else if (field == "tensors") {
      reader.object([&](const std::string& name) {
        auto [record, of_dims] = read_tensor(reader);
        result.tensors[name] = std::move(record);
        numbers[name] = std::move(of_dims);
      });
    } else if (field == "modules") {
      reader.object([&](const std::string& module) {
        auto& values = result.attributes[module];
        reader.object([&](const std::string& name) { values[name] = reader.value(); });
      });
    } else {
      reader.value();  // for readers of this format that know more
    }
  });
  reader.end();
  reader.require(format.has_value(), "must say its format");
  for (auto& [name, tensor] : result.tensors) {
    for (const auto& [dim, number] : numbers[name]) {
      reader.require(number < lists.size(), "must have list ", number, " of ", name, ", got ", lists.size(), " lists");
      tensor.kept[dim] = lists[number];
    }
    check_record(tensor, name, reader);
  }
  return result;
}

void save_pruned(const NamedTensors& tensors, const Manifest& manifest, const std::filesystem::path& path) {
  State state;
  for (const auto& item : tensors) {
    if (const auto record = manifest.tensors.find(item.key()); record != manifest.tensors.end()) {
      const auto shape = record->second.current_shape();
      TORCH_CHECK_VALUE(item.value().sizes() == at::IntArrayRef(shape), "[save_pruned] ", item.key(),
                        " must have the shape that its record says, ", at::IntArrayRef(shape), ", got ",
                        item.value().sizes());
    }
    state.emplace_back(item.key(), item.value());
  }
  Metadata metadata{{kManifestKey, manifest.to_json()}};
  const auto written = without_duplicates(std::move(state), metadata);
  save_safetensors(written, path, metadata);
}

void save_pruned(const torch::nn::Module& model, const Manifest& manifest, const std::filesystem::path& path) {
  check_masks(model, "save_pruned");
  NamedTensors tensors;
  for (const auto& [name, tensor] : state_of(model)) {
    tensors.insert(name, tensor);
  }
  save_pruned(tensors, manifest, path);
}

Manifest read_manifest(const Checkpoint& checkpoint, const std::filesystem::path& path) {
  const auto text = checkpoint.metadata.find(kManifestKey);
  TORCH_CHECK_VALUE(text != checkpoint.metadata.end(), "[load_pruned] ", path.string(),
                    " must have been written by save_pruned, but has no manifest");
  return Manifest::from_json(text->second, path.string());
}

Manifest load_pruned(torch::nn::Module& model, const std::filesystem::path& path, const SetAttribute& set_attribute) {
  const auto file = path.string();
  const auto checkpoint = load_safetensors(path);
  const auto manifest = read_manifest(checkpoint, path);
  const auto tensors = graph::named_tensors(model);
  const auto named = by_name(tensors);
  std::vector<std::string> wrong;
  std::vector<Cut> cuts;
  for (const auto& [name, record] : manifest.tensors) {
    const auto position = named.find(name);
    if (position == named.end()) {
      wrong.push_back(name + " is not of the model");
    } else if (position->second.sizes() != at::IntArrayRef(record.shape)) {
      wrong.push_back(fmt::format("{} must be [{}], got [{}]", name, fmt::join(record.shape, ", "),
                                  fmt::join(position->second.sizes(), ", ")));
    }
    for (const auto& [dim, kept] : record.kept) {
      cuts.push_back({name, dim, kept});
    }
  }
  TORCH_CHECK_VALUE(wrong.empty(), "[load_pruned] ", file,
                    ": the model must be of the class that was pruned, freshly constructed, but: ", listed(wrong));
  const auto of_quantizers = quantizer_cuts(model, cuts);
  cuts.insert(cuts.end(), of_quantizers.begin(), of_quantizers.end());

  Surgery surgery(tensors);
  surgery.apply(cuts);
  const auto changed = resize_modules(model, surgery);
  std::vector<std::pair<std::string, std::string>> left;  // module, attribute
  for (const auto& [module, values] : manifest.attributes) {
    const auto set = changed.find(module);
    for (const auto& [name, value] : values) {
      if (set == changed.end() || set->second.count(name) == 0 || set->second.at(name) != value) {
        left.emplace_back(module, name);
      }
    }
  }
  TORCH_CHECK_VALUE(left.empty() || set_attribute != nullptr, "[load_pruned] ", file, ": someone must set '",
                    left.empty() ? "" : left.front().second, "' of module '", left.empty() ? "" : left.front().first,
                    "' to ", left.empty() ? "" : manifest.attributes.at(left.front().first).at(left.front().second),
                    ", which C++ does not know: give set_attribute");
  load_into(model, checkpoint, file, /*strict=*/true, [&] {
    for (const auto& [module, name] : left) {
      const auto& value = manifest.attributes.at(module).at(name);
      TORCH_CHECK_VALUE(set_attribute(module, name, value), "[load_pruned] ", file, ": set_attribute must take '", name,
                        "' of module '", module, "', ", value);
    }
  });
  surgery.commit();
  return manifest;
}

}  // namespace rarefy::pruning
