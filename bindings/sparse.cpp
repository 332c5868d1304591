#include <pybind11/functional.h>
#include <pybind11/stl/filesystem.h>
#include <rarefy/pruning/sparse_report.h>
#include <rarefy/pruning/torch_pruning.h>

#include <filesystem>

#include "bindings.h"

namespace rarefy::python {
namespace {

using namespace rarefy::pruning;

using Names = std::vector<std::string>;
using Tensors = std::vector<at::Tensor>;
using Weight = std::tuple<at::Tensor, at::Tensor, at::Tensor>;  // values, columns, row_offsets

NamedTensors zip(const Names& names, const Tensors& values) {
  NamedTensors out;
  for (size_t i = 0; i < names.size(); ++i) {
    out.insert(names[i], values.at(i));
  }
  return out;
}

py::dict unzip(const NamedTensors& tensors) {
  py::dict out;
  for (const auto& item : tensors) {
    out[py::str(item.key())] = item.value();
  }
  return out;
}

Weight parts_of(const ops::SparseWeight& weight) { return {weight.values, weight.columns, weight.row_offsets}; }

void init_files(py::module_& m) {
  py::class_<SparseFileTensor>(m, "SparseFileTensor", "One tensor of a compressed file.")
      .def_readonly("name", &SparseFileTensor::name)
      .def_readonly("shape", &SparseFileTensor::shape)
      .def_property_readonly(
          "form", [](const SparseFileTensor& self) { return name(self.form); }, "'dense', 'bitmask' or '1:4'.")
      .def_readonly("elements", &SparseFileTensor::elements)
      .def_readonly("kept", &SparseFileTensor::kept, "Values that are stored.")
      .def_readonly("dense_bytes", &SparseFileTensor::dense_bytes)
      .def_readonly("bytes", &SparseFileTensor::bytes)
      .def("__repr__", [](const SparseFileTensor& self) {
        return "SparseFileTensor(name='" + self.name + "', form='" + name(self.form) +
               "', elements=" + std::to_string(self.elements) + ", kept=" + std::to_string(self.kept) + ")";
      });
  py::class_<SparseFileReport>(m, "SparseFileReport", "What a compressed file holds. Prints as a table.")
      .def_property_readonly("tensors", [](const SparseFileReport& self) { return py::tuple(py::cast(self.tensors)); })
      .def_readonly("dense_bytes", &SparseFileReport::dense_bytes, "Of the tensors, each in full.")
      .def_readonly("bytes", &SparseFileReport::bytes, "Of the file, header included.")
      .def_property_readonly("ratio", &SparseFileReport::ratio, "bytes / dense_bytes.")
      .def("__repr__", &SparseFileReport::to_string)
      .def("_repr_html_", &SparseFileReport::to_html);
  m.def(
      "write_sparse",
      [](const Names& names, const Tensors& values, const std::filesystem::path& path, const Metadata& metadata) {
        return save_sparse(zip(names, values), path, metadata);
      },
      py::arg("names"), py::arg("values"), py::arg("path"), py::arg("metadata"),
      py::call_guard<py::gil_scoped_release>(), "Writes tensors, sparse ones compressed.");
  m.def(
      "sparse_size",
      [](const Names& names, const Tensors& values, const Metadata& metadata) {
        return sparse_size(zip(names, values), metadata);
      },
      py::arg("names"), py::arg("values"), py::arg("metadata"), py::call_guard<py::gil_scoped_release>(),
      "What write_sparse would write.");
  m.def(
      "read_sparse",
      [](const std::filesystem::path& path) {
        const auto checkpoint = load_sparse(path);
        return py::make_tuple(unzip(checkpoint.tensors), checkpoint.metadata);
      },
      py::arg("path"), "Tensors and metadata of a compressed file.");
  m.def("is_pruning_state", &is_pruning_state, py::arg("name"), "Whether a name is one of a pruner's state.");
  m.def(
      "import_torch_pruning",
      [](const Names& names, const Tensors& values) { return unzip(import_torch_pruning(zip(names, values))); },
      py::arg("names"), py::arg("values"), "x_orig and x_mask become x and x_mask_bits.");
  m.def(
      "export_torch_pruning",
      [](const Names& names, const Tensors& values) { return unzip(export_torch_pruning(zip(names, values))); },
      py::arg("names"), py::arg("values"), "x and x_mask_bits become x_orig and x_mask.");
}

void init_execution(py::module_& m) {
  py::class_<SparsifiedLayer>(m, "SparsifiedLayer", "What became of one linear layer.")
      .def(py::init([](std::string layer, std::vector<int64_t> samples, int64_t elements, std::string reason,
                       bool sparse, double sparsity, std::pair<double, double> milliseconds) {
             SparsifiedLayer out;
             out.name = std::move(layer);
             out.elements = elements;
             out.sparsity = sparsity;
             out.samples = std::move(samples);
             out.sparse = sparse;
             out.dense_milliseconds = milliseconds.first;
             out.sparse_milliseconds = milliseconds.second;
             out.reason = std::move(reason);
             return out;
           }),
           py::arg("name"), py::arg("samples"), py::arg("elements") = 0, py::arg("reason") = "",
           py::arg("sparse") = false, py::arg("sparsity") = 0.0, py::arg("milliseconds") = std::pair(0.0, 0.0))
      .def_readonly("name", &SparsifiedLayer::name)
      .def_readonly("elements", &SparsifiedLayer::elements)
      .def_readonly("sparsity", &SparsifiedLayer::sparsity)
      .def_readonly("samples", &SparsifiedLayer::samples, "Rows of the inputs that the model gave it, call by call.")
      .def_readonly("sparse", &SparsifiedLayer::sparse)
      .def_readonly("block", &SparsifiedLayer::block, "Of the fastest form that was measured; (0, 0) without one.")
      .def_readonly("dense_milliseconds", &SparsifiedLayer::dense_milliseconds, "0 where it was not measured.")
      .def_readonly("sparse_milliseconds", &SparsifiedLayer::sparse_milliseconds)
      .def_readonly("reason", &SparsifiedLayer::reason, "Why it is sparse, or stays dense.")
      .def("__repr__", [](const SparsifiedLayer& self) {
        return "SparsifiedLayer(name='" + self.name + "', sparse=" + (self.sparse ? "True" : "False") + ", reason='" +
               self.reason + "')";
      });
  py::class_<SparsifyReport>(m, "SparsifyReport", "Which linear layers are sparse, and why. Prints as a table.")
      .def(py::init([](std::vector<SparsifiedLayer> layers) { return SparsifyReport{std::move(layers)}; }),
           py::arg("layers"))
      .def_property_readonly("layers", [](const SparsifyReport& self) { return py::tuple(py::cast(self.layers)); })
      .def_property_readonly("sparse", &SparsifyReport::sparse, "How many layers are sparse.")
      .def("__repr__", &SparsifyReport::to_string)
      .def("_repr_html_", &SparsifyReport::to_html);
  py::class_<SparsifyOptions>(m, "SparsifyOptions", "Checked options of sparsify.")
      .def(py::init(
               [](double gain, double seconds, double least_sparsity, std::vector<std::pair<int64_t, int64_t>> blocks) {
                 SparsifyOptions options{gain, seconds, least_sparsity, std::move(blocks)};
                 options.validate();
                 return options;
               }),
           py::arg("gain"), py::arg("seconds"), py::arg("least_sparsity"), py::arg("blocks"));
  py::class_<SparseReport>(m, "SparseReport", "Bytes on disk, multiply-accumulates, measured time. Prints as a table.")
      .def(py::init([](SparseFileReport file, int64_t macs, int64_t effective, std::pair<double, double> milliseconds,
                       SparsifyReport layers) {
             return SparseReport{std::move(file),  macs, effective, milliseconds.first, milliseconds.second,
                                 std::move(layers)};
           }),
           py::arg("file"), py::arg("macs"), py::arg("effective_macs"), py::arg("milliseconds"), py::arg("layers"))
      .def_readonly("file", &SparseReport::file, "What save_sparse would write.")
      .def_readonly("macs", &SparseReport::macs)
      .def_readonly("effective_macs", &SparseReport::effective_macs, "Of those, with a weight that is not zero.")
      .def_readonly("dense_milliseconds", &SparseReport::dense_milliseconds)
      .def_readonly("sparse_milliseconds", &SparseReport::sparse_milliseconds)
      .def_readonly("layers", &SparseReport::layers)
      .def("__repr__", &SparseReport::to_string)
      .def("_repr_html_", &SparseReport::to_html);
  m.def("linear_samples", &linear_samples, py::arg("graph"),
        "The rows of the input of every linear operator, by the name of its weight.");
  m.def(
      "choose_sparse",
      [](SparsifiedLayer& layer, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
         const SparsifyOptions& options) -> std::optional<Weight> {
        const auto sparse = choose_sparse(layer, weight, bias.value_or(at::Tensor()), options);
        return sparse.has_value() ? std::optional(parts_of(*sparse)) : std::nullopt;
      },
      py::arg("layer"), py::arg("weight"), py::arg("bias"), py::arg("options"),
      "Measures a layer and fills in what was found; the sparse weight where it is faster.");
  m.def("effective_macs", &effective_macs, py::arg("graph"),
        "The multiply-accumulates of a recording whose weight is not zero.");
  m.def("compare_times", &compare_times, py::arg("first"), py::arg("second"), py::arg("seconds"),
        "Milliseconds of two calls that take turns.");
  m.def(
      "to_sparse_weight",
      [](const at::Tensor& weight, int64_t height, int64_t width) {
        return parts_of(ops::to_sparse_weight(weight, height, width));
      },
      py::arg("weight"), py::arg("height") = 1, py::arg("width") = 1,
      "Values, columns and row offsets of a dense weight [out, in].");
  m.def(
      "to_dense_weight",
      [](const at::Tensor& values, const at::Tensor& columns, const at::Tensor& row_offsets, int64_t in_features) {
        return ops::to_dense_weight({values, columns, row_offsets}, in_features);
      },
      py::arg("values"), py::arg("columns"), py::arg("row_offsets"), py::arg("in_features"),
      "The dense weight [out, in].");
}

}  // namespace

void init_sparse(py::module_& pruning) {
  init_files(pruning);
  init_execution(pruning);
}

}  // namespace rarefy::python
