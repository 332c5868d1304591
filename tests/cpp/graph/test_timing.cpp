#include <ATen/record_function.h>
#include <rarefy/graph/record.h>
#include <rarefy/graph/timing.h>
#include <torch/torch.h>

#include "catch.h"

using namespace rarefy::graph;
using Catch::Matchers::ContainsSubstring;

namespace {

/// A recording of these operators, nothing else in it.
Graph recording(const std::vector<std::string>& names) {
  Graph graph;
  for (const auto& name : names) {
    Node node;
    node.op = c10::OperatorName("aten::" + name, "");
    graph.schedule.push_back(static_cast<int64_t>(graph.nodes.size()));
    graph.nodes.push_back(node);
  }
  return graph;
}

}  // namespace

TEST_CASE("measure gives the median and the quartiles of an injected clock", "[timing]") {
  double now = 0;
  int calls = 0;
  TimingOptions options;
  options.seconds = 0.010;
  options.runs = 5;
  options.warmup = 2;
  options.clock = [&] { return now; };
  // 50 ms twice (warm-up, not counted), then 1, 2, 3, 4, 5 ms.
  const auto timing = measure(
      [&] {
        now += calls < 2 ? 0.050 : 1e-3 * (calls - 1);
        ++calls;
      },
      options);
  CHECK(calls == 7);
  CHECK(timing.runs == 5);
  CHECK(timing.milliseconds == Approx(3.0));
  CHECK(timing.spread == Approx(2.0 / 3.0));
  CHECK(timing.threads == at::get_num_threads());
  CHECK_THAT(timing.to_string(), ContainsSubstring("3 ms (median of 5, quartiles 66.7 % apart"));

  calls = 2;
  options.warmup = 0;
  options.seconds = 1.0;  // 1 + 2 + ... + 45 ms is the first sum past a second
  CHECK(measure([&] { now += 1e-3 * (calls++ - 1); }, options).runs == 45);
}

TEST_CASE("Options of a measurement are checked", "[timing]") {
  CHECK_THROWS_WITH(measure([] {}, {.seconds = 0}), ContainsSubstring("seconds must be positive, got 0"));
  CHECK_THROWS_WITH(measure([] {}, {.runs = 0}), ContainsSubstring("runs must be positive, got 0"));
  CHECK_THROWS_WITH(measure([] {}, {.warmup = -1}), ContainsSubstring("warmup must not be negative, got -1"));
}

TEST_CASE("Times of nodes are those of the operators that run, nested ones included", "[timing]") {
  const auto large = at::randn({1 << 21});
  const auto small = at::randn({4});
  const TimingOptions options{.seconds = 1e-3, .runs = 5};
  const auto times = time_nodes(recording({"exp", "sigmoid"}), [&] { small.exp(), large.sigmoid(); }, options);
  REQUIRE(times.size() == 2);
  CHECK(times[0] > 0);
  CHECK(times[1] > 5 * times[0]);

  const auto graph = record([&] { return std::vector{large.square()}; }, {{"x", large, Origin::input}});
  REQUIRE(graph.nodes.size() >= 2);
  REQUIRE(graph.nodes[0].op.name == "aten::square");
  REQUIRE(graph.nodes[1].op.name == "aten::pow");  // inside of it
  const auto nested = time_nodes(graph, [&] { large.square(); }, options);
  CHECK(nested[0] > nested[1]);
  CHECK(nested[1] > 0.3 * nested[0]);
}

TEST_CASE("A forward pass that is not the recorded one has no times", "[timing]") {
  const auto x = at::randn({4});
  const auto graph = recording({"exp", "sigmoid"});
  CHECK_THROWS_WITH(time_nodes(graph, [&] { x.exp(), x.cos(); }), ContainsSubstring("got others after 1 of 2"));
  CHECK_THROWS_WITH(time_nodes(graph, [&] { x.exp(); }), ContainsSubstring("got fewer of them after 1 of 2"));
  CHECK_THROWS_WITH(time_nodes(graph, [&] { x.exp(), x.sigmoid(), x.cos(); }), ContainsSubstring("after 2 of 2"));
  // A failed one leaves the thread as it was.
  CHECK(time_nodes(graph, [&] { x.exp(), x.sigmoid(); }, {.seconds = 1e-4}).size() == 2);
}
