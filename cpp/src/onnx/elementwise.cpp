// What becomes of operators that work on each element by itself.
#include <cmath>
#include <limits>
#include <numbers>

#include "onnx/translate.h"

namespace rarefy::onnx {
namespace {

/// An argument that is a tensor or a number, as `dtype`.
Value* operand(const Call& c, std::string_view name, at::ScalarType dtype) {
  return c.is_tensor(name) ? c.t.cast(c.tensor(name), dtype) : c.t.scalar(c.number(name), dtype);
}

Rule unary(const char* op) {
  return [op](const Call& c) -> std::vector<Value*> {
    return {c.t.emit(op, {c.t.cast(c.tensor("self"), c.result_dtype())})};
  };
}

/// first (op) alpha * second, where there is an alpha.
Rule binary(const char* op, const char* first = "self", const char* second = "other") {
  return [=](const Call& c) -> std::vector<Value*> {
    const auto dtype = c.result_dtype();
    if (dtype == at::kBool) {
      c.refuse("ONNX computes with numbers, got bool (torch::logical_and and logical_or have a form)");
    }
    auto *a = operand(c, first, dtype), *b = operand(c, second, dtype);
    if (c.has("alpha") && c.number("alpha") != 1.0) {
      b = c.t.emit("Mul", {b, c.t.scalar(c.number("alpha"), dtype)});
    }
    return {c.t.emit(op, {a, b})};
  };
}

std::vector<Value*> divide(const Call& c) {
  const auto dtype = c.result_dtype();
  const auto mode = c.text("rounding_mode");
  if (mode == "trunc" || (mode == "floor" && !at::isFloatingType(dtype))) {
    c.refuse("division must not round, got rounding_mode '" + mode + "'");
  }
  auto* result = c.t.emit("Div", {operand(c, "self", dtype), operand(c, "other", dtype)});
  return {mode == "floor" ? c.t.emit("Floor", {result}) : result};
}

/// The type in which two arguments are compared.
at::ScalarType common_type(const Call& c) {
  const auto a = c.dtype_of("self");
  if (c.is_tensor("other")) {
    return at::promoteTypes(a, c.dtype_of("other"));
  }
  return at::isFloatingType(a) || c.number("other") == std::floor(c.number("other")) ? a : at::kFloat;
}

Rule comparison(const char* op, bool negated = false) {
  return [=](const Call& c) -> std::vector<Value*> {
    const auto dtype = common_type(c);
    auto* result = c.t.emit(op, {operand(c, "self", dtype), operand(c, "other", dtype)}, {}, at::kBool);
    return {negated ? c.t.emit("Not", {result}) : result};
  };
}

Rule logical(const char* op) {
  return [op](const Call& c) -> std::vector<Value*> {
    if (c.result_dtype() != at::kBool) {
      c.refuse("its arguments must be bool");
    }
    return {c.t.emit(op, {operand(c, "self", at::kBool), operand(c, "other", at::kBool)})};
  };
}

std::vector<Value*> logical_not(const Call& c) {
  if (c.result_dtype() != at::kBool) {
    c.refuse("its argument must be bool");
  }
  return {c.t.emit("Not", {c.t.cast(c.tensor("self"), at::kBool)})};
}

Value* clip(const Call& c, Value* x, std::optional<double> low, std::optional<double> high) {
  std::vector<Value*> inputs{x, low ? c.t.scalar(*low, x->dtype) : nullptr};
  if (high) {
    inputs.push_back(c.t.scalar(*high, x->dtype));
  }
  return c.t.emit("Clip", inputs);
}

std::vector<Value*> clamp(const Call& c) {
  auto* x = c.t.cast(c.tensor("self"), c.result_dtype());
  if (c.is_tensor("min") || c.is_tensor("max")) {
    if (c.is_tensor("min")) {
      x = c.t.emit("Max", {x, c.t.cast(c.tensor("min"), x->dtype)});
    }
    return {c.is_tensor("max") ? c.t.emit("Min", {x, c.t.cast(c.tensor("max"), x->dtype)}) : x};
  }
  const auto limit = [&](const char* name) { return c.has(name) ? std::optional(c.number(name)) : std::nullopt; };
  return {clip(c, x, limit("min"), limit("max"))};
}

Rule one_sided(const char* op) {
  return [op](const Call& c) -> std::vector<Value*> {
    const bool low = std::string_view(op) == "Max";
    auto* x = c.t.cast(c.tensor("self"), c.result_dtype());
    return {c.t.emit(op, {x, operand(c, low ? "min" : "max", x->dtype)})};
  };
}

std::vector<Value*> hardtanh(const Call& c) {
  return {clip(c, c.tensor("self"), c.number("min_val"), c.number("max_val"))};
}

std::vector<Value*> relu6(const Call& c) { return {clip(c, c.tensor("self"), 0.0, 6.0)}; }

/// Bytes are never negative, and ONNX has no Relu of them: the layer that gave them clamped at its zero point already.
std::vector<Value*> relu(const Call& c) {
  auto* x = c.tensor(c.node().op.name.starts_with("rarefy::") ? "x" : "self");
  return {x->dtype == at::kByte ? x : c.t.emit("Relu", {x})};
}

std::vector<Value*> hardsigmoid(const Call& c) {
  return {c.t.emit("HardSigmoid", {c.tensor("self")}, {{"alpha", 1.0F / 6.0F}, {"beta", 0.5F}})};
}

std::vector<Value*> hardswish(const Call& c) {
  auto* x = c.tensor("self");
  return {c.t.opset() >= 14 ? c.t.emit("HardSwish", {x}) : c.t.emit("Mul", {x, hardsigmoid(c)[0]})};
}

std::vector<Value*> silu(const Call& c) {
  auto* x = c.tensor("self");
  return {c.t.emit("Mul", {x, c.t.emit("Sigmoid", {x})})};
}

std::vector<Value*> mish(const Call& c) {
  auto* x = c.tensor("self");
  return {c.t.emit("Mul", {x, c.t.emit("Tanh", {c.t.emit("Softplus", {x})})})};
}

/// x * Phi(x), or with tanh in the place of the error function.
std::vector<Value*> gelu(const Call& c) {
  auto* x = c.tensor("self");
  const auto kind = c.text("approximate");
  if (c.t.opset() >= 20) {
    return {c.t.emit("Gelu", {x}, {{"approximate", kind}})};
  }
  const auto number = [&](double value) { return c.t.scalar(value, x->dtype); };
  Value* inner = nullptr;
  if (kind == "tanh") {
    auto* cube = c.t.emit("Mul", {c.t.emit("Mul", {x, x}), x});
    auto* sum = c.t.emit("Add", {x, c.t.emit("Mul", {cube, number(0.044715)})});
    inner = c.t.emit("Tanh", {c.t.emit("Mul", {sum, number(std::sqrt(2.0 / std::numbers::pi))})});
  } else {
    inner = c.t.emit("Erf", {c.t.emit("Div", {x, number(std::numbers::sqrt2)})});
  }
  auto* product = c.t.emit("Mul", {x, c.t.emit("Add", {inner, number(1.0)})});
  return {c.t.emit("Mul", {product, number(0.5)})};
}

std::vector<Value*> leaky_relu(const Call& c) {
  return {c.t.emit("LeakyRelu", {c.tensor("self")}, {{"alpha", static_cast<float>(c.number("negative_slope"))}})};
}

std::vector<Value*> elu(const Call& c) {
  if (c.number("scale") != 1.0 || c.number("input_scale") != 1.0) {
    c.refuse("scale and input_scale must be 1");
  }
  return {c.t.emit("Elu", {c.tensor("self")}, {{"alpha", static_cast<float>(c.number("alpha"))}})};
}

/// One slope, or one per channel, which is dimension 1.
std::vector<Value*> prelu(const Call& c) {
  auto* slope = c.tensor("weight");
  const auto rank = c.rank_of("self");
  if (slope->shape.size() == 1 && slope->shape[0].size > 1 && rank > 2) {
    Shape shape(static_cast<size_t>(rank - 1), Dim{1, 0});
    shape[0] = slope->shape[0];
    slope = c.t.reshape(slope, shape);
  }
  return {c.t.emit("PRelu", {c.tensor("self"), slope})};
}

std::vector<Value*> softplus(const Call& c) {
  if (c.number("beta") != 1.0) {
    c.refuse("beta must be 1");
  }
  return {c.t.emit("Softplus", {c.tensor("self")})};
}

std::vector<Value*> power(const Call& c) {
  const auto dtype = c.result_dtype();
  if (!c.is_tensor("exponent") && c.number("exponent") == 2.0) {
    auto* x = operand(c, "self", dtype);
    return {c.t.emit("Mul", {x, x})};
  }
  return {c.t.emit("Pow", {operand(c, "self", dtype), operand(c, "exponent", dtype)})};
}

std::vector<Value*> square(const Call& c) {
  auto* x = c.tensor("self");
  return {c.t.emit("Mul", {x, x})};
}

std::vector<Value*> rsqrt(const Call& c) {
  return {c.t.emit("Reciprocal", {c.t.emit("Sqrt", {c.t.cast(c.tensor("self"), c.result_dtype())})})};
}

std::vector<Value*> where(const Call& c) {
  const auto dtype = c.result_dtype();
  auto* condition = c.t.cast(c.tensor("condition"), at::kBool);
  return {c.t.emit("Where", {condition, operand(c, "self", dtype), operand(c, "other", dtype)}, {}, dtype)};
}

std::vector<Value*> masked_fill(const Call& c) {
  const auto dtype = c.result_dtype();
  return {c.t.emit("Where", {c.tensor("mask"), operand(c, "value", dtype), c.tensor("self")}, {}, dtype)};
}

}  // namespace

void add_elementwise_rules(Rules& rules) {
  for (const auto& [name, op] : {std::pair{"add", "Add"},
                                 {"sub", "Sub"},
                                 {"subtract", "Sub"},
                                 {"mul", "Mul"},
                                 {"multiply", "Mul"},
                                 {"minimum", "Min"},
                                 {"maximum", "Max"}}) {
    rules[name] = binary(op);
  }
  rules["rsub"] = binary("Sub", "other", "self");
  rules["div"] = rules["divide"] = rules["true_divide"] = divide;
  for (const auto& [name, op] : {std::pair{"abs", "Abs"},
                                 {"neg", "Neg"},
                                 {"exp", "Exp"},
                                 {"log", "Log"},
                                 {"sqrt", "Sqrt"},
                                 {"erf", "Erf"},
                                 {"sin", "Sin"},
                                 {"cos", "Cos"},
                                 {"floor", "Floor"},
                                 {"ceil", "Ceil"},
                                 {"round", "Round"},
                                 {"sign", "Sign"},
                                 {"reciprocal", "Reciprocal"},
                                 {"sigmoid", "Sigmoid"},
                                 {"tanh", "Tanh"}}) {
    rules[name] = unary(op);
  }
  for (const auto& [name, op] :
       {std::pair{"eq", "Equal"}, {"gt", "Greater"}, {"ge", "GreaterOrEqual"}, {"lt", "Less"}, {"le", "LessOrEqual"}}) {
    rules[name] = comparison(op);
  }
  rules["ne"] = comparison("Equal", /*negated=*/true);
  rules["logical_and"] = rules["bitwise_and"] = rules["__and__"] = logical("And");
  rules["logical_or"] = rules["bitwise_or"] = rules["__or__"] = logical("Or");
  rules["logical_not"] = rules["bitwise_not"] = logical_not;
  rules["clamp"] = rules["clip"] = clamp;
  rules["clamp_min"] = one_sided("Max");
  rules["clamp_max"] = one_sided("Min");
  rules["hardtanh"] = hardtanh;
  rules["relu6"] = relu6;
  rules["relu"] = rules["rarefy::relu"] = relu;
  rules["hardsigmoid"] = hardsigmoid;
  rules["hardswish"] = hardswish;
  rules["silu"] = silu;
  rules["mish"] = mish;
  rules["gelu"] = gelu;
  rules["leaky_relu"] = leaky_relu;
  rules["elu"] = elu;
  rules["prelu"] = rules["_prelu_kernel"] = prelu;
  rules["softplus"] = softplus;
  rules["pow"] = power;
  rules["square"] = square;
  rules["rsqrt"] = rsqrt;
  rules["where"] = where;
  rules["masked_fill"] = masked_fill;
}

}  // namespace rarefy::onnx
