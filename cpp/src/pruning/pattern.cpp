#include <c10/util/Exception.h>
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <rarefy/pruning/pattern.h>

#include <charconv>

namespace rarefy::pruning {
namespace {

[[noreturn]] void throw_unknown(const std::string& text) {
  TORCH_CHECK_VALUE(false,
                    "[parse_pattern] pattern must be 'unstructured', 'n:m', 'rows x columns' as in '4x1', 'row', "
                    "'column', 'filter' or 'head:size', got '",
                    text, "'");
}

/// The two numbers of "a<separator>b", if it is that.
std::optional<std::pair<int64_t, int64_t>> parse_numbers(const std::string& text, char separator) {
  std::pair<int64_t, int64_t> out;
  const char* const end = text.data() + text.size();
  const auto first = std::from_chars(text.data(), end, out.first);
  if (first.ec != std::errc() || first.ptr == end || *first.ptr != separator) {
    return std::nullopt;
  }
  const auto second = std::from_chars(first.ptr + 1, end, out.second);
  if (second.ec != std::errc() || second.ptr != end) {
    return std::nullopt;
  }
  return out;
}

std::string text_of(const Pattern& pattern) {
  return std::visit([](const auto& p) { return p.to_string(); }, pattern);
}

}  // namespace

std::string Unstructured::to_string() const { return "Unstructured()"; }
std::string Row::to_string() const { return "Row()"; }
std::string Column::to_string() const { return "Column()"; }
std::string Filter::to_string() const { return "Filter()"; }

void NM::validate() const { TORCH_CHECK_VALUE(n >= 1 && n < m, "[NM] must have 1 <= n < m, got n ", n, " and m ", m); }

std::string NM::to_string() const { return fmt::format("NM(n={}, m={})", n, m); }

void Block::validate() const {
  TORCH_CHECK_VALUE(rows >= 1 && columns >= 1, "[Block] rows and columns must be at least 1, got ", rows, " and ",
                    columns);
}

std::string Block::to_string() const { return fmt::format("Block(rows={}, columns={})", rows, columns); }

void Head::validate() const { TORCH_CHECK_VALUE(size >= 1, "[Head] size must be at least 1, got ", size); }

std::string Head::to_string() const { return fmt::format("Head(size={})", size); }

Pattern parse_pattern(const std::string& text) {
  Pattern pattern;
  if (text == "unstructured") {
    pattern = Unstructured{};
  } else if (text == "row") {
    pattern = Row{};
  } else if (text == "column") {
    pattern = Column{};
  } else if (text == "filter") {
    pattern = Filter{};
  } else if (const auto nm = parse_numbers(text, ':')) {
    pattern = NM{nm->first, nm->second};
  } else if (const auto block = parse_numbers(text, 'x')) {
    pattern = Block{block->first, block->second};
  } else if (text.starts_with("head:")) {
    Head head;
    const char* const end = text.data() + text.size();
    const auto read = std::from_chars(text.data() + 5, end, head.size);
    if (read.ec != std::errc() || read.ptr != end) {
      throw_unknown(text);
    }
    pattern = head;
  } else {
    throw_unknown(text);
  }
  std::visit([](const auto& p) { p.validate(); }, pattern);
  return pattern;
}

std::string short_name(const Pattern& pattern) {
  struct Names {
    std::string operator()(const Unstructured&) const { return "unstructured"; }
    std::string operator()(const NM& p) const { return fmt::format("{}:{}", p.n, p.m); }
    std::string operator()(const Block& p) const { return fmt::format("{}x{}", p.rows, p.columns); }
    std::string operator()(const Row&) const { return "row"; }
    std::string operator()(const Column&) const { return "column"; }
    std::string operator()(const Filter&) const { return "filter"; }
    std::string operator()(const Head& p) const { return fmt::format("head:{}", p.size); }
  };
  return std::visit(Names(), pattern);
}

std::string misfit(const Pattern& pattern, c10::IntArrayRef sizes) {
  const auto dims = static_cast<int64_t>(sizes.size());
  const auto needs = [&](const std::string& what) {
    return fmt::format("{} needs {}, got shape [{}]", text_of(pattern), what, fmt::join(sizes, ", "));
  };
  struct Rule {
    int64_t dims;
    c10::IntArrayRef sizes;

    std::string operator()(const Unstructured&) const { return ""; }
    std::string operator()(const NM& p) const {
      return dims < 2         ? "2 or more dimensions"
             : sizes[1] < p.m ? fmt::format("{} or more input features or channels (dimension 1)", p.m)
                              : "";
    }
    std::string operator()(const Block& p) const {
      if (dims < 2) {
        return "2 or more dimensions";
      }
      int64_t columns = 1;
      for (const auto size : sizes.slice(1)) {
        columns *= size;
      }
      return sizes[0] < p.rows || columns < p.columns ? "a matrix that is not smaller than the block" : "";
    }
    std::string operator()(const Row&) const { return dims < 1 ? "1 or more dimensions" : ""; }
    std::string operator()(const Column&) const { return dims < 2 ? "2 or more dimensions" : ""; }
    std::string operator()(const Filter&) const { return dims < 3 ? "the 3 or more dimensions of a convolution" : ""; }
    std::string operator()(const Head& p) const {
      return dims < 1 || sizes[0] % p.size != 0 ? fmt::format("a number of rows that {} divides", p.size) : "";
    }
  };
  const auto missing = std::visit(Rule{dims, sizes}, pattern);
  return missing.empty() ? "" : needs(missing);
}

std::optional<double> implied_sparsity(const Pattern& pattern) {
  const auto* nm = std::get_if<NM>(&pattern);
  return nm == nullptr ? std::nullopt : std::optional(1.0 - static_cast<double>(nm->n) / static_cast<double>(nm->m));
}

}  // namespace rarefy::pruning
