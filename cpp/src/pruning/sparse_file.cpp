#include <ATen/ops/zeros.h>
#include <rarefy/pruning/sparse_file.h>
#include <rarefy/pruning/state.h>

#include <algorithm>
#include <iterator>
#include <map>
#include <set>
#include <utility>

#include "checkpoint_state.h"
#include "ops/fake_quantize_checks.h"
#include "pruning/sparse_codec.h"
#include "pruning/sparse_manifest.h"
#include "safetensors_stream.h"

namespace rarefy::pruning {
namespace {

using safetensors::Entry;
using safetensors::Item;

// A sparse tensor adds about this much text to the header: below it, compressing saves nothing.
constexpr int64_t kDescription = 320;

at::Tensor on_host(const at::Tensor& x) { return x.detach().to(at::kCPU).resolve_conj().resolve_neg().contiguous(); }

/// A file in the making.
struct Plan {
  std::vector<Item> items;
  Metadata metadata;
  SparseFileReport report;
};

class Planner {
 public:
  Planner(State state, const Metadata& metadata, const char* function) : function_(function) {
    TORCH_CHECK_VALUE(metadata.count(kSparseKey) == 0, "[", function, "] metadata must not have the key ", kSparseKey);
    for (const auto& [name, tensor] : state) {
      safetensors::item_of(name, tensor, function);  // throws for what is not a tensor with values
    }
    plan_.metadata = metadata;
    tensors_ = without_duplicates(std::move(state), plan_.metadata);
  }

  Plan make() {
    std::vector<Item> dense;
    std::set<std::string> absorbed;  // masks that are the bits of their tensor
    for (const auto& item : tensors_) {
      const auto& [name, tensor] = std::pair(item.key(), item.value());
      if (is_mask_of_another(name)) {
        continue;  // below, when it is known which are absorbed
      }
      dense.push_back(safetensors::item_of(name, tensor, function_));
      if (tensor.numel() > 0) {
        if (const auto record = compress(name, tensor)) {
          dense.pop_back();
          records_.emplace(name, *record);
          if (record->is_mask) {
            absorbed.insert(mask_key(name));
          }
          continue;
        }
      }
      const auto bytes = static_cast<int64_t>(tensor.nbytes());
      plan_.report.tensors.push_back(
          {name, tensor.sizes().vec(), SparseForm::dense, tensor.numel(), tensor.numel(), bytes, bytes});
    }
    for (const auto& item : tensors_) {
      if (is_mask_of_another(item.key()) && absorbed.count(item.key()) == 0) {
        dense.push_back(safetensors::item_of(item.key(), item.value(), function_));
        const auto bytes = static_cast<int64_t>(item.value().nbytes());
        plan_.report.tensors.push_back({item.key(), item.value().sizes().vec(), SparseForm::dense, item.value().numel(),
                                        item.value().numel(), bytes, bytes});
      }
    }
    std::move(dense.begin(), dense.end(), std::back_inserter(plan_.items));
    check_names();
    plan_.metadata.emplace(kSparseKey, to_json(records_));
    for (const auto& tensor : plan_.report.tensors) {
      plan_.report.dense_bytes += is_pruning_state(tensor.name) ? 0 : tensor.dense_bytes;
    }
    plan_.report.bytes = static_cast<int64_t>(safetensors::file_size(plan_.items, plan_.metadata));
    return std::move(plan_);
  }

 private:
  /// Whether a tensor is the mask of one that is there.
  bool is_mask_of_another(const std::string& name) const {
    static const std::string suffix = mask_key("");
    return name.ends_with(suffix) && tensors_.contains(name.substr(0, name.size() - suffix.size()));
  }

  /// The pruner's mask of a tensor, on the CPU; undefined when it has none.
  at::Tensor mask_of(const std::string& name, const at::Tensor& host) const {
    const auto* mask = tensors_.find(mask_key(name));
    if (mask == nullptr || mask->scalar_type() != at::kByte || mask->dim() != 1 ||
        mask->numel() != ops::mask_bytes(host.numel())) {
      return {};
    }
    auto bits = on_host(*mask);
    TORCH_CHECK_VALUE(count_kept(bits.const_data_ptr<uint8_t>(), host.numel()) >= 0, "[", function_,
                      "] the padding of mask '", mask_key(name), "' must be zero");
    const int64_t outside = first_outside(host, bits.const_data_ptr<uint8_t>());
    TORCH_CHECK_VALUE(outside < 0, "[", function_, "] what a mask prunes must be zero, got another value in '", name,
                      "' at flat index ", outside, ": call the pruner's step() after the optimizer's");
    return bits;
  }

  /// How a tensor is stored when that takes fewer bytes than its elements do.
  std::optional<SparseRecord> compress(const std::string& name, const at::Tensor& tensor) {
    const auto host = on_host(tensor);
    auto bits = mask_of(name, host);
    SparseRecord record{SparseForm::bitmask, host.sizes().vec(), 0, bits.defined()};
    if (!record.is_mask) {
      bits = bits_of(host);
    }
    const int64_t n = host.numel(), width = host.element_size(), dense = n * width;
    const auto* packed = bits.const_data_ptr<uint8_t>();
    int64_t kept = count_kept(packed, n);
    int64_t bytes = bits.numel() + kept * width;
    const int64_t by_index = index_bytes(n) + n / 4 * width;
    if (by_index < bytes && 4 * kept <= n) {
      if (const auto axis = one_of_four_axis(host.sizes(), packed, record.is_mask)) {
        record.form = SparseForm::one_of_four;
        record.axis = *axis;
        bytes = by_index;
        kept = n / 4;
      }
    }
    // A mask that is not the bits of its tensor takes its own bytes.
    if (bytes + kDescription >= dense + (record.is_mask ? bits.numel() : 0)) {
      return std::nullopt;
    }
    const auto add = [&](const char* suffix, at::ScalarType type, int64_t size, auto write) {
      plan_.items.push_back({name + suffix, type, {size}, std::move(write)});
    };
    if (record.form == SparseForm::bitmask) {
      add(".bits", at::kByte, bits.numel(),
          [bits](PendingFile& file) { file.write(bits.const_data_ptr(), bits.nbytes()); });
      add(".values", host.scalar_type(), kept, [tensor, bits](PendingFile& file) {
        gather(on_host(tensor), bits.const_data_ptr<uint8_t>(),
               [&](const void* data, size_t size) { file.write(data, size); });
      });
    } else {
      const auto indices = std::make_shared<std::vector<uint8_t>>(indices_of(host.sizes(), record.axis, packed));
      add(".indices", at::kByte, static_cast<int64_t>(indices->size()),
          [indices](PendingFile& file) { file.write(indices->data(), indices->size()); });
      add(".values", host.scalar_type(), kept, [tensor, indices, record](PendingFile& file) {
        gather_groups(on_host(tensor), record.axis, indices->data(), record.is_mask,
                      [&](const void* data, size_t size) { file.write(data, size); });
      });
    }
    plan_.report.tensors.push_back({name, record.shape, record.form, n, kept, dense, bytes});
    return record;
  }

  void check_names() const {
    std::set<std::string> names;
    for (const auto& item : plan_.items) {
      TORCH_CHECK_VALUE(names.insert(item.name).second, "[", function_,
                        "] no tensor may be called as a part of a sparse one, got '", item.name, "'");
    }
  }

  NamedTensors tensors_;
  const char* function_;
  SparseRecords records_;
  Plan plan_;
};

State state_of(const NamedTensors& tensors) {
  State state;
  for (const auto& item : tensors) {
    state.emplace_back(item.key(), item.value());
  }
  return state;
}

SparseFileReport save(State state, const std::filesystem::path& path, const Metadata& metadata) {
  auto plan = Planner(std::move(state), metadata, "save_sparse").make();
  safetensors::write_items(std::move(plan.items), path, plan.metadata, "save_sparse");
  return std::move(plan.report);
}

/// Puts sparse tensors together again.
class Decoder {
 public:
  explicit Decoder(const std::filesystem::path& path) : file_(path) {
    for (const auto& entry : file_.header().entries) {
      entries_.emplace(entry.name, &entry);
    }
  }

  Checkpoint decode() {
    auto& metadata = file_.header().metadata;
    SparseRecords records;
    if (const auto text = metadata.find(kSparseKey); text != metadata.end()) {
      records = parse_sparse_records(text->second, file_.name());
      metadata.erase(text);
    }
    Checkpoint result;
    std::set<const Entry*> parts;
    std::vector<std::pair<std::string, at::Tensor>> decoded;
    for (const auto& [name, record] : records) {
      const auto& values = part(name + ".values", parts);
      const bool by_index = record.form == SparseForm::one_of_four;
      const auto& bits = part(name + (by_index ? ".indices" : ".bits"), parts);
      auto [tensor, mask] = by_index ? from_indices(name, record, values, bits) : from_bits(name, record, values, bits);
      if (values.dtype == at::kBool) {
        const auto* bytes = static_cast<const uint8_t*>(tensor.const_data_ptr());
        require(std::all_of(bytes, bytes + tensor.numel(), [](uint8_t byte) { return byte <= 1; }),
                "the bytes of bool tensor '", name, "' must be 0 or 1");
      }
      decoded.emplace_back(name, std::move(tensor));
      if (record.is_mask) {
        decoded.emplace_back(mask_key(name), std::move(mask));
      }
    }
    for (const auto& entry : file_.header().entries) {
      if (parts.count(&entry) == 0) {
        result.tensors.insert(entry.name, file_.read(entry));
      }
    }
    for (auto& [name, tensor] : decoded) {
      require(!result.tensors.contains(name), "'", name, "' must be there once");
      result.tensors.insert(name, std::move(tensor));
    }
    result.metadata = std::move(metadata);
    return result;
  }

 private:
  template <typename... Rule>
  void require(bool condition, const Rule&... rule) const {
    TORCH_CHECK_VALUE(condition, "[load_sparse] ", file_.name(), ": ", rule...);
  }

  const Entry& part(const std::string& name, std::set<const Entry*>& parts) const {
    const auto position = entries_.find(name);
    require(position != entries_.end(), "'", name, "' must be there");
    require(position->second->shape.size() == 1, "'", name, "' must have one dimension, got ",
            position->second->shape.size());
    parts.insert(position->second);
    return *position->second;
  }

  void check_sizes(const std::string& name, const Entry& packed, int64_t bytes) const {
    require(packed.dtype == at::kByte && packed.shape[0] == bytes, "'", packed.name, "' must be ", bytes,
            " bytes (uint8) for the shape of '", name, "', got ", packed.shape[0], " of ", packed.dtype);
  }

  void check_count(const Entry& values, int64_t kept) const {
    require(values.shape[0] == kept, "'", values.name, "' must have as many values as are kept, ", kept, ", got ",
            values.shape[0]);
  }

  /// What reads the values of an entry from front to back.
  Source source(const Entry& values) const {
    return [this, &values, at = uint64_t{0}](void* data, size_t size) mutable {
      file_.read(values, at, data, size);
      at += size;
    };
  }

  std::pair<at::Tensor, at::Tensor> from_bits(const std::string& name, const SparseRecord& record, const Entry& values,
                                              const Entry& bits) const {
    const int64_t n = record.elements();
    check_sizes(name, bits, ops::mask_bytes(n));
    auto mask = file_.read(bits);
    const auto* packed = mask.const_data_ptr<uint8_t>();
    const int64_t kept = count_kept(packed, n);
    require(kept >= 0, "the padding of '", bits.name, "' must be zero");
    check_count(values, kept);
    auto tensor = at::zeros(record.shape, at::TensorOptions().dtype(values.dtype));
    scatter(tensor, packed, source(values));
    return {std::move(tensor), std::move(mask)};
  }

  std::pair<at::Tensor, at::Tensor> from_indices(const std::string& name, const SparseRecord& record,
                                                 const Entry& values, const Entry& indices) const {
    const int64_t n = record.elements();
    check_sizes(name, indices, index_bytes(n));
    const auto packed = file_.read(indices);
    const auto* bytes = packed.const_data_ptr<uint8_t>();
    const int64_t last = n / 4 % 4;  // groups in the last byte, if it is not full
    require(last == 0 || (bytes[packed.numel() - 1] >> (2 * last)) == 0, "the padding of '", indices.name,
            "' must be zero");
    check_count(values, n / 4);
    auto tensor = at::zeros(record.shape, at::TensorOptions().dtype(values.dtype));
    scatter_groups(tensor, record.axis, bytes, source(values));
    return {std::move(tensor), record.is_mask ? bits_of_indices(record.shape, record.axis, bytes) : at::Tensor()};
  }

  safetensors::Reader file_;
  std::map<std::string, const Entry*> entries_;
};

}  // namespace

bool is_pruning_state(const std::string& name) {
  return is_pruning_key(name.substr(name.rfind('.') + 1));  // npos + 1 is 0: the whole name
}

SparseFileReport save_sparse(const NamedTensors& tensors, const std::filesystem::path& path, const Metadata& metadata) {
  return save(state_of(tensors), path, metadata);
}

SparseFileReport save_sparse(const torch::nn::Module& model, const std::filesystem::path& path,
                             const Metadata& metadata) {
  return save(rarefy::state_of(model), path, metadata);
}

SparseFileReport sparse_size(const NamedTensors& tensors, const Metadata& metadata) {
  return Planner(state_of(tensors), metadata, "sparse_size").make().report;
}

SparseFileReport sparse_size(const torch::nn::Module& model, const Metadata& metadata) {
  return Planner(rarefy::state_of(model), metadata, "sparse_size").make().report;
}

Checkpoint load_sparse(const std::filesystem::path& path) { return Decoder(path).decode(); }

LoadResult load_sparse(torch::nn::Module& model, const std::filesystem::path& path, bool strict) {
  auto checkpoint = load_sparse(path);
  std::map<std::string, torch::nn::Module*> modules{{"", &model}};
  for (const auto& child : model.named_modules("", /*include_self=*/false)) {
    modules.emplace(child.key(), child.value().get());
  }
  std::set<std::string> known;
  for (const auto& [name, tensor] : rarefy::state_of(model)) {
    known.insert(name);
  }
  // What a pruner that is made next will continue with: set aside, and registered when all else has been checked.
  struct NewBuffer {
    torch::nn::Module* module;
    std::string name;
    at::Tensor value;
  };
  std::vector<NewBuffer> fresh;
  Checkpoint rest{NamedTensors(), checkpoint.metadata};
  for (const auto& item : checkpoint.tensors) {
    const auto& name = item.key();
    const auto dot = name.rfind('.');
    const bool belongs = name == kStepKey || known.count(name.substr(0, name.rfind("_mask_"))) != 0;
    if (is_pruning_state(name) && known.count(name) == 0 && belongs) {
      fresh.push_back({modules.at(dot == std::string::npos ? "" : name.substr(0, dot)),
                       dot == std::string::npos ? name : name.substr(dot + 1), item.value()});
    } else {
      rest.tensors.insert(name, item.value());
    }
  }
  auto result = load_into(model, rest, path.string(), strict);
  const auto parameters = model.parameters();
  const auto device = parameters.empty() ? at::Device(at::kCPU) : parameters[0].device();
  for (const auto& buffer : fresh) {
    buffer.module->register_buffer(buffer.name, buffer.value.to(device));
  }
  return result;
}

}  // namespace rarefy::pruning
