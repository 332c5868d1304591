#include <c10/util/Exception.h>
#include <fmt/format.h>
#include <rarefy/pruning/criterion.h>

#include <array>
#include <utility>

namespace rarefy::pruning {
namespace {

constexpr std::array<std::pair<Reduction, const char*>, 3> kReductions{
    {{Reduction::mean, "mean"}, {Reduction::sum, "sum"}, {Reduction::max, "max"}}};
constexpr std::array<std::pair<Normalization, const char*>, 5> kNormalizations{{{Normalization::none, "none"},
                                                                                {Normalization::mean, "mean"},
                                                                                {Normalization::max, "max"},
                                                                                {Normalization::sum, "sum"},
                                                                                {Normalization::min_max, "min_max"}}};

template <typename Table>
auto parse(const Table& table, const char* function, const char* allowed, const std::string& text) {
  for (const auto& [value, known] : table) {
    if (text == known) {
      return value;
    }
  }
  TORCH_CHECK_VALUE(false, "[", function, "] must be one of ", allowed, ", got '", text, "'");
}

template <typename Table, typename Value>
const char* name_in(const Table& table, Value value) {
  for (const auto& [known, text] : table) {
    if (known == value) {
      return text;
    }
  }
  TORCH_INTERNAL_ASSERT(false, "a value without a name");
}

}  // namespace

void Magnitude::validate() const {
  TORCH_CHECK_VALUE(p > 0.0, "[Magnitude] p must be positive, got ", p);  // false for NaN
}

std::string Magnitude::to_string() const { return fmt::format("Magnitude(p={})", p); }
std::string BatchNormScale::to_string() const { return "BatchNormScale()"; }
std::string Taylor::to_string() const { return fmt::format("Taylor(joint={})", joint ? "True" : "False"); }
std::string Fisher::to_string() const { return "Fisher()"; }
std::string GeometricMedian::to_string() const { return "GeometricMedian()"; }
std::string Activation::to_string() const { return "Activation()"; }
std::string Lamp::to_string() const { return "Lamp()"; }
std::string Random::to_string() const { return fmt::format("Random(seed={})", seed); }

Reduction parse_reduction(const std::string& name) {
  return parse(kReductions, "parse_reduction", "mean, sum, max", name);
}

const char* name(Reduction reduction) { return name_in(kReductions, reduction); }

Normalization parse_normalization(const std::string& name) {
  return parse(kNormalizations, "parse_normalization", "none, mean, max, sum, min_max", name);
}

const char* name(Normalization normalization) { return name_in(kNormalizations, normalization); }

void ImportanceOptions::validate() const {
  std::visit([](const auto& chosen) { chosen.validate(); }, criterion);
}

}  // namespace rarefy::pruning
