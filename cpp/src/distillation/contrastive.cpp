#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/full.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/gather.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/logsumexp.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/softplus.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <rarefy/distillation/contrastive.h>
#include <torch/library.h>
#include <torch/types.h>

#include <cmath>
#include <limits>

#include "distillation/loss_math.h"

namespace rarefy::distillation {
namespace {

/// A 32-bit hash of 32-bit values held in int64. The factors are below 2^31, so that no product leaves int64.
at::Tensor mix(at::Tensor x) {
  constexpr int64_t low = 0xffffffff;
  x = x.bitwise_xor(x.bitwise_right_shift(16)).mul(0x21f0aaad).bitwise_and(low);
  x = x.bitwise_xor(x.bitwise_right_shift(15)).mul(0x735a2d97).bitwise_and(low);
  return x.bitwise_xor(x.bitwise_right_shift(15));
}

/// Where a stream of hashes begins: a 32-bit number from seed and step.
at::Tensor stream_start(const at::Tensor& step, int64_t seed) {
  constexpr int64_t low = 0xffffffff;
  const auto first = mix(at::full_like(step, seed & low)) + ((seed >> 32) & low);
  return mix((mix(first.bitwise_and(low)) + step).bitwise_and(low));
}

/// 32-bit hashes [rows, columns].
at::Tensor hashes(const at::Tensor& rows, int64_t columns, const at::Tensor& start) {
  constexpr int64_t low = 0xffffffff;
  const auto column = at::arange(columns, rows.options());
  const auto place = mix((rows + start).bitwise_and(low)).unsqueeze(1) + column;
  return mix(mix(place.bitwise_and(low)).bitwise_xor(start));
}

void check_places(const char* function, const char* name, const at::Tensor& places, int64_t dims) {
  TORCH_CHECK_TYPE(places.scalar_type() == at::kLong, "[", function, "] ", name, " must be int64, got ",
                   places.scalar_type());
  TORCH_CHECK_VALUE(places.dim() == dims && places.sym_numel() >= 1, "[", function, "] ", name, " must have ", dims,
                    " dimension(s) and an element, got shape ", places.sym_sizes());
}

void check_range(const char* function, const char* name, const at::Tensor& places, const c10::SymInt& size) {
  if (is_readable(places)) {
    const auto low = places.min().item<int64_t>(), high = places.max().item<int64_t>();
    TORCH_CHECK_INDEX(low >= 0 && high < size, "[", function, "] ", name, " must be in [0, ", size, "), got ",
                      low < 0 ? low : high);
  }
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> contrastive_loss(const at::Tensor& anchor, const at::Tensor& memory,
                                                    const at::Tensor& index, const at::Tensor& negatives,
                                                    double temperature,
                                                    const std::optional<at::Tensor>& log_normalizer) {
  const FullPrecision full_precision;
  constexpr auto function = "contrastive_loss";
  check_positive(function, "temperature", temperature);
  TORCH_CHECK_TYPE(anchor.is_floating_point() && memory.is_floating_point(), "[", function,
                   "] anchor and memory must be of floating point, got ", anchor.scalar_type(), " and ",
                   memory.scalar_type());
  TORCH_CHECK_VALUE(
      anchor.dim() == 2 && anchor.sym_numel() >= 1 && memory.dim() == 2 && memory.sym_size(1) == anchor.sym_size(1),
      "[", function, "] anchor and memory must have shapes [batch, features] and [samples, features], got ",
      anchor.sym_sizes(), " and ", memory.sym_sizes());
  check_places(function, "index", index, 1);
  check_places(function, "negatives", negatives, 2);
  TORCH_CHECK_VALUE(index.sym_size(0) == anchor.sym_size(0) && negatives.sym_size(0) == anchor.sym_size(0), "[",
                    function, "] index and negatives must have one row per anchor, ", anchor.sym_size(0), ", got ",
                    index.sym_size(0), " and ", negatives.sym_size(0));
  check_range(function, "index", index, memory.sym_size(0));
  check_range(function, "negatives", negatives, memory.sym_size(0));

  const auto type = anchor.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  // All similarities at once: gathering the negatives' features first would take negatives / samples * features as much.
  const auto similarity = at::matmul(anchor.to(type), memory.detach().to(type).t()) / temperature;
  const auto positive = similarity.gather(1, index.unsqueeze(1)), negative = similarity.gather(1, negatives);
  const auto samples = memory.sym_size(0).guard_int(__FILE__, __LINE__);
  const auto count = negatives.sym_size(1).guard_int(__FILE__, __LINE__);
  const auto log_samples = std::log(static_cast<double>(samples));
  auto normalizer = at::zeros({}, similarity.options());
  if (log_normalizer.has_value()) {
    TORCH_CHECK_VALUE(log_normalizer->sym_numel() == 1, "[", function, "] log_normalizer must be a scalar, got shape ",
                      log_normalizer->sym_sizes());
    const auto rows =
        at::logsumexp(at::cat({positive, negative}, 1).detach(), 1) - std::log(static_cast<double>(count) + 1.0);
    const auto estimate = at::logsumexp(rows - at::ones_like(rows).sum().log(), 0) + log_samples;
    const auto known = log_normalizer->detach().reshape({}).to(type);
    normalizer = at::where(known.isfinite(), known, estimate);
  }
  const auto offset = normalizer + (std::log(static_cast<double>(count)) - log_samples);
  const auto loss = at::softplus(offset - positive).squeeze(1) + at::softplus(negative - offset).sum(1);
  return {loss.mean(), normalizer};
}

at::Tensor contrastive_negatives(const at::Tensor& index, const at::Tensor& step, int64_t count, int64_t size,
                                 int64_t seed) {
  constexpr auto function = "contrastive_negatives";
  check_places(function, "index", index, 1);
  TORCH_CHECK_TYPE(step.scalar_type() == at::kLong, "[", function, "] step must be int64, got ", step.scalar_type());
  TORCH_CHECK_VALUE(step.sym_numel() == 1, "[", function, "] step must be a scalar, got shape ", step.sym_sizes());
  TORCH_CHECK_VALUE(count >= 1, "[", function, "] count must be at least 1, got ", count);
  TORCH_CHECK_VALUE(size >= 2 && size < (int64_t{1} << 31), "[", function, "] size must be in [2, 2^31), got ", size);
  const auto rows = at::ones_like(index).cumsum(0) - 1;
  const auto drawn = hashes(rows, count, stream_start(step.reshape({}).to(index.device()), seed));
  // One of the size - 1 others: those from the row's own place on move up by one.
  const auto other = drawn.mul(size - 1).bitwise_right_shift(32);
  return other + (other >= index.unsqueeze(1)).to(at::kLong);
}

void update_memory_(at::Tensor& memory, const at::Tensor& index, const at::Tensor& values, double momentum) {
  constexpr auto function = "update_memory_";
  check_places(function, "index", index, 1);
  TORCH_CHECK_VALUE(momentum >= 0.0 && momentum < 1.0, "[", function, "] momentum must be in [0, 1), got ", momentum);
  TORCH_CHECK_VALUE(memory.dim() == 2 && values.dim() == 2 && values.sym_size(1) == memory.sym_size(1) &&
                        values.sym_size(0) == index.sym_size(0),
                    "[", function, "] values must have shape [", index.sym_size(0), ", features of the memory ",
                    memory.sym_sizes(), "], got ", values.sym_sizes());
  check_range(function, "index", index, memory.sym_size(0));
  const at::NoGradGuard no_grad;
  const FullPrecision full_precision;
  const auto mixed =
      memory.index_select(0, index) * momentum + values.detach().to(memory.scalar_type()) * (1.0 - momentum);
  memory.index_copy_(0, index, normalize(mixed, -1));
}

at::Tensor embed_features(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias) {
  constexpr auto function = "embed_features";
  TORCH_CHECK_TYPE(x.is_floating_point() && weight.is_floating_point(), "[", function,
                   "] x and weight must be of floating point, got ", x.scalar_type(), " and ", weight.scalar_type());
  TORCH_CHECK_VALUE(x.dim() >= 2, "[", function, "] x must have shape [batch, ...], got ", x.sym_sizes());
  const auto flat = x.flatten(1);
  TORCH_CHECK_VALUE(weight.dim() == 2 && weight.sym_size(1) == flat.sym_size(1), "[", function, "] x must have ",
                    weight.sym_size(1), " features per sample, got shape ", x.sym_sizes());
  const FullPrecision full_precision;
  const auto type = weight.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  return normalize(at::linear(flat.to(type), weight.to(type), bias.to(type)), -1);
}

at::Tensor initial_memory(int64_t size, int64_t features, int64_t seed, int64_t stream) {
  TORCH_CHECK_VALUE(size >= 1 && features >= 1, "[initial_memory] size and features must be at least 1, got ", size,
                    " and ", features);
  const auto step = at::full({}, stream, at::kLong);
  const auto drawn = hashes(at::arange(size, at::kLong), features, stream_start(step, seed));
  return normalize(drawn.to(at::kDouble) / 2147483648.0 - 1.0, -1).to(at::kFloat);
}

TORCH_LIBRARY_FRAGMENT(rarefy, m) {
  m.def(
      "contrastive_loss(Tensor anchor, Tensor memory, Tensor index, Tensor negatives, *, float temperature, "
      "Tensor? log_normalizer=None) -> (Tensor loss, Tensor log_normalizer)");
  m.def("contrastive_negatives(Tensor index, Tensor step, int count, int size, int seed) -> Tensor");
  m.def("update_memory_(Tensor(a!) memory, Tensor index, Tensor values, float momentum) -> ()");
  m.def("embed_features(Tensor x, Tensor weight, Tensor bias) -> Tensor");
  m.def("initial_memory(int size, int features, int seed, int stream) -> Tensor");
}

TORCH_LIBRARY_IMPL(rarefy, CompositeImplicitAutograd, m) {
  m.impl("contrastive_loss", &contrastive_loss);
  m.impl("contrastive_negatives", &contrastive_negatives);
  m.impl("update_memory_", &update_memory_);
  m.impl("embed_features", &embed_features);
  m.impl("initial_memory", &initial_memory);
}

void ContrastiveRepresentationOptions::validate() const {
  constexpr auto function = "ContrastiveRepresentation";
  TORCH_CHECK_VALUE(dataset_size >= 2 && dataset_size < (int64_t{1} << 31), "[", function,
                    "] dataset_size must be in [2, 2^31), got ", dataset_size);
  for (const auto& [name, value] :
       {std::pair{"student_features", student_features}, std::pair{"teacher_features", teacher_features},
        std::pair{"features", features}, std::pair{"negatives", negatives}}) {
    TORCH_CHECK_VALUE(value >= 1, "[", function, "] ", name, " must be at least 1, got ", value);
  }
  check_positive(function, "temperature", temperature);
  TORCH_CHECK_VALUE(momentum >= 0.0 && momentum < 1.0, "[", function, "] momentum must be in [0, 1), got ", momentum);
  check_choice(function, "variant", variant, {"paper", "code"});
}

ContrastiveRepresentationImpl::ContrastiveRepresentationImpl(const ContrastiveRepresentationOptions& options)
    : options(options) {
  options.validate();
  ContrastiveRepresentationImpl::reset();
}

void ContrastiveRepresentationImpl::reset() {
  student_embedding =
      register_module("student_embedding", torch::nn::Linear(options.student_features, options.features));
  teacher_embedding =
      register_module("teacher_embedding", torch::nn::Linear(options.teacher_features, options.features));
  const auto memory = [&](int64_t stream) {
    return initial_memory(options.dataset_size, options.features, options.seed, stream);
  };
  student_memory = register_buffer("student_memory", memory(-1));
  teacher_memory = register_buffer("teacher_memory", memory(-2));
  log_normalizers = register_buffer(
      "log_normalizers", at::full({2}, options.variant == "paper" ? 0.0 : std::numeric_limits<double>::infinity()));
  step = register_buffer("step", at::zeros({}, at::kLong));
}

torch::Tensor ContrastiveRepresentationImpl::forward(const torch::Tensor& student, const torch::Tensor& teacher,
                                                     const torch::Tensor& index) {
  check_pair("ContrastiveRepresentation", student, teacher, 2);
  const auto s = embed_features(student, student_embedding->weight, student_embedding->bias);
  const auto t = embed_features(teacher.detach(), teacher_embedding->weight, teacher_embedding->bias);
  const auto negatives = contrastive_negatives(index, step, options.negatives, options.dataset_size, options.seed);
  // Copies: the memories change below, and the backward pass needs them as they were.
  const auto from_student =
      contrastive_loss(s, teacher_memory.clone(), index, negatives, options.temperature, log_normalizers[0]);
  const auto from_teacher =
      contrastive_loss(t, student_memory.clone(), index, negatives, options.temperature, log_normalizers[1]);
  if (is_training()) {
    const torch::NoGradGuard no_grad;
    update_memory_(student_memory, index, s, options.momentum);
    update_memory_(teacher_memory, index, t, options.momentum);
    log_normalizers.copy_(at::stack({std::get<1>(from_student), std::get<1>(from_teacher)}));
    step.add_(1);
  }
  return std::get<0>(from_student) + std::get<0>(from_teacher);
}

void ContrastiveRepresentationImpl::pretty_print(std::ostream& stream) const {
  stream << "rarefy::distillation::ContrastiveRepresentation(" << options.dataset_size
         << " samples, features=" << options.features << ", negatives=" << options.negatives << ")";
}

}  // namespace rarefy::distillation
