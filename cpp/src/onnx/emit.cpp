// What the rules write nodes with.
#include <ATen/ops/full.h>
#include <ATen/ops/tensor.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <utility>

#include "onnx/file.h"
#include "onnx/translate.h"

namespace rarefy::onnx {

Value* Translator::emit(const std::string& op, std::vector<Value*> inputs, Attributes attributes,
                        std::optional<at::ScalarType> dtype) {
  const auto type = dtype.value_or(inputs.empty() ? at::kFloat : inputs[0]->dtype);
  return model_.add_node(name_here(op), op, std::move(inputs), std::move(attributes), type)->outputs[0];
}

std::vector<Value*> Translator::emit_several(size_t count, const std::string& op, std::vector<Value*> inputs,
                                             Attributes attributes) {
  const auto type = inputs.at(0)->dtype;
  return model_.add_node(name_here(op), op, std::move(inputs), std::move(attributes), type, count)->outputs;
}

Value* Translator::integers(const std::vector<int64_t>& values) {
  const auto name = fmt::format("int64[{}]", fmt::join(values, ","));
  auto& known = small_[name];
  if (known == nullptr) {
    known = model_.add_constant(name, at::tensor(values, at::kLong));
  }
  return known;
}

Value* Translator::scalar(double number, at::ScalarType dtype) {
  const auto name = fmt::format("{}({})", c10::toString(dtype), number);
  auto& known = small_[name];
  if (known == nullptr) {
    known = model_.add_constant(name, at::full({}, number, at::TensorOptions().dtype(dtype)));
  }
  return known;
}

Value* Translator::constant(const at::Tensor& tensor, std::string_view role) {
  return model_.add_constant(module_.empty() ? std::string(role) : fmt::format("{}.{}", module_, role), tensor);
}

Value* Translator::cast(Value* x, at::ScalarType dtype) {
  if (x->dtype == dtype) {
    return x;
  }
  if (x->constant.defined()) {
    return model_.add_constant(x->name, x->constant.to(dtype));
  }
  return emit("Cast", {x}, {{"to", type_number(dtype)}}, dtype);
}

Value* Translator::reduce(const std::string& op, Value* x, const std::vector<int64_t>& axes, bool keeps_axes) {
  Attributes attributes{{"keepdims", int64_t{keeps_axes}}};
  std::vector<Value*> inputs{x};
  if (!axes.empty() && (opset() >= 18 || op == "ReduceSum")) {
    inputs.push_back(integers(axes));
  } else if (!axes.empty()) {
    attributes.emplace_back("axes", axes);
  }
  return emit(op, inputs, attributes);
}

/// The size of the batch as int64 [1]: that of the first input's first dimension.
Value* Translator::batch() {
  if (batch_ == nullptr) {
    auto* sizes = model_.add_node("batch/Shape", "Shape", {model_.inputs.at(0)}, {}, at::kLong)->outputs[0];
    batch_ = model_.add_node("batch/Gather", "Gather", {sizes, integers(std::vector<int64_t>{0})}, {}, at::kLong)
                 ->outputs[0];
  }
  return batch_;
}

Value* Translator::shape_value(const Shape& shape) {
  std::vector<Value*> pieces;
  std::vector<int64_t> numbers;
  const auto flush = [&] {
    if (!numbers.empty()) {
      pieces.push_back(integers(std::exchange(numbers, {})));
    }
  };
  for (const auto& dim : shape) {
    if (dim.is_fixed()) {
      numbers.push_back(dim.size);
      continue;
    }
    if (dim.per_batch < 0) {
      refuse("a size must be fixed or a multiple of the batch (dynamic_batch = false fixes it)");
    }
    flush();
    pieces.push_back(dim.per_batch == 1 ? batch()
                                        : emit("Mul", {batch(), integers(std::vector<int64_t>{dim.per_batch})}));
  }
  flush();
  if (pieces.empty()) {
    return integers(std::vector<int64_t>{});
  }
  return pieces.size() == 1 ? pieces[0] : emit("Concat", pieces, {{"axis", int64_t{0}}});
}

Value* Translator::reshape(Value* x, const Shape& shape) {
  const auto following = std::count_if(shape.begin(), shape.end(), [](const Dim& dim) { return !dim.is_fixed(); });
  if (std::any_of(shape.begin(), shape.end(), [](const Dim& dim) { return dim.size == 0; })) {
    refuse("a tensor without elements cannot be reshaped");
  }
  Value* sizes = nullptr;
  if (following <= 1) {  // which works for sizes that are no multiple of the batch too
    std::vector<int64_t> numbers;
    for (const auto& dim : shape) {
      numbers.push_back(dim.is_fixed() ? dim.size : -1);
    }
    sizes = integers(numbers);
  } else {
    sizes = shape_value(shape);
  }
  auto* result = emit("Reshape", {x, sizes});
  result->shape = shape;
  result->has_shape = true;
  return result;
}

Value* Translator::weight(const IntegerTensor& weight, std::string_view role) {
  auto* values = constant(weight.values, role);
  auto* scale = constant(weight.grid.scale, fmt::format("{}_scale", role));
  std::vector<Value*> inputs{values, scale};
  if (options_.weight_zero_points) {
    inputs.push_back(constant(weight.grid.zero_point, fmt::format("{}_zero_point", role)));
  }
  Attributes attributes;
  if (weight.grid.axis.has_value()) {
    attributes.emplace_back("axis", *weight.grid.axis);
  }
  auto* result = emit("DequantizeLinear", inputs, attributes, weight.grid.scale.scalar_type());
  result->shape = fixed(weight.values.sizes());
  result->has_shape = true;
  return result;
}

Grid Translator::as_written(Grid grid) const {
  const bool wide = grid.zero_point.element_size() > 1;
  if (wide && opset() < 21) {
    refuse("activations of 16 bits need operator set 21");
  }
  if (options_.unsigned_activations && at::isSignedType(grid.zero_point.scalar_type())) {
    const int64_t middle = wide ? 32768 : 128;
    grid.zero_point = (grid.zero_point.to(at::kInt) + middle).to(wide ? at::kUInt16 : at::kByte);
    grid.qmin += middle;
    grid.qmax += middle;
  }
  return grid;
}

namespace {

Attributes axis_of(const Grid& grid) { return grid.axis.has_value() ? Attributes{{"axis", *grid.axis}} : Attributes{}; }

Value* shaped_like(Value* y, const Value* x) {
  y->shape = x->shape;
  y->has_shape = x->has_shape;
  return y;
}

}  // namespace

Value* Translator::quantize(Value* x, const Grid& grid) {
  const auto type = grid.zero_point.scalar_type();
  auto *scale = constant(grid.scale, "scale"), *zero_point = constant(grid.zero_point, "zero_point");
  const bool wide = grid.zero_point.element_size() > 1;
  const int64_t levels = wide ? 65536 : 256;
  const int64_t lowest = at::isSignedType(type) ? -levels / 2 : 0;
  const bool fills = grid.qmin == lowest && grid.qmax == lowest + levels - 1;
  if (wide && !fills) {  // runtimes have no Clip of 16 bits; (k * s) / s rounds to k
    const auto edge = [&](int64_t q, const char* role) {
      return constant((q - grid.zero_point.to(at::kInt)) * grid.scale, role);
    };
    if (grid.axis.has_value()) {
      refuse("ranges that do not fill 16 bits are per tensor in a file");
    }
    x = shaped_like(emit("Clip", {x, edge(grid.qmin, "min"), edge(grid.qmax, "max")}), x);
  }
  auto* q = shaped_like(emit("QuantizeLinear", {x, scale, zero_point}, axis_of(grid), type), x);
  if (wide || fills) {
    return q;
  }
  // The operator saturates at the limits of the type only.
  const auto limit = [&](int64_t value, const char* role) {
    return constant(at::full({}, value, at::kLong).to(type), role);
  };
  return shaped_like(emit("Clip", {q, limit(grid.qmin, "qmin"), limit(grid.qmax, "qmax")}), x);
}

Value* Translator::dequantize(Value* q, const Grid& grid) {
  auto *scale = constant(grid.scale, "scale"), *zero_point = constant(grid.zero_point, "zero_point");
  const auto type = grid.scale.scalar_type();
  return shaped_like(emit("DequantizeLinear", {q, scale, zero_point}, axis_of(grid), type), q);
}

}  // namespace rarefy::onnx
