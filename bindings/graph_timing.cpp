#include <pybind11/functional.h>
#include <rarefy/graph/timing.h>

#include "bindings.h"

namespace rarefy::python {
namespace {

using namespace rarefy::graph;

TimingOptions timing_options(double seconds, int64_t runs, int64_t warmup, const at::Device& device,
                             const std::function<double()>& clock) {
  TimingOptions options;
  options.seconds = seconds;
  options.runs = runs;
  options.warmup = warmup;
  options.device = device;
  options.clock = clock;
  options.validate();
  return options;
}

}  // namespace

void init_graph_timing(py::module_& parent) {
  auto m = parent.attr("graph").cast<py::module_>();
  py::class_<Timing>(m, "Timing", "How long a call takes on this machine.")
      .def_readonly("milliseconds", &Timing::milliseconds, "The median.")
      .def_readonly("spread", &Timing::spread, "Distance between the quartiles over the median.")
      .def_readonly("runs", &Timing::runs)
      .def_readonly("threads", &Timing::threads, "Of torch, inside an operator.")
      .def("__repr__", [](const Timing& self) { return "Timing(" + self.to_string() + ")"; });
  m.def(
      "measure",
      [](const std::function<void()>& call, double seconds, int64_t runs, int64_t warmup, const at::Device& device,
         const std::function<double()>& clock) {
        return measure(call, timing_options(seconds, runs, warmup, device, clock));
      },
      py::arg("call"), py::kw_only(), py::arg("seconds") = 0.5, py::arg("runs") = 7, py::arg("warmup") = 3,
      py::arg("device") = at::Device(at::kCPU), py::arg("clock") = py::none(),
      "The time of a call without arguments, under no-grad: the median of at least `runs` runs that take at least\n"
      "`seconds` together, after `warmup` runs. Runs end when the device has done what they asked of it. `clock` gives\n"
      "seconds, for tests.");
}

}  // namespace rarefy::python
