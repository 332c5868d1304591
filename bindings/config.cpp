#include <rarefy/config.h>

#include "bindings.h"

namespace rarefy::python {

void init_config(py::module_& m) {
  m.def("version", &version, "Version of rarefy.");
  m.def("torch_version", &torch_version, "Version of the torch that rarefy was compiled against.");
  m.def("has_cuda_kernels", &has_cuda_kernels, "True when the library carries CUDA kernels.");
  m.def("instruction_set", &instruction_set, "The instruction set that the CPU kernels run with.");
  m.def("set_instruction_set", &set_instruction_set, py::arg("name"),
        "Run the CPU kernels with 'plain', 'avx2' or 'avx512' from now on. Results do not depend on it.");
  m.def("release_cached_memory", &release_cached_memory,
        "Give the memory that is kept for the next results of CPU operators back to the system; returns its bytes.");
  m.def("show_config", &show_config, "Versions, compiler, instruction sets and CUDA, one 'name: value' a line.");
}

}  // namespace rarefy::python
