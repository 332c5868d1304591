#include <fmt/format.h>
#include <rarefy/pruning/calibration_report.h>

#include <algorithm>
#include <array>

#include "html.h"

namespace rarefy::pruning {
namespace {

constexpr size_t kColumns = 8;
using Line = std::array<std::string, kColumns>;

const Line kHead{"weight", "shape", "sparsity", "error", "damping", "samples", "seconds", "note"};

double fraction(int64_t part, int64_t whole) {
  return whole == 0 ? 0.0 : static_cast<double>(part) / static_cast<double>(whole);
}

std::string title(const CalibrationReport& report) {
  return fmt::format("{}: sparsity {:.4f} of {} weights in {:.1f} s, at most {:.1f} MiB of statistics and copies",
                     report.method, report.sparsity(), report.elements(), report.seconds,
                     static_cast<double>(report.peak_bytes) / 1048576.0);
}

Line line_of(const CalibratedTensor& tensor) {
  std::string shape;
  for (const int64_t size : tensor.shape) {
    shape += fmt::format("{}{}", shape.empty() ? "" : "x", size);
  }
  return {tensor.name,
          shape,
          fmt::format("{:.4f}", tensor.sparsity()),
          tensor.error.has_value() ? fmt::format("{:.5f}", *tensor.error) : "-",
          tensor.damping > 0.0 ? fmt::format("{:g}", tensor.damping) : "-",
          fmt::format("{}", tensor.samples),
          fmt::format("{:.2f}", tensor.seconds),
          tensor.note};
}

Line total_of(const CalibrationReport& report) {
  double seconds = 0;
  for (const auto& tensor : report.tensors) {
    seconds += tensor.seconds;
  }
  return {"total", "", fmt::format("{:.4f}", report.sparsity()), "", "", "", fmt::format("{:.2f}", seconds), ""};
}

}  // namespace

double CalibratedTensor::sparsity() const { return fraction(pruned, elements); }

int64_t CalibrationReport::elements() const {
  int64_t sum = 0;
  for (const auto& tensor : tensors) {
    sum += tensor.elements;
  }
  return sum;
}

int64_t CalibrationReport::pruned() const {
  int64_t sum = 0;
  for (const auto& tensor : tensors) {
    sum += tensor.pruned;
  }
  return sum;
}

double CalibrationReport::sparsity() const { return fraction(pruned(), elements()); }

std::string CalibrationReport::to_string() const {
  std::vector<Line> lines{kHead};
  for (const auto& tensor : tensors) {
    lines.push_back(line_of(tensor));
  }
  lines.push_back(total_of(*this));
  std::array<size_t, kColumns> widths{};
  for (const auto& line : lines) {
    for (size_t i = 0; i < kColumns; ++i) {
      widths.at(i) = std::max(widths.at(i), line.at(i).size());
    }
  }
  std::string out = fmt::format("CalibrationReport: {}\n", title(*this));
  for (const auto& line : lines) {
    std::string text;
    for (size_t i = 0; i < kColumns; ++i) {
      const bool is_text = i < 2 || i + 1 == kColumns;
      text += is_text ? fmt::format("{:<{}}  ", line.at(i), widths.at(i))
                      : fmt::format("{:>{}}  ", line.at(i), widths.at(i));
    }
    text.erase(text.find_last_not_of(' ') + 1);
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

std::string CalibrationReport::to_html() const {
  std::string out = fmt::format("<p><b>CalibrationReport</b>: {}</p>\n<table>\n", escaped(title(*this)));
  const auto row = [&](const char* cell, const Line& line) {
    out += "<tr>";
    for (const auto& text : line) {
      out += fmt::format("<{0}>{1}</{0}>", cell, escaped(text));
    }
    out += "</tr>\n";
  };
  row("th", kHead);
  for (const auto& tensor : tensors) {
    row("td", line_of(tensor));
  }
  row("th", total_of(*this));
  for (const auto& other : left_alone) {
    row("td", {other.name, "", "", "", "", "", "", "left alone: " + other.reason});
  }
  return out + "</table>";
}

}  // namespace rarefy::pruning
