// Which instruction set the CPU kernels run with, decided at run time.
//
// A file x_simd.cpp is compiled once per instruction set into the namespaces plain, avx2 and avx512 (see
// cmake/RarefyIsa.cmake). Its header declares the functions inside RAREFY_DECLARE_ISA(...), and callers reach the right
// copy with RAREFY_ISA_CALL(function, arguments...). This header is included by those files: no standard library here.
#pragma once

namespace rarefy::cpu {

enum class Isa { plain, avx2, avx512 };

/// The one in use: the best that the processor has, unless RAREFY_ISA (environment) or set_isa() says less.
Isa current_isa();
bool is_available(Isa isa);
const char* name(Isa isa);
/// Throws c10::ValueError for a name that is unknown or that this processor does not have.
void set_isa(const char* name);

}  // namespace rarefy::cpu

#if defined(RAREFY_PLAIN_ONLY)
#define RAREFY_DECLARE_ISA(...) \
  namespace plain {             \
  __VA_ARGS__                   \
  }
#define RAREFY_ISA_CALL(function, ...) ::rarefy::cpu::plain::function(__VA_ARGS__)
#else
#define RAREFY_DECLARE_ISA(...) \
  namespace plain {             \
  __VA_ARGS__                   \
  }                             \
  namespace avx2 {              \
  __VA_ARGS__                   \
  }                             \
  namespace avx512 {            \
  __VA_ARGS__                   \
  }
#define RAREFY_ISA_CALL(function, ...)                                                                       \
  (::rarefy::cpu::current_isa() == ::rarefy::cpu::Isa::avx512 ? ::rarefy::cpu::avx512::function(__VA_ARGS__) \
   : ::rarefy::cpu::current_isa() == ::rarefy::cpu::Isa::avx2 ? ::rarefy::cpu::avx2::function(__VA_ARGS__)   \
                                                              : ::rarefy::cpu::plain::function(__VA_ARGS__))
#endif
