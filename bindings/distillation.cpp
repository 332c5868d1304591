#include <rarefy/distillation/loss.h>
#include <torch/csrc/utils/pybind.h>

#include "bindings.h"

namespace rarefy::python {

using namespace rarefy::distillation;  // NOLINT(google-build-using-namespace)

void init_distillation(py::module_& m) {
  auto sub = m.def_submodule("distillation", "Distillation loss options and the trainer's loop.");

  py::class_<DistillationLossOptions>(sub, "DistillationLossOptions")
      .def(py::init([](double temperature, double alpha, int64_t ignore_index) {
             return DistillationLossOptions{temperature, alpha, ignore_index};
           }),
           py::arg("temperature") = 4.0, py::arg("alpha") = 0.5, py::arg("ignore_index") = -100)
      .def_readonly("temperature", &DistillationLossOptions::temperature)
      .def_readonly("alpha", &DistillationLossOptions::alpha)
      .def_readonly("ignore_index", &DistillationLossOptions::ignore_index)
      .def("validate", &DistillationLossOptions::validate, "Raise ValueError for a field out of range.");

  init_distillation_trainer(sub);
  init_ema(sub);
}

}  // namespace rarefy::python
