#include <pybind11/functional.h>
#include <rarefy/pruning/importance.h>

#include "bindings.h"

namespace rarefy::python {
namespace {

using namespace rarefy::pruning;
using Tensors = std::map<std::string, at::Tensor>;

/// What every criterion has.
template <typename Type, typename... Fields>
void def_criterion(py::class_<Type>& type, Fields... fields) {
  type.def("__repr__", &Type::to_string)
      .def("__hash__", [](const Type& self) { return std::hash<std::string>()(self.to_string()); })
      .def(
          "__eq__", [](const Type& a, const Type& b) { return a == b; }, py::is_operator())
      .def(py::pickle([fields...](const Type& self) { return py::make_tuple(self.*fields...); },
                      [](const py::tuple& state) {
                        size_t i = 0;
                        Type value{state[i++].cast<std::decay_t<decltype(std::declval<Type>().*fields)>>()...};
                        value.validate();
                        return value;
                      }));
}

template <typename Type>
Type validated(Type value) {
  value.validate();
  return value;
}

ParameterLookup lookup_in(const Tensors& parameters) {
  return [&parameters](const std::string& name) {
    const auto found = parameters.find(name);
    return found == parameters.end() ? at::Tensor() : found->second;
  };
}

void init_criteria(py::module_& m) {
  py::class_<Magnitude> magnitude(
      m, "Magnitude",
      "The L_p norm of a unit's slices; p = 1 and 2 are usual, math.inf gives the largest magnitude (arXiv:1608.08710).");
  magnitude.def(py::init([](double p) { return validated(Magnitude{p}); }), py::arg("p") = 1.0)
      .def_readonly("p", &Magnitude::p);
  def_criterion(magnitude, &Magnitude::p);
  py::class_<BatchNormScale> scale(m, "BatchNormScale",
                                   "|gamma| of the normalization that a channel passes (network slimming, "
                                   "arXiv:1708.06519). Groups without one are left alone.");
  scale.def(py::init<>());
  def_criterion(scale);
  py::class_<Taylor> taylor(m, "Taylor",
                            "|sum w * grad| over a unit's slices, or sum |w * grad| with joint=False "
                            "(arXiv:1906.10771). Needs gradients.");
  taylor.def(py::init([](bool joint) { return Taylor{joint}; }), py::arg("joint") = true)
      .def_readonly("joint", &Taylor::joint);
  def_criterion(taylor, &Taylor::joint);
  py::class_<Fisher> fisher(m, "Fisher",
                            "1/2 (sum w * grad)^2 over a unit's slices (arXiv:1801.05787), of the gradients that are "
                            "there; FisherAccumulator takes the mean over many. Needs gradients.");
  fisher.def(py::init<>());
  def_criterion(fisher);
  py::class_<GeometricMedian> median(m, "GeometricMedian",
                                     "The sum of distances to the filters of all other units (FPGM, "
                                     "arXiv:1811.00250).");
  median.def(py::init<>());
  def_criterion(median);
  py::class_<Activation> activation(m, "Activation",
                                    "The mean |activation| of a unit's channels, from ActivationStatistics.");
  activation.def(py::init<>());
  def_criterion(activation);
  py::class_<Lamp> lamp(m, "Lamp",
                        "Squared L_2 norm over the sum of those that are not smaller (arXiv:2010.07611), per group; "
                        "normalizes by itself.");
  lamp.def(py::init<>());
  def_criterion(lamp);
  py::class_<Random> random(m, "Random", "Uniform in [0, 1), from the seed, the group's name and the unit alone.");
  random.def(py::init([](uint64_t seed) { return Random{seed}; }), py::arg("seed") = 0)
      .def_readonly("seed", &Random::seed);
  def_criterion(random, &Random::seed);
}

}  // namespace

void init_importance(py::module_& m) {
  init_criteria(m);
  py::class_<GroupScore>(m, "GroupScore", "Scores of a group's units; None with a reason when there are none.")
      .def(py::init([](std::optional<at::Tensor> values, std::string reason) {
             return GroupScore{values.value_or(at::Tensor()), std::move(reason)};
           }),
           py::arg("values"), py::arg("reason") = "")
      .def_property_readonly(
          "values",
          [](const GroupScore& self) { return self.values.defined() ? std::optional(self.values) : std::nullopt; })
      .def_readonly("reason", &GroupScore::reason)
      .def("__repr__", [](const GroupScore& self) {
        return self.values.defined() ? "GroupScore(" + std::to_string(self.values.numel()) + " units)"
                                     : "GroupScore(None, reason='" + self.reason + "')";
      });
  m.def(
      "importance",
      [](const Structure& structure, const Tensors& parameters, const Criterion& criterion,
         const std::string& reduction, const std::string& normalization, const Statistics& statistics) {
        const ImportanceOptions options{criterion, parse_reduction(reduction), parse_normalization(normalization)};
        const py::gil_scoped_release no_gil;
        return importance(structure, lookup_in(parameters), options, statistics);
      },
      py::arg("structure"), py::arg("parameters"), py::arg("criterion"), py::arg("reduction") = "mean",
      py::arg("normalization") = "mean", py::arg("statistics") = Statistics(), "One GroupScore per group.");
  m.def(
      "custom_importance",
      [](const Structure& structure, const std::function<at::Tensor(const Group&)>& score,
         const std::string& normalization) { return importance(structure, score, parse_normalization(normalization)); },
      py::arg("structure"), py::arg("score"), py::arg("normalization") = "mean",
      "One GroupScore per group from a callable that gives one value per unit.");
  py::class_<FisherAccumulator>(m, "FisherAccumulator", "The mean of Fisher over backward passes.")
      .def(py::init<Structure>(), py::arg("structure"))
      .def(
          "update",
          [](FisherAccumulator& self, const Tensors& parameters) {
            const py::gil_scoped_release no_gil;
            self.update(lookup_in(parameters));
          },
          py::arg("parameters"))
      .def_property_readonly("batches", &FisherAccumulator::batches)
      .def(
          "importance",
          [](const FisherAccumulator& self, const std::string& reduction, const std::string& normalization) {
            return self.importance(parse_reduction(reduction), parse_normalization(normalization));
          },
          py::arg("reduction") = "mean", py::arg("normalization") = "mean");
}

}  // namespace rarefy::python
