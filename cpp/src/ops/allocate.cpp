#include "ops/allocate.h"

#include <ATen/ops/empty_like.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdint>
#include <cstdlib>

namespace rarefy::ops {

at::Tensor empty_for(const at::Tensor& x) {
  auto out = at::empty_like(x);
#if defined(__linux__)
  constexpr uintptr_t kHugePage = uintptr_t{2} << 20;
  const auto bytes = static_cast<uintptr_t>(out.nbytes());
  if (out.is_cpu() && bytes >= 4 * kHugePage) {
    const auto begin = (reinterpret_cast<uintptr_t>(out.data_ptr()) + kHugePage - 1) / kHugePage * kHugePage;
    const auto end = (reinterpret_cast<uintptr_t>(out.data_ptr()) + bytes) / kHugePage * kHugePage;
    // Advice only: where the kernel does not take it, the pages are small and everything else is the same.
    static_cast<void>(madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE));
  }
#endif
  return out;
}

bool bypasses_caches(const at::Tensor& out) {
  static const size_t threshold = [] { const char* v = std::getenv("RAREFY_STREAM"); return v ? size_t(std::atoll(v)) << 20 : size_t{64} << 20; }();
  return out.nbytes() >= threshold;
}

}  // namespace rarefy::ops
