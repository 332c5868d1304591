#include <fmt/format.h>
#include <rarefy/graph/cost.h>
#include <rarefy/graph/svg.h>

#include <algorithm>
#include <array>
#include <set>

#include "dataflow.h"
#include "html.h"
#include "operators.h"
#include "svg_layout.h"
#include "text.h"

namespace rarefy::graph {
namespace {

constexpr double kCharacter = 6.3;  // width of one at the font size of 11
constexpr double kLayerGap = 24;
constexpr double kMargin = 16;
constexpr double kLegend = 26;
constexpr size_t kLongestModule = 26;

struct Style {
  const char* meaning;
  const char* fill;
  const char* stroke;
};

enum Look { product, attends, looks_up, norm, elementwise, pools, moves, unknown, end, looks };

const std::array<Style, looks> kStyles{{{"product", "#cfe1f6", "#3b6ea8"},
                                        {"attention", "#ddd6f3", "#6a51a3"},
                                        {"lookup", "#cdebea", "#2f8080"},
                                        {"normalization", "#d5ecd0", "#4b8b3b"},
                                        {"element-wise", "#fdebc8", "#b98a26"},
                                        {"pooling, reduction, softmax", "#f5d6e6", "#a8518a"},
                                        {"movement", "#eeeeee", "#8c8c8c"},
                                        {"not known", "#ffffff", "#c0392b"},
                                        {"input, output", "#3c4650", "#3c4650"}}};

Look look_of(const Node& node) {
  switch (kind_of(node.op)) {
    case Kind::linear:
    case Kind::addmm:
    case Kind::matmul:
    case Kind::baddbmm:
    case Kind::convolution:
    case Kind::transposed_convolution:
    case Kind::general_convolution:
    case Kind::recurrent:
      return product;
    case Kind::attention:
      return attends;
    case Kind::embedding:
    case Kind::index:
      return looks_up;
    case Kind::batch_norm:
    case Kind::instance_norm:
    case Kind::layer_norm:
    case Kind::group_norm:
    case Kind::rms_norm:
    case Kind::weight_norm:
      return norm;
    case Kind::elementwise:
    case Kind::glu:
    case Kind::prelu:
    case Kind::fake_quantize:
      return elementwise;
    case Kind::reduction:
    case Kind::along:
    case Kind::spatial1:
    case Kind::spatial2:
    case Kind::spatial3:
      return pools;
    case Kind::unknown:
      return unknown;
    default:
      return moves;
  }
}

struct Box {
  Look look = end;
  std::string name, macs, module, shape, tooltip;
  std::vector<int64_t> nodes;  // drawn as this one
  double width = 0, height = 0;
};

double text_width(const std::string& text) {
  return kCharacter *
         static_cast<double>(std::count_if(text.begin(), text.end(), [](char c) { return (c & 0xC0) != 0x80; }));
}

/// The end of a path says more than its start.
std::string shortened(const std::string& module) {
  return module.size() <= kLongestModule ? module
                                         : fmt::format("\u2026{}", module.substr(module.size() - kLongestModule + 1));
}

class Drawing {
 public:
  Drawing(const Graph& graph, const SvgOptions& options) : graph_(graph), flow_(dataflow(graph)) {
    choose(options.constants);
    make_boxes(options.movement);
    std::vector<double> widths;
    for (auto& box : boxes_) {
      measure(box);
      widths.push_back(box.width);
    }
    layout_ = lay_out(widths, edges_);
  }

  std::string svg() {
    std::vector<double> top, bottom;
    double y = kMargin + kLegend;
    double left = 0, right = 0;
    for (const auto& layer : layout_.layers) {
      double height = 0;
      for (auto id : layer) {
        const auto& item = layout_.items[id];
        height = std::max(height, item.box >= 0 ? boxes_[item.box].height : 0);
        left = std::min(left, item.x - item.width / 2);
        right = std::max(right, item.x + item.width / 2);
      }
      top.push_back(y);
      bottom.push_back(y + height);
      y += height + kLayerGap;
    }
    for (auto& item : layout_.items) {
      item.x += kMargin - left;
    }
    const auto [legend, legend_width] = make_legend();
    const double width = std::max(right - left, legend_width) + 2 * kMargin;
    const double height = y - kLayerGap + kMargin;

    std::string edges, boxes;
    for (size_t l = 0; l < layout_.layers.size(); ++l) {
      for (auto id : layout_.layers[l]) {
        const auto& item = layout_.items[id];
        if (item.box >= 0) {
          boxes += draw(boxes_[item.box], item.x, (top[l] + bottom[l]) / 2);
          const double start = (top[l] + bottom[l] + boxes_[item.box].height) / 2;
          follow(id, l, fmt::format("M{:.1f} {:.1f}V{:.1f}", item.x, start, bottom[l]), false, top, bottom, edges);
        }
      }
    }
    return fmt::format(
               "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{0:.0f}\" height=\"{1:.0f}\" viewBox=\"0 0 {0:.0f} {1:.0f}\" "
               "font-family=\"Helvetica, Arial, sans-serif\" font-size=\"11\">\n"
               "<style>.edge{{fill:none;stroke:#9aa3ab;stroke-width:1.2}}.far{{stroke:#c8642d;stroke-width:1.8}}"
               ".dim{{fill:#5c6670}}</style>\n"
               "<defs><marker id=\"rarefy-arrow\" viewBox=\"0 0 8 8\" refX=\"7\" refY=\"4\" markerWidth=\"8\" markerHeight=\"8\" "
               "markerUnits=\"userSpaceOnUse\" orient=\"auto\"><path d=\"M0 1L7 4L0 7z\" fill=\"#6b747c\"/></marker></defs>\n"
               "<rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n",
               width, height) +
           legend + edges + boxes + "</svg>\n";
  }

 private:
  /// The nodes to draw: what makes or changes a tensor, and follows from an input.
  void choose(bool constants) {
    drawn_.assign(graph_.nodes.size(), 0);
    std::vector<char> dependent(graph_.nodes.size(), 0);
    for (auto index : graph_.schedule) {
      const Node& node = graph_.nodes[index];
      for (const auto& read : flow_.reads[index]) {
        dependent[index] |=
            graph_.values[read.value].origin == Origin::input || (read.writer >= 0 && dependent[read.writer]);
      }
      const bool makes = std::any_of(node.outputs.begin(), node.outputs.end(),
                                     [&](int64_t id) { return id >= 0 && flow_.maker[id] == index; });
      drawn_[index] =
          (makes || !flow_.written[index].empty()) && (constants || dependent[index] || graph_.inputs.empty());
    }
  }

  /// The nodes that a node reads from, as far as they are drawn.
  std::set<int64_t> sources(int64_t index) const {
    std::set<int64_t> out;
    for (const auto& read : flow_.reads[index]) {
      if (read.writer >= 0 && drawn_[read.writer]) {
        out.insert(read.writer);
      }
    }
    return out;
  }

  bool only_moves(int64_t index) const { return look_of(graph_.nodes[index]) == moves && flow_.written[index].empty(); }

  void make_boxes(bool movement) {
    std::vector<int64_t> box_of_value(graph_.values.size(), -1), box_of_node(graph_.nodes.size(), -1);
    std::vector<int64_t> readers(graph_.nodes.size(), 0);
    for (auto index : graph_.schedule) {
      for (auto source : drawn_[index] ? sources(index) : std::set<int64_t>{}) {
        ++readers[source];
      }
    }
    for (auto writer : flow_.output_writers) {
      if (writer >= 0) {
        ++readers[writer];
      }
    }
    for (auto id : graph_.inputs) {
      box_of_value[id] = add_end(graph_.values[id].name, id);
    }
    std::vector<int64_t> macs(graph_.nodes.size(), 0);
    for (const auto& item : count_costs(graph_).operators) {
      macs[item.node] = item.cost.macs;
    }
    for (auto index : graph_.schedule) {
      if (!drawn_[index]) {
        continue;
      }
      const auto from = sources(index);
      std::set<int64_t> boxes;
      for (auto source : from) {
        boxes.insert(box_of_node[source]);
      }
      for (const auto& read : flow_.reads[index]) {
        if (read.writer < 0 && box_of_value[read.value] >= 0) {
          boxes.insert(box_of_value[read.value]);
        }
      }
      if (!movement && only_moves(index) && from.size() == 1 && boxes.size() == 1 && only_moves(*from.begin()) &&
          readers[*from.begin()] == 1) {
        box_of_node[index] = *boxes.begin();
        extend(boxes_[*boxes.begin()], index);
        continue;
      }
      box_of_node[index] = static_cast<int64_t>(boxes_.size());
      for (auto box : boxes) {
        edges_.emplace_back(box, box_of_node[index]);
      }
      boxes_.push_back(make_box(index, macs[index]));
    }
    for (size_t i = 0; i < graph_.outputs.size(); ++i) {
      const int64_t id = graph_.outputs[i], writer = flow_.output_writers[i];
      const int64_t source = writer >= 0 ? box_of_node[writer] : box_of_value[id];
      const int64_t box = add_end(graph_.outputs.size() == 1 ? "output" : fmt::format("output.{}", i), id);
      if (source >= 0) {
        edges_.emplace_back(source, box);
      }
    }
  }

  int64_t add_end(const std::string& name, int64_t id) {
    Box box;
    box.name = name;
    box.shape = shape_string(graph_.values[id]);
    box.tooltip = name + " " + box.shape;
    boxes_.push_back(box);
    return static_cast<int64_t>(boxes_.size()) - 1;
  }

  std::string line(int64_t index) const {
    const Node& node = graph_.nodes[index];
    const auto constants = constants_string(node);
    return fmt::format("#{} {}({}){}{}", index, node.describe(), tensors_string(graph_, node),
                       constants.empty() ? "" : " ", constants);
  }

  std::string result_shape(int64_t index) const {
    const Node& node = graph_.nodes[index];
    const int64_t id = node.outputs.empty() ? flow_.written[index].at(0) : node.outputs[0];
    const auto shape = id < 0 ? std::string() : shape_string(graph_.values[id]);
    return node.outputs.size() > 1 ? fmt::format("{} \u00d7 {}", node.outputs.size(), shape) : shape;
  }

  Box make_box(int64_t index, int64_t macs) const {
    const Node& node = graph_.nodes[index];
    Box box;
    box.look = look_of(node);
    box.name = short_name(node);
    box.macs = macs > 0 ? count_string(static_cast<double>(macs)) + " MACs" : "";
    box.module = shortened(node.module);
    box.shape = result_shape(index);
    box.tooltip = line(index);
    box.nodes = {index};
    return box;
  }

  void extend(Box& box, int64_t index) const {
    box.nodes.push_back(index);
    box.name = box.nodes.size() <= 3 ? box.name + " \u00b7 " + short_name(graph_.nodes[index])
                                     : fmt::format("{} movements", box.nodes.size());
    box.shape = result_shape(index);
    box.tooltip += '\n';
    box.tooltip += line(index);
  }

  static bool two_lines(const Box& box) { return box.look != moves && box.look != elementwise && box.look != end; }

  static void measure(Box& box) {
    const double first = text_width(box.name) * 1.06, gap = 14, padding = 16;
    if (two_lines(box)) {
      box.width =
          std::max(first + gap + text_width(box.macs), text_width(box.module) + gap + text_width(box.shape)) + padding;
      box.height = 36;
    } else {
      box.width = first + gap + text_width(box.shape) + padding;
      box.height = 20;
    }
    box.width = std::max(box.width, 130.0);
  }

  static std::string draw(const Box& box, double x, double y) {
    const auto& style = kStyles[box.look];
    const double left = x - box.width / 2, top = y - box.height / 2, right = left + box.width - 8;
    auto out = fmt::format(
        "<g><title>{}</title><rect class=\"box\" x=\"{:.1f}\" y=\"{:.1f}\" width=\"{:.1f}\" height=\"{:.1f}\" rx=\"{}\" "
        "fill=\"{}\" stroke=\"{}\"{}/>",
        escaped(box.tooltip), left, top, box.width, box.height, box.look == end ? 10 : 4, style.fill, style.stroke,
        box.look == unknown ? " stroke-dasharray=\"4 3\"" : "");
    const auto text = [&](double at, double line, const char* attributes, const std::string& content) {
      if (!content.empty()) {
        out +=
            fmt::format("<text x=\"{:.1f}\" y=\"{:.1f}\" {}>{}</text>", at, top + line, attributes, escaped(content));
      }
    };
    const char* dim = box.look == end ? "text-anchor=\"end\" fill=\"#dfe4e8\"" : "text-anchor=\"end\" class=\"dim\"";
    text(left + 8, 14, box.look == end ? "fill=\"#ffffff\" font-weight=\"bold\"" : "font-weight=\"bold\"", box.name);
    if (two_lines(box)) {
      text(right, 14, "text-anchor=\"end\"", box.macs);
      text(left + 8, 29, "class=\"dim\"", box.module);
      text(right, 29, dim, box.shape);
    } else {
      text(right, 14, dim, box.shape);
    }
    return out + "</g>\n";
  }

  /// Draws the edges from an item of layer `l` on: curves in the gap between two layers, straight down inside of a layer.
  void follow(int64_t id, size_t l, const std::string& path, bool far, const std::vector<double>& top,
              const std::vector<double>& bottom, std::string& out) const {
    const auto& item = layout_.items[id];
    for (auto next : item.below) {
      const auto& target = layout_.items[next];
      const bool passes = target.box < 0;
      const double x = passes ? target.x : entry(target, id);
      const double middle = (bottom[l] + top[l + 1]) / 2;
      auto further =
          path + fmt::format("C{:.1f} {:.1f} {:.1f} {:.1f} {:.1f} {:.1f}", item.x, middle, x, middle, x, top[l + 1]);
      if (passes) {
        follow(next, l + 1, further + fmt::format("V{:.1f}", bottom[l + 1]), true, top, bottom, out);
      } else {
        const double end = (top[l + 1] + bottom[l + 1] - boxes_[target.box].height) / 2;
        out += fmt::format("<path class=\"edge{}\" d=\"{}V{:.1f}\" marker-end=\"url(#rarefy-arrow)\"/>\n",
                           far ? " far" : "", further, end);
      }
    }
  }

  /// Edges come into a box side by side, in the order of where they come from.
  double entry(const Layout::Item& target, int64_t from) const {
    auto above = target.above;
    std::sort(above.begin(), above.end(),
              [&](int64_t a, int64_t b) { return layout_.items[a].x < layout_.items[b].x; });
    const auto place = static_cast<double>(std::find(above.begin(), above.end(), from) - above.begin());
    const auto count = static_cast<double>(above.size());
    const double step = std::min(22.0, (target.width - 20) / std::max(1.0, count - 1));
    return target.x + (place - (count - 1) / 2) * step;
  }

  /// The kinds that occur, and how wide that is.
  std::pair<std::string, double> make_legend() const {
    std::string out;
    double x = kMargin;
    for (int look = 0; look < looks; ++look) {
      if (std::none_of(boxes_.begin(), boxes_.end(), [&](const Box& box) { return box.look == look; })) {
        continue;
      }
      const auto& style = kStyles[look];
      out += fmt::format(
          "<rect x=\"{:.1f}\" y=\"12\" width=\"10\" height=\"10\" rx=\"2\" fill=\"{}\" stroke=\"{}\"/>"
          "<text x=\"{:.1f}\" y=\"21\" class=\"dim\">{}</text>\n",
          x, style.fill, style.stroke, x + 15, style.meaning);
      x += 15 + 1.05 * text_width(style.meaning) + 18;
    }
    return {out, x - kMargin};
  }

  const Graph& graph_;
  Dataflow flow_;
  std::vector<char> drawn_;  // of each node
  std::vector<Box> boxes_;
  std::vector<std::pair<int64_t, int64_t>> edges_;
  Layout layout_;
};

}  // namespace

std::string to_svg(const Graph& graph, const SvgOptions& options) { return Drawing(graph, options).svg(); }

}  // namespace rarefy::graph
