#include <fmt/format.h>
#include <rarefy/pruning/report.h>

#include <algorithm>

#include "html.h"

namespace rarefy::pruning {
namespace {

double fraction(int64_t part, int64_t whole) {
  return whole == 0 ? 0.0 : static_cast<double>(part) / static_cast<double>(whole);
}

std::string shape_text(const std::vector<int64_t>& shape) {
  std::string text;
  for (const int64_t size : shape) {
    text += fmt::format("{}{}", text.empty() ? "" : "x", size);
  }
  return text.empty() ? "scalar" : text;
}

std::string title(const PruningReport& report) {
  return fmt::format("sparsity {:.4f} (target {}) after {} steps{}{}", report.sparsity(), report.target, report.step,
                     report.finalized ? ", finalized" : "",
                     report.target == 0.0 ? "; the target is 0, so nothing is pruned" : "");
}

}  // namespace

double PrunedTensor::sparsity() const { return fraction(zeros, elements); }

int64_t PruningReport::elements() const {
  int64_t sum = 0;
  for (const auto& tensor : tensors) {
    sum += tensor.elements;
  }
  return sum;
}

int64_t PruningReport::zeros() const {
  int64_t sum = 0;
  for (const auto& tensor : tensors) {
    sum += tensor.zeros;
  }
  return sum;
}

int64_t PruningReport::pruned() const {
  int64_t sum = 0;
  for (const auto& tensor : tensors) {
    sum += tensor.pruned;
  }
  return sum;
}

double PruningReport::sparsity() const { return fraction(zeros(), elements()); }

std::string PruningReport::to_string() const {
  size_t name_width = 9, shape_width = 5;
  for (const auto& tensor : tensors) {
    name_width = std::max(name_width, tensor.name.size());
    shape_width = std::max(shape_width, shape_text(tensor.shape).size());
  }
  std::string out = fmt::format("PruningReport: {}\n", title(*this));
  const auto line = [&](const std::string& name, const std::string& shape, const auto& elements, const auto& zeros,
                        const std::string& sparsity, const std::string& note) {
    auto text = fmt::format("{:<{}}  {:<{}}  {:>12}  {:>12}  {:>8}  {}", name, name_width, shape, shape_width, elements,
                            zeros, sparsity, note);
    text.erase(text.find_last_not_of(' ') + 1);
    out += text + "\n";
  };
  line("parameter", "shape", "elements", "zeros", "sparsity", "");
  for (const auto& tensor : tensors) {
    line(tensor.name, shape_text(tensor.shape), tensor.elements, tensor.zeros, fmt::format("{:.4f}", tensor.sparsity()),
         tensor.note);
  }
  line("total", "", elements(), zeros(), fmt::format("{:.4f}", sparsity()), "");
  if (!left_alone.empty()) {
    out += "left alone:\n";
    for (const auto& other : left_alone) {
      out += fmt::format("  {} ({} elements): {}\n", other.name, other.elements, other.reason);
    }
  }
  return out;
}

std::string PruningReport::to_html() const {
  std::string out = fmt::format("<p><b>PruningReport</b>: {}</p>\n<table>\n", title(*this));
  const auto row = [&](const char* cell, const std::string& name, const std::string& shape, const auto& count,
                       const auto& zero_count, const std::string& sparsity_text, const std::string& note) {
    out +=
        fmt::format("<tr><{0}>{1}</{0}><{0}>{2}</{0}><{0}>{3}</{0}><{0}>{4}</{0}><{0}>{5}</{0}><{0}>{6}</{0}></tr>\n",
                    cell, escaped(name), shape, count, zero_count, sparsity_text, escaped(note));
  };
  row("th", "parameter", "shape", "elements", "zeros", "sparsity", "note");
  for (const auto& tensor : tensors) {
    row("td", tensor.name, shape_text(tensor.shape), tensor.elements, tensor.zeros,
        fmt::format("{:.4f}", tensor.sparsity()), tensor.note);
  }
  row("th", "total", "", elements(), zeros(), fmt::format("{:.4f}", sparsity()), "");
  for (const auto& other : left_alone) {
    row("td", other.name, "", other.elements, "", "", "left alone: " + other.reason);
  }
  return out + "</table>";
}

}  // namespace rarefy::pruning
