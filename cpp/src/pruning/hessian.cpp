#include <ATen/core/grad_mode.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>
#include <rarefy/pruning/hessian.h>

#include <algorithm>

#include "linalg.h"
#include "pruning/finite.h"

namespace rarefy::pruning {
namespace {

constexpr int64_t kPartBytes = int64_t{64} << 20;  // of unfolded inputs at once

int64_t value_or(const std::vector<int64_t>& values, size_t i, int64_t otherwise) {
  return values.empty() ? otherwise : values[i];
}

bool is_convolution(const LayerShape& layer) { return layer.weight.size() > 2; }

/// The input with a batch dimension, checked.
at::Tensor batched(const LayerShape& layer, const at::Tensor& input) {
  const auto dims = static_cast<int64_t>(layer.weight.size()) - 2;
  TORCH_CHECK_VALUE(input.defined() && input.is_floating_point(), "[input_rows] the input must be floating point, got ",
                    input.defined() ? input.scalar_type() : at::ScalarType::Undefined);
  if (!is_convolution(layer)) {
    TORCH_CHECK_VALUE(input.dim() >= 1 && input.size(-1) == layer.weight[1],
                      "[input_rows] the input of a linear layer must have ", layer.weight[1],
                      " features in its last dimension, got sizes ", input.sizes());
    return input;
  }
  TORCH_CHECK_VALUE(input.dim() == dims + 1 || input.dim() == dims + 2,
                    "[input_rows] the input of a convolution with a ", dims, "-dimensional kernel must have ", dims + 2,
                    " dimensions (or ", dims + 1, " without batch), got sizes ", input.sizes());
  auto x = input.dim() == dims + 1 ? input.unsqueeze(0) : input;
  TORCH_CHECK_VALUE(x.size(1) == layer.weight[1] * layer.groups, "[input_rows] the input of the convolution must have ",
                    layer.weight[1] * layer.groups, " channels, got sizes ", input.sizes());
  for (int64_t d = 0; d < dims; ++d) {
    const auto i = static_cast<size_t>(d);
    const int64_t reach = value_or(layer.dilation, i, 1) * (layer.weight[i + 2] - 1) + 1;
    TORCH_CHECK_VALUE(x.size(d + 2) + 2 * value_or(layer.padding, i, 0) >= reach,
                      "[input_rows] the kernel must fit into the padded input, got a reach of ", reach, " and sizes ",
                      input.sizes());
  }
  return x;
}

/// Windows of a batch: [groups, batch * places, channels * kernel].
at::Tensor unfolded(const LayerShape& layer, const at::Tensor& x) {
  const auto dims = static_cast<size_t>(x.dim()) - 2;
  std::vector<int64_t> pad(2 * dims);
  for (size_t i = 0; i < dims; ++i) {
    pad[2 * (dims - 1 - i)] = pad[2 * (dims - 1 - i) + 1] = value_or(layer.padding, i, 0);
  }
  const bool is_padded = std::any_of(pad.begin(), pad.end(), [](int64_t p) { return p != 0; });
  const auto padded = (is_padded ? at::constant_pad_nd(x, pad, 0) : x).contiguous();
  // [groups, batch, places..., channels of the group, kernel...] as a view, copied into order by reshape().
  const int64_t channels = layer.weight[1];
  std::vector<int64_t> sizes{layer.groups, padded.size(0)};
  std::vector<int64_t> strides{channels * padded.stride(1), padded.stride(0)};
  int64_t places = padded.size(0);
  for (size_t i = 0; i < dims; ++i) {
    const auto d = static_cast<int64_t>(i) + 2;
    const int64_t step = value_or(layer.stride, i, 1);
    const int64_t reach = value_or(layer.dilation, i, 1) * (layer.weight[i + 2] - 1) + 1;
    sizes.push_back((padded.size(d) - reach) / step + 1);
    strides.push_back(step * padded.stride(d));
    places *= sizes.back();
  }
  sizes.push_back(channels);
  strides.push_back(padded.stride(1));
  for (size_t i = 0; i < dims; ++i) {
    sizes.push_back(layer.weight[i + 2]);
    strides.push_back(value_or(layer.dilation, i, 1) * padded.stride(static_cast<int64_t>(i) + 2));
  }
  return padded.as_strided(sizes, strides).reshape({layer.groups, places, layer.features()});
}

at::Tensor rows_of(const LayerShape& layer, const at::Tensor& x) {
  return is_convolution(layer) ? unfolded(layer, x) : x.reshape({1, -1, layer.weight[1]});
}

}  // namespace

void LayerShape::validate() const {
  TORCH_CHECK_VALUE(weight.size() >= 2 && *std::min_element(weight.begin(), weight.end()) >= 1,
                    "[LayerShape] weight must have 2 or more sizes of at least 1, got ", weight);
  const size_t dims = weight.size() - 2;
  for (const auto& [name, values, least] :
       {std::tuple("stride", &stride, 1), {"padding", &padding, 0}, {"dilation", &dilation, 1}}) {
    TORCH_CHECK_VALUE(values->empty() || values->size() == dims, "[LayerShape] ", name, " must have ", dims,
                      " values, one per dimension of the kernel, got ", *values);
    TORCH_CHECK_VALUE(std::all_of(values->begin(), values->end(), [least = least](int64_t v) { return v >= least; }),
                      "[LayerShape] ", name, " must be at least ", least, ", got ", *values);
  }
  TORCH_CHECK_VALUE(groups >= 1 && weight[0] % groups == 0 && (dims > 0 || groups == 1),
                    "[LayerShape] groups must divide the ", weight[0], " outputs, and be 1 for a linear layer, got ",
                    groups);
}

int64_t LayerShape::features() const {
  int64_t product = 1;
  for (size_t i = 1; i < weight.size(); ++i) {
    product *= weight[i];
  }
  return product;
}

at::Tensor input_rows(const LayerShape& layer, const at::Tensor& input) {
  layer.validate();
  return rows_of(layer, batched(layer, input));
}

HessianAccumulator::HessianAccumulator(std::string name, LayerShape layer, Statistic statistic, bool float64)
    : name_(std::move(name)),
      layer_(std::move(layer)),
      statistic_(statistic),
      type_(float64 ? at::kDouble : at::kFloat) {
  layer_.validate();
}

bool HessianAccumulator::update(const at::Tensor& input) {
  const at::NoGradGuard no_grad;
  const auto x = batched(layer_, input.defined() ? input.detach() : input);
  if (!is_finite(x)) {
    ++skipped_;
    return false;
  }
  if (x.numel() == 0) {
    return true;
  }
  const int64_t features = layer_.features();
  if (!mean_.defined()) {
    const auto options = at::TensorOptions(type_).device(x.device());
    mean_ = statistic_ == Statistic::products ? at::zeros({layer_.groups, features, features}, options)
                                              : at::zeros({layer_.groups, features}, options);
  }
  // A linear input is its own matrix; what is unfolded or converted is made part by part.
  const auto whole = is_convolution(layer_) ? x : x.reshape({-1, x.size(-1)});
  int64_t step = whole.size(0);
  if (is_convolution(layer_) || whole.scalar_type() != type_) {
    const int64_t width = is_convolution(layer_) ? layer_.groups * features * whole[0][0].numel() : features;
    step = std::max<int64_t>(1, kPartBytes / (width * static_cast<int64_t>(at::elementSize(type_))));
  }
  for (int64_t begin = 0; begin < whole.size(0); begin += step) {
    const auto part = whole.narrow(0, begin, std::min(step, whole.size(0) - begin)).to(mean_.device(), type_);
    const auto rows = rows_of(layer_, part);
    const int64_t count = rows.size(1);
    if (count == 0) {
      continue;
    }
    const auto total = static_cast<double>(samples_ + count);
    const double beta = static_cast<double>(samples_) / total, alpha = 1.0 / total;
    if (statistic_ == Statistic::squares) {
      mean_.mul_(beta).add_(rows.square().sum(1), alpha);
    } else if (layer_.groups == 1) {
      auto mean = mean_[0];
      linalg::add_gram(mean, rows[0], beta, alpha);
    } else {
      mean_.baddbmm_(rows.transpose(1, 2), rows, beta, alpha);
    }
    samples_ += count;
  }
  ++batches_;
  return true;
}

void HessianAccumulator::check_seen(const char* function) const {
  TORCH_CHECK_VALUE(samples_ > 0, "[HessianAccumulator.", function, "] '", name_,
                    "' must have seen a finite batch, got ",
                    skipped_ == 0 ? std::string("none") : c10::str(skipped_, " with NaN or infinity"));
}

at::Tensor HessianAccumulator::hessian() const {
  TORCH_CHECK_VALUE(statistic_ == Statistic::products, "[HessianAccumulator.hessian] '", name_,
                    "' has gathered squares alone");
  check_seen("hessian");
  auto out = mean_.clone();
  for (int64_t group = 0; group < out.size(0); ++group) {
    auto own = out[group];
    linalg::mirror(own);
  }
  return out;
}

at::Tensor HessianAccumulator::norms() const {
  check_seen("norms");
  return (statistic_ == Statistic::products ? mean_.diagonal(0, 1, 2) : mean_).sqrt();
}

int64_t HessianAccumulator::bytes() const { return mean_.defined() ? static_cast<int64_t>(mean_.nbytes()) : 0; }

}  // namespace rarefy::pruning
