// What becomes of bags of embeddings: sums, means and largest values of rows.
#include <ATen/ops/arange.h>
#include <ATen/ops/equal.h>

#include <limits>

#include "onnx/translate.h"

namespace rarefy::onnx {
namespace {

constexpr const char* kRule =
    "bags must be the rows of a matrix of indices, as ONNX has no operator that reduces the rows between offsets, got ";

enum class Mode : int64_t { sum, mean, max };  // as torch numbers them

struct Bags {
  Mode mode;
  Value* rows;     // [bags, size, width]
  Value* indices;  // [bags, size]
  Value* weights;  // of the rows, [bags, size]; may be null
  std::optional<int64_t> padding;
};

/// [bags, width]: rows that are left out count as 0, or as less than any number where the largest is taken.
Value* reduced(Translator& t, const Bags& bags) {
  const auto dtype = bags.rows->dtype;
  const auto beside_rows = [&](Value* x) { return t.emit("Unsqueeze", {x, t.integers(std::vector<int64_t>{2})}); };
  auto* rows = bags.rows;
  if (bags.weights != nullptr) {
    rows = t.emit("Mul", {rows, beside_rows(t.cast(bags.weights, dtype))});
  }
  const bool is_max = bags.mode == Mode::max;
  if (!bags.padding.has_value()) {
    const auto* op = is_max ? "ReduceMax" : bags.mode == Mode::sum ? "ReduceSum" : "ReduceMean";
    return t.reduce(op, rows, {1}, /*keeps_axes=*/false);
  }
  auto* left_out =
      t.emit("Equal", {bags.indices, t.scalar(static_cast<double>(*bags.padding), bags.indices->dtype)}, {}, at::kBool);
  auto* neutral = t.scalar(is_max ? -std::numeric_limits<double>::infinity() : 0, dtype);
  rows = t.emit("Where", {beside_rows(left_out), neutral, rows}, {}, dtype);
  auto* result = t.reduce(is_max ? "ReduceMax" : "ReduceSum", rows, {1}, /*keeps_axes=*/false);
  if (bags.mode == Mode::sum) {
    return result;
  }
  auto* kept = t.reduce("ReduceSum", t.cast(t.emit("Not", {left_out}), dtype), {1}, /*keeps_axes=*/true);
  if (bags.mode == Mode::mean) {
    return t.emit("Div", {result, t.emit("Max", {kept, t.scalar(1, dtype)})});
  }
  auto* has_rows = t.emit("Greater", {kept, t.scalar(0, dtype)}, {}, at::kBool);
  return t.emit("Where", {has_rows, result, t.scalar(0, dtype)}, {}, dtype);
}

std::optional<int64_t> padding_of(const Call& c) {
  return c.has("padding_idx") ? std::optional(c.integer("padding_idx")) : std::nullopt;
}

/// Of rows that were looked up before, one after the other.
std::vector<Value*> reduce_bags(const Call& c) {
  auto shape = c.shape_of("indices");
  if (shape.size() != 2) {  // as the operator has checked, one
    c.refuse(std::string(kRule) + "indices of 1 dimension and offsets");
  }
  if (c.flag("include_last_offset")) {
    c.refuse(std::string(kRule) + "include_last_offset");
  }
  const auto name = c.text("mode");
  const auto mode = name == "sum" ? Mode::sum : name == "mean" ? Mode::mean : Mode::max;
  shape.push_back(c.shape_of("rows").at(1));
  auto* rows = c.t.reshape(c.tensor("rows"), shape);
  return {reduced(c.t, {mode, rows, c.tensor("indices"), c.optional_tensor("per_sample_weights"), padding_of(c)})};
}

/// The shape [bags, size] of the indices of torch's own operator, which has them in a row: its offsets must be those of bags of
/// one size, whatever the size of the batch.
Shape shape_of_bags(const Call& c) {
  const auto indices = c.node().input(1), offsets = c.node().input(2), result = c.node().outputs.at(0);
  const auto& main = c.t.graph();
  const auto origin = main.values[offsets].origin;
  if (origin == graph::Origin::input || origin == graph::Origin::intermediate) {
    c.refuse(std::string(kRule) + "offsets that depend on the input");
  }
  const auto size_in = [&](const graph::Graph& run) {
    const auto bags = run.values[result].sizes.at(0), count = run.values[indices].sizes.at(0);
    // Where all runs had the same offsets, one copy is left.
    const auto& begins =
        run.values[offsets].tensor.defined() ? run.values[offsets].tensor : main.values[offsets].tensor;
    if (bags == 0 || count % bags != 0 ||
        !at::equal(begins.to(at::kLong), at::arange(begins.numel(), at::kLong).mul(count / bags))) {
      c.refuse(std::string(kRule) + "offsets that do not cut them into bags of one size");
    }
    return count / bags;
  };
  const auto size = size_in(main);
  bool is_fixed = true;
  for (const auto& run : c.t.recording().others) {
    is_fixed = size_in(run.graph) == size && is_fixed;
  }
  return {c.result_shape().at(0), {size, is_fixed ? 0 : -1}};
}

std::vector<Value*> embedding_bag(const Call& c) {
  const auto shape = shape_of_bags(c);
  auto* indices = c.t.reshape(c.tensor("indices"), shape);
  auto* weights = c.optional_tensor("per_sample_weights");
  weights = weights == nullptr ? nullptr : c.t.reshape(weights, shape);
  auto* rows = c.t.emit("Gather", {c.tensor("weight"), indices}, {{"axis", int64_t{0}}});
  auto padding = padding_of(c);
  if (padding.has_value() && *padding < 0) {
    *padding += c.t.graph().values[c.node().input(0)].sizes.at(0);
  }
  return {reduced(c.t, {static_cast<Mode>(c.integer("mode")), rows, indices, weights, padding})};
}

}  // namespace

void add_bag_rules(Rules& rules) {
  rules["rarefy::reduce_bags"] = reduce_bags;
  rules["embedding_bag"] = embedding_bag;
}

}  // namespace rarefy::onnx
