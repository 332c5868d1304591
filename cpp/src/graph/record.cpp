#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <ATen/record_function.h>
#include <c10/util/Exception.h>
#include <rarefy/graph/record.h>
#include <torch/nn/module.h>

#include <unordered_map>

#include "evaluation.h"
#include "operators.h"
#include "shapes_only.h"

// Whoever compiles this file must define NDEBUG: RecordFunction asserts in its own accessors otherwise, from the second
// callback on.

namespace rarefy::graph {
namespace {

using c10::IValue;

/// What belongs to the operator: an interpreter's stack has what others wait for below it.
c10::ArrayRef<const IValue> last(c10::ArrayRef<const IValue> stack, size_t count) {
  return stack.size() > count ? stack.slice(stack.size() - count) : stack;
}

class Recorder {
 public:
  Recorder(Graph& graph, const RecordOptions& options) : graph_(graph), options_(options) {}

  int64_t add_known(const NamedTensor& named) {
    TORCH_CHECK_VALUE(named.value.defined(), "[record] tensor '", named.name, "' is undefined");
    TORCH_CHECK_VALUE(named.value.layout() == at::kStrided, "[record] tensor '", named.name, "' must be dense, got ",
                      named.value.layout());
    auto found = ids_.find(named.value.unsafeGetTensorImpl());
    if (found != ids_.end()) {
      return found->second;
    }
    const int64_t id = add(named.value, named.origin);
    graph_.values[id].name = named.name;
    graph_.values[id].tensor = named.value.detach();  // the data of this moment, also when the model is cut later
    return id;
  }

  void start(const at::RecordFunction& fn, const c10::OperatorName& op) {
    const auto index = static_cast<int64_t>(graph_.nodes.size());
    Node node;
    node.op = op;
    node.parent = open_.empty() ? -1 : open_.back();
    const auto handle = c10::Dispatcher::singleton().findSchema(op);
    const size_t count = handle ? handle->schema().arguments().size() : fn.inputs().size();
    for (const IValue& argument : last(fn.inputs(), count)) {
      node.input_values.emplace_back();
      node.inputs.push_back(keep_constant(argument, node.input_values.back()));
      for (auto id : node.input_values.back()) {
        if (id >= 0 && (graph_.values[id].consumers.empty() || graph_.values[id].consumers.back() != index)) {
          graph_.values[id].consumers.push_back(index);
        }
      }
    }
    if (open_.empty() && options_.location) {
      auto location = options_.location();
      node.module = std::move(location.module);
      node.source = std::move(location.source);
    } else if (!open_.empty()) {
      node.module = graph_.nodes[open_.back()].module;
      node.source = graph_.nodes[open_.back()].source;
    } else {
      node.module = owner_of_parameters(node);
    }
    graph_.nodes.push_back(std::move(node));
    open_.push_back(index);
    known_.push_back(static_cast<int64_t>(graph_.values.size()));
  }

  void end(const at::RecordFunction& fn) {
    const int64_t index = open_.back();
    open_.pop_back();
    graph_.nodes[index].children_end = static_cast<int64_t>(graph_.nodes.size());
    const auto handle = c10::Dispatcher::singleton().findSchema(graph_.nodes[index].op);
    const size_t returns = handle ? handle->schema().returns().size() : fn.outputs().size();
    graph_.nodes[index].failed = fn.outputs().size() < returns;
    const int64_t known = known_.back();
    known_.pop_back();
    const c10::ArrayRef<const IValue> results(fn.outputs().data(), fn.outputs().size());
    for (const IValue& result : last(results, returns)) {
      add_results(result, index, known);
    }
  }

  /// The values of the tensors that the model returned.
  void finish(const std::vector<at::Tensor>& outputs) {
    for (const auto& output : outputs) {
      TORCH_CHECK_VALUE(output.defined(), "[record] the model returned an undefined tensor");
      const int64_t id = id_of(output);
      graph_.values[id].is_output = true;
      graph_.values[id].tensor = output;
      graph_.outputs.push_back(id);
    }
  }

 private:
  int64_t add(const at::Tensor& tensor, Origin origin) {
    const auto id = static_cast<int64_t>(graph_.values.size());
    Value value;
    value.origin = origin;
    value.sizes = tensor.sizes().vec();
    value.dtype = tensor.scalar_type();
    value.memory = id;
    if (tensor.has_storage()) {
      const auto [memory, first] = memories_.try_emplace(tensor.storage().unsafeGetStorageImpl());
      if (first) {
        storages_.push_back(tensor.storage().getWeakStorageImpl());
      }
      memory->second.push_back({id, tensor.storage_offset(), tensor.strides().vec()});
      value.memory = memory->second.front().id;
    }
    graph_.values.push_back(std::move(value));
    name_tensor(tensor, id);
    return id;
  }

  void name_tensor(const at::Tensor& tensor, int64_t id) {
    ids_[tensor.unsafeGetTensorImpl()] = id;
    // A weak reference keeps the address from being used again without keeping the data.
    alive_.emplace_back(tensor.getIntrusivePtr());
  }

  /// The value that a tensor is though no operator made it: `x.data` of x. -1 when there is none.
  int64_t same_place(const at::Tensor& tensor) const {
    const auto found = tensor.has_storage() ? memories_.find(tensor.storage().unsafeGetStorageImpl()) : memories_.end();
    if (found == memories_.end()) {
      return -1;
    }
    for (auto place = found->second.rbegin(); place != found->second.rend(); ++place) {
      const Value& value = graph_.values[place->id];
      if (place->offset == tensor.storage_offset() && tensor.strides() == place->strides &&
          tensor.sizes() == value.sizes && tensor.scalar_type() == value.dtype) {
        return place->id;
      }
    }
    return -1;
  }

  int64_t id_of(const at::Tensor& tensor) {
    if (!tensor.defined()) {
      return -1;
    }
    auto found = ids_.find(tensor.unsafeGetTensorImpl());
    if (found != ids_.end() && tensor.sizes() == graph_.values[found->second].sizes) {
      return found->second;
    }
    if (const int64_t same = same_place(tensor); same >= 0) {
      name_tensor(tensor, same);
      return same;
    }
    const int64_t id = add(tensor, Origin::constant);
    graph_.values[id].tensor = tensor;
    return id;
  }

  /// A constant argument as it is; None for tensors and lists of tensors, whose values go to `ids`.
  IValue keep_constant(const IValue& argument, std::vector<int64_t>& ids) {
    if (argument.isTensor()) {
      ids.push_back(id_of(argument.toTensor()));
      return IValue();
    }
    if (argument.isTensorList()) {
      for (const at::Tensor& tensor : argument.toTensorVector()) {
        ids.push_back(id_of(tensor));
      }
      return IValue();
    }
    if (argument.isList()) {
      const auto items = argument.toListRef();
      bool tensors = !items.empty();
      bool any = false;
      for (const IValue& item : items) {
        tensors = tensors && (item.isTensor() || item.isNone());
        any = any || item.isTensor();
      }
      if (tensors && any) {
        for (const IValue& item : items) {
          ids.push_back(item.isTensor() ? id_of(item.toTensor()) : -1);
        }
        return IValue();
      }
      return argument.deepcopy();
    }
    return argument;
  }

  /// `known_before`: how many values there were before the operator did anything.
  void add_results(const IValue& result, int64_t node, int64_t known_before) {
    if (result.isTensor()) {
      const at::Tensor& tensor = result.toTensor();
      if (!tensor.defined()) {
        graph_.nodes[node].outputs.push_back(-1);
        return;
      }
      auto found = ids_.find(tensor.unsafeGetTensorImpl());
      // An operator that changes the shape in place (unsqueeze_) makes a new value of the same tensor.
      const bool known = found != ids_.end() && graph_.values[found->second].sizes == tensor.sizes();
      const int64_t id = known ? found->second : add(tensor, Origin::intermediate);
      if (!known) {
        graph_.values[id].producer = node;
        if (!tensor.is_floating_point() && !tensor.is_complex()) {
          graph_.values[id].tensor = tensor;  // an index or a mask, which later operators may use as a constant
        }
      } else if (graph_.values[id].producer >= 0 && graph_.nodes[node].children_end > graph_.values[id].producer &&
                 graph_.values[id].producer > node) {
        graph_.values[id].producer = node;  // the composite operator around the one that made it
      } else if (graph_.values[id].origin == Origin::constant && id >= known_before) {
        // The operator made it without calling another one, and had others write into it (roll, mean).
        graph_.values[id].origin = Origin::intermediate;
        graph_.values[id].producer = node;
        if (tensor.is_floating_point() || tensor.is_complex()) {
          graph_.values[id].tensor = at::Tensor();
        }
      }
      graph_.nodes[node].outputs.push_back(id);
    } else if (result.isTensorList()) {
      for (const at::Tensor& tensor : result.toTensorVector()) {
        add_results(tensor, node, known_before);
      }
    }
  }

  std::string owner_of_parameters(const Node& node) const {
    for (const auto& ids : node.input_values) {
      for (auto id : ids) {
        if (id >= 0 && graph_.values[id].origin == Origin::parameter) {
          const auto dot = graph_.values[id].name.rfind('.');
          return dot == std::string::npos ? "" : graph_.values[id].name.substr(0, dot);
        }
      }
    }
    return "";
  }

  Graph& graph_;
  const RecordOptions& options_;
  std::vector<int64_t> open_;   // the nodes that are running
  std::vector<int64_t> known_;  // of each: how many values there were when it started
  std::unordered_map<const c10::TensorImpl*, int64_t> ids_;
  std::vector<c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>> alive_;

  /// Where a value lies in its memory.
  struct Place {
    int64_t id;
    int64_t offset;
    std::vector<int64_t> strides;
  };
  std::unordered_map<const c10::StorageImpl*, std::vector<Place>> memories_;
  std::vector<c10::weak_intrusive_ptr<c10::StorageImpl>> storages_;  // keep addresses from being used again
};

thread_local Recorder* current = nullptr;

struct Observed : at::ObserverContext {};

std::unique_ptr<at::ObserverContext> on_start(const at::RecordFunction& fn) {
  const auto op = fn.operator_name();
  if (!current || !op) {
    return nullptr;
  }
  current->start(fn, *op);
  return std::make_unique<Observed>();
}

void on_end(const at::RecordFunction& fn, at::ObserverContext* context) {
  if (current && context) {
    current->end(fn);
  }
}

/// Attaches the callbacks to this thread for as long as it lives.
class Attached {
 public:
  explicit Attached(Recorder& recorder) {
    TORCH_CHECK_VALUE(current == nullptr, "[record] must not be called while another recording runs on this thread");
    handle_ = at::addThreadLocalCallback(at::RecordFunctionCallback(on_start, on_end)
                                             .needsInputs(true)
                                             .needsOutputs(true)
                                             .scopes({at::RecordScope::FUNCTION}));
    current = &recorder;
  }
  Attached(const Attached&) = delete;
  Attached& operator=(const Attached&) = delete;
  ~Attached() {
    current = nullptr;
    at::removeCallback(handle_);
  }

 private:
  at::CallbackHandle handle_ = 0;
};

bool is_composite(const c10::OperatorName& op) {
  const auto handle = c10::Dispatcher::singleton().findSchema(op);
  return handle && handle->hasKernelForDispatchKey(c10::DispatchKey::CompositeImplicitAutograd);
}

/// Appends to the schedule what computes the outputs of nodes [begin, end) at one level of nesting.
void make_schedule(Graph& graph, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i = std::max(graph.nodes[i].children_end, i + 1)) {
    const Node& node = graph.nodes[i];
    if (node.failed) {
      continue;
    }
    if (!is_known(node.op) && node.children_end > i + 1 && is_composite(node.op)) {
      make_schedule(graph, i + 1, node.children_end);
    } else {
      graph.schedule.push_back(i);
    }
  }
}

}  // namespace

Graph record(const std::function<std::vector<at::Tensor>()>& forward, const std::vector<NamedTensor>& tensors,
             const RecordOptions& options, Graph* partial) {
  Graph graph;
  Recorder recorder(graph, options);
  for (const auto& named : tensors) {
    const auto id = recorder.add_known(named);
    if (named.origin == Origin::input) {
      graph.inputs.push_back(id);
    }
  }
  std::vector<at::Tensor> outputs;
  try {
    const at::NoGradGuard no_grad;
    const Attached attached(recorder);
    std::optional<ShapesOnly> shapes_only;
    if (options.shapes_only) {
      shapes_only.emplace();
    }
    outputs = forward();
  } catch (...) {
    if (partial) {
      make_schedule(graph, 0, static_cast<int64_t>(graph.nodes.size()));
      *partial = std::move(graph);
    }
    throw;
  }
  recorder.finish(outputs);
  make_schedule(graph, 0, static_cast<int64_t>(graph.nodes.size()));
  return graph;
}

std::vector<NamedTensor> named_tensors(const torch::nn::Module& model) {
  std::vector<NamedTensor> out;
  for (const auto& item : model.named_parameters()) {
    out.push_back({item.key(), item.value(), Origin::parameter});
  }
  for (const auto& item : model.named_buffers()) {
    out.push_back({item.key(), item.value(), Origin::buffer});
  }
  return out;
}

Graph record(const torch::nn::Module& model, const std::function<std::vector<at::Tensor>()>& forward,
             const std::vector<at::Tensor>& inputs) {
  auto tensors = named_tensors(model);
  for (size_t i = 0; i < inputs.size(); ++i) {
    tensors.push_back({"input." + std::to_string(i), inputs[i], Origin::input});
  }
  const Evaluation evaluation(const_cast<torch::nn::Module&>(model));
  return record(forward, tensors);
}

}  // namespace rarefy::graph
