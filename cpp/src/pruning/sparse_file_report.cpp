#include <fmt/format.h>
#include <fmt/ranges.h>
#include <rarefy/pruning/sparse_file.h>

#include <algorithm>

#include "html.h"

namespace rarefy::pruning {
namespace {

std::string title(const SparseFileReport& report) {
  return fmt::format("{} bytes in the file, {} dense: {:.4f}", report.bytes, report.dense_bytes, report.ratio());
}

std::string shape_text(const SparseFileTensor& tensor) {
  return tensor.shape.empty() ? "scalar" : fmt::format("{}", fmt::join(tensor.shape, "x"));
}

}  // namespace

const char* name(SparseForm form) {
  return form == SparseForm::dense ? "dense" : form == SparseForm::bitmask ? "bitmask" : "1:4";
}

double SparseFileReport::ratio() const {
  return dense_bytes == 0 ? 1.0 : static_cast<double>(bytes) / static_cast<double>(dense_bytes);
}

std::string SparseFileReport::to_string() const {
  size_t name_width = 6, shape_width = 5;
  for (const auto& tensor : tensors) {
    name_width = std::max(name_width, tensor.name.size());
    shape_width = std::max(shape_width, shape_text(tensor).size());
  }
  std::string out = title(*this) + "\n";
  const auto line = [&](const std::string& tensor, const std::string& shape, const std::string& form,
                        const std::string& kept, const std::string& dense, const std::string& bytes) {
    out += fmt::format("  {:<{}}  {:<{}}  {:<7}  {:>12}  {:>12}  {:>12}\n", tensor, name_width, shape, shape_width,
                       form, kept, dense, bytes);
  };
  line("tensor", "shape", "form", "values", "dense bytes", "bytes");
  for (const auto& tensor : tensors) {
    line(tensor.name, shape_text(tensor), name(tensor.form), std::to_string(tensor.kept),
         std::to_string(tensor.dense_bytes), std::to_string(tensor.bytes));
  }
  return out;
}

std::string SparseFileReport::to_html() const {
  std::string out = fmt::format(
      "<table><caption>{}</caption><tr><th>tensor</th><th>shape</th><th>form</th><th>values</th><th>dense bytes</th>"
      "<th>bytes</th></tr>",
      escaped(title(*this)));
  for (const auto& tensor : tensors) {
    out +=
        fmt::format("<tr><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td></tr>", escaped(tensor.name),
                    shape_text(tensor), name(tensor.form), tensor.kept, tensor.dense_bytes, tensor.bytes);
  }
  return out + "</table>";
}

}  // namespace rarefy::pruning
