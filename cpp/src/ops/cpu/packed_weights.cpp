#include "ops/cpu/packed_weights.h"

#include <c10/core/StorageImpl.h>
#include <c10/util/intrusive_ptr.h>
#include <rarefy/ops/quantized.h>

#include <algorithm>
#include <cstddef>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <utility>

namespace rarefy::ops {
namespace {

constexpr size_t kMostWeights = 8192;
constexpr size_t kMostForms = 4;

using Key = std::vector<int64_t>;

struct Hash {
  size_t operator()(const Key& key) const {
    uint64_t hash = 0xcbf29ce484222325u;
    for (const int64_t value : key) {
      hash = (hash ^ static_cast<uint64_t>(value)) * 0x100000001b3u;
      hash ^= hash >> 29;
    }
    return hash;
  }
};

struct Form {
  std::vector<int64_t> input_size;
  at::Tensor packed;
};

struct Entry {
  explicit Entry(const c10::Storage& storage) : memory(storage.getWeakStorageImpl()) {}

  c10::weak_intrusive_ptr<c10::StorageImpl> memory;  // keeps the address from being used again, not the bytes
  uint64_t last_use = 0;
  std::mutex mutex;  // of what follows
  uint32_t version = 0;
  std::vector<Form> forms;
};

class Cache {
 public:
  std::shared_ptr<Entry> entry(const at::Tensor& weight, Key key) {
    const std::lock_guard lock(mutex_);
    auto found = entries_.find(key);
    if (found == entries_.end()) {
      drop_dead();
      if (entries_.size() >= kMostWeights) {
        entries_.erase(std::min_element(entries_.begin(), entries_.end(), [](const auto& a, const auto& b) {
          return a.second->last_use < b.second->last_use;
        }));
      }
      found = entries_.emplace(std::move(key), std::make_shared<Entry>(weight.storage())).first;
    }
    found->second->last_use = ++clock_;
    return found->second;
  }
  int64_t count() {
    const std::lock_guard lock(mutex_);
    drop_dead();
    return static_cast<int64_t>(entries_.size());
  }
  void clear() {
    const std::lock_guard lock(mutex_);
    entries_.clear();
  }

 private:
  void drop_dead() {
    std::erase_if(entries_, [](const auto& item) { return item.second->memory.expired(); });
  }

  std::mutex mutex_;
  uint64_t clock_ = 0;
  std::unordered_map<Key, std::shared_ptr<Entry>, Hash> entries_;
};

/// Never destroyed: oneDNN may be gone before static objects are.
Cache& cache() {
  static auto* instance = new Cache;
  return *instance;
}

Key key_of(const at::Tensor& weight, at::IntArrayRef how) {
  Key key;
  key.reserve(2 + 2 * static_cast<size_t>(weight.dim()) + how.size());
  key.push_back(static_cast<int64_t>(reinterpret_cast<intptr_t>(weight.storage().unsafeGetStorageImpl())));
  key.push_back(weight.storage_offset());
  key.insert(key.end(), weight.sizes().begin(), weight.sizes().end());
  key.insert(key.end(), weight.strides().begin(), weight.strides().end());
  key.insert(key.end(), how.begin(), how.end());
  return key;
}

}  // namespace

at::Tensor packed_weight(const at::Tensor& weight, at::IntArrayRef how, at::IntArrayRef input_size,
                         c10::function_ref<at::Tensor()> pack) {
  if (weight.is_inference()) {
    return pack();
  }
  const auto entry = cache().entry(weight, key_of(weight, how));
  const std::lock_guard lock(entry->mutex);
  const auto version = static_cast<uint32_t>(weight._version());
  if (entry->version != version) {
    entry->forms.clear();
    entry->version = version;
  }
  auto& forms = entry->forms;
  const auto form = std::find_if(forms.begin(), forms.end(),
                                 [&](const Form& f) { return at::IntArrayRef(f.input_size) == input_size; });
  if (form != forms.end()) {
    return form->packed;
  }
  if (forms.size() == kMostForms) {
    return forms.front().packed;
  }
  return forms.emplace_back(Form{input_size.vec(), pack()}).packed;
}

int64_t packed_weight_count() { return cache().count(); }

void clear_packed_weights() { cache().clear(); }

}  // namespace rarefy::ops
