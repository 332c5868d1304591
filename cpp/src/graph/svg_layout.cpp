#include "svg_layout.h"

#include <algorithm>
#include <limits>
#include <numeric>

namespace rarefy::graph {
namespace {

constexpr double kEdgeWidth = 6;
constexpr double kGap = 18;  // between neighbours in a layer
constexpr int kOrderSweeps = 16;
constexpr int kPlaceSweeps = 20;

class Layered {
 public:
  Layered(const std::vector<double>& widths, const std::vector<std::pair<int64_t, int64_t>>& edges)
      : boxes_(static_cast<int64_t>(widths.size())) {
    layout_.items.resize(widths.size());
    for (size_t i = 0; i < widths.size(); ++i) {
      layout_.items[i].box = static_cast<int64_t>(i);
      layout_.items[i].width = widths[i];
    }
    assign_layers(edges);
    route(edges);
    order();
    place();
  }

  Layout take() { return std::move(layout_); }

 private:
  using Item = Layout::Item;

  void assign_layers(const std::vector<std::pair<int64_t, int64_t>>& edges) {
    std::vector<std::vector<int64_t>> from(boxes_), to(boxes_);
    for (const auto& [a, b] : edges) {
      to[a].push_back(b);
      from[b].push_back(a);
    }
    layer_.assign(boxes_, 0);
    for (int64_t b = 0; b < boxes_; ++b) {
      for (auto a : from[b]) {
        layer_[b] = std::max(layer_[b], layer_[a] + 1);
      }
    }
    // What reads nothing stands right above its first reader.
    for (int64_t a = boxes_ - 1; a >= 0; --a) {
      if (from[a].empty() && !to[a].empty()) {
        int64_t first = std::numeric_limits<int64_t>::max();
        for (auto b : to[a]) {
          first = std::min(first, layer_[b]);
        }
        layer_[a] = first - 1;
      }
    }
    int64_t count = 1;
    for (auto layer : layer_) {
      count = std::max(count, layer + 1);
    }
    layout_.layers.resize(count);
    for (int64_t b = 0; b < boxes_; ++b) {
      layout_.layers[layer_[b]].push_back(b);
    }
  }

  void connect(int64_t above, int64_t below) {
    layout_.items[above].below.push_back(below);
    layout_.items[below].above.push_back(above);
  }

  void route(const std::vector<std::pair<int64_t, int64_t>>& edges) {
    std::vector<std::vector<int64_t>> to(boxes_);
    for (const auto& [a, b] : edges) {
      if (std::find(to[a].begin(), to[a].end(), b) == to[a].end()) {
        to[a].push_back(b);
      }
    }
    for (int64_t a = 0; a < boxes_; ++a) {
      std::sort(to[a].begin(), to[a].end(), [&](int64_t p, int64_t q) { return layer_[p] < layer_[q]; });
      int64_t at = a, layer = layer_[a];
      for (auto b : to[a]) {
        for (; layer < layer_[b] - 1; ++layer) {
          const auto next = static_cast<int64_t>(layout_.items.size());
          Item item;
          item.source = a;
          item.width = kEdgeWidth;
          layout_.items.push_back(item);
          layout_.layers[layer + 1].push_back(next);
          connect(at, next);
          at = next;
        }
        connect(at, b);
      }
    }
  }

  // --- the order within the layers ---

  void number() {
    place_.resize(layout_.items.size());
    for (const auto& layer : layout_.layers) {
      for (size_t i = 0; i < layer.size(); ++i) {
        place_[layer[i]] = static_cast<double>(i);
      }
    }
  }

  /// Edges that cross between all pairs of neighbouring layers.
  int64_t crossings() const {
    int64_t count = 0;
    for (const auto& layer : layout_.layers) {
      std::vector<double> ends;  // of the edges, from left to right by their upper ends
      for (auto id : layer) {
        std::vector<double> mine;
        for (auto below : layout_.items[id].below) {
          mine.push_back(place_[below]);
        }
        std::sort(mine.begin(), mine.end());
        for (auto end : mine) {
          count +=
              static_cast<int64_t>(std::count_if(ends.begin(), ends.end(), [&](double other) { return other > end; }));
        }
        ends.insert(ends.end(), mine.begin(), mine.end());
      }
    }
    return count;
  }

  void sort_layer(std::vector<int64_t>& layer, bool by_above) {
    std::vector<std::pair<double, int64_t>> keys;
    for (size_t i = 0; i < layer.size(); ++i) {
      const auto& item = layout_.items[layer[i]];
      const auto& neighbours = by_above ? item.above : item.below;
      double sum = 0;
      for (auto other : neighbours) {
        sum += place_[other];
      }
      keys.emplace_back(neighbours.empty() ? static_cast<double>(i) : sum / static_cast<double>(neighbours.size()),
                        layer[i]);
    }
    std::stable_sort(keys.begin(), keys.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
    for (size_t i = 0; i < layer.size(); ++i) {
      layer[i] = keys[i].second;
      place_[layer[i]] = static_cast<double>(i);
    }
  }

  void order() {
    number();
    auto best = layout_.layers;
    int64_t fewest = crossings();
    for (int sweep = 0; sweep < kOrderSweeps && fewest > 0; ++sweep) {
      const auto count = static_cast<int64_t>(layout_.layers.size());
      for (int64_t i = 0; i < count; ++i) {
        const bool down = sweep % 2 == 0;
        sort_layer(layout_.layers[down ? i : count - 1 - i], down);
      }
      if (const auto now = crossings(); now < fewest) {
        fewest = now;
        best = layout_.layers;
      }
    }
    layout_.layers = std::move(best);
  }

  // --- the places within the layers ---

  bool is_box(int64_t id) const { return layout_.items[id].box >= 0; }

  /// The mean of the neighbours, where those of the item's own kind (boxes, places of edges) count `own` times.
  double mean(const Item& item, bool above, bool below, double own) const {
    double sum = 0, weights = 0;
    for (const auto* neighbours : {above ? &item.above : nullptr, below ? &item.below : nullptr}) {
      for (size_t i = 0; neighbours && i < neighbours->size(); ++i) {
        const auto& other = layout_.items[(*neighbours)[i]];
        const double w = (other.box >= 0) == (item.box >= 0) ? own : 1.0;
        sum += w * other.x;
        weights += w;
      }
    }
    return weights > 0 ? sum / weights : item.x;
  }

  /// The places nearest to the wanted ones (least squares) at which neighbours keep their distance: shifted by the
  /// distances, these are the nearest ascending numbers, found by pooling neighbours that are out of order. Boxes weigh
  /// more than the places of edges, which so go around them.
  template <typename Wanted>
  void place_layer(const std::vector<int64_t>& layer, const Wanted& wanted) {
    struct Pool {
      double sum, weight;
      size_t count;
    };
    std::vector<Pool> pools;
    std::vector<double> shift(layer.size(), 0);
    for (size_t i = 0; i < layer.size(); ++i) {
      const auto& item = layout_.items[layer[i]];
      if (i > 0) {
        shift[i] = shift[i - 1] + (layout_.items[layer[i - 1]].width + item.width) / 2 + kGap;
      }
      const double weight = item.box >= 0 ? 1e4 : 1.0;
      pools.push_back({weight * (wanted(item) - shift[i]), weight, 1});
      while (pools.size() > 1) {
        auto& last = pools.back();
        auto& before = pools[pools.size() - 2];
        if (before.sum / before.weight <= last.sum / last.weight) {
          break;
        }
        before = {before.sum + last.sum, before.weight + last.weight, before.count + last.count};
        pools.pop_back();
      }
    }
    size_t at = 0;
    for (const auto& pool : pools) {
      for (size_t k = 0; k < pool.count; ++k, ++at) {
        layout_.items[layer[at]].x = pool.sum / pool.weight + shift[at];
      }
    }
  }

  template <typename Wanted>
  void sweep(bool down, const Wanted& wanted) {
    const auto count = static_cast<int64_t>(layout_.layers.size());
    for (int64_t i = 0; i < count; ++i) {
      place_layer(layout_.layers[down ? i : count - 1 - i], wanted);
    }
  }

  void place() {
    for (int i = 0; i < kPlaceSweeps; ++i) {
      const bool down = i % 2 == 0;
      sweep(down, [&](const Item& item) { return mean(item, down || i > 1, !down || i > 1, 8.0); });
    }
    // Boxes right below those that they read; what starts something new, above its readers.
    sweep(true, [&](const Item& item) {
      return item.above.empty() ? mean(item, false, true, 1e3) : mean(item, true, false, 1e3);
    });
    // The places of an edge below each other.
    for (const bool down : {false, true, false}) {
      sweep(down, [&](const Item& item) {
        const auto& neighbours = down ? item.above : item.below;
        const bool goes_on = std::any_of(neighbours.begin(), neighbours.end(), [&](int64_t id) { return !is_box(id); });
        return item.box >= 0 || !goes_on ? item.x : mean(item, down, !down, 1e6);
      });
    }
  }

  int64_t boxes_;
  Layout layout_;
  std::vector<int64_t> layer_;  // of each box
  std::vector<double> place_;   // of each item in its layer
};

}  // namespace

Layout lay_out(const std::vector<double>& widths, const std::vector<std::pair<int64_t, int64_t>>& edges) {
  return Layered(widths, edges).take();
}

}  // namespace rarefy::graph
