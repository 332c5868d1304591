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
  return fmt::format("sparsity {:.4f} (target {}) after {} steps{}{}{}", report.sparsity(), report.target, report.step,
                     report.pattern == "unstructured" ? "" : ", pattern " + report.pattern,
                     report.finalized ? ", finalized" : "",
                     report.target == 0.0 ? "; the target is 0, so nothing is pruned" : "");
}

/// One line per quantity that was measured: "bytes 100 of 400 (0.250)".
std::vector<std::string> cost_lines(const PruningCost& cost) {
  std::vector<std::string> lines;
  const auto add = [&](const char* what, const auto& part, const auto& whole, const char* unit) {
    if (part.has_value() && whole.has_value()) {
      const auto ratio = *whole == 0 ? 0.0 : static_cast<double>(*part) / static_cast<double>(*whole);
      lines.push_back(fmt::format("{}: {}{} of {}{} ({:.3f})", what, *part, unit, *whole, unit, ratio));
    }
  };
  add("bytes in a file", cost.bytes, cost.dense_bytes, "");
  add("multiply-accumulates", cost.macs, cost.dense_macs, "");
  add("forward pass", cost.seconds, cost.dense_seconds, " s");
  return lines;
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
  for (const auto& text : cost_lines(cost)) {
    out += text + "\n";
  }
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
  for (const auto& text : cost_lines(cost)) {
    row("td", text, "", "", "", "", "");
  }
  for (const auto& other : left_alone) {
    row("td", other.name, "", other.elements, "", "", "left alone: " + other.reason);
  }
  return out + "</table>";
}

}  // namespace rarefy::pruning
