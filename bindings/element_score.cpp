#include <pybind11/functional.h>
#include <rarefy/pruning/element_score.h>
#include <rarefy/pruning/one_shot_score.h>

#include "bindings.h"

namespace rarefy::python {
namespace {

using namespace rarefy::pruning;
using Names = std::vector<std::string>;
using Tensors = std::vector<at::Tensor>;

std::vector<NamedParameter> named(const Names& names, const Tensors& values) {
  std::vector<NamedParameter> out;
  for (size_t i = 0; i < names.size(); ++i) {
    out.push_back({names.at(i), values.at(i)});
  }
  return out;
}

}  // namespace

void init_element_score(py::module_& m) {
  py::class_<Movement>(m, "Movement",
                       "Sum over backward passes of -w * grad: weights that move away from zero are kept\n"
                       "(arXiv:2005.07683). For single weights. Needs gradients.")
      .def(py::init<>())
      .def("__repr__", &Movement::to_string)
      .def("__hash__", [](const Movement& self) { return std::hash<std::string>()(self.to_string()); })
      .def(
          "__eq__", [](const Movement& a, const Movement& b) { return a == b; }, py::is_operator())
      .def(py::pickle([](const Movement&) { return py::tuple(); }, [](const py::tuple&) { return Movement{}; }));
  m.def(
      "validate_element_criterion", [](const ElementCriterion& criterion) { validate(criterion); },
      py::arg("criterion"), "ValueError when a criterion cannot score single weights.");
  m.def("needs_gradients", &needs_gradients, py::arg("criterion"), "True for Movement, Taylor and Fisher.");
  m.def("new_accumulator", &new_accumulator, py::arg("value"), "Zeros that accumulate() adds to.");
  m.def("accumulate", &accumulate, py::arg("criterion"), py::arg("value"), py::arg("gradient"), py::arg("accumulated"),
        py::call_guard<py::gil_scoped_release>(), "Add what one backward pass says about a parameter, in place.");
  m.def(
      "element_scores",
      [](const ElementCriterion& criterion, const std::string& name, const at::Tensor& value,
         const std::optional<at::Tensor>& accumulated,
         int64_t passes) { return element_scores(criterion, name, value, accumulated.value_or(at::Tensor()), passes); },
      py::arg("criterion"), py::arg("name"), py::arg("value"), py::arg("accumulated") = std::nullopt,
      py::arg("passes") = 1, py::call_guard<py::gil_scoped_release>(), "A score per element, larger = kept.");
  // Losses run Python code: the functions are called without the interpreter's lock, and each callable takes it.
  m.def(
      "snip",
      [](const Names& names, const Tensors& values, const std::vector<LossFunction>& losses) {
        return snip(named(names, values), losses);
      },
      py::arg("names"), py::arg("values"), py::arg("losses"), py::call_guard<py::gil_scoped_release>());
  m.def(
      "grasp",
      [](const Names& names, const Tensors& values, const std::vector<LossFunction>& losses) {
        return grasp(named(names, values), losses);
      },
      py::arg("names"), py::arg("values"), py::arg("losses"), py::call_guard<py::gil_scoped_release>());
  m.def(
      "synflow",
      [](const Names& names, const Tensors& values, const std::function<at::Tensor()>& forward, double sparsity,
         int64_t rounds) { return synflow(named(names, values), forward, {sparsity, rounds}); },
      py::arg("names"), py::arg("values"), py::arg("forward"), py::arg("sparsity"), py::arg("rounds"),
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "choose_parameters",
      [](const Names& names, const Tensors& values, const std::optional<Names>& include, const Names& exclude) {
        auto selection = select_parameters(named(names, values), include, exclude);
        return std::pair(std::move(selection.chosen), std::move(selection.left_alone));
      },
      py::arg("names"), py::arg("values"), py::arg("include"), py::arg("exclude"),
      "Indices of the parameters to prune, and what is left alone.");
}

}  // namespace rarefy::python
