#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

// Provenance labels: integers that say which channel an element of a tensor belongs to. Every dimension of every
// parameter starts with labels of its own; what an operator couples is united (Tarjan's disjoint sets), what cannot be
// removed is pinned.
namespace rarefy::pruning {

/// Why labels are pinned.
struct PinReason {
  int64_t node = -1;  // -1: no operator is to blame
  std::string text;
};

class Labels {
 public:
  /// n new labels, each a set of its own; returns the first.
  int32_t fresh(int64_t n);
  int32_t find(int32_t label) const;
  void unite(int32_t a, int32_t b);
  void pin(int32_t label, int32_t reason);
  bool pinned(int32_t label) const { return reason_[find(label)] >= 0; }
  /// The reason of a pinned label, as an index into reasons.
  int32_t reason(int32_t label) const { return reason_[find(label)]; }
  int32_t add_reason(int64_t node, std::string text);
  int64_t size() const { return static_cast<int64_t>(parent_.size()); }
  /// Grows with every union and pin: what was computed from the sets is current while it stays the same.
  int64_t version() const { return version_; }

  std::vector<PinReason> reasons;

 private:
  mutable std::vector<int32_t> parent_;
  std::vector<int32_t> reason_;  // of roots
  int64_t version_ = 0;
};

/// The labels of a tensor's elements, in a tensor of the same rank whose size is 1 where the labels do not depend on
/// the place. Removing a label removes the places that carry it. A tensor may have several fields: a table of positions
/// times channels has one for each.
struct Field {
  at::Tensor labels;  // int32
  bool weak = false;  // of copies that an operator made, which yield to the labels of parameters
  int64_t leaf = -1;  // the parameter that it comes from unchanged but for movement, and its dimension
  int64_t leaf_dim = -1;
  int64_t version = -1;  // of the sets when it was last brought up to date

  bool varies(int64_t dim) const { return labels.size(dim) > 1; }
  std::vector<int64_t> dims() const;
};

/// Replaces labels by their representatives and drops the dimensions on which they no longer depend. False when nothing
/// is left that could be removed: all pinned, or the same label everywhere, which is then pinned for `reason`.
bool update(Labels& labels, Field& field, int32_t reason);

/// Unites the labels of the same places, broadcast.
void unite(Labels& labels, const Field& a, const Field& b);

/// Unites the labels along some dimensions, so that none depends on the place there.
void unite_along(Labels& labels, Field& field, const std::vector<int64_t>& dims);

void pin(Labels& labels, const Field& field, int32_t reason);

/// True when both depend on the place along one dimension at least.
bool overlap(const Field& a, const Field& b);

/// The field with dimensions of size 1 put in front or taken from the front until it has `rank` of them.
Field with_rank(const Field& field, int64_t rank);

}  // namespace rarefy::pruning
