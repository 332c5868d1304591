#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/embedding.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/matmul.h>
#include <rarefy/quantization/packed_weight.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <utility>

#include "ops/autograd/not_differentiable.h"
#include "quantization/packed_rows.h"
#include "quantization/scheme_cache.h"

#if !defined(INTRA_OP_PARALLEL)
#error "at::parallel_for is a template in torch's header: without -fopenmp here it runs on one thread, silently"
#endif

TORCH_LIBRARY_FRAGMENT(rarefy, m) {
  m.def("dequantize_packed(Tensor[] parts, str scheme, int[] shape, ScalarType dtype) -> Tensor");
  m.def("packed_linear(Tensor x, Tensor[] parts, Tensor? bias, str scheme, int[] shape, ScalarType dtype) -> Tensor");
  m.def("packed_embedding(Tensor indices, Tensor[] parts, str scheme, int[] shape, ScalarType dtype) -> Tensor");
}

namespace rarefy::quantization {
namespace {

using Parts = at::ArrayRef<at::Tensor>;

constexpr int64_t kFewRows = 8;  // of x: the library sums in one order whatever the height of the weight
constexpr int64_t kSmallBlock = int64_t{1} << 17;  // elements of a block of one thread: 512 KiB of floats
constexpr int64_t kHeight = 256;  // rows of a block for more rows of x: the library then sums as for the whole weight

QuantizedTensorParts read(const char* function, Parts parts, const std::string& scheme, at::IntArrayRef shape,
                          at::ScalarType dtype) {
  TORCH_CHECK_TYPE(at::isFloatingType(dtype), "[", function, "] dtype must be floating point, got ", dtype);
  return parts_of(parts.vec(), scheme_of(scheme), shape.vec(), dtype);
}

void check_matrix(const char* function, at::IntArrayRef shape) {
  TORCH_CHECK_VALUE(shape.size() == 2, "[", function, "] the weight must have two dimensions, got shape ", shape);
}

void check_input(const at::Tensor& x, at::IntArrayRef shape, at::ScalarType dtype) {
  check_matrix("packed_linear", shape);
  TORCH_CHECK_TYPE(x.scalar_type() == dtype, "[packed_linear] x must have the weight's type, ", dtype, ", got ",
                   x.scalar_type());
  TORCH_CHECK_VALUE(x.dim() >= 1 && x.sym_size(-1) == shape[1], "[packed_linear] x must have ", shape[1],
                    " features, got shape ", x.sym_sizes());
}

void check_indices(const at::Tensor& indices) {
  TORCH_CHECK_TYPE(indices.scalar_type() == at::kLong || indices.scalar_type() == at::kInt,
                   "[packed_embedding] indices must be int32 or int64, got ", indices.scalar_type());
}

// ---- CPU -------------------------------------------------------------------------------------------------------------

/// Rows of the weight in its type, [end - begin, width].
at::Tensor rows_of(const PackedRows& packed, int64_t begin, int64_t end, at::ScalarType dtype, at::Tensor& buffer) {
  const auto rows = buffer.narrow(0, 0, end - begin);
  packed.read(begin, end, rows.mutable_data_ptr<float>());
  return rows.to(dtype);
}

at::Tensor all_rows(const PackedRows& packed, int64_t begin, int64_t end, at::ScalarType dtype) {
  const auto out = at::empty({end - begin, packed.width()}, at::kFloat);
  auto* values = out.mutable_data_ptr<float>();
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(packed.width(), 1));
  at::parallel_for(begin, end, grain, [&](int64_t first, int64_t last) {
    packed.read(first, last, values + (first - begin) * packed.width());
  });
  return out.to(dtype);
}

at::Tensor dequantize_cpu(Parts parts, std::string scheme, at::IntArrayRef shape, at::ScalarType dtype) {
  const auto weight = read("dequantize_packed", parts, scheme, shape, dtype);
  if (dtype == at::kDouble) {
    check_parts("dequantize_packed", weight);
    return dequantize(weight);
  }
  const PackedRows packed("dequantize_packed", weight);
  return all_rows(packed, 0, packed.rows(), dtype).reshape(shape);
}

at::Tensor linear_cpu(const at::Tensor& x, Parts parts, const std::optional<at::Tensor>& bias, std::string scheme,
                      at::IntArrayRef shape, at::ScalarType dtype) {
  check_input(x, shape, dtype);
  const int64_t outputs = shape[0], inputs = shape[1];
  const bool is_small = outputs * inputs <= kSmallBlock;
  if (dtype == at::kDouble || is_small || x.numel() == 0) {
    return at::linear(x, dequantize_cpu(parts, std::move(scheme), shape, dtype), bias);
  }
  const auto weight = read("packed_linear", parts, scheme, shape, dtype);
  const PackedRows packed("packed_linear", weight);
  const auto rows = x.reshape({-1, inputs});
  const auto y = at::empty({rows.size(0), outputs}, x.options());
  const auto bias_of = [&](int64_t begin, int64_t end) {
    return bias.has_value() ? std::optional(bias->narrow(0, begin, end - begin)) : std::nullopt;
  };
  const auto multiply = [&](int64_t begin, int64_t end, const at::Tensor& block) {
    y.narrow(1, begin, end - begin).copy_(at::linear(rows, block, bias_of(begin, end)));
  };
  if (rows.size(0) > kFewRows) {
    for (int64_t begin = 0, end = 0; begin < outputs; begin = end) {
      end = outputs - begin < 2 * kHeight ? outputs : begin + kHeight;  // no short block at the end
      multiply(begin, end, all_rows(packed, begin, end, dtype));
    }
  } else {
    const int64_t height = std::max<int64_t>(1, kSmallBlock / inputs), blocks = (outputs + height - 1) / height;
    at::parallel_for(0, blocks, 1, [&](int64_t first, int64_t last) {
      const at::AutoDispatchBelowADInplaceOrView guard;
      auto buffer = at::empty({height, inputs}, at::kFloat);
      for (int64_t b = first; b < last; ++b) {
        const int64_t begin = b * height, end = std::min(begin + height, outputs);
        multiply(begin, end, rows_of(packed, begin, end, dtype, buffer));
      }
    });
  }
  auto sizes = x.sizes().vec();
  sizes.back() = outputs;
  return y.view(sizes);
}

at::Tensor embedding_cpu(const at::Tensor& indices, Parts parts, std::string scheme, at::IntArrayRef shape,
                         at::ScalarType dtype) {
  check_indices(indices);
  check_matrix("packed_embedding", shape);
  if (dtype == at::kDouble) {
    return at::embedding(dequantize_cpu(parts, std::move(scheme), shape, dtype), indices);
  }
  const auto table = read("packed_embedding", parts, scheme, shape, dtype);
  const PackedRows packed("packed_embedding", table);
  const auto flat = indices.reshape({-1}).to(at::kLong).contiguous();
  const auto* row = flat.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < flat.numel(); ++i) {
    TORCH_CHECK_INDEX(row[i] >= 0 && row[i] < packed.rows(), "[packed_embedding] indices must be within [0, ",
                      packed.rows(), "), got ", row[i]);
  }
  const auto out = at::empty({flat.numel(), packed.width()}, at::kFloat);
  auto* values = out.mutable_data_ptr<float>();
  at::parallel_for(0, flat.numel(), std::max<int64_t>(1, 32768 / std::max<int64_t>(packed.width(), 1)),
                   [&](int64_t first, int64_t last) {
                     for (int64_t i = first; i < last; ++i) {
                       packed.read(row[i], row[i] + 1, values + i * packed.width());
                     }
                   });
  auto sizes = indices.sizes().vec();
  sizes.push_back(packed.width());
  return out.to(dtype).view(sizes);
}

// ---- Other devices, and shapes ----------------------------------------------------------------------------------------

at::Tensor dequantize_anywhere(Parts parts, std::string scheme, at::IntArrayRef shape, at::ScalarType dtype) {
  const auto weight = read("dequantize_packed", parts, scheme, shape, dtype);
  check_parts("dequantize_packed", weight);
  return dequantize(weight);
}

at::Tensor linear_anywhere(const at::Tensor& x, Parts parts, const std::optional<at::Tensor>& bias, std::string scheme,
                           at::IntArrayRef shape, at::ScalarType dtype) {
  check_input(x, shape, dtype);
  return at::linear(x, dequantize_anywhere(parts, std::move(scheme), shape, dtype), bias);
}

at::Tensor embedding_anywhere(const at::Tensor& indices, Parts parts, std::string scheme, at::IntArrayRef shape,
                              at::ScalarType dtype) {
  check_indices(indices);
  check_matrix("packed_embedding", shape);
  return at::embedding(dequantize_anywhere(parts, std::move(scheme), shape, dtype), indices);
}

at::Tensor dequantize_meta(Parts parts, std::string scheme, at::IntArrayRef shape, at::ScalarType dtype) {
  read("dequantize_packed", parts, scheme, shape, dtype);
  return at::empty(shape, parts[0].options().dtype(dtype));
}

at::Tensor linear_meta(const at::Tensor& x, Parts parts, const std::optional<at::Tensor>& /*bias*/, std::string scheme,
                       at::IntArrayRef shape, at::ScalarType dtype) {
  read("packed_linear", parts, scheme, shape, dtype);
  check_input(x, shape, dtype);
  auto sizes = x.sym_sizes().vec();
  sizes.back() = shape[0];
  return at::empty_symint(sizes, x.options());
}

at::Tensor embedding_meta(const at::Tensor& indices, Parts parts, std::string scheme, at::IntArrayRef shape,
                          at::ScalarType dtype) {
  read("packed_embedding", parts, scheme, shape, dtype);
  check_indices(indices);
  check_matrix("packed_embedding", shape);
  auto sizes = indices.sym_sizes().vec();
  sizes.emplace_back(shape[1]);
  return at::empty_symint(sizes, parts[0].options().dtype(dtype));
}

// ---- Gradient --------------------------------------------------------------------------------------------------------

at::Tensor call_dequantize(Parts parts, std::string scheme, at::IntArrayRef shape, at::ScalarType dtype) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("rarefy::dequantize_packed", "").typed<decltype(dequantize_cpu)>();
  return op.call(parts, std::move(scheme), shape, dtype);
}

at::Tensor call_linear(const at::Tensor& x, Parts parts, const std::optional<at::Tensor>& bias, std::string scheme,
                       at::IntArrayRef shape, at::ScalarType dtype) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("rarefy::packed_linear", "").typed<decltype(linear_cpu)>();
  return op.call(x, parts, bias, std::move(scheme), shape, dtype);
}

at::Tensor call_embedding(const at::Tensor& indices, Parts parts, std::string scheme, at::IntArrayRef shape,
                          at::ScalarType dtype) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("rarefy::packed_embedding", "").typed<decltype(embedding_cpu)>();
  return op.call(indices, parts, std::move(scheme), shape, dtype);
}

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

/// Saves the packed weight: the gradient of x unpacks it again.
class PackedLinear : public torch::autograd::Function<PackedLinear> {
 public:
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const std::optional<at::Tensor>& bias,
                            const std::vector<at::Tensor>* parts, const std::string& scheme,
                            const std::vector<int64_t>* shape, at::ScalarType dtype) {
    ctx->saved_data["parts"] = *parts;
    ctx->saved_data["scheme"] = scheme;
    ctx->saved_data["shape"] = *shape;
    ctx->saved_data["dtype"] = dtype;
    ctx->saved_data["has_bias"] = bias.has_value() && bias->defined();
    const at::AutoDispatchBelowADInplaceOrView guard;
    return call_linear(x, *parts, bias, scheme, *shape, dtype);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& gradients) {
    const auto& g = gradients[0];
    variable_list out(6);
    if (ctx->needs_input_grad(0)) {
      const auto weight =
          call_dequantize(ctx->saved_data["parts"].toTensorVector(), ctx->saved_data["scheme"].toStringRef(),
                          ctx->saved_data["shape"].toIntVector(), ctx->saved_data["dtype"].toScalarType());
      out[0] = at::matmul(g, weight);
    }
    if (ctx->saved_data["has_bias"].toBool() && ctx->needs_input_grad(1)) {
      out[1] = g.reshape_symint({-1, g.sym_size(-1)}).sum(0);
    }
    return out;
  }
};

at::Tensor linear_autograd(const at::Tensor& x, Parts parts, const std::optional<at::Tensor>& bias, std::string scheme,
                           at::IntArrayRef shape, at::ScalarType dtype) {
  const auto tensors = parts.vec();
  const auto sizes = shape.vec();
  return PackedLinear::apply(x, bias, &tensors, scheme, &sizes, dtype);
}

std::vector<at::Tensor> list_of(const QuantizedTensorParts& parts) {
  check_parts("packed_weight", parts);
  std::vector<at::Tensor> tensors;
  for (const auto& name : part_names(parts.scheme)) {
    tensors.push_back(parts.tensors.at(name));
  }
  return tensors;
}

}  // namespace

at::Tensor dequantize_packed(const QuantizedTensorParts& parts) {
  return call_dequantize(list_of(parts), parts.scheme.to_json(), parts.shape, parts.dtype);
}

at::Tensor packed_linear(const at::Tensor& x, const QuantizedTensorParts& weight,
                         const std::optional<at::Tensor>& bias) {
  return call_linear(x, list_of(weight), bias, weight.scheme.to_json(), weight.shape, weight.dtype);
}

at::Tensor packed_embedding(const at::Tensor& indices, const QuantizedTensorParts& table) {
  return call_embedding(indices, list_of(table), table.scheme.to_json(), table.shape, table.dtype);
}

TORCH_LIBRARY_IMPL(rarefy, CPU, m) {
  m.impl("dequantize_packed", &dequantize_cpu);
  m.impl("packed_linear", &linear_cpu);
  m.impl("packed_embedding", &embedding_cpu);
}

TORCH_LIBRARY_IMPL(rarefy, CompositeExplicitAutograd, m) {
  m.impl("dequantize_packed", &dequantize_anywhere);
  m.impl("packed_linear", &linear_anywhere);
  m.impl("packed_embedding", &embedding_anywhere);
}

TORCH_LIBRARY_IMPL(rarefy, Meta, m) {
  m.impl("dequantize_packed", &dequantize_meta);
  m.impl("packed_linear", &linear_meta);
  m.impl("packed_embedding", &embedding_meta);
}

TORCH_LIBRARY_IMPL(rarefy, Autograd, m) {
  m.impl("dequantize_packed", &ops::NotDifferentiable<&call_dequantize>::call);
  m.impl("packed_linear", &linear_autograd);
  m.impl("packed_embedding", &ops::NotDifferentiable<&call_embedding>::call);
}

}  // namespace rarefy::quantization
