#include <pybind11/stl.h>
#include <rarefy/distillation/loss.h>
#include <torch/csrc/utils/pybind.h>

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "bindings.h"

namespace rarefy::python {

using namespace rarefy::distillation;  // NOLINT(google-build-using-namespace)
using torch::Tensor;

void init_distillation(py::module_& m) {
  auto sub = m.def_submodule("distillation", "Distillation loss options and the trainer's loop.");

  py::class_<DistillationLossOptions>(sub, "DistillationLossOptions", "What DistillationLoss computes.")
      .def(py::init([](double temperature, double alpha, std::string divergence, double skew, double label_smoothing,
                       int64_t ignore_index, std::string reduction, std::string vocabulary,
                       std::optional<Tensor> label_map, bool shift, bool standardize,
                       std::vector<double> teacher_weights) {
             return DistillationLossOptions{temperature,
                                            alpha,
                                            std::move(divergence),
                                            skew,
                                            label_smoothing,
                                            ignore_index,
                                            std::move(reduction),
                                            std::move(vocabulary),
                                            label_map.value_or(Tensor()),
                                            shift,
                                            standardize,
                                            std::move(teacher_weights)};
           }),
           py::kw_only(), py::arg("temperature"), py::arg("alpha"), py::arg("divergence"), py::arg("skew"),
           py::arg("label_smoothing"), py::arg("ignore_index"), py::arg("reduction"), py::arg("vocabulary") = "error",
           py::arg("label_map") = py::none(), py::arg("shift") = false, py::arg("standardize") = false,
           py::arg("teacher_weights") = std::vector<double>{})
      .def("validate", &DistillationLossOptions::validate, "Raise ValueError for a field out of range.");

  init_distillation_trainer(sub);
  init_ema(sub);
}

}  // namespace rarefy::python
