#include "ops/allocate.h"

#include <ATen/EmptyTensor.h>
#include <c10/core/CPUAllocator.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdint>
#include <list>
#include <mutex>
#include <utility>

namespace rarefy::ops {
namespace {

constexpr size_t kSmallest = size_t{64} << 10;  // malloc itself keeps blocks below this
constexpr size_t kPage = 4096;

/// One huge page of 2 MiB instead of 512 small ones where a fresh block holds some. Advice only: where the system does
/// not take it, nothing else changes.
void advise_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kHugePage = uintptr_t{2} << 20;
  const auto address = reinterpret_cast<uintptr_t>(data);
  const auto begin = (address + kHugePage - 1) / kHugePage * kHugePage;
  const auto end = (address + bytes) / kHugePage * kHugePage;
  if (begin < end) {
    static_cast<void>(madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE));
  }
#endif
}

struct Block {
  c10::DataPtr memory;
  size_t bytes;
};

class Cache {
 public:
  /// Never destroyed: tensors may be freed after the statics of this library.
  static Cache& get() {
    static auto* cache = new Cache;
    return *cache;
  }

  Block* take(size_t bytes) {
    bytes = (bytes + kPage - 1) / kPage * kPage;
    {
      const std::lock_guard lock(mutex_);
      auto best = free_.end();
      for (auto it = free_.begin(); it != free_.end(); ++it) {
        const size_t have = (*it)->bytes;
        if (have >= bytes && have - bytes <= bytes / 8 && (best == free_.end() || have < (*best)->bytes)) {
          best = it;
        }
      }
      if (best != free_.end()) {
        Block* block = *best;
        free_.erase(best);
        total_ -= block->bytes;
        return block;
      }
    }
    auto memory = c10::GetCPUAllocator()->allocate(bytes);
    advise_huge_pages(memory.get(), bytes);
    return new Block{std::move(memory), bytes};
  }

  void give_back(Block* block) {
    std::list<Block*> evicted;
    {
      const std::lock_guard lock(mutex_);
      free_.push_front(block);
      total_ += block->bytes;
      while (total_ > kCacheBytes) {
        total_ -= free_.back()->bytes;
        evicted.splice(evicted.end(), free_, std::prev(free_.end()));
      }
    }
    destroy(evicted);
  }

  size_t release() {
    std::list<Block*> evicted;
    size_t bytes = 0;
    {
      const std::lock_guard lock(mutex_);
      evicted.swap(free_);
      bytes = std::exchange(total_, 0);
    }
    destroy(evicted);
    return bytes;
  }

 private:
  static void destroy(const std::list<Block*>& blocks) {
    for (const Block* block : blocks) {
      delete block;
    }
  }

  std::mutex mutex_;
  std::list<Block*> free_;  // most recently freed first
  size_t total_ = 0;
};

class CachingAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes < kSmallest) {
      return c10::GetCPUAllocator()->allocate(bytes);
    }
    Block* block = Cache::get().take(bytes);
    return {block->memory.get(), block, [](void* context) { Cache::get().give_back(static_cast<Block*>(context)); },
            c10::Device(c10::kCPU)};
  }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};

CachingAllocator* allocator() {
  static auto* instance = new CachingAllocator;  // storages that can be resized keep a pointer to it
  return instance;
}

constexpr c10::DispatchKeySet kCpu(c10::DispatchKey::CPU);

}  // namespace

at::Tensor empty_for(const at::Tensor& x) { return empty_for(x, x.scalar_type()); }

at::Tensor empty_for(const at::Tensor& x, at::ScalarType type) {
  return at::detail::empty_strided_generic(x.sizes(), x.strides(), allocator(), kCpu, type);
}

at::Tensor empty_cached(at::IntArrayRef sizes, at::ScalarType type) {
  return at::detail::empty_generic(sizes, allocator(), kCpu, type, std::nullopt);
}

size_t release_cached_memory() { return Cache::get().release(); }

}  // namespace rarefy::ops
