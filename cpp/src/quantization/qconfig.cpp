#include <c10/util/Exception.h>
#include <rarefy/quantization/format_search.h>
#include <rarefy/quantization/learned_grids.h>
#include <rarefy/quantization/target.h>

namespace rarefy::quantization {

namespace {

template <typename... Alternatives, typename Variant>
bool is_one_of(const Variant& variant) {
  return (std::holds_alternative<Alternatives>(variant) || ...);
}

}  // namespace

void LayerConfig::validate() const {
  if (weight.has_value()) {
    weight->validate();
    TORCH_CHECK_VALUE((weight->symmetric && weight->signed_range()) || !weight->block().empty(),
                      "[QConfig] weight must be symmetric and signed (integer kernels have no weight zero point), got ",
                      weight->str());
    TORCH_CHECK_VALUE(weight->axis().value_or(0) == 0,
                      "[QConfig] weight must be per tensor or per output channel (axis 0), got axis ",
                      weight->axis().value_or(0));
    TORCH_CHECK_VALUE(!std::holds_alternative<PerToken>(weight->granularity),
                      "[QConfig] weight must not be per token, got ", weight->str());
  }
  if (activation.has_value()) {
    activation->validate();
    TORCH_CHECK_VALUE(weight.has_value(), "[QConfig] activation needs a weight scheme beside it, got none");
    TORCH_CHECK_VALUE(!activation->axis().has_value(), "[QConfig] activation must be per tensor, got ",
                      activation->str());
    TORCH_CHECK_VALUE(
        activation->block().empty() || activation->dynamic,
        "[QConfig] activation must be per tensor, or dynamic where more values than one share its scales, got ",
        activation->str());
    TORCH_CHECK_VALUE((!is_one_of<Binary, Ternary, NF4, Codebook>(activation->format)), "[QConfig] ",
                      name(activation->format), " is for weights, got the activation ", activation->str());
  }
  if (observer.has_value()) {
    quantization::validate(*observer);
    TORCH_CHECK_VALUE(std::holds_alternative<Latest>(*observer) || !follows_latest(*observer),
                      "[QConfig] observer must gather over batches (for least error: Histogram), got ", str(*observer));
    if (activation.has_value()) {
      check_learned_scheme("QConfig", *observer, *activation, /*is_weight=*/false);
    }
  }
  if (weight_observer.has_value()) {
    quantization::validate(*weight_observer);
    TORCH_CHECK_VALUE(follows_latest(*weight_observer) || is_learned(*weight_observer),
                      "[QConfig] weight_observer must be Latest, MSE, HalfQuadratic, LSQ, TQT or LearnedBits, got ",
                      str(*weight_observer));
    if (weight.has_value()) {
      check_learned_scheme("QConfig", *weight_observer, *weight, /*is_weight=*/true);
    }
  }
  const auto check_served = [](const std::optional<Scheme>& scheme, const std::optional<Observer>& by) {
    const auto reason = scheme.has_value() && by.has_value() ? why_not_observed(*scheme, *by) : std::nullopt;
    TORCH_CHECK_VALUE(!reason.has_value(), "[QConfig] ", str(*by), " does not serve ", scheme->str(), ": ",
                      reason.value_or(""));
  };
  check_served(activation, observer);
  check_served(weight, weight_observer);
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
  for (const auto* scheme : {&*weight, &*activation}) {
    if (auto reason = scheme->why_not_integer()) {
      return reason;
    }
  }
  for (const auto& [scheme, what] : {std::pair(&*weight, "weights"), std::pair(&*activation, "activations")}) {
    if (scheme->bits > 8) {
      return std::string(what) + " of " + std::to_string(scheme->bits) + " bits have no integer kernels";
    }
  }
  for (const auto& learned : {observer, weight_observer}) {
    if (learned.has_value() && is_learned(*learned)) {
      return str(*learned) + " trains its grid, whose gradient is that of simulated execution";
    }
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

QConfig QConfig::int8_dynamic() {
  auto config = int8();
  config.activation = Scheme{.granularity = PerToken{}, .dynamic = true};
  return config;
}

QConfig QConfig::int4_weight_only(int64_t group_size) {
  QConfig config;
  config.weight = Scheme{.bits = 4, .granularity = PerGroup{group_size, 1}};
  return config;
}

QConfig QConfig::fp8() {
  QConfig config;
  config.weight = Scheme::minifloat(Minifloat::e4m3(), PerChannel{0});
  config.activation = Scheme::minifloat(Minifloat::e4m3());
  return config;
}

QConfig QConfig::mxfp8() {
  QConfig config;
  config.weight = Scheme::mx(MXElement::e4m3, 32, 1);
  config.activation = Scheme::mx(MXElement::e4m3);
  return config;
}

QConfig QConfig::nvfp4() {
  QConfig config;
  config.weight = Scheme::nvfp4(16, 1);
  config.activation = Scheme::nvfp4();
  return config;
}

QConfig QConfig::nf4(bool double_quantized) {
  QConfig config;
  config.weight = Scheme::nf4(64, double_quantized, 1);
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
