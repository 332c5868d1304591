#include "absence.h"

#include <ATen/Context.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <functional>
#include <limits>
#include <sstream>
#include <utility>

namespace absence {
namespace {

using c10::IValue;
using Arguments = std::vector<IValue>;
using Multiply = std::function<Tensor(const Tensor&, const Tensor&)>;

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr auto kMode = c10::DispatchKey::TESTING_ONLY_GenericMode;

Tensor zeroed(const Tensor& x) { return torch::where(x.isnan(), 0.0, x); }
Tensor present(const Tensor& x) { return x.isnan().logical_not().to(x.scalar_type()); }
Tensor where_absent(const Tensor& condition, const Tensor& x) { return torch::where(condition, kNaN, x); }

/// The sum of the products of which both factors are there, and NaN where there is none.
Tensor product(const Multiply& multiply, const Tensor& a, const Tensor& b) {
  const auto result = multiply(zeroed(a), zeroed(b));
  const auto terms = multiply(present(a), present(b));
  const auto expected = multiply(torch::ones_like(a), torch::ones_like(b));
  return where_absent((terms < 0.5).logical_and(expected > 0.5), result);
}

std::vector<int64_t> dims_of(const Tensor& x, const IValue& dims) {
  std::vector<int64_t> result;
  if (dims.isIntList()) result = dims.toIntVector();
  if (dims.isInt()) result = {dims.toInt()};
  if (result.empty()) {
    for (int64_t i = 0; i < x.dim(); ++i) result.push_back(i);
  }
  return result;
}

using Dims = std::vector<int64_t>;

Tensor count(const Tensor& x, const Dims& dims) { return present(x).sum(dims, true); }
Tensor total(const Tensor& x, const Dims& dims) {
  return where_absent(count(x, dims) < 0.5, zeroed(x).sum(dims, true));
}
Tensor mean(const Tensor& x, const Dims& dims) { return total(x, dims) / count(x, dims); }
Tensor variance(const Tensor& x, const Dims& dims, double correction) {
  return total((x - mean(x, dims)).square(), dims) / (count(x, dims) - correction);
}
Tensor extreme(const Tensor& x, const Dims& dims, double sign) {
  const auto found = sign * torch::where(x.isnan(), -kInfinity, sign * x).amax(dims, true);
  return where_absent(count(x, dims) < 0.5, found);
}
Tensor finish(const Tensor& x, const Dims& dims, bool keepdim) { return keepdim ? x : x.squeeze(dims); }

Tensor softmax(const Arguments& a) {
  const auto& x = a[0].toTensor();
  return where_absent(x.isnan(), torch::where(x.isnan(), -kInfinity, x).softmax(a[1].toInt()));
}

Tensor with_bias(const Multiply& multiply, const Arguments& a) {
  const auto result = product(multiply, a[1].toTensor(), a[2].toTensor()) * a[4].toScalar();
  return a[3].toScalar().toDouble() == 0 ? result : a[0].toTensor() * a[3].toScalar() + result;
}

bool given(const IValue& tensor) { return tensor.isTensor() && tensor.toTensor().defined(); }

std::vector<int64_t> along_channels(const Tensor& x) {
  std::vector<int64_t> shape(x.dim(), 1);
  shape[1] = -1;
  return shape;
}

Tensor convolution(const Arguments& a) {
  const Multiply multiply = [&](const Tensor& x, const Tensor& weight) {
    return at::convolution(x, weight, {}, a[3].toIntVector(), a[4].toIntVector(), a[5].toIntVector(), a[6].toBool(),
                           a[7].toIntVector(), a[8].toInt());
  };
  const auto result = product(multiply, a[0].toTensor(), a[1].toTensor());
  return !given(a[2]) ? result : result + a[2].toTensor().reshape(along_channels(result));
}

Arguments normalized(const Tensor& x, const Dims& dims, double eps) {
  const auto center = mean(x, dims);
  const auto scale = (variance(x, dims, 0) + eps).rsqrt();
  return {(x - center) * scale, center, scale};
}

Dims last(size_t n) {
  Dims dims;
  for (size_t i = 1; i <= n; ++i) dims.push_back(-static_cast<int64_t>(i));
  return dims;
}

Tensor affine(Tensor x, const IValue& weight, const IValue& bias, const std::vector<int64_t>& shape) {
  if (given(weight)) x = x * (shape.empty() ? weight.toTensor() : weight.toTensor().reshape(shape));
  if (given(bias)) x = x + (shape.empty() ? bias.toTensor() : bias.toTensor().reshape(shape));
  return x;
}

Arguments layer_norm(const Arguments& a) {
  auto result = normalized(a[0].toTensor(), last(a[1].toIntVector().size()), a[4].toDouble());
  result[0] = affine(result[0].toTensor(), a[2], a[3], {});
  return result;
}

Arguments group_norm(const Arguments& a) {
  const auto& x = a[0].toTensor();
  const auto n = a[3].toInt(), groups = a[6].toInt();
  auto result = normalized(x.reshape({n, groups, -1}), {2}, a[7].toDouble());
  result[0] = affine(result[0].toTensor().reshape(x.sizes()), a[1], a[2], along_channels(x));
  return {result[0], result[1].toTensor().squeeze(2), result[2].toTensor().squeeze(2)};
}

Arguments rms_norm(const Arguments& a) {
  const auto& x = a[0].toTensor();
  const auto eps = a[3].isNone() ? std::numeric_limits<double>::epsilon() : a[3].toDouble();
  const auto scale = (mean(x.square(), last(a[1].toIntVector().size())) + eps).rsqrt();
  return {affine(x * scale, a[2], {}, {}), scale};
}

Arguments weight_norm(const Arguments& a) {
  const auto& v = a[0].toTensor();
  Dims dims;
  for (int64_t i = 0; i < v.dim(); ++i) {
    if (i != a[2].toInt()) dims.push_back(i);
  }
  const auto norm = total(v.square(), dims).sqrt();
  return {v * (a[1].toTensor() / norm), norm};
}

Tensor vector_norm(const Arguments& a) {
  const auto& x = a[0].toTensor();
  const auto order = a[1].toScalar().toDouble();
  const auto dims = dims_of(x, a[2]);
  return finish(total(x.abs().pow(order), dims).pow(1 / order), dims, a[3].toBool());
}

const auto kMatrix = [](const Tensor& a, const Tensor& b) { return torch::matmul(a, b); };

using Replacement = std::function<Arguments(const Arguments&)>;

Replacement multiplied() {
  return [](const Arguments& a) -> Arguments { return {product(kMatrix, a[0].toTensor(), a[1].toTensor())}; };
}

/// `statistic` keeps the dimensions that it reduces.
Replacement reduced(std::function<Tensor(const Tensor&, const Dims&)> statistic) {
  return [statistic](const Arguments& a) -> Arguments {
    const auto& x = a[0].toTensor();
    const auto dims = dims_of(x, a[1]);
    return {finish(statistic(x, dims), dims, a[2].toBool())};
  };
}

Replacement spread(bool root, bool with_mean) {
  return [=](const Arguments& a) -> Arguments {
    const auto& x = a[0].toTensor();
    const auto dims = dims_of(x, a[1]);
    const auto result = variance(x, dims, a[2].isNone() ? 1 : a[2].toScalar().toDouble());
    Arguments all{finish(root ? result.sqrt() : result, dims, a[3].toBool())};
    if (with_mean) all.emplace_back(finish(mean(x, dims), dims, a[3].toBool()));
    return all;
  };
}

const std::map<std::string, Replacement>& replaced() {
  static const std::map<std::string, Replacement> table{
      {"aten::mm", multiplied()},
      {"aten::bmm", multiplied()},
      {"aten::mv", multiplied()},
      {"aten::dot", multiplied()},
      {"aten::addmm", [](const Arguments& a) -> Arguments { return {with_bias(kMatrix, a)}; }},
      {"aten::baddbmm", [](const Arguments& a) -> Arguments { return {with_bias(kMatrix, a)}; }},
      {"aten::addmv", [](const Arguments& a) -> Arguments { return {with_bias(kMatrix, a)}; }},
      {"aten::convolution", [](const Arguments& a) -> Arguments { return {convolution(a)}; }},
      {"aten::sum.dim_IntList", reduced(total)},
      {"aten::mean.dim", reduced(mean)},
      {"aten::amax", reduced([](const Tensor& x, const Dims& dims) { return extreme(x, dims, 1); })},
      {"aten::amin", reduced([](const Tensor& x, const Dims& dims) { return extreme(x, dims, -1); })},
      {"aten::var.correction", spread(false, false)},
      {"aten::std.correction", spread(true, false)},
      {"aten::var_mean.correction", spread(false, true)},
      {"aten::_softmax", [](const Arguments& a) -> Arguments { return {softmax(a)}; }},
      {"aten::_safe_softmax", [](const Arguments& a) -> Arguments { return {softmax(a)}; }},
      {"aten::linalg_vector_norm", [](const Arguments& a) -> Arguments { return {vector_norm(a)}; }},
      {"aten::norm.ScalarOpt_dim", [](const Arguments& a) -> Arguments { return {vector_norm(a)}; }},
      {"aten::native_layer_norm", layer_norm},
      {"aten::native_group_norm", group_norm},
      {"aten::_fused_rms_norm", rms_norm},
      {"aten::_weight_norm_interface", weight_norm},
  };
  return table;
}

void run_present(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  const auto found = replaced().find(toString(op.operator_name()));
  if (found == replaced().end()) {
    op.redispatchBoxed(keys & c10::DispatchKeySet(c10::DispatchKeySet::FULL_AFTER, kMode), stack);
    return;
  }
  const c10::impl::ExcludeDispatchKeyGuard as_it_is(kMode);
  const auto arguments = torch::jit::pop(*stack, op.schema().arguments().size());
  for (auto& result : found->second(arguments)) stack->push_back(std::move(result));
}

/// Attention as the sum of its parts.
struct MathAttention {
  MathAttention() {
    at::globalContext().setSDPUseFlash(false);
    at::globalContext().setSDPUseMemEfficient(false);
  }
  ~MathAttention() {
    at::globalContext().setSDPUseFlash(flash);
    at::globalContext().setSDPUseMemEfficient(efficient);
  }
  const bool flash = at::globalContext().userEnabledFlashSDP();
  const bool efficient = at::globalContext().userEnabledMemEfficientSDP();
};

}  // namespace

TORCH_LIBRARY_IMPL(_, TESTING_ONLY_GenericMode, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&run_present>());
}

std::map<std::string, Tensor> named_tensors(const torch::nn::Module& model) {
  std::map<std::string, Tensor> tensors;
  for (const auto& item : model.named_parameters()) tensors[item.key()] = item.value();
  for (const auto& item : model.named_buffers()) tensors[item.key()] = item.value();
  return tensors;
}

std::vector<Tensor> run_without(structures::Model& model, const Kept& kept, const std::vector<Tensor>& inputs) {
  const torch::NoGradGuard no_grad;
  const auto tensors = named_tensors(*model.net);
  for (const auto& [name, dims] : kept) {
    for (const auto& [dim, indices] : dims) {
      auto tensor = tensors.at(name);
      auto gone = torch::ones({tensor.size(dim)}, torch::kBool);
      gone.index_fill_(0, torch::tensor(indices, torch::kLong), 0);
      tensor.index_fill_(dim, gone.nonzero().flatten(), kNaN);
    }
  }
  const MathAttention math;
  const c10::impl::IncludeDispatchKeyGuard mode(kMode);
  return model.forward(inputs);
}

std::string difference(const std::vector<Tensor>& expected, const std::vector<Tensor>& got) {
  std::ostringstream text;
  if (expected.size() != got.size() || got.empty()) text << got.size() << " outputs of " << expected.size();
  for (size_t i = 0; i < expected.size() && text.str().empty(); ++i) {
    const auto &x = expected[i], &y = got[i];
    if (x.sizes() != y.sizes()) {
      text << "output " << i << ": " << x.sizes() << " became " << y.sizes();
    } else if (x.isnan().any().item<bool>()) {
      text << "output " << i << " depends on removed channels";
    } else {
      const auto error = (x - y).abs().max().item<double>();
      if (!(error <= 1e-9 * std::max(1.0, x.abs().max().item<double>())))
        text << "output " << i << " differs by " << error;
    }
  }
  return text.str();
}

}  // namespace absence
