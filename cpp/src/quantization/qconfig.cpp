#include <c10/util/Exception.h>
#include <rarefy/quantization/target.h>

namespace rarefy::quantization {

void LayerConfig::validate() const {
  if (weight.has_value()) {
    weight->validate();
    TORCH_CHECK_VALUE(weight->bits <= 8, "[QConfig] weight must have at most 8 bits, got ", weight->str());
    TORCH_CHECK_VALUE(weight->symmetric && weight->signed_range(),
                      "[QConfig] weight must be symmetric and signed (integer kernels have no weight zero point), got ",
                      weight->str());
    TORCH_CHECK_VALUE(weight->axis().value_or(0) == 0,
                      "[QConfig] weight must be per tensor or per output channel (axis 0), got axis ",
                      weight->axis().value_or(0));
  }
  if (activation.has_value()) {
    activation->validate();
    TORCH_CHECK_VALUE(weight.has_value(), "[QConfig] activation needs a weight scheme beside it, got none");
    TORCH_CHECK_VALUE(!activation->axis().has_value(), "[QConfig] activation must be per tensor, got ",
                      activation->str());
  }
  if (observer.has_value()) {
    quantization::validate(*observer);
    TORCH_CHECK_VALUE(std::holds_alternative<Latest>(*observer) || !follows_latest(*observer),
                      "[QConfig] observer must gather over batches (for least error: Histogram), got ", str(*observer));
  }
  if (weight_observer.has_value()) {
    quantization::validate(*weight_observer);
    TORCH_CHECK_VALUE(follows_latest(*weight_observer),
                      "[QConfig] weight_observer must be Latest, MSE or HalfQuadratic, got ", str(*weight_observer));
  }
  TORCH_CHECK_VALUE(gradient_dtype == c10::ScalarType::Float || gradient_dtype == c10::ScalarType::BFloat16,
                    "[QConfig] gradient_dtype must be float32 or bfloat16, got ", gradient_dtype);
}

std::optional<std::string> LayerConfig::why_not_integer() const {
  if (!weight.has_value()) {
    return "the weight stays in floating point";
  }
  if (!activation.has_value()) {
    return "the input stays in floating point";
  }
  if (activation->bits > 8) {
    return "activations of " + std::to_string(activation->bits) + " bits have no integer kernels";
  }
  return std::nullopt;
}

std::string str(Execution execution) { return execution == Execution::integer ? "integer" : "simulated"; }

QConfig QConfig::int8(std::optional<std::string> target, bool reduce_range) {
  QConfig config;
  config.weight =
      Scheme{.bits = reduce_range ? 7 : 8, .symmetric = true, .narrow_range = true, .granularity = PerChannel{0}};
  config.activation = Scheme{.bits = 8, .symmetric = target.has_value() && !target_profile(*target).zero_points};
  config.target = std::move(target);
  return config;
}

std::optional<LayerConfig> QConfig::resolve(const std::string& name) const {
  for (auto entry = overrides.rbegin(); entry != overrides.rend(); ++entry) {
    if (matches(entry->first, name)) {
      return entry->second;
    }
  }
  return static_cast<const LayerConfig&>(*this);
}

bool matches(const std::string& pattern, const std::string& name) {
  size_t p = 0, n = 0, star = std::string::npos, resume = 0;
  while (n < name.size()) {
    if (p < pattern.size() && (pattern[p] == '?' || pattern[p] == name[n]) && pattern[p] != '*') {
      ++p;
      ++n;
    } else if (p < pattern.size() && pattern[p] == '*') {
      star = p++;
      resume = n;
    } else if (star != std::string::npos) {  // let the last star take one character more
      p = star + 1;
      n = ++resume;
    } else {
      return false;
    }
  }
  while (p < pattern.size() && pattern[p] == '*') {
    ++p;
  }
  return p == pattern.size();
}

}  // namespace rarefy::quantization
