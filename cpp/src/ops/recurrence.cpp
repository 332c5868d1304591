#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/tanh.h>
#include <rarefy/ops/fake_quantize.h>
#include <rarefy/ops/recurrence.h>
#include <torch/library.h>

#include <algorithm>
#include <functional>
#include <numeric>
#include <utility>
#include <vector>

TORCH_LIBRARY_FRAGMENT(rarefy, m) {
  m.def(
      "recurrence(Tensor gates, Tensor weight, Tensor? weight_scale, Tensor? bias, Tensor? scale, Tensor? zero_point, "
      "int qmin, int qmax, Tensor h0, Tensor? c0, int[] batch_sizes, bool reverse) -> (Tensor, Tensor, Tensor)");
}

namespace rarefy::ops {
namespace {

using OptionalTensor = std::optional<at::Tensor>;
using Result = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

void check(const at::Tensor& gates, const at::Tensor& weight, const OptionalTensor& weight_scale,
           const OptionalTensor& scale, const OptionalTensor& zero_point, const at::Tensor& h0,
           const OptionalTensor& c0, at::IntArrayRef batch_sizes) {
  const int64_t count = c0.has_value() ? 4 : 3;
  TORCH_CHECK_VALUE(weight.dim() == 2 && weight.sym_size(0) == count * weight.sym_size(1),
                    "[recurrence] weight must have shape [", count, " * hidden, hidden], got ", weight.sym_sizes());
  const bool integers = weight.scalar_type() == at::kChar;
  TORCH_CHECK_VALUE(integers == weight_scale.has_value(),
                    "[recurrence] weight_scale must be given for an int8 weight and no other, got a weight of ",
                    weight.scalar_type());
  TORCH_CHECK_VALUE(scale.has_value() == zero_point.has_value() && (scale.has_value() || !integers),
                    "[recurrence] scale and zero_point must be given together, and for an int8 weight");
  TORCH_CHECK_VALUE(gates.dim() == 2 && gates.sym_size(1) == weight.sym_size(0),
                    "[recurrence] gates must have shape [rows, ", weight.sym_size(0), "], got ", gates.sym_sizes());
  TORCH_CHECK_VALUE(!batch_sizes.empty() && batch_sizes.back() >= 0 &&
                        std::is_sorted(batch_sizes.begin(), batch_sizes.end(), std::greater<>()),
                    "[recurrence] batch_sizes must be one or more numbers that do not grow, got ", batch_sizes);
  const auto rows = std::accumulate(batch_sizes.begin(), batch_sizes.end(), int64_t{0});
  TORCH_CHECK_VALUE(gates.sym_size(0) == rows, "[recurrence] gates must have ", rows,
                    " rows, the sum of batch_sizes, got ", gates.sym_size(0));
  for (const auto* state : {&h0, c0.has_value() ? &*c0 : &h0}) {
    TORCH_CHECK_VALUE(
        state->dim() == 2 && state->sym_size(0) == batch_sizes[0] && state->sym_size(1) == weight.sym_size(1),
        "[recurrence] h0 and c0 must have shape [", batch_sizes[0], ", ", weight.sym_size(1), "], got ",
        state->sym_sizes());
  }
}

int64_t rows_of(const at::Tensor& x) { return x.sym_size(0).guard_int(__FILE__, __LINE__); }

struct State {
  at::Tensor h, c;  // c undefined for a GRU

  State rows(int64_t begin, int64_t count) const {
    if (begin == 0 && count == rows_of(h)) {
      return *this;
    }
    return {h.narrow(0, begin, count), c.defined() ? c.narrow(0, begin, count) : c};
  }
  /// Above other rows.
  State over(const State& below) const { return {at::cat({h, below.h}), c.defined() ? at::cat({c, below.c}) : c}; }
};

State step(const at::Tensor& gates, const at::Tensor& product, const State& state) {
  if (state.c.defined()) {
    const auto parts = (gates + product).chunk(4, 1);
    const auto c = at::sigmoid(parts[1]) * state.c + at::sigmoid(parts[0]) * at::tanh(parts[2]);
    return {at::sigmoid(parts[3]) * at::tanh(c), c};
  }
  const auto a = gates.chunk(3, 1), d = product.chunk(3, 1);
  const auto reset = at::sigmoid(a[0] + d[0]), update = at::sigmoid(a[1] + d[1]);
  const auto n = at::tanh(a[2] + reset * d[2]);
  return {n + update * (state.h - n), {}};
}

Result recurrence_composite(const at::Tensor& gates, const at::Tensor& weight, const OptionalTensor& weight_scale,
                            const OptionalTensor& bias, const OptionalTensor& scale, const OptionalTensor& zero_point,
                            int64_t qmin, int64_t qmax, const at::Tensor& h0, const OptionalTensor& c0,
                            at::IntArrayRef batch_sizes, bool reverse) {
  check(gates, weight, weight_scale, scale, zero_point, h0, c0, batch_sizes);
  const auto product = [&](const at::Tensor& h) {
    if (weight_scale.has_value()) {
      return quantized_linear(h, weight, *weight_scale, bias, {*scale, *zero_point, qmin, qmax});
    }
    const auto q = scale.has_value() ? fake_quantize(h, *scale, *zero_point, std::nullopt, qmin, qmax) : h;
    return at::linear(q, weight, bias);
  };
  const auto steps = static_cast<int64_t>(batch_sizes.size());
  const bool padded = batch_sizes.front() == batch_sizes.back();
  const auto inputs = padded ? gates.reshape_symint({steps, batch_sizes[0], gates.sym_size(1)}).unbind(0)
                             : gates.split_with_sizes(batch_sizes);
  std::vector<at::Tensor> outputs(batch_sizes.size());
  const State start{h0, c0.value_or(at::Tensor())};
  std::vector<State> finished;  // shorter sequences, the shortest first
  auto state = reverse ? start.rows(0, batch_sizes.back()) : start;
  for (int64_t i = 0; i < steps; ++i) {
    const auto t = static_cast<size_t>(reverse ? steps - 1 - i : i);
    const auto present = rows_of(state.h), rows = batch_sizes[t];
    if (rows < present) {
      finished.push_back(state.rows(rows, present - rows));
      state = state.rows(0, rows);
    } else if (rows > present) {  // in reverse, a sequence begins where it ends
      state = state.over(start.rows(present, rows - present));
    }
    state = step(inputs[t], product(state.h), state);
    outputs[t] = state.h;
  }
  for (auto it = finished.rbegin(); it != finished.rend(); ++it) {
    state = state.over(*it);
  }
  auto all = outputs.size() == 1 ? outputs[0].clone() : at::cat(outputs);
  return {std::move(all), state.h, state.c.defined() ? state.c : at::empty({0}, h0.options())};
}

}  // namespace

Result recurrence(const at::Tensor& gates, const HiddenProduct& hidden, const at::Tensor& h0, const OptionalTensor& c0,
                  at::IntArrayRef batch_sizes, bool reverse) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("rarefy::recurrence", "").typed<decltype(recurrence_composite)>();
  const auto& grid = hidden.grid;
  const auto scale = grid.has_value() ? OptionalTensor(grid->scale) : std::nullopt;
  const auto zero_point = grid.has_value() ? OptionalTensor(grid->zero_point) : std::nullopt;
  return op.call(gates, hidden.weight, hidden.weight_scale, hidden.bias, scale, zero_point, grid ? grid->qmin : 0,
                 grid ? grid->qmax : 255, h0, c0, batch_sizes, reverse);
}

TORCH_LIBRARY_IMPL(rarefy, CompositeImplicitAutograd, m) { m.impl("recurrence", &recurrence_composite); }

}  // namespace rarefy::ops
