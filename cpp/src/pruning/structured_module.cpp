#include <ATen/core/grad_mode.h>
#include <rarefy/pruning/optimizer_state.h>
#include <rarefy/pruning/resize.h>
#include <rarefy/pruning/structured.h>
#include <rarefy/pruning/surgery.h>
#include <torch/nn/module.h>
#include <torch/nn/modules/activation.h>

#include <algorithm>

#include "../graph/evaluation.h"

// StructuredPruner over torch::nn modules: what the transaction asks of a model.
namespace rarefy::pruning {
namespace {

at::Tensor find(const std::vector<graph::NamedTensor>& tensors, const std::string& name) {
  const auto found =
      std::find_if(tensors.begin(), tensors.end(), [&](const auto& tensor) { return tensor.name == name; });
  TORCH_INTERNAL_ASSERT(found != tensors.end(), name);
  return found->value;
}

/// Adds what removed channels contributed as constants.
void add_folds(Surgery& surgery, const std::vector<graph::NamedTensor>& tensors, const std::vector<Fold>& folds) {
  const at::NoGradGuard no_grad;
  for (const auto& fold : folds) {
    auto tensor = find(tensors, fold.tensor);
    if (const auto* kept = surgery.kept(tensor, 0)) {
      tensor.add_(fold.delta.index_select(
          0, at::tensor(*kept, at::TensorOptions().dtype(at::kLong).device(fold.delta.device()))));
    } else {
      // Its memory is the model's own: bring the values back.
      surgery.on_rollback([tensor, before = tensor.detach().clone()]() mutable {
        const at::NoGradGuard inner;
        tensor.copy_(before);
      });
      tensor.add_(fold.delta);
    }
  }
}

}  // namespace

struct StructuredPruner::State {
  torch::nn::Module& model;
  std::function<std::vector<at::Tensor>()> forward;
  std::vector<at::Tensor> inputs;
  ImportanceOptions importance_options;
  std::function<at::Tensor(const Group&)> score;
  Follow follow;
  Manifest manifest;
  std::vector<torch::optim::Optimizer*> optimizers;
  std::unique_ptr<Surgery> surgery;
  Attributes attributes;
  std::optional<StructuredTransaction> transaction;

  Recording record(bool shapes_only) {
    auto tensors = graph::named_tensors(model);
    for (size_t i = 0; i < inputs.size(); ++i) {
      tensors.push_back({"input." + std::to_string(i), inputs[i], graph::Origin::input});
    }
    const graph::Evaluation evaluation(model);
    Recording out;
    graph::Graph partial;
    graph::RecordOptions options;
    options.shapes_only = shapes_only;
    try {
      out.graph = graph::record(forward, tensors, options, &partial);
    } catch (const std::exception& error) {  // of the model's own code: the transaction reports it or tries another way
      out.graph = std::move(partial);
      out.failure = error.what();
      out.failure = out.failure.substr(0, out.failure.find('\n'));
    }
    return out;
  }

  void apply(const Plan& plan) {
    auto tensors = graph::named_tensors(model);
    std::vector<OptimizerTensor> state;
    for (const auto* optimizer : optimizers) {
      auto more = optimizer_tensors(*optimizer, tensors);
      state.insert(state.end(), std::make_move_iterator(more.begin()), std::make_move_iterator(more.end()));
    }
    surgery = std::make_unique<Surgery>(tensors, std::move(state));
    try {
      auto cuts = plan.cuts;
      const auto quantizers = quantizer_cuts(model, cuts);
      cuts.insert(cuts.end(), quantizers.begin(), quantizers.end());
      surgery->apply(cuts);
      attributes = resize_modules(model, *surgery);
      add_folds(*surgery, tensors, plan.folds);
      if (follow) {
        surgery->on_rollback(follow(plan));
      }
    } catch (...) {
      surgery.reset();
      throw;
    }
  }

  void commit() {
    auto next = manifest;
    next.record(*surgery, graph::named_tensors(model), attributes);
    surgery->commit();
    surgery.reset();
    manifest = std::move(next);
  }
};

StructuredPruner::StructuredPruner(torch::nn::Module& model, std::function<std::vector<at::Tensor>()> forward,
                                   std::vector<at::Tensor> inputs, StructuredOptions options,
                                   std::function<at::Tensor(const Group&)> score, Follow follow)
    : state_(new State{model,
                       std::move(forward),
                       std::move(inputs),
                       options.importance,
                       std::move(score),
                       std::move(follow),
                       {},
                       {},
                       nullptr,
                       {},
                       std::nullopt}) {
  auto* state = state_.get();
  PrunableModel subject;
  subject.record = [state](bool shapes_only) { return state->record(shapes_only); };
  subject.tensors = [state] { return graph::named_tensors(state->model); };
  subject.score = [state](const Structure& structure) {
    return state->score ? importance(structure, state->score, state->importance_options.normalization)
                        : importance(structure, parameter_lookup(state->model), state->importance_options);
  };
  subject.apply = [state](const Plan& plan) { state->apply(plan); };
  subject.rollback = [state] { state->surgery.reset(); };
  subject.commit = [state] { state->commit(); };
  subject.run = [state] {
    const graph::Evaluation evaluation(state->model);
    const at::NoGradGuard no_grad;
    state->forward();
  };
  for (const auto& item : model.named_modules("", /*include_self=*/false)) {
    if (item.value()->as<torch::nn::MultiheadAttentionImpl>()) {
      for (const auto& parameter : item.value()->named_parameters()) {
        subject.pinned.emplace_back(item.key() + "." + parameter.key(),
                                    "torch::nn::MultiheadAttention takes its heads and its scale from its width");
      }
    }
  }
  state->transaction.emplace(std::move(subject), std::move(options));
}

StructuredPruner::~StructuredPruner() = default;

const Structure& StructuredPruner::structure() { return state_->transaction->structure(); }

StructuredReport StructuredPruner::preview() { return state_->transaction->preview(); }

StructuredReport StructuredPruner::prune(const std::vector<torch::optim::Optimizer*>& optimizers) {
  state_->optimizers = optimizers;
  try {
    auto report = state_->transaction->prune();
    state_->optimizers.clear();
    return report;
  } catch (...) {
    state_->surgery.reset();
    state_->optimizers.clear();
    throw;
  }
}

const Manifest& StructuredPruner::manifest() const { return state_->manifest; }

}  // namespace rarefy::pruning
