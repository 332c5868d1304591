#pragma once

#include <c10/util/ArrayRef.h>
#include <rarefy/export.h>

#include <cstdint>
#include <optional>
#include <string>
#include <variant>

// Which elements of a weight are pruned together. Value types; choose_masks() has the computation.
//
// A weight is seen as a matrix: dimension 0 by all others in contiguous order, so that a row is what one output feature
// of a linear layer or one output channel of a convolution reads. Dimension 1 is the input: features, or the input
// channels of a convolution (of one group when it has several). What the dimensions of a weight mean is not looked at: a
// transposed convolution has its input channels in dimension 0.
namespace rarefy::pruning {

/// Every element by itself.
struct RAREFY_API Unstructured {
  void validate() const {}
  std::string to_string() const;
  bool operator==(const Unstructured&) const = default;
};

/// At most n of every m consecutive elements along dimension 1 are kept: in every row of a linear layer, and for a
/// convolution in every row and at every place of the kernel, along the input channels. That is the order in which
/// sparse tensor cores multiply (Mishra et al., 2021, arXiv:2104.08378). When m does not divide the size, the last,
/// shorter group keeps at most n too: it is a whole group once the input is padded with zeros.
struct RAREFY_API NM {
  int64_t n = 2;  // >= 1
  int64_t m = 4;  // > n

  /// Throws c10::ValueError when a field is out of range.
  void validate() const;
  std::string to_string() const;
  bool operator==(const NM&) const = default;
};

/// Blocks of rows x columns of the matrix, from its first row and column on. Where a side is not a multiple, the last
/// blocks are smaller.
struct RAREFY_API Block {
  int64_t rows = 4;     // >= 1
  int64_t columns = 1;  // >= 1

  void validate() const;
  std::string to_string() const;
  bool operator==(const Block&) const = default;
};

/// All weights of an output feature or channel: an index of dimension 0.
struct RAREFY_API Row {
  void validate() const {}
  std::string to_string() const;
  bool operator==(const Row&) const = default;
};

/// All weights of an input feature or channel: an index of dimension 1.
struct RAREFY_API Column {
  void validate() const {}
  std::string to_string() const;
  bool operator==(const Column&) const = default;
};

/// The filter of an output channel of a convolution: an index of dimension 0 of a weight of 3 or more dimensions.
struct RAREFY_API Filter {
  void validate() const {}
  std::string to_string() const;
  bool operator==(const Filter&) const = default;
};

/// `size` consecutive rows, which divide dimension 0: the head of an attention layer's query, key or value projection.
struct RAREFY_API Head {
  int64_t size = 64;  // >= 1

  void validate() const;
  std::string to_string() const;
  bool operator==(const Head&) const = default;
};

using Pattern = std::variant<Unstructured, NM, Block, Row, Column, Filter, Head>;

/// "unstructured", "2:4", "4x1", "row", "column", "filter" or "head:64". Throws c10::ValueError for anything else, and
/// for numbers out of range.
RAREFY_API Pattern parse_pattern(const std::string& text);

/// The text that parse_pattern() reads.
RAREFY_API std::string short_name(const Pattern& pattern);

/// Why a weight of these sizes cannot have the pattern: "NM(n=2, m=4) needs 4 or more input channels, ..."; empty when it
/// can.
RAREFY_API std::string misfit(const Pattern& pattern, c10::IntArrayRef sizes);

/// 1 - n / m for N:M, which is the largest sparsity that it has; unset for other patterns.
RAREFY_API std::optional<double> implied_sparsity(const Pattern& pattern);

}  // namespace rarefy::pruning
