#include <fmt/format.h>
#include <rarefy/config.h>
#include <rarefy/version.h>

#include <string>

#include "ops/allocate.h"
#include "ops/cpu/isa.h"

namespace rarefy {

std::string version() { return RAREFY_VERSION; }

std::string torch_version() { return RAREFY_TORCH_VERSION; }

bool has_cuda_kernels() { return RAREFY_HAS_CUDA != 0; }

std::string instruction_set() { return cpu::name(cpu::current_isa()); }

void set_instruction_set(const std::string& name) { cpu::set_isa(name.c_str()); }

size_t release_cached_memory() { return ops::release_cached_memory(); }

std::string show_config() {
  std::string available;
  for (const auto isa : {cpu::Isa::plain, cpu::Isa::avx2, cpu::Isa::avx512}) {
    if (cpu::is_available(isa)) {
      available += fmt::format("{}{}", available.empty() ? "" : ", ", cpu::name(isa));
    }
  }
  return fmt::format(
      "rarefy: {}\n"
      "built against torch: {}\n"
      "compiler: {}\n"
      "instruction sets: {} (in use: {})\n"
      "CUDA kernels: {}\n",
      version(), torch_version(), RAREFY_COMPILER, available, instruction_set(), has_cuda_kernels() ? "yes" : "no");
}

}  // namespace rarefy
