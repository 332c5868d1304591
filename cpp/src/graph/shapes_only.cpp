#include "shapes_only.h"

#include <ATen/ExpandUtils.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/record_function.h>
#include <torch/library.h>

#include <optional>
#include <vector>

namespace rarefy::graph {
namespace {

// A key above all backends that nothing in torch or in common extensions uses; inactive unless it is included. Every
// operator without a kernel below falls through it.
constexpr auto kKey = c10::DispatchKey::TESTING_ONLY_GenericWrapper;

using Shape = std::optional<std::vector<int64_t>>;  // unset: compute

Shape linear(const torch::jit::Stack& stack, size_t first) {
  const auto &x = stack[first].toTensor(), &weight = stack[first + 1].toTensor();
  if (weight.dim() != 2 || x.dim() < 1 || x.size(-1) != weight.size(1)) {
    return std::nullopt;
  }
  auto shape = x.sizes().vec();
  shape.back() = weight.size(0);
  return shape;
}

Shape product(const torch::jit::Stack& stack, size_t first) {
  const auto &a = stack[first].toTensor(), &b = stack[first + 1].toTensor();
  if (a.dim() < 2 || b.dim() < 2 || a.size(-1) != b.size(-2)) {
    return std::nullopt;
  }
  auto shape = at::infer_size(a.sizes().slice(0, a.dim() - 2), b.sizes().slice(0, b.dim() - 2));
  shape.push_back(a.size(-2));
  shape.push_back(b.size(-1));
  return shape;
}

Shape convolution(const torch::jit::Stack& stack, size_t first) {
  const auto &x = stack[first].toTensor(), &weight = stack[first + 1].toTensor();
  const auto &stride = stack[first + 3], &padding = stack[first + 4], &dilation = stack[first + 5];
  const auto spatial = static_cast<size_t>(weight.dim() - 2);
  if (x.dim() != weight.dim() || x.size(1) != weight.size(1) * stack[first + 6].toInt() || !stride.isIntList() ||
      !padding.isIntList() || !dilation.isIntList()) {
    return std::nullopt;
  }
  const auto strides = stride.toIntVector(), pads = padding.toIntVector(), dilations = dilation.toIntVector();
  const auto at = [](const std::vector<int64_t>& values, size_t d) {
    return values.size() == 1 ? values[0] : values.at(d);
  };
  std::vector<int64_t> shape{x.size(0), weight.size(0)};
  for (size_t d = 0; d < spatial; ++d) {
    const auto dim = static_cast<int64_t>(d) + 2;
    const int64_t extent = at(dilations, d) * (weight.size(dim) - 1) + 1;
    const int64_t size = (x.size(dim) + 2 * at(pads, d) - extent) / at(strides, d) + 1;
    if (size < 1) {
      return std::nullopt;  // the operator says what is wrong
    }
    shape.push_back(size);
  }
  return shape;
}

Shape attention(const torch::jit::Stack& stack, size_t first) {
  const auto &query = stack[first].toTensor(), &value = stack[first + 2].toTensor();
  if (query.dim() < 3 || value.dim() != query.dim()) {
    return std::nullopt;
  }
  auto shape = query.sizes().vec();
  shape.back() = value.size(-1);
  return shape;
}

template <Shape (*shape_of)(const torch::jit::Stack&, size_t), size_t data>
void kernel(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const size_t count = op.schema().arguments().size();
  const size_t first = stack->size() - count;
  const auto& x = (*stack)[first + data].toTensor();
  const auto shape = x.layout() == at::kStrided ? shape_of(*stack, first + data) : std::nullopt;
  if (!shape) {
    const c10::impl::ExcludeDispatchKeyGuard compute(kKey);
    op.callBoxed(*stack);
    return;
  }
  const at::RecordFunctionGuard quiet(false);
  auto format = x.suggest_memory_format();
  if (static_cast<int64_t>(shape->size()) != x.dim()) {
    format = at::MemoryFormat::Contiguous;
  }
  auto out = at::empty(*shape, x.options(), format).zero_();
  torch::jit::drop(*stack, count);
  stack->emplace_back(std::move(out));
}

}  // namespace

ShapesOnly::ShapesOnly() : guard_(kKey) {}

TORCH_LIBRARY_IMPL(_, TESTING_ONLY_GenericWrapper, m) { m.fallback(torch::CppFunction::makeFallthrough()); }

TORCH_LIBRARY_IMPL(aten, TESTING_ONLY_GenericWrapper, m) {
  m.impl("linear", torch::CppFunction::makeFromBoxedFunction<&kernel<&linear, 0>>());
  m.impl("addmm", torch::CppFunction::makeFromBoxedFunction<&kernel<&product, 1>>());
  m.impl("matmul", torch::CppFunction::makeFromBoxedFunction<&kernel<&product, 0>>());
  m.impl("bmm", torch::CppFunction::makeFromBoxedFunction<&kernel<&product, 0>>());
  m.impl("mm", torch::CppFunction::makeFromBoxedFunction<&kernel<&product, 0>>());
  m.impl("conv1d", torch::CppFunction::makeFromBoxedFunction<&kernel<&convolution, 0>>());
  m.impl("conv2d", torch::CppFunction::makeFromBoxedFunction<&kernel<&convolution, 0>>());
  m.impl("conv3d", torch::CppFunction::makeFromBoxedFunction<&kernel<&convolution, 0>>());
  m.impl("scaled_dot_product_attention", torch::CppFunction::makeFromBoxedFunction<&kernel<&attention, 0>>());
}

}  // namespace rarefy::graph
