#include <rarefy/ops/fake_quantize.h>
#include <rarefy/quantization/fake_quantizer.h>
#include <torch/types.h>

#include <limits>
#include <ostream>

namespace rarefy::quantization {

FakeQuantizerImpl::FakeQuantizerImpl(FakeQuantizerOptions options_) : options(std::move(options_)) {
  options.scheme.validate();
  validate(options.observer);
  TORCH_CHECK_VALUE(options.channels >= 1, "[FakeQuantizer] channels must be at least 1, got ", options.channels);
  FakeQuantizerImpl::reset();
}

void FakeQuantizerImpl::reset() {
  const int64_t size = options.scheme.axis().has_value() ? options.channels : 1;
  constexpr float infinity = std::numeric_limits<float>::infinity();
  scale = register_buffer("scale", torch::ones({size}));
  zero_point = register_buffer("zero_point", torch::zeros({size}, torch::kInt32));
  min_val = register_buffer("min_val", torch::full({size}, infinity));
  max_val = register_buffer("max_val", torch::full({size}, -infinity));
}

void FakeQuantizerImpl::pretty_print(std::ostream& stream) const {
  stream << "rarefy::quantization::FakeQuantizer(" << options.scheme.str() << ", " << str(options.observer)
         << (calibrated() ? ")" : ", not calibrated)");
}

torch::Tensor FakeQuantizerImpl::forward(const torch::Tensor& x) {
  const auto& scheme = options.scheme;
  const bool observe_now = observe && (is_training() || !quantize || std::holds_alternative<Latest>(options.observer));
  if (observe_now && quantize) {
    return ops::observe_fake_quantize(x, min_val, max_val, scale, zero_point, scheme.axis(),
                                      averaging_constant(options.observer), scheme.qmin(), scheme.qmax(),
                                      scheme.symmetric);
  }
  if (observe_now) {
    const torch::NoGradGuard no_grad;
    ops::observe(x, min_val, max_val, scale, zero_point, scheme.axis(), averaging_constant(options.observer),
                 scheme.qmin(), scheme.qmax(), scheme.symmetric);
    return x;
  }
  if (!quantize) {
    return x;
  }
  known_calibrated_ = known_calibrated_ || calibrated();
  TORCH_CHECK_VALUE(known_calibrated_,
                    "[FakeQuantizer] must observe data before it quantizes: run a training step or calibrate");
  return ops::fake_quantize(x, scale, zero_point, scheme.axis(), scheme.qmin(), scheme.qmax());
}

torch::Tensor FakeQuantizerImpl::quantize_to_integer(const torch::Tensor& x) const {
  const auto& scheme = options.scheme;
  return ops::quantize(x.detach(), scale, zero_point, scheme.axis(), scheme.qmin(), scheme.qmax());
}

void FakeQuantizerImpl::load(torch::serialize::InputArchive& archive) {
  torch::nn::Module::load(archive);
  refresh();
}

bool FakeQuantizerImpl::calibrated() const { return (min_val <= max_val).all().item<bool>(); }

}  // namespace rarefy::quantization
