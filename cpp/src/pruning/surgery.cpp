#include <c10/core/InferenceMode.h>
#include <rarefy/pruning/state.h>
#include <rarefy/pruning/surgery.h>
#include <torch/csrc/autograd/variable.h>

#include <algorithm>
#include <map>
#include <tuple>
#include <unordered_map>
#include <unordered_set>
#include <utility>

#include "mask_slices.h"
#include "ops/mask_checks.h"
#include "slices.h"

namespace rarefy::pruning {
namespace {

using Accumulator = decltype(torch::autograd::impl::try_get_grad_accumulator(std::declval<const at::Tensor&>()));

/// A tensor holds its gradient accumulator weakly; which kind of weak pointer depends on the version of torch.
template <typename Weak>
void set_accumulator(void (*set)(const at::Tensor&, Weak), const at::Tensor& tensor, const Accumulator& accumulator) {
  set(tensor, Weak(accumulator));
}

/// Buffers of a pruner, by what follows the tensor's name: the packed mask first, the others have the tensor's shape.
constexpr const char* kBeside[] = {"_mask_bits", "_mask_score", "_mask_latent", "_mask_rewind"};

/// What one tensor was, and what it becomes.
struct Change {
  at::Tensor tensor;
  at::Tensor before, after;
  at::Tensor grad_before, grad_after;  // undefined where there is none
  Accumulator accumulator;
};

/// Equal for tensors that are the same elements of the same memory.
auto memory_of(const at::Tensor& tensor) {
  return std::tuple(tensor.storage().unsafeGetStorageImpl(), tensor.storage_offset(), tensor.scalar_type(),
                    tensor.sizes().vec(), tensor.strides().vec());
}

/// The bytes of the storage from the first element to behind the last.
std::pair<int64_t, int64_t> span_of(const at::Tensor& tensor) {
  int64_t last = tensor.storage_offset();
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    last += (tensor.size(d) - 1) * tensor.stride(d);
  }
  const auto bytes = static_cast<int64_t>(tensor.element_size());
  return {tensor.storage_offset() * bytes, (last + 1) * bytes};
}

void check_cut(const Cut& cut, const at::Tensor& tensor) {
  TORCH_CHECK_INDEX(cut.dim >= 0 && cut.dim < tensor.dim(), "[Surgery] the dimension of a cut of ", cut.tensor,
                    " must be in [0, ", tensor.dim(), "), got ", cut.dim);
  const auto& kept = cut.kept;
  TORCH_CHECK_VALUE(!kept.empty(), "[Surgery] a cut of ", cut.tensor, " must keep a slice of dimension ", cut.dim,
                    ", got none");
  for (size_t i = 0; i + 1 < kept.size(); ++i) {
    TORCH_CHECK_VALUE(kept[i] < kept[i + 1], "[Surgery] the indices that a cut of ", cut.tensor,
                      " keeps must ascend, got ", kept[i], " before ", kept[i + 1]);
  }
  const int64_t size = tensor.size(cut.dim);
  TORCH_CHECK_VALUE(kept.front() >= 0 && kept.back() < size, "[Surgery] the indices that a cut of ", cut.tensor,
                    " keeps of dimension ", cut.dim, " must be in [0, ", size, "), got ",
                    kept.front() < 0 ? kept.front() : kept.back());
}

void put(const Change& change, bool forward) {
  auto tensor = change.tensor;
  tensor.set_data(forward ? change.after : change.before);
  if (change.grad_before.defined()) {
    tensor.mutable_grad() = forward ? change.grad_after : change.grad_before;
  }
  if (tensor.requires_grad() && tensor.is_leaf()) {
    // The accumulator of a loss that is still alive expects gradients of the old shape, and would be used again.
    set_accumulator(&torch::autograd::impl::set_grad_accumulator, tensor, forward ? Accumulator() : change.accumulator);
  }
  if (!tensor.is_floating_point() && !tensor.is_inference()) {
    // Integer weights are packed for their kernels, by version. What autograd may have saved keeps its version until commit.
    tensor.unsafeGetTensorImpl()->bump_version();
  }
}

}  // namespace

struct Surgery::Transaction {
  std::vector<Change> changes;
  std::unordered_map<const void*, Kept> kept;  // by tensor
  std::vector<std::function<void()>> undo;
  bool applied = false;
};

Surgery::Surgery(std::vector<graph::NamedTensor> tensors, std::vector<OptimizerTensor> state)
    : tensors_(std::move(tensors)), state_(std::move(state)), transaction_(std::make_unique<Transaction>()) {
  std::erase_if(tensors_, [](const auto& item) { return !item.value.defined(); });
}

Surgery::~Surgery() { rollback(); }

void Surgery::apply(const std::vector<Cut>& cuts) {
  TORCH_CHECK_VALUE(!transaction_->applied, "[Surgery.apply] the cuts before must be committed or rolled back first");
  const torch::NoGradGuard no_grad;
  const c10::InferenceMode not_inference(false);

  std::unordered_map<std::string, at::Tensor> by_name;
  for (const auto& item : tensors_) {
    by_name.emplace(item.name, item.value);
  }
  // Names of one tensor, and tensors over the same memory, have one entry.
  struct Target {
    std::string name;
    std::vector<at::Tensor> tensors;
    Kept kept;
  };
  using Memory = decltype(memory_of(at::Tensor()));
  std::map<Memory, Target> targets;
  for (const auto& request : cuts) {
    const auto position = by_name.find(request.tensor);
    TORCH_CHECK_VALUE(position != by_name.end(), "[Surgery] a cut must be of a parameter or buffer of the model, got '",
                      request.tensor, "'");
    const auto& tensor = position->second;
    for (const char* suffix : kBeside) {
      const std::string end = suffix;
      TORCH_CHECK_VALUE(!request.tensor.ends_with(end) ||
                            by_name.count(request.tensor.substr(0, request.tensor.size() - end.size())) == 0,
                        "[Surgery] ", request.tensor, " must be cut by a cut of what it belongs to");
    }
    TORCH_CHECK_VALUE(tensor.layout() == at::kStrided && !tensor.is_quantized(), "[Surgery] ", request.tensor,
                      " must be a dense tensor, got layout ", tensor.layout());
    check_cut(request, tensor);
    if (static_cast<int64_t>(request.kept.size()) == tensor.size(request.dim)) {
      continue;
    }
    auto& target = targets[memory_of(tensor)];
    target.name = target.name.empty() ? request.tensor : target.name;
    const auto [kept, is_new] = target.kept.emplace(request.dim, request.kept);
    TORCH_CHECK_VALUE(is_new || kept->second == request.kept, "[Surgery] the cuts of dimension ", request.dim, " of ",
                      request.tensor, target.name == request.tensor ? "" : ", which is also " + target.name + ",",
                      " must be the same");
  }
  for (const auto& item : tensors_) {
    if (item.value.layout() != at::kStrided) {
      continue;
    }
    const auto memory = memory_of(item.value);
    if (const auto position = targets.find(memory); position != targets.end()) {
      auto& tensors = position->second.tensors;
      if (std::none_of(tensors.begin(), tensors.end(), [&](const auto& t) { return t.is_same(item.value); })) {
        tensors.push_back(item.value);
      }
      continue;
    }
    // Targets of the same storage are neighbours in the map's order.
    const auto* storage = std::get<0>(memory);
    for (auto other = targets.lower_bound(Memory(std::get<0>(memory), INT64_MIN, at::ScalarType(), {}, {}));
         other != targets.end() && std::get<0>(other->first) == storage && item.value.numel() > 0; ++other) {
      const auto a = span_of(by_name.at(other->second.name)), b = span_of(item.value);
      TORCH_CHECK_VALUE(a.second <= b.first || b.second <= a.first, "[Surgery] ", other->second.name,
                        " must not share some of its memory with ", item.name);
    }
  }

  Transaction next;
  std::unordered_set<const void*> beside;  // what pruners keep about tensors that are cut, and is cut along
  for (const auto& [memory, target] : targets) {
    const auto after = take(target.tensors.front().detach(), target.kept);
    for (const auto& tensor : target.tensors) {
      Change change{tensor, tensor.variable_data(), after, {}, {}, {}};
      if (tensor.is_leaf() && tensor.grad().defined()) {
        change.grad_before = tensor.grad();
        change.grad_after = take(change.grad_before.detach(), target.kept);
      }
      change.accumulator = torch::autograd::impl::try_get_grad_accumulator(tensor);
      next.changes.push_back(std::move(change));
      next.kept.emplace(tensor.unsafeGetTensorImpl(), target.kept);
    }
  }
  for (const auto& item : tensors_) {
    const auto of_item = next.kept.find(item.value.unsafeGetTensorImpl());
    if (of_item == next.kept.end()) {
      continue;
    }
    for (const char* suffix : kBeside) {
      const auto found = by_name.find(item.name + suffix);
      if (found == by_name.end() || !beside.insert(found->second.unsafeGetTensorImpl()).second) {
        continue;
      }
      const auto& tensor = found->second;
      const bool packed = item.name + suffix == mask_key(item.name);
      const bool fits = packed ? tensor.scalar_type() == at::kByte && tensor.dim() == 1 &&
                                     tensor.numel() == ops::mask_bytes(item.value.numel())
                               : tensor.sizes() == item.value.sizes();
      TORCH_CHECK_VALUE(fits, "[Surgery] ", found->first, " must fit ", item.name, " of shape ", item.value.sizes(),
                        packed ? ", as packed bits" : "", ", got ", tensor.scalar_type(), " ", tensor.sizes());
      const auto after =
          packed ? take_mask(tensor, item.value.sizes(), of_item->second) : take(tensor.detach(), of_item->second);
      next.changes.push_back({tensor, tensor.variable_data(), after, {}, {}, {}});
    }
  }
  for (const auto& state : state_) {
    const auto position = by_name.find(state.parameter);
    TORCH_CHECK_VALUE(position != by_name.end(), "[Surgery] optimizer state '", state.name,
                      "' must be of a parameter of the model, got '", state.parameter, "'");
    const auto kept = next.kept.find(position->second.unsafeGetTensorImpl());
    if (kept == next.kept.end()) {
      continue;
    }
    const auto of_state = kept_of_state(state, position->second.sizes(), kept->second);
    if (of_state.empty() || next.kept.count(state.value.unsafeGetTensorImpl()) > 0) {
      continue;
    }
    next.changes.push_back(
        {state.value, state.value.variable_data(), take(state.value.detach(), of_state), {}, {}, {}});
    next.kept.emplace(state.value.unsafeGetTensorImpl(), of_state);
  }

  // Nothing has changed so far, and from here on what changes is undone.
  next.applied = true;
  next.undo = std::move(transaction_->undo);
  *transaction_ = std::move(next);
  try {
    for (const auto& change : transaction_->changes) {
      put(change, /*forward=*/true);
    }
  } catch (...) {
    rollback();
    throw;
  }
}

const std::vector<int64_t>* Surgery::kept(const at::Tensor& tensor, int64_t dim) const {
  const auto of_tensor = transaction_->kept.find(tensor.unsafeGetTensorImpl());
  if (of_tensor == transaction_->kept.end()) {
    return nullptr;
  }
  const auto of_dim = of_tensor->second.find(dim);
  return of_dim == of_tensor->second.end() ? nullptr : &of_dim->second;
}

std::vector<int64_t> Surgery::sizes_before(const at::Tensor& tensor) const {
  for (const auto& change : transaction_->changes) {
    if (change.tensor.is_same(tensor)) {
      return change.before.sizes().vec();
    }
  }
  return tensor.sizes().vec();
}

bool Surgery::is_cut(const at::Tensor& tensor) const {
  return transaction_->kept.count(tensor.unsafeGetTensorImpl()) > 0;
}

void Surgery::on_rollback(std::function<void()> undo) { transaction_->undo.push_back(std::move(undo)); }

void Surgery::rollback() noexcept {
  auto& undo = transaction_->undo;
  std::for_each(undo.rbegin(), undo.rend(), [](const auto& call) { call(); });
  for (const auto& change : transaction_->changes) {
    put(change, /*forward=*/false);
  }
  *transaction_ = Transaction();
}

void Surgery::commit() {
  std::unordered_map<std::string, at::Tensor> parameters;
  for (const auto& item : tensors_) {
    parameters.emplace(item.name, item.value);
  }
  for (const auto& change : transaction_->changes) {
    TORCH_CHECK_VALUE(change.tensor.sizes() == change.after.sizes(),
                      "[Surgery.commit] a tensor must have the shape that it was cut to, ", change.after.sizes(),
                      ", got ", change.tensor.sizes());
  }
  for (const auto& state : state_) {
    if (const auto& parameter = parameters.at(state.parameter); is_cut(parameter)) {
      kept_of_state(state, parameter.sizes(), {});  // with nothing left to cut, this checks the shape alone
    }
  }
  for (const auto& change : transaction_->changes) {
    if (!change.tensor.is_inference()) {
      change.tensor.unsafeGetTensorImpl()->bump_version();
    }
  }
  *transaction_ = Transaction();
}

}  // namespace rarefy::pruning
