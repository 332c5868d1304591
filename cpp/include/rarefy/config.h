#pragma once

#include <rarefy/export.h>

#include <cstddef>
#include <string>

namespace rarefy {

/// Version of rarefy, "major.minor.patch".
RAREFY_API std::string version();

/// Version of the torch that the library was compiled against, with its build tag: "2.13.0+cpu".
RAREFY_API std::string torch_version();

/// True when the library carries CUDA kernels. Says nothing about a GPU being present.
RAREFY_API bool has_cuda_kernels();

/// The instruction set that the CPU kernels run with: "plain", "avx2" or "avx512".
/// The best one that the processor has, unless the environment variable RAREFY_ISA or set_instruction_set() says less.
RAREFY_API std::string instruction_set();

/// Run the CPU kernels with `name` ("plain", "avx2", "avx512") from now on, in all threads. Results do not depend on it.
/// Throws c10::ValueError for an unknown name and for one that this processor does not have.
RAREFY_API void set_instruction_set(const std::string& name);

/// Results of CPU operators that are at least 64 KiB live in memory that is kept, up to 1 GiB, when they are freed, and
/// used again for the next ones. This gives what is kept back to the system and returns how many bytes that was.
RAREFY_API size_t release_cached_memory();

/// Versions, compiler, instruction sets and CUDA, one "name: value" a line.
RAREFY_API std::string show_config();

}  // namespace rarefy
