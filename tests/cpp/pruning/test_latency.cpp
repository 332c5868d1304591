#include <rarefy/graph/record.h>
#include <rarefy/pruning/latency.h>
#include <torch/torch.h>

#include <cmath>
#include <limits>
#include <numeric>

#include "catch.h"

using namespace rarefy::pruning;
using namespace rarefy::graph;
using Catch::Matchers::ContainsSubstring;

namespace {

/// A chain of 3x3 convolutions with a ReLU behind each, recorded by hand: widths[0] is the image's channels, and each
/// width between the first and the last one is a group.
struct Chain {
  Graph graph;
  Structure structure;
  std::vector<at::Tensor> weights;
  at::Tensor image;

  explicit Chain(const std::vector<int64_t>& widths, int64_t side = 8, const std::string& kind = "conv2d")
      : image(at::randn({1, widths[0], side, side})) {
    int64_t x = add(Origin::input, "input.0", image.sizes().vec());
    for (size_t i = 0; i + 1 < widths.size(); ++i) {
      weights.push_back(at::randn({widths[i + 1], widths[i], 3, 3}));
      const auto w = add(Origin::parameter, "conv" + std::to_string(i) + ".weight", weights[i].sizes().vec());
      graph.values.back().tensor = weights[i];
      Node conv;
      conv.op = {"aten::" + kind, ""};
      using IValue = c10::IValue;
      const std::vector<int64_t> one = {1, 1};
      conv.inputs = {IValue(), IValue(), IValue(), IValue(one), IValue(one), IValue(one), IValue(int64_t{1})};
      conv.input_values = {{x}, {w}, {-1}, {}, {}, {}, {}};
      x = add(Origin::intermediate, "", {1, widths[i + 1], side, side});
      conv.outputs = {x};
      push(conv);
      Node relu;
      relu.op = {"aten::relu", ""};
      relu.inputs = {IValue()};
      relu.input_values = {{x}};
      x = add(Origin::intermediate, "", {1, widths[i + 1], side, side});
      relu.outputs = {x};
      push(relu);
      if (i > 0) {
        structure.groups.back().members.push_back(member(w, i, 1, widths[i]));
      }
      if (i + 2 < widths.size()) {
        structure.groups.push_back({"conv" + std::to_string(i), widths[i + 1], {member(w, i, 0, widths[i + 1])}});
      }
    }
  }

  at::Tensor forward() const {
    auto x = image;
    for (const auto& weight : weights) {
      x = at::conv2d(x, weight, {}, at::IntArrayRef{1, 1}, at::IntArrayRef{1, 1}, at::IntArrayRef{1, 1}).relu();
    }
    return x;
  }

  /// The same chain as it is recorded when it runs.
  Graph record() const {
    std::vector<NamedTensor> tensors = {{"input.0", image, Origin::input}};
    for (size_t i = 0; i < weights.size(); ++i) {
      tensors.push_back({"conv" + std::to_string(i) + ".weight", weights[i], Origin::parameter});
    }
    return rarefy::graph::record([&] { return std::vector{forward()}; }, tensors);
  }

  int64_t add(Origin origin, const std::string& name, const std::vector<int64_t>& sizes) {
    graph.values.emplace_back();
    graph.values.back().origin = origin;
    graph.values.back().name = name;
    graph.values.back().sizes = sizes;
    return static_cast<int64_t>(graph.values.size()) - 1;
  }
  void push(const Node& node) {
    graph.schedule.push_back(static_cast<int64_t>(graph.nodes.size()));
    graph.nodes.push_back(node);
  }
  static Member member(int64_t value, size_t layer, int64_t dim, int64_t units) {
    Member out{"conv" + std::to_string(layer) + ".weight", value, dim, dim == 0 ? Role::output : Role::input, {}};
    out.unit_of_index.resize(static_cast<size_t>(units));
    std::iota(out.unit_of_index.begin(), out.unit_of_index.end(), 0);
    return out;
  }
};

/// Kernels that compute 16 channels at a time: time only falls where a whole 16 is gone.
double stepped(const Node&, int64_t outputs, int64_t inputs) {
  const auto blocks = [](int64_t n) { return static_cast<double>((n + 15) / 16); };
  return 0.1 * blocks(outputs) * blocks(inputs);
}

LatencyOptions injected() {
  LatencyOptions options;
  options.time_operator = stepped;
  return options;
}

/// Convolutions 1.6 ms each, ReLUs 0.1, and 0.5 that nothing explains.
LatencyTable table_of(const Chain& chain, const LatencyOptions& options = injected()) {
  std::vector<double> times;
  double whole = 0.5;
  for (size_t i = 0; i < chain.graph.nodes.size(); ++i) {
    times.push_back(i % 2 == 0 ? 1.6 : 0.1);
    whole += times.back();
  }
  return measure_latency(chain.graph, chain.structure, whole, times, options);
}

std::vector<at::Tensor> equal_scores(const LatencyTable& table) {
  std::vector<at::Tensor> out;
  for (auto units : table.units) {
    out.push_back(at::ones({units}));
  }
  return out;
}

}  // namespace

TEST_CASE("Widths to measure are multiples of what kernels compute at once, as many as asked", "[latency]") {
  const auto widths = [](int64_t units, LatencyOptions options) {
    return table_of(Chain({3, units, 8}), options).widths.at(0);
  };
  CHECK(widths(64, injected()) == Widths{8, 16, 24, 32, 40, 48, 56, 64});
  CHECK(widths(20, injected()) == Widths{2, 4, 6, 8, 10, 12, 14, 16, 18, 20});
  CHECK(widths(100, injected()).back() == 100);
  CHECK(widths(2048, injected()).size() == 16);
  auto options = injected();
  options.points = 4;
  CHECK(widths(64, options) == Widths{16, 32, 48, 64});
  options = injected();
  options.round_to = 12;
  CHECK(widths(64, options) == Widths{24, 48, 64});
  CHECK(widths(20, options) == Widths{12, 20});
  options = injected();
  options.smallest = {30};
  CHECK(widths(64, options) == Widths{32, 40, 48, 56, 64});
}

TEST_CASE("The table predicts what was measured, and in between linearly", "[latency]") {
  const Chain chain({3, 64, 64, 8});
  const auto table = table_of(chain);
  CHECK(table.whole == Approx(0.5 + 3 * 1.7));
  CHECK(table.rest == Approx(0.5));
  CHECK(table.predict({64, 64}) == Approx(table.whole));
  // conv0 has 3 inputs and 64 outputs, conv1 64 x 64, conv2 64 x 8; the last ReLU is that of the 8.
  const double relu = 0.1;
  CHECK(table.predict({32, 64}) == Approx(0.5 + 1.6 / 2 + 1.6 / 2 + 1.6 + (relu / 2 + table.call / 2) + 2 * relu));
  CHECK(table.predict({64, 16}) == Approx(0.5 + 1.6 + 1.6 / 4 + 1.6 / 4 + 2 * relu + (relu / 4 + table.call * 3 / 4)));
  CHECK(table.predict({64, 52}) > table.predict({64, 48}));  // between the points 48 and 56
  CHECK(table.predict({64, 52}) < table.predict({64, 56}));
  CHECK_THROWS_WITH(table.predict({64}), ContainsSubstring("a width for each of the 2 groups, got 1"));
}

TEST_CASE("Parts that take longer one by one than together are scaled to the whole", "[latency]") {
  const Chain chain({3, 64, 8});
  const auto table = measure_latency(chain.graph, chain.structure, 2.0, {2.0, 0.0, 2.0, 0.0}, injected());
  CHECK(table.rest == 0.0);
  CHECK(table.predict({64}) == Approx(2.0));
  CHECK(table.predict({32}) == Approx(1.0));
}

TEST_CASE("A width that saves no time is not worth having", "[latency]") {
  const auto table = table_of(Chain({3, 64, 8}));
  // The steps are 16 wide. ReLU alone falls at 56, by less than noise.
  CHECK(useful_widths(table).at(0) == Widths{16, 32, 48, 64});

  SECTION("nor one that is slower than a larger one") {
    auto options = injected();
    options.time_operator = [](const Node& node, int64_t outputs, int64_t inputs) {
      return (outputs == 16 || inputs == 16 ? 3.0 : 1.0) * stepped(node, outputs, inputs);
    };
    CHECK(useful_widths(table_of(Chain({3, 64, 8}), options)).at(0) == Widths{8, 32, 48, 64});
  }
}

TEST_CASE("Widths for a time are at the steps, meet it, and leave nothing to give back", "[latency]") {
  const auto table = table_of(Chain({3, 64, 64, 64, 8}));
  const auto scores = equal_scores(table);
  for (const double fraction : {0.95, 0.8, 0.65, 0.5, 0.3}) {
    const double target = fraction * table.whole;
    const auto widths = widths_for_latency(table, scores, target);
    CHECK(table.predict(widths) <= target);
    for (size_t g = 0; g < widths.size(); ++g) {
      CHECK(widths[g] % 16 == 0);
      if (widths[g] < 64) {
        auto wider = widths;
        wider[g] += 16;
        CHECK(table.predict(wider) > target);
      }
    }
  }
  CHECK(widths_for_latency(table, scores, table.whole) == table.units);
  CHECK(widths_for_latency(table, scores, 100.0) == table.units);
}

TEST_CASE("The choice is within a step of the best of all widths", "[latency]") {
  const auto table = table_of(Chain({3, 64, 64, 64, 8}));
  torch::manual_seed(0);
  std::vector<at::Tensor> scores;
  for (int g = 0; g < 3; ++g) {
    scores.push_back(at::rand({64}) + 0.2 * g);
  }
  const auto lost = [&](const Widths& widths) {
    double sum = 0;
    for (size_t g = 0; g < widths.size(); ++g) {
      sum += std::get<0>(scores[g].sort()).narrow(0, 0, 64 - widths[g]).sum().item<double>();
    }
    return sum;
  };
  double total = 0;
  for (const auto& score : scores) {
    total += score.sum().item<double>();
  }
  for (const double fraction : {0.8, 0.6, 0.4}) {
    const double target = fraction * table.whole;
    double best = std::numeric_limits<double>::infinity();
    for (int64_t a = 8; a <= 64; a += 8) {
      for (int64_t b = 8; b <= 64; b += 8) {
        for (int64_t c = 8; c <= 64; c += 8) {
          if (table.predict({a, b, c}) <= target) {
            best = std::min(best, lost({a, b, c}));
          }
        }
      }
    }
    CHECK(lost(widths_for_latency(table, scores, target)) <= best + 0.1 * total);
  }
}

TEST_CASE("Unimportant groups go first, and those without scores stay", "[latency]") {
  const auto table = table_of(Chain({3, 64, 64, 8}));
  const double target = 0.8 * table.whole;
  CHECK(widths_for_latency(table, {at::ones({64}), at::full({64}, 10.0)}, target)[1] == 64);
  CHECK(widths_for_latency(table, {at::full({64}, 10.0), at::ones({64})}, target)[0] == 64);
  CHECK(widths_for_latency(table, {at::ones({64}), at::Tensor()}, target)[1] == 64);
  CHECK_THROWS_WITH(widths_for_latency(table, {at::Tensor(), at::Tensor()}, target),
                    ContainsSubstring("the fastest widths are estimated at 5.6 ms of 5.6 ms now"));
}

TEST_CASE("Widths that save no time alone are not given up", "[latency]") {
  auto options = injected();
  options.time_operator = [](const Node&, int64_t outputs, int64_t inputs) {
    return outputs + inputs <= 96 ? 0.1 : 1.6;  // of conv1, neither alone
  };
  options.smallest = {40, 40};
  const auto table = table_of(Chain({90, 64, 64, 90}), options);
  CHECK(useful_widths(table) == std::vector<Widths>{{64}, {64}});
  CHECK_THROWS_WITH(widths_for_latency(table, equal_scores(table), 0.3 * table.whole),
                    ContainsSubstring("target must be reachable"));
}

TEST_CASE("Bad targets and scores are errors", "[latency]") {
  const auto table = table_of(Chain({3, 64, 64, 8}));
  const auto scores = equal_scores(table);
  const double nan = std::numeric_limits<double>::quiet_NaN();
  CHECK_THROWS_WITH(widths_for_latency(table, scores, 0),
                    ContainsSubstring("target must be positive milliseconds, got 0"));
  CHECK_THROWS_WITH(widths_for_latency(table, scores, nan), ContainsSubstring("target must be positive"));
  CHECK_THROWS_WITH(widths_for_latency(table, scores, 0.51), ContainsSubstring("the fastest widths are estimated at "));
  CHECK_THROWS_WITH(widths_for_latency(table, {scores[0]}, 3), ContainsSubstring("each of the 2 groups, got 1"));
  CHECK_THROWS_WITH(widths_for_latency(table, {scores[0], at::ones({63})}, 3),
                    ContainsSubstring("the scores of group 1 must have shape [64] (one per unit), got [63]"));
  CHECK_THROWS_WITH(widths_for_latency(table, {at::full({64}, nan), scores[1]}, 3),
                    ContainsSubstring("the scores of group 0 must be finite, got nan"));
  const Chain chain({3, 64, 8});
  CHECK_THROWS_WITH(measure_latency(chain.graph, chain.structure, 1.0, {1.0}, injected()),
                    ContainsSubstring("a time for each of the 4 nodes, got 1"));
  CHECK_THROWS_WITH(measure_latency(chain.graph, chain.structure, 0.0, {1, 1, 1, 1}, injected()),
                    ContainsSubstring("the model's time must be positive, got 0"));
  auto options = injected();
  options.smallest = {1, 1};
  CHECK_THROWS_WITH(table_of(chain, options), ContainsSubstring("smallest must have 1 widths (one per group), got 2"));
  options = injected();
  options.points = 1;
  CHECK_THROWS_WITH(table_of(chain, options), ContainsSubstring("points must be 2 or more, got 1"));
  options = injected();
  options.time_operator = [](const Node&, int64_t, int64_t) { return 0.0; };
  CHECK_THROWS_WITH(table_of(chain, options), ContainsSubstring("positive milliseconds, got 0"));
}

TEST_CASE("A target is reached though the table is wrong", "[latency]") {
  const auto table = table_of(Chain({3, 64, 64, 64, 64, 64, 64, 64, 64, 8}));
  const auto scores = equal_scores(table);
  for (const double error : {0.75, 1.0, 1.3}) {
    for (const double fraction : {0.8, 0.6, 0.45}) {
      const double target = fraction * table.whole;
      // The truth: what was removed saves more, or less, than the table says.
      const auto truth = [&](const Widths& widths) {
        return table.whole - error * (table.whole - table.predict(widths));
      };
      const auto result = reach_latency(table, scores, target, truth);
      CHECK(result.measured == truth(result.widths));
      CHECK(result.measured <= 1.1 * target);
      CHECK(result.measured >= 0.9 * target);
      CHECK(result.tries.size() <= 5);
      CHECK(result.before == table.whole);
      CHECK_THAT(result.to_string(), ContainsSubstring("measured"));
    }
  }
}

TEST_CASE("A target that no try reaches names the fastest one", "[latency]") {
  const auto table = table_of(Chain({3, 64, 64, 8}));
  int calls = 0;
  const auto slow = [&](const Widths&) { return ++calls, 4.0; };
  CHECK_THROWS_WITH(reach_latency(table, equal_scores(table), 3.0, slow),
                    ContainsSubstring("got 3 ms; the fastest of") && ContainsSubstring("tries took 4 ms of 5.6 ms"));
  CHECK(calls >= 2);
  // Nothing to do: the model is not pruned, and not measured again.
  const auto none = reach_latency(table, equal_scores(table), 5.6, [](const Widths&) -> double { throw 1; });
  CHECK(none.widths == table.units);
}

TEST_CASE("Progress reaches the end, and equal operators are measured once", "[latency]") {
  std::vector<double> seen;
  int64_t calls = 0;
  auto options = injected();
  options.progress = [&](double done) { seen.push_back(done); };
  options.time_operator = [&](const Node& node, int64_t outputs, int64_t inputs) {
    return ++calls, stepped(node, outputs, inputs);
  };
  table_of(Chain({3, 64, 64, 64, 64, 8}), options);
  CHECK(std::is_sorted(seen.begin(), seen.end()));
  CHECK(seen.back() == Approx(1.0));
  CHECK(seen.size() == 3);  // the first, those in the middle, the last
  CHECK(calls == 8 + 8 * 8 + 8);
}

TEST_CASE("Convolutions and linear layers are measured in the shapes that pruning gives them", "[latency]") {
  // Really run: a wrong shape would throw. The times themselves are the machine's.
  const Chain chain({16, 64, 32}, 16);
  LatencyOptions options;
  options.seconds = 0.2;
  options.points = 4;
  options.timing.seconds = 0.02;
  const auto graph = chain.record();
  const auto structure = find_structure(graph);
  REQUIRE(structure.groups.size() == 1);
  REQUIRE(structure.groups[0].units == 64);
  const auto table = measure_latency(graph, structure, [&] { chain.forward(); }, options);
  REQUIRE(table.operators.size() == 4);
  for (const auto index : {0, 2}) {
    const auto& time = table.operators[static_cast<size_t>(index)];
    CHECK(time.milliseconds > 0);
    REQUIRE(time.relative.size() == 4);
    CHECK(time.relative.back() == 1.0);
    for (auto relative : time.relative) {
      CHECK(std::isfinite(relative));
      CHECK(relative > 0);
    }
  }
  CHECK(table.whole > 0);
  CHECK(table.predict({64}) == Approx(table.whole).epsilon(1e-6));
  CHECK(table.threads == at::get_num_threads());
}
