#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>
#include <rarefy/distillation/teacher_cache.h>
#include <torch/csrc/utils/pybind.h>

#include <sstream>

#include "bindings.h"

namespace rarefy::python {
namespace {

using namespace rarefy::distillation;  // NOLINT(google-build-using-namespace)
using torch::Tensor;
using Strings = std::vector<std::string>;

template <typename T>
std::string printed(const T& value) {
  std::ostringstream text;
  text << value;
  return text.str();
}

/// The fields in the order of rarefy.distillation.TopKLogits.
py::tuple to_tuple(const TopKLogits& top) {
  return py::make_tuple(top.values, top.indices, top.tail, top.temperature, top.classes);
}

}  // namespace

void init_teacher_cache(py::module_& m) {
  auto sub = m.attr("distillation").cast<py::module_>();
  using release = py::call_guard<py::gil_scoped_release>;

  sub.def(
      "topk_logits",
      [](const Tensor& logits, int64_t k, double temperature) { return to_tuple(topk_logits(logits, k, temperature)); },
      py::arg("logits"), py::arg("k"), py::arg("temperature"),
      "The k largest logits as (values, indices, tail, temperature, classes).");

  py::class_<TeacherCacheOptions>(sub, "TeacherCacheOptions", "What a cache of teacher outputs holds.")
      .def(py::init([](int64_t classes, int64_t k, double temperature, std::string dtype, std::string key,
                       std::string fingerprint) {
             TeacherCacheOptions options{
                 classes, k, temperature, std::move(dtype), std::move(key), std::move(fingerprint)};
             options.validate();
             return options;
           }),
           py::arg("classes"), py::arg("k") = 64, py::arg("temperature") = 4.0, py::arg("dtype") = "float16",
           py::arg("key") = "int64", py::arg("fingerprint") = "")
      .def_readonly("classes", &TeacherCacheOptions::classes)
      .def_readonly("k", &TeacherCacheOptions::k)
      .def_readonly("temperature", &TeacherCacheOptions::temperature)
      .def_readonly("dtype", &TeacherCacheOptions::dtype)
      .def_readonly("key", &TeacherCacheOptions::key)
      .def_readonly("fingerprint", &TeacherCacheOptions::fingerprint)
      .def(py::self == py::self)  // NOLINT(misc-redundant-expression)
      .def("__repr__", &printed<TeacherCacheOptions>);

  py::class_<TeacherCacheBound>(
      sub, "TeacherCacheBound",
      "How far a loss with the cached teacher may be from the loss with the full one, over all rows of a cache.")
      .def_readonly("samples", &TeacherCacheBound::samples)
      .def_readonly("rows", &TeacherCacheBound::rows)
      .def_readonly("temperature", &TeacherCacheBound::temperature)
      .def_readonly("logit_error_mean", &TeacherCacheBound::logit_error_mean)
      .def_readonly("logit_error_max", &TeacherCacheBound::logit_error_max)
      .def_readonly("log_probability_error_max", &TeacherCacheBound::log_probability_error_max)
      .def_readonly("tail_mass_mean", &TeacherCacheBound::tail_mass_mean)
      .def_readonly("tail_mass_max", &TeacherCacheBound::tail_mass_max)
      .def_readonly("gradient_error_mean", &TeacherCacheBound::gradient_error_mean)
      .def_readonly("gradient_error_max", &TeacherCacheBound::gradient_error_max)
      .def_readonly("teacher_range", &TeacherCacheBound::teacher_range)
      .def_readonly("student_range", &TeacherCacheBound::student_range)
      .def_readonly("loss_error_mean", &TeacherCacheBound::loss_error_mean)
      .def_readonly("loss_error_max", &TeacherCacheBound::loss_error_max)
      .def("__repr__", &printed<TeacherCacheBound>);

  py::class_<TeacherCacheWriter>(
      sub, "TeacherCacheWriter",
      "Writes a cache of teacher outputs batch by batch; opening the same path again resumes.")
      .def(py::init<const std::filesystem::path&, const TeacherCacheOptions&>(), py::arg("path"), py::arg("options"))
      .def("__contains__", py::overload_cast<int64_t>(&TeacherCacheWriter::contains, py::const_), py::arg("key"))
      .def("__contains__", py::overload_cast<const std::string&>(&TeacherCacheWriter::contains, py::const_),
           py::arg("key"))
      .def("__len__", &TeacherCacheWriter::samples)
      .def(
          "append",
          [](TeacherCacheWriter& writer, const Tensor& keys, const Tensor& logits, const std::optional<Tensor>& mask) {
            writer.append(keys, logits, mask.value_or(Tensor()));
          },
          py::arg("keys"), py::arg("logits"), py::arg("mask") = py::none(), release(),
          "Write a batch; on return it is on the disk, and when something is raised nothing of it is.")
      .def(
          "append",
          [](TeacherCacheWriter& writer, const Strings& keys, const Tensor& logits, const std::optional<Tensor>& mask) {
            writer.append(keys, logits, mask.value_or(Tensor()));
          },
          py::arg("keys"), py::arg("logits"), py::arg("mask") = py::none(), release())
      .def_property_readonly("options", &TeacherCacheWriter::options)
      .def("finish", &TeacherCacheWriter::finish, release(), "Write the end and give the file its name.");

  py::class_<TeacherCache>(sub, "TeacherCache", "A finished cache of teacher outputs, memory-mapped.")
      .def(py::init<const std::filesystem::path&>(), py::arg("path"))
      .def("__contains__", py::overload_cast<int64_t>(&TeacherCache::contains, py::const_), py::arg("key"))
      .def("__contains__", py::overload_cast<const std::string&>(&TeacherCache::contains, py::const_), py::arg("key"))
      .def("__len__", &TeacherCache::samples)
      .def_property_readonly("options", &TeacherCache::options)
      .def(
          "get",
          [](const TeacherCache& cache, const Tensor& keys, const std::optional<Tensor>& mask) {
            return to_tuple(cache.get(keys, mask.value_or(Tensor())));
          },
          py::arg("keys"), py::arg("mask") = py::none(),
          "The logits of samples as (values, indices, tail, temperature, classes).")
      .def(
          "get",
          [](const TeacherCache& cache, const Strings& keys, const std::optional<Tensor>& mask) {
            return to_tuple(cache.get(keys, mask.value_or(Tensor())));
          },
          py::arg("keys"), py::arg("mask") = py::none())
      .def("bound", &TeacherCache::bound, py::arg("student_range") = py::none(), "The bound over all rows.")
      .def("verify", &TeacherCache::verify, release(), "Compare the checksums of all rows.")
      .def("__repr__", [](const TeacherCache& cache) {
        return "TeacherCache of " + std::to_string(cache.samples()) + " samples: " + printed(cache.options());
      });
}

}  // namespace rarefy::python
