// One init function per component file; each adds its classes and functions to the module. Bindings translate and never
// compute.
#pragma once

#include <pybind11/operators.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

namespace rarefy::python {

namespace py = pybind11;

void init_config(py::module_& m);
void init_graph(py::module_& m);
void init_graph_timing(py::module_& m);
void init_pruning(py::module_& m);
void init_pruning_schedule(py::module_& m);
void init_pruning_surgery(py::module_& m);
void init_pruning_enforce(py::module_& pruning);
void init_pruning_structure(py::module_& pruning);
void init_mask_choice(py::module_& pruning);
void init_permutation(py::module_& pruning);
void init_importance(py::module_& pruning);
void init_element_score(py::module_& pruning);
void init_calibrated(py::module_& pruning);
void init_choice(py::module_& pruning);
void init_structured(py::module_& pruning);
void init_sparse(py::module_& pruning);
void init_pruning_latency(py::module_& m);
void init_observer(py::module_& m);
void init_quantization(py::module_& m);
void init_quantized_checkpoint(py::module_& m);
void init_target(py::module_& m);
void init_distillation(py::module_& m);
void init_teacher_cache(py::module_& m);
void init_distillation_trainer(py::module_& distillation);
void init_ema(py::module_& distillation);

}  // namespace rarefy::python
