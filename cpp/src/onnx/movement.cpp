// What becomes of operators that put elements elsewhere, and of those that reduce along dimensions.
#include <algorithm>
#include <limits>
#include <numeric>

#include "onnx/translate.h"

namespace rarefy::onnx {
namespace {

std::vector<Value*> identity(const Call& c) { return {c.tensor("self")}; }

std::vector<Value*> dropout(const Call& c) {
  if (c.flag("train") && c.number("p") > 0) {
    c.refuse("dropout must be off: the model must be in evaluation mode");
  }
  return {c.tensor("input")};
}

/// to, type_as and the like: a conversion, whatever the arguments are called.
std::vector<Value*> convert(const Call& c) { return {c.t.cast(c.tensor("self"), c.result_dtype())}; }

std::vector<Value*> reshape(const Call& c) { return {c.t.reshape(c.tensor("self"), c.result_shape())}; }

std::vector<Value*> transpose(const Call& c, std::vector<int64_t> order) {
  return {c.t.emit("Transpose", {c.tensor("self")}, {{"perm", std::move(order)}})};
}

std::vector<int64_t> in_order(int64_t rank) {
  std::vector<int64_t> order(static_cast<size_t>(rank));
  std::iota(order.begin(), order.end(), 0);
  return order;
}

std::vector<Value*> permute(const Call& c) {
  auto order = c.integers("dims");
  for (auto& dim : order) {
    dim += dim < 0 ? c.rank_of("self") : 0;
  }
  return transpose(c, std::move(order));
}

Rule swap(const char* first, const char* second) {
  return [=](const Call& c) -> std::vector<Value*> {
    auto order = in_order(c.rank_of("self"));
    const auto rank = static_cast<int64_t>(order.size());
    std::swap(order.at(static_cast<size_t>(c.dimension(first, rank))),
              order.at(static_cast<size_t>(c.dimension(second, rank))));
    return transpose(c, std::move(order));
  };
}

/// The last two dimensions: t, mT, numpy_T of a matrix.
std::vector<Value*> swap_last(const Call& c) {
  auto order = in_order(c.rank_of("self"));
  if (order.size() < 2) {
    return identity(c);
  }
  std::swap(order[order.size() - 1], order[order.size() - 2]);
  return transpose(c, std::move(order));
}

std::vector<Value*> expand(const Call& c) {
  auto* x = c.tensor("self");
  return {c.keeps_shape_of("self") ? x : c.t.emit("Expand", {x, c.t.shape_value(c.result_shape())})};
}

/// One number everywhere: zeros_like, new_full, fill_ and the like. What is empty is zeros.
Rule filled(double number, const char* argument = nullptr) {
  return [=](const Call& c) -> std::vector<Value*> {
    const auto dtype = c.result_dtype();
    auto* value = argument == nullptr     ? c.t.scalar(number, dtype)
                  : c.is_tensor(argument) ? c.t.cast(c.tensor(argument), dtype)
                                          : c.t.scalar(c.number(argument), dtype);
    return {c.t.emit("Expand", {value, c.t.shape_value(c.result_shape())})};
  };
}

std::vector<Value*> repeat(const Call& c) {
  auto* x = c.tensor("self");
  const auto times = c.integers("repeats");
  auto shape = c.shape_of("self");
  if (times.size() > shape.size()) {
    shape.insert(shape.begin(), times.size() - shape.size(), Dim{1, 0});
    x = c.t.reshape(x, shape);
  }
  return {c.t.emit("Tile", {x, c.t.integers(times)})};
}

std::vector<Value*> select(const Call& c) {
  const auto axis = c.dimension("dim", c.rank_of("self"));
  auto* index = c.t.scalar(static_cast<double>(c.integer("index")), at::kLong);
  return {c.t.emit("Gather", {c.tensor("self"), index}, {{"axis", axis}})};
}

std::vector<Value*> slice_from(const Call& c, int64_t axis, int64_t start, int64_t end, int64_t step) {
  const auto list = [&](int64_t value) { return c.t.integers(std::vector<int64_t>{value}); };
  return {c.t.emit("Slice", {c.tensor("self"), list(start), list(end), list(axis), list(step)})};
}

std::vector<Value*> slice(const Call& c) {
  const auto axis = c.dimension("dim", c.rank_of("self"));
  if (c.keeps_shape_of("self")) {
    return identity(c);
  }
  const auto start = c.has("start") ? c.integer("start") : 0;
  const auto end = c.has("end") ? c.integer("end") : std::numeric_limits<int64_t>::max();
  return slice_from(c, axis, start, end, c.integer("step"));
}

std::vector<Value*> narrow(const Call& c) {
  const auto start = c.integer("start");
  const auto length = c.integer("length");
  if (start < 0) {
    c.refuse("start must not be negative");
  }
  return slice_from(c, c.dimension("dim", c.rank_of("self")), start, start + length, 1);
}

/// chunk, split and the like: pieces of the sizes that they had in the run.
std::vector<Value*> split(const Call& c) {
  const auto axis = c.dimension("dim", c.rank_of("self"));
  std::vector<int64_t> sizes;
  for (size_t i = 0; i < c.results(); ++i) {
    const auto size = c.result_shape(i).at(static_cast<size_t>(axis));
    if (!size.is_fixed()) {
      c.refuse("the dimension that is split must not be that of the batch (dynamic_batch = false fixes it)");
    }
    sizes.push_back(size.size);
  }
  if (sizes.size() == 1) {
    return identity(c);
  }
  return c.t.emit_several(sizes.size(), "Split", {c.tensor("self"), c.t.integers(sizes)}, {{"axis", axis}});
}

std::vector<Value*> unbind(const Call& c) {
  const auto axis = c.dimension("dim", c.rank_of("self"));
  if (!c.shape_of("self").at(static_cast<size_t>(axis)).is_fixed()) {
    c.refuse("the dimension must not be that of the batch (dynamic_batch = false fixes it)");
  }
  std::vector<Value*> out;
  for (size_t i = 0; i < c.results(); ++i) {
    auto* index = c.t.scalar(static_cast<double>(i), at::kLong);
    out.push_back(c.t.emit("Gather", {c.tensor("self"), index}, {{"axis", axis}}));
  }
  return out;
}

Rule concatenate(bool stacked) {
  return [stacked](const Call& c) -> std::vector<Value*> {
    auto tensors = c.tensors("tensors");
    const auto rank = static_cast<int64_t>(c.result_shape().size());
    const auto axis = c.dimension("dim", rank);
    for (auto& tensor : tensors) {
      tensor = c.t.cast(tensor, c.result_dtype());
      if (stacked) {
        tensor = c.t.emit("Unsqueeze", {tensor, c.t.integers(std::vector<int64_t>{axis})});
      }
    }
    return {c.t.emit("Concat", tensors, {{"axis", axis}})};
  };
}

std::vector<Value*> index_select(const Call& c) {
  return {c.t.emit("Gather", {c.tensor("self"), c.tensor("index")}, {{"axis", c.dimension("dim", c.rank_of("self"))}})};
}

/// x[:, i], with one tensor of integers.
std::vector<Value*> index(const Call& c) {
  const auto indices = c.tensors("indices");
  std::optional<size_t> axis;
  for (size_t i = 0; i < indices.size(); ++i) {
    if (indices[i] != nullptr && (axis.has_value() || indices[i]->dtype != at::kLong)) {
      c.refuse("only one dimension may be indexed, by integers");
    }
    axis = indices[i] != nullptr ? std::optional(i) : axis;
  }
  return {c.t.emit("Gather", {c.tensor("self"), indices.at(axis.value())}, {{"axis", static_cast<int64_t>(*axis)}})};
}

std::vector<Value*> gather(const Call& c) {
  const auto axis = c.dimension("dim", c.rank_of("self"));
  return {c.t.emit("GatherElements", {c.tensor("self"), c.tensor("index")}, {{"axis", axis}})};
}

std::vector<Value*> pixel_shuffle(const Call& c) {
  return {c.t.emit("DepthToSpace", {c.tensor("self")},
                   {{"blocksize", c.integer("upscale_factor")}, {"mode", std::string("CRD")}})};
}

/// torch gives the padding of the last dimension first.
Rule pad(const char* mode) {
  return [mode](const Call& c) -> std::vector<Value*> {
    const auto given = c.integers(std::string_view(mode) == "constant" ? "pad" : "padding");
    const auto rank = static_cast<size_t>(c.rank_of("self"));
    std::vector<int64_t> amounts(2 * rank, 0);
    for (size_t i = 0; i < given.size() / 2; ++i) {
      amounts[rank - 1 - i] = given[2 * i];
      amounts[2 * rank - 1 - i] = given[2 * i + 1];
    }
    std::vector<Value*> inputs{c.tensor("self"), c.t.integers(amounts)};
    if (std::string_view(mode) == "constant") {
      inputs.push_back(c.t.scalar(c.number("value"), inputs[0]->dtype));
    }
    return {c.t.emit("Pad", inputs, {{"mode", std::string(mode)}})};
  };
}

Rule reduce(const char* op) {
  return [op](const Call& c) -> std::vector<Value*> {
    auto* x = c.t.cast(c.tensor("self"), c.result_dtype());
    auto axes = c.integers("dim");
    const bool keep = c.has("keepdim") && c.flag("keepdim");
    if (axes.empty()) {
      axes = in_order(c.rank_of("self"));
    }
    return {c.t.reduce(op, x, axes, keep)};
  };
}

Rule arg(const char* op) {
  return [op](const Call& c) -> std::vector<Value*> {
    if (!c.has("dim")) {
      c.refuse("dim must be given");
    }
    const auto axis = c.dimension("dim", c.rank_of("self"));
    return {c.t.emit(op, {c.tensor("self")}, {{"axis", axis}, {"keepdims", int64_t{c.flag("keepdim")}}}, at::kLong)};
  };
}

Rule normalized(const char* op) {
  return [op](const Call& c) -> std::vector<Value*> {
    auto* x = c.t.cast(c.tensor("self"), c.result_dtype());
    return {c.t.emit(op, {x}, {{"axis", c.dimension("dim", c.rank_of("self"))}})};
  };
}

}  // namespace

void add_movement_rules(Rules& rules) {
  for (const auto* name :
       {"contiguous", "clone", "detach", "alias", "lift_fresh", "resolve_conj", "resolve_neg", "positive"}) {
    rules[name] = identity;
  }
  rules["dropout"] = rules["feature_dropout"] = rules["alpha_dropout"] = dropout;
  rules["to"] = rules["_to_copy"] = rules["type_as"] = convert;
  for (const auto* name :
       {"view", "reshape", "_unsafe_view", "_reshape_alias", "flatten", "unflatten", "ravel", "squeeze", "unsqueeze"}) {
    rules[name] = reshape;
  }
  rules["permute"] = permute;
  rules["transpose"] = swap("dim0", "dim1");
  rules["swapaxes"] = swap("axis0", "axis1");
  rules["swapdims"] = swap("dim0", "dim1");
  rules["t"] = rules["mT"] = swap_last;
  rules["expand"] = expand;
  rules["empty_like"] = rules["zeros_like"] = rules["new_zeros"] = rules["new_empty"] = rules["zero"] = filled(0);
  rules["ones_like"] = rules["new_ones"] = filled(1);
  rules["full_like"] = rules["new_full"] = filled(0, "fill_value");
  rules["fill"] = filled(0, "value");
  rules["repeat"] = repeat;
  rules["select"] = select;
  rules["slice"] = slice;
  rules["narrow"] = narrow;
  for (const auto* name : {"chunk", "split", "split_with_sizes", "tensor_split", "unsafe_chunk", "unsafe_split",
                           "unsafe_split_with_sizes"}) {
    rules[name] = split;
  }
  rules["unbind"] = unbind;
  rules["cat"] = rules["concat"] = concatenate(/*stacked=*/false);
  rules["stack"] = concatenate(/*stacked=*/true);
  rules["index_select"] = index_select;
  rules["index"] = index;
  rules["gather"] = gather;
  rules["pixel_shuffle"] = pixel_shuffle;
  rules["constant_pad_nd"] = pad("constant");
  rules["reflection_pad1d"] = rules["reflection_pad2d"] = rules["reflection_pad3d"] = pad("reflect");
  rules["replication_pad1d"] = rules["replication_pad2d"] = rules["replication_pad3d"] = pad("edge");
  rules["mean"] = reduce("ReduceMean");
  rules["sum"] = reduce("ReduceSum");
  rules["amax"] = reduce("ReduceMax");
  rules["amin"] = reduce("ReduceMin");
  rules["argmax"] = arg("ArgMax");
  rules["argmin"] = arg("ArgMin");
  rules["softmax"] = rules["_softmax"] = normalized("Softmax");
  rules["log_softmax"] = rules["_log_softmax"] = normalized("LogSoftmax");
}

}  // namespace rarefy::onnx
