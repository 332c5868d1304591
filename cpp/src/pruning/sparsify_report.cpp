#include <fmt/format.h>
#include <rarefy/pruning/sparsify.h>

#include <algorithm>

#include "html.h"

namespace rarefy::pruning {
namespace {

std::string samples_text(const std::vector<int64_t>& samples) {
  std::string text;
  for (size_t i = 0; i < samples.size() && i < 3; ++i) {
    text += (i == 0 ? "" : ", ") + std::to_string(samples[i]);
  }
  return text + (samples.size() > 3 ? fmt::format(" and {} more", samples.size() - 3) : "");
}

std::string title(const SparsifyReport& report) {
  return fmt::format("{} of {} linear layers are sparse", report.sparse(), report.layers.size());
}

std::string milliseconds(double value) { return value > 0 ? fmt::format("{:.4g}", value) : std::string("-"); }

}  // namespace

int64_t SparsifyReport::sparse() const {
  return std::count_if(layers.begin(), layers.end(), [](const auto& layer) { return layer.sparse; });
}

std::string SparsifyReport::to_string() const {
  size_t width = 5, samples_width = 7;
  for (const auto& layer : layers) {
    width = std::max(width, layer.name.size());
    samples_width = std::max(samples_width, samples_text(layer.samples).size());
  }
  std::string out = title(*this) + "\n";
  out += fmt::format("  {:<{}}  {:>8}  {:>{}}  {:>10}  {:>10}  why\n", "layer", width, "sparsity", "samples",
                     samples_width, "dense ms", "sparse ms");
  for (const auto& layer : layers) {
    out += fmt::format("  {:<{}}  {:>8.3f}  {:>{}}  {:>10}  {:>10}  {}: {}\n", layer.name, width, layer.sparsity,
                       samples_text(layer.samples), samples_width, milliseconds(layer.dense_milliseconds),
                       milliseconds(layer.sparse_milliseconds), layer.sparse ? "sparse" : "dense", layer.reason);
  }
  return out;
}

std::string SparsifyReport::to_html() const {
  std::string out = fmt::format(
      "<table><caption>{}</caption><tr><th>layer</th><th>sparsity</th><th>samples</th><th>dense ms</th>"
      "<th>sparse ms</th><th></th><th>why</th></tr>",
      title(*this));
  for (const auto& layer : layers) {
    out += fmt::format("<tr><td>{}</td><td>{:.3f}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td></tr>",
                       escaped(layer.name), layer.sparsity, samples_text(layer.samples),
                       milliseconds(layer.dense_milliseconds), milliseconds(layer.sparse_milliseconds),
                       layer.sparse ? "sparse" : "dense", escaped(layer.reason));
  }
  return out + "</table>";
}

}  // namespace rarefy::pruning
