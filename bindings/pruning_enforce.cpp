#include <rarefy/pruning/enforce.h>

#include "bindings.h"

namespace rarefy::python {

using namespace rarefy::pruning;

void init_pruning_enforce(py::module_& m) {
  m.def("mask_gradients", &mask_gradients, py::arg("state"), py::call_guard<py::gil_scoped_release>(),
        "Set dense gradients to zero where masks prune; False when some gradient is sparse and was left as it is.");
  m.def(
      "enforce",
      [](const PruningState& state, const std::vector<size_t>& owners, const std::vector<at::Tensor>& moments) {
        std::vector<Moment> of_parameters;
        for (size_t i = 0; i < owners.size(); ++i) {
          of_parameters.push_back({owners[i], moments.at(i)});
        }
        enforce(state, of_parameters);
      },
      py::arg("state"), py::arg("owners"), py::arg("moments"), py::call_guard<py::gil_scoped_release>(),
      "Set values, dense gradients and moments to zero where masks prune; owners are positions of parameters.");
  m.def("apply_values", &apply_values, py::arg("state"), py::call_guard<py::gil_scoped_release>(),
        "Set values, and nothing else, to zero where masks prune.");
  m.def(
      "names_of",
      [](const PruningState& state) {
        std::vector<std::string> names;
        for (const auto& parameter : state.parameters) {
          names.push_back(parameter.name);
        }
        return names;
      },
      py::arg("state"));
  m.def(
      "values_of",
      [](const PruningState& state) {
        std::vector<at::Tensor> values;
        for (const auto& parameter : state.parameters) {
          values.push_back(parameter.value);
        }
        return values;
      },
      py::arg("state"), "The parameters themselves.");
  m.def(
      "masks_of",
      [](const PruningState& state) {
        std::vector<at::Tensor> masks;
        for (const auto& parameter : state.parameters) {
          masks.push_back(parameter.mask);
        }
        return masks;
      },
      py::arg("state"), "Their packed masks.");
  m.def(
      "stray_values",
      [](const PruningState& state) {
        std::vector<std::tuple<std::string, int64_t, int64_t>> rows;
        for (const auto& stray : stray_values(state)) {
          rows.emplace_back(stray.parameter, stray.count, stray.first);
        }
        return rows;
      },
      py::arg("state"), py::call_guard<py::gil_scoped_release>(),
      "Parameters with values that left their mask, how many, and the first flat index.");
  m.def(
      "check_masks",
      [](const PruningState& state, const std::string& function) { check_masks(state, function.c_str()); },
      py::arg("state"), py::arg("function"), py::call_guard<py::gil_scoped_release>(),
      "Raise ValueError when values left their mask.");
}

}  // namespace rarefy::python
