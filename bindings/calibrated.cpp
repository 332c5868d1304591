#include <pybind11/functional.h>
#include <rarefy/pruning/calibration.h>

#include "bindings.h"

namespace rarefy::python {
namespace {

using namespace rarefy::pruning;

void init_statistics(py::module_& m) {
  py::class_<LayerShape>(
      m, "LayerShape",
      "How a layer's weight meets its inputs: sizes [out, in] of a linear layer, or\n"
      "[out, in / groups, kernel...] of a convolution with its stride, padding, dilation and groups.")
      .def(py::init([](std::vector<int64_t> weight, std::vector<int64_t> stride, std::vector<int64_t> padding,
                       std::vector<int64_t> dilation, int64_t groups) {
             LayerShape shape{std::move(weight), std::move(stride), std::move(padding), std::move(dilation), groups};
             shape.validate();
             return shape;
           }),
           py::arg("weight"), py::arg("stride") = std::vector<int64_t>(), py::arg("padding") = std::vector<int64_t>(),
           py::arg("dilation") = std::vector<int64_t>(), py::arg("groups") = 1)
      .def_readonly("weight", &LayerShape::weight)
      .def_readonly("stride", &LayerShape::stride)
      .def_readonly("padding", &LayerShape::padding)
      .def_readonly("dilation", &LayerShape::dilation)
      .def_readonly("groups", &LayerShape::groups)
      .def_property_readonly("features", &LayerShape::features, "Inputs of one row of the weight.");
  m.def("input_rows", &input_rows, py::arg("layer"), py::arg("input"), py::call_guard<py::gil_scoped_release>(),
        "The inputs of a layer as a matrix per group: [groups, samples, features].");
  py::class_<HessianAccumulator>(
      m, "HessianAccumulator",
      "The mean of x x^T over the inputs x of a layer, batch by batch. With squares=True its\n"
      "diagonal alone. Batches with NaN or infinity are left out and counted.")
      .def(py::init([](std::string name, const LayerShape& layer, bool squares, bool float64) {
             return HessianAccumulator(std::move(name), layer, squares ? Statistic::squares : Statistic::products,
                                       float64);
           }),
           py::arg("name"), py::arg("layer"), py::kw_only(), py::arg("squares") = false, py::arg("float64") = false)
      .def("update", &HessianAccumulator::update, py::arg("input"), py::call_guard<py::gil_scoped_release>(),
           "Add a batch; False when it was left out.")
      .def("hessian", &HessianAccumulator::hessian, "[groups, features, features]")
      .def("norms", &HessianAccumulator::norms, "Root mean squares of the input features: [groups, features]")
      .def_property_readonly("name", &HessianAccumulator::name)
      .def_property_readonly("samples", &HessianAccumulator::samples)
      .def_property_readonly("batches", &HessianAccumulator::batches)
      .def_property_readonly("skipped", &HessianAccumulator::skipped)
      .def_property_readonly("bytes", &HessianAccumulator::bytes)
      .def("__repr__", [](const HessianAccumulator& self) {
        return "HessianAccumulator('" + self.name() + "', " + std::to_string(self.samples()) + " samples, " +
               std::to_string(self.skipped()) + " batches left out)";
      });
}

void init_report(py::module_& m) {
  m.def(
      "left_alone",
      [](std::string name, int64_t elements, std::string reason) {
        return LeftAlone{std::move(name), elements, std::move(reason)};
      },
      py::arg("name"), py::arg("elements"), py::arg("reason"), "One parameter that is not touched, and why.");
  py::class_<CalibratedTensor>(m, "CalibratedTensor", "One weight that was pruned with calibration data.")
      .def_readonly("name", &CalibratedTensor::name)
      .def_property_readonly("shape", [](const CalibratedTensor& self) { return py::tuple(py::cast(self.shape)); })
      .def_readonly("elements", &CalibratedTensor::elements)
      .def_readonly("pruned", &CalibratedTensor::pruned)
      .def_property_readonly("sparsity", &CalibratedTensor::sparsity)
      .def_readonly("error", &CalibratedTensor::error,
                    "The fraction of the output's energy that is lost, or None when no Hessian was gathered.")
      .def_readonly("damping", &CalibratedTensor::damping)
      .def_readonly("samples", &CalibratedTensor::samples)
      .def_readonly("skipped", &CalibratedTensor::skipped)
      .def_readonly("seconds", &CalibratedTensor::seconds)
      .def_readonly("note", &CalibratedTensor::note)
      .def("__repr__", [](const CalibratedTensor& self) {
        return "CalibratedTensor(name='" + self.name + "', elements=" + std::to_string(self.elements) +
               ", pruned=" + std::to_string(self.pruned) +
               ", error=" + (self.error.has_value() ? std::to_string(*self.error) : "None") + ")";
      });
  py::class_<CalibrationReport>(m, "CalibrationReport",
                                "What a calibrated method did to each weight. Prints as a table.")
      .def_readonly("method", &CalibrationReport::method)
      .def_property_readonly("tensors", [](const CalibrationReport& self) { return py::tuple(py::cast(self.tensors)); })
      .def_property_readonly("left_alone",
                             [](const CalibrationReport& self) { return py::tuple(py::cast(self.left_alone)); })
      .def_readonly("seconds", &CalibrationReport::seconds)
      .def_readonly("peak_bytes", &CalibrationReport::peak_bytes)
      .def_property_readonly("elements", &CalibrationReport::elements)
      .def_property_readonly("pruned", &CalibrationReport::pruned)
      .def_property_readonly("sparsity", &CalibrationReport::sparsity)
      .def("add_left_alone",
           [](CalibrationReport& self, const std::vector<LeftAlone>& others) {
             self.left_alone.insert(self.left_alone.end(), others.begin(), others.end());
           })
      .def("__repr__", &CalibrationReport::to_string)
      .def("_repr_html_", &CalibrationReport::to_html);
}

/// Weight, mask, damping, note.
py::tuple unpacked(CalibratedWeight result) {
  return py::make_tuple(std::move(result.weight), std::move(result.mask), result.damping, std::move(result.note));
}

template <typename Options>
Options checked(Options options) {
  options.validate();
  return options;
}

}  // namespace

void init_calibrated(py::module_& m) {
  init_statistics(m);
  init_report(m);
  py::class_<WandaOptions>(m, "WandaOptions", "Checked options of Wanda.")
      .def(py::init([](std::optional<double> sparsity, const Pattern& pattern) {
             return checked(WandaOptions{sparsity, pattern});
           }),
           py::arg("sparsity"), py::arg("pattern"));
  py::class_<SparseGptOptions>(m, "SparseGptOptions", "Checked options of SparseGPT.")
      .def(py::init([](std::optional<double> sparsity, const Pattern& pattern, int64_t block, double damping,
                       double max_damping) {
             return checked(SparseGptOptions{sparsity, pattern, block, damping, max_damping});
           }),
           py::arg("sparsity"), py::arg("pattern"), py::arg("block"), py::arg("damping"), py::arg("max_damping"));
  py::class_<RefitOptions>(m, "RefitOptions", "Checked options of the least-squares refit.")
      .def(py::init([](double damping, double max_damping) { return checked(RefitOptions{damping, max_damping}); }),
           py::arg("damping") = RefitOptions{}.damping, py::arg("max_damping") = RefitOptions{}.max_damping)
      .def_readonly("damping", &RefitOptions::damping)
      .def_readonly("max_damping", &RefitOptions::max_damping)
      .def("__repr__", [](const RefitOptions& self) {
        return py::str("RefitOptions(damping={}, max_damping={})").format(self.damping, self.max_damping);
      });
  py::class_<MaskRefit>(m, "MaskRefit", "Masks whose kept weights are refit.")
      .def(py::init([](std::map<std::string, at::Tensor> masks, std::map<std::string, at::Tensor> dense,
                       const RefitOptions& refit) { return MaskRefit{std::move(masks), std::move(dense), refit}; }),
           py::arg("masks"), py::arg("dense"), py::arg("refit"));
  m.def(
      "wanda_weight",
      [](const at::Tensor& weight, const at::Tensor& norms, const WandaOptions& options, const std::string& name) {
        CalibratedWeight result;
        {
          const py::gil_scoped_release no_gil;
          result = wanda(name, weight, norms, options);
        }
        return unpacked(std::move(result));
      },
      py::arg("weight"), py::arg("norms"), py::arg("options"), py::arg("name") = "weight");
  m.def(
      "sparse_gpt_weight",
      [](const at::Tensor& weight, const at::Tensor& hessian, const SparseGptOptions& options,
         const std::string& name) {
        CalibratedWeight result;
        {
          const py::gil_scoped_release no_gil;
          result = sparse_gpt(name, weight, hessian, options);
        }
        return unpacked(std::move(result));
      },
      py::arg("weight"), py::arg("hessian"), py::arg("options"), py::arg("name") = "weight");
  m.def(
      "refit_weight",
      [](const at::Tensor& weight, const at::Tensor& mask, const at::Tensor& hessian, const RefitOptions& options,
         const std::string& name) {
        CalibratedWeight result;
        {
          const py::gil_scoped_release no_gil;
          result = refit(name, weight, mask, hessian, options);
        }
        return unpacked(std::move(result));
      },
      py::arg("weight"), py::arg("mask"), py::arg("hessian"), py::arg("options"), py::arg("name") = "weight");
  m.def("relative_error", &relative_error, py::arg("weight"), py::arg("pruned"), py::arg("hessian"),
        py::call_guard<py::gil_scoped_release>(),
        "The fraction of the output's energy that a pruned weight loses: ||(W - W') X||^2 / ||W X||^2.");

  py::class_<CalibratedLayer>(m, "CalibratedLayer", "A weight, its name and how it meets its inputs.")
      .def(py::init([](std::string name, at::Tensor weight, LayerShape shape) {
             return CalibratedLayer{std::move(name), std::move(weight), std::move(shape)};
           }),
           py::arg("name"), py::arg("weight"), py::arg("shape"));
  using Method = std::variant<WandaOptions, SparseGptOptions, MaskRefit>;
  using Layers = std::vector<std::pair<std::string, double>>;
  using Stage = std::pair<std::vector<CalibratedLayer>, std::function<void(const InputSink&)>>;
  m.def(
      "prune_calibrated",
      [](const std::vector<Stage>& stages, Method method, std::optional<RefitOptions> refit, Layers layers,
         bool propagate, bool float64, bool errors, std::function<void(const std::string&)> on_layer) {
        std::vector<CalibrationStage> own;
        for (const auto& [of_stage, run] : stages) {
          own.push_back({of_stage, run});
        }
        CalibrationOptions options;
        options.method = std::move(method);
        options.refit = refit;
        options.layers = std::move(layers);
        options.propagate = propagate;
        options.float64 = float64;
        options.errors = errors;
        options.on_layer = std::move(on_layer);
        auto result = prune_calibrated(own, options);
        return std::pair(std::move(result.masks), std::move(result.report));
      },
      py::arg("stages"), py::arg("method"), py::arg("refit"), py::arg("layers"), py::arg("propagate"),
      py::arg("float64"), py::arg("errors"), py::arg("on_layer"), py::call_guard<py::gil_scoped_release>(),
      "Prune the weights of all stages; returns masks and the report.");
}

}  // namespace rarefy::python
