#include "ops/cpu/isa.h"

#include <c10/util/Exception.h>

#include <atomic>
#include <cstdlib>
#include <cstring>

namespace rarefy::cpu {
namespace {

constexpr Isa all_isas[] = {Isa::avx512, Isa::avx2, Isa::plain};

Isa best_isa() {
  for (const auto isa : all_isas) {
    if (is_available(isa)) {
      return isa;
    }
  }
  return Isa::plain;
}

/// `where` says in the error who asked: a function or the environment variable.
Isa parse(const char* where, const char* wanted) {
  for (const auto isa : all_isas) {
    if (is_available(isa) && std::strcmp(wanted, name(isa)) == 0) {
      return isa;
    }
  }
  TORCH_CHECK_VALUE(false, "[", where, "] must be one of plain, avx2 and avx512 that this processor has (the best is ",
                    name(best_isa()), "), got '", wanted, "'");
}

std::atomic<Isa>& current() {
  static std::atomic<Isa> isa = [] {
    const char* wanted = std::getenv("RAREFY_ISA");
    return wanted != nullptr && *wanted != '\0' ? parse("RAREFY_ISA", wanted) : best_isa();
  }();
  return isa;
}

}  // namespace

bool is_available(Isa isa) {
  if (isa == Isa::plain) {
    return true;
  }
#if defined(RAREFY_PLAIN_ONLY)
  return false;
#else
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (isa == Isa::avx2) {
    return avx2;
  }
  return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
}

Isa current_isa() { return current().load(std::memory_order_relaxed); }

void set_isa(const char* name) { current().store(parse("set_instruction_set", name)); }

const char* name(Isa isa) { return isa == Isa::avx512 ? "avx512" : isa == Isa::avx2 ? "avx2" : "plain"; }

}  // namespace rarefy::cpu
