#include <pybind11/stl.h>
#include <rarefy/distillation/ema.h>

#include "bindings.h"

namespace rarefy::python {

using namespace rarefy::distillation;  // NOLINT(google-build-using-namespace)

void init_ema(py::module_& distillation) {
  py::class_<Ema>(distillation, "Ema", "Moving averages of lists of tensors; rarefy.distillation.EMATeacher holds one.")
      .def(py::init([](double decay, double warmup) { return Ema(EmaOptions{decay, warmup}); }),
           py::arg("decay") = EmaOptions{}.decay, py::arg("warmup") = EmaOptions{}.warmup)
      .def_property_readonly("decay", [](const Ema& ema) { return ema.options().decay; })
      .def_property_readonly("warmup", [](const Ema& ema) { return ema.options().warmup; })
      .def_property("updates", &Ema::updates, &Ema::set_updates)
      .def_property_readonly("next_decay", &Ema::next_decay)
      .def("update",
           py::overload_cast<const std::vector<torch::Tensor>&, const std::vector<torch::Tensor>&>(&Ema::update),
           py::arg("averages"), py::arg("values"), py::call_guard<py::gil_scoped_release>(),
           "Move every average towards its value, in place.")
      .def(py::pickle(
          [](const Ema& ema) { return py::make_tuple(ema.options().decay, ema.options().warmup, ema.updates()); },
          [](const py::tuple& state) {
            Ema ema(EmaOptions{state[0].cast<double>(), state[1].cast<double>()});
            ema.set_updates(state[2].cast<int64_t>());
            return ema;
          }))
      .def("__repr__", [](const Ema& ema) {
        return py::str("Ema(decay={:g}, warmup={:g}, updates={})")
            .format(ema.options().decay, ema.options().warmup, ema.updates());
      });
}

}  // namespace rarefy::python
