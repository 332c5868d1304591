#include <rarefy/ops/integer.h>
#include <rarefy/ops/quantized.h>
#include <rarefy/quantization/qconfig.h>
#include <rarefy/quantization/schedule.h>
#include <rarefy/quantization/scheme.h>

#include "bindings.h"

namespace rarefy::python {

void init_scheme(py::module_& quantization);  // scheme.cpp

void init_quantization(py::module_& parent) {
  using namespace quantization;
  auto m = parent.def_submodule("quantization", "Schemes and observers. rarefy.quantization is the public side.");

  init_scheme(m);

  m.attr("LONGEST_INTEGER_SUM") = ops::kLongestSum;
  m.def("has_exact_integer_products", &ops::has_exact_integer_products,
        "Whether the processor sums products of bytes in 32 bits, without saturating (AVX512-VNNI, AVX-VNNI).");
  m.def("packed_weight_count", &ops::packed_weight_count,
        "How many weights of converted layers are kept packed for the CPU's int8 kernels.");
  m.def("clear_packed_weights", &ops::clear_packed_weights,
        "Drop the packed forms of all weights; they are made again when they are needed.");

  m.def(
      "validate_layer_config",
      [](const std::optional<Scheme>& weight, const std::optional<Scheme>& activation,
         const std::optional<Observer>& observer, const std::optional<Observer>& weight_observer,
         c10::ScalarType gradient_dtype) {
        LayerConfig{.weight = weight,
                    .activation = activation,
                    .observer = observer,
                    .weight_observer = weight_observer,
                    .gradient_dtype = gradient_dtype}
            .validate();
      },
      py::arg("weight"), py::arg("activation"), py::arg("observer"), py::arg("weight_observer"),
      py::arg("gradient_dtype"), "Raises ValueError for a scheme that no layer can execute.");
  m.def(
      "why_not_integer",
      [](const std::optional<Scheme>& weight, const std::optional<Scheme>& activation,
         const std::optional<Observer>& observer, const std::optional<Observer>& weight_observer) {
        return LayerConfig{
            .weight = weight, .activation = activation, .observer = observer, .weight_observer = weight_observer}
            .why_not_integer();
      },
      py::arg("weight"), py::arg("activation"), py::arg("observer") = py::none(),
      py::arg("weight_observer") = py::none(), "Why a layer with these schemes cannot compute in integers, or None.");

  const auto make_options = [](int64_t observe_from, int64_t quantize_from, std::optional<int64_t> freeze_observers_at,
                               std::optional<int64_t> freeze_batch_norm_at) {
    QATScheduleOptions options{observe_from, quantize_from, freeze_observers_at, freeze_batch_norm_at};
    options.validate();
    return options;
  };
  py::class_<QATScheduleOptions>(m, "QATScheduleOptions", "When training begins to observe and quantize, and freezes.")
      .def(py::init(make_options), py::arg("observe_from"), py::arg("quantize_from"), py::arg("freeze_observers_at"),
           py::arg("freeze_batch_norm_at"))
      .def(
          "flags_at",
          [](const QATScheduleOptions& self, int64_t step) {
            const auto flags = self.flags_at(step);
            return std::make_tuple(flags.observe, flags.quantize, flags.freeze_batch_norm);
          },
          py::arg("step"), "(observe, quantize, freeze batch normalization) in a training step.")
      .def_readonly("observe_from", &QATScheduleOptions::observe_from)
      .def_readonly("quantize_from", &QATScheduleOptions::quantize_from)
      .def_readonly("freeze_observers_at", &QATScheduleOptions::freeze_observers_at)
      .def_readonly("freeze_batch_norm_at", &QATScheduleOptions::freeze_batch_norm_at)
      .def(py::self == py::self)
      .def("__hash__", [](const QATScheduleOptions& self) { return py::hash(py::str(self.to_string())); })
      .def("__repr__", [](const QATScheduleOptions& self) { return "QATScheduleOptions(" + self.to_string() + ")"; })
      .def("__str__", &QATScheduleOptions::to_string)
      .def(py::pickle(
          [](const QATScheduleOptions& self) {
            return py::make_tuple(self.observe_from, self.quantize_from, self.freeze_observers_at,
                                  self.freeze_batch_norm_at);
          },
          [make_options](const py::tuple& state) {
            return make_options(state[0].cast<int64_t>(), state[1].cast<int64_t>(),
                                state[2].cast<std::optional<int64_t>>(), state[3].cast<std::optional<int64_t>>());
          }));
}

}  // namespace rarefy::python
