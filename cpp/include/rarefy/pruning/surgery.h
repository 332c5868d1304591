#pragma once

#include <ATen/core/Tensor.h>
#include <rarefy/export.h>
#include <rarefy/graph/record.h>
#include <rarefy/pruning/optimizer_state.h>
#include <rarefy/pruning/structure.h>

#include <functional>
#include <memory>
#include <vector>

namespace rarefy::pruning {

/// The removal of slices from a model's tensors, as a transaction: apply() cuts, commit() keeps it, and everything else,
/// the destructor included, brings back what was there.
///
///   Surgery surgery(graph::named_tensors(*net), optimizer_tensors(optimizer, graph::named_tensors(*net)));
///   surgery.apply(cuts);
///   resize_modules(*net, surgery);  // rarefy/pruning/resize.h: out_channels and such
///   surgery.commit();
///
/// Tensors keep their identity: a parameter, a buffer or a momentum is the same tensor object with other data, so that
/// modules, optimizers and everyone else who holds it sees the cut. The data is new memory in the order of the old (channels
/// last, transposed), and never a view of it: the old memory is free after commit(), unless someone else holds it. .grad is
/// cut along, and so are the packed mask of a pruner beside a parameter and what else it keeps there. A loss that was computed before can still be there: its backward pass fails after commit() with torch's
/// message about modified variables, and neither it nor a later one is wrong.
///
/// A tensor under several names is cut once, and tensors over the same memory stay so. Distributed wrappers hold copies of
/// gradients by their old shapes: cut first, wrap second.
class RAREFY_API Surgery {
 public:
  ///   tensors  the parameters and buffers of the model
  ///   state    what optimizers keep about the parameters
  explicit Surgery(std::vector<graph::NamedTensor> tensors, std::vector<OptimizerTensor> state = {});
  Surgery(const Surgery&) = delete;
  Surgery& operator=(const Surgery&) = delete;
  /// Rolls back what was not committed.
  ~Surgery();

  /// Cuts the tensors, their gradients, and what optimizers keep about them. A cut that keeps everything is none.
  /// Throws, with everything as it was: c10::ValueError for an unknown tensor, for indices that are none, not ascending or
  /// out of range, for tensors with several names and different cuts, for memory that overlaps another tensor's, for a
  /// mask by itself or one that does not fit its parameter (pruners), for optimizer state of a shape that is not understood (kept_of_state), and
  /// when cuts are applied already; c10::IndexError for a dimension that the tensor does not have.
  void apply(const std::vector<Cut>& cuts);

  /// The indices along `dim` that stay; null when all do. Of the transaction that runs.
  const std::vector<int64_t>* kept(const at::Tensor& tensor, int64_t dim) const;
  /// The shape that the tensor had when the transaction began.
  std::vector<int64_t> sizes_before(const at::Tensor& tensor) const;
  /// Whether slices of the tensor were removed.
  bool is_cut(const at::Tensor& tensor) const;

  /// Has rollback() call `undo`, the last one given first: for what is not a tensor. It must not throw.
  void on_rollback(std::function<void()> undo);

  /// Brings back tensors, gradients and state as they were: the same memory, and backward passes of losses that were
  /// computed before work. Does nothing when nothing was applied.
  void rollback() noexcept;

  /// Keeps what was done. Throws c10::ValueError, and keeps the transaction open, when a state tensor does not fit its
  /// parameter: someone else changed it.
  void commit();

 private:
  struct Transaction;
  std::vector<graph::NamedTensor> tensors_;
  std::vector<OptimizerTensor> state_;
  std::unique_ptr<Transaction> transaction_;
};

}  // namespace rarefy::pruning
