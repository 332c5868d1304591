#pragma once

#include <rarefy/distillation/capture.h>
#include <rarefy/export.h>
#include <torch/nn/module.h>
#include <torch/types.h>

#include <concepts>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace rarefy::distillation {

/// One batch. `labels` may be undefined where the loss needs none.
struct Batch {
  torch::Tensor inputs = {};
  torch::Tensor labels = {};
  TensorMap fields = {};              // further tensors by name: masks, sample ids, a second input
  std::shared_ptr<void> object = {};  // whatever else the source, the models and the losses have agreed on
};

/// What a model gives.
struct Outputs {
  torch::Tensor logits = {};
  TensorMap features = {};            // outputs of layers, by name
  std::shared_ptr<void> object = {};  // whatever else the model and the losses have agreed on

  Outputs() = default;
  Outputs(torch::Tensor values) : logits(std::move(values)) {}  // NOLINT(google-explicit-constructor)
  Outputs(torch::Tensor values, TensorMap layers, std::shared_ptr<void> other = {})
      : logits(std::move(values)), features(std::move(layers)), object(std::move(other)) {}
};

/// A std::shared_ptr to a torch::nn module, or a holder made by TORCH_MODULE, whose forward maps a tensor to a tensor.
template <typename M>
concept ModuleLike = requires(M& module, const torch::Tensor& x) {
  { module->forward(x) } -> std::convertible_to<torch::Tensor>;
  { module->modules() } -> std::convertible_to<std::vector<std::shared_ptr<torch::nn::Module>>>;
};

/// A model as the trainer sees it: a function from a batch to outputs, and what training needs to know beside it. Every
/// member but `forward` may be empty.
struct Model {
  using Forward = std::function<Outputs(const Batch&)>;
  using Restore = std::function<void()>;

  Forward forward;
  /// Puts the model in training (true) or evaluation mode; returns what puts every module back as it was.
  std::function<Restore(bool)> enter_mode = {};
  /// Begins to capture layers; returns what ends it. Called around everything that runs the model.
  std::function<Restore()> capture = {};
  /// All parameters and buffers by name: what a teacher must not change, and what its fingerprint is made of.
  std::function<std::vector<std::pair<std::string, torch::Tensor>>()> tensors = {};
  /// Holds the exchange of gradients between processes back until the returned function is called.
  std::function<Restore()> pause_sync = {};
  /// Called after each step of the optimizer: a teacher that follows the student. Such a teacher may change.
  std::function<void()> after_step = {};

  Model() = default;

  /// Any callable from a batch to outputs, or from a tensor (the batch's inputs) to logits; it has no modes.
  template <typename F>
    requires(!ModuleLike<F> && !std::same_as<std::remove_cvref_t<F>, Model> &&
             std::is_invocable_r_v<Outputs, F&, const Batch&>)
  Model(F function) : forward(std::move(function)) {}  // NOLINT(google-explicit-constructor): reads as the model itself
  template <typename F>
    requires(!ModuleLike<F> && !std::same_as<std::remove_cvref_t<F>, Model> &&
             !std::is_invocable_r_v<Outputs, F&, const Batch&> &&
             std::is_invocable_r_v<torch::Tensor, F&, const torch::Tensor&>)
  Model(F function)  // NOLINT(google-explicit-constructor)
      : forward([function = std::move(function)](const Batch& batch) mutable -> Outputs {
          return torch::Tensor(function(batch.inputs));
        }) {}

  /// A torch::nn module, shared with the caller. What its forward taps (capture.h) are the features.
  template <ModuleLike M>
  Model(M module)  // NOLINT(google-explicit-constructor)
      : forward([module](const Batch& batch) mutable -> Outputs {
          Capture capture;
          torch::Tensor logits = module->forward(batch.inputs);
          return {std::move(logits), capture.take()};
        }),
        enter_mode([module](bool training) mutable { return switch_mode(module->modules(), training); }),
        tensors([module]() mutable {
          std::vector<std::pair<std::string, torch::Tensor>> all;
          for (const auto& item : module->named_parameters()) {
            all.emplace_back(item.key(), item.value());
          }
          for (const auto& item : module->named_buffers()) {
            all.emplace_back(item.key(), item.value());
          }
          return all;
        }) {}

 private:
  /// Parts that were put in evaluation mode inside of a module in training mode stay so: frozen normalization.
  static Restore switch_mode(std::vector<std::shared_ptr<torch::nn::Module>> modules, bool training) {
    if (training && modules.front()->is_training()) {
      return [] {};
    }
    std::vector<bool> flags;
    for (const auto& part : modules) {
      flags.push_back(part->is_training());
    }
    modules.front()->train(training);
    return [modules = std::move(modules), flags = std::move(flags)] {
      // Parents come before their children here, and train() reaches down: every own flag is set last.
      for (size_t i = 0; i < modules.size(); ++i) {
        modules[i]->train(flags[i]);
      }
    };
  }
};

/// A hash of tensors with their names, shapes and dtypes, in 16 hexadecimal digits; an empty string without tensors. It tells
/// one model from another, and is no protection against forgery.
RAREFY_API std::string fingerprint(const std::vector<std::pair<std::string, torch::Tensor>>& tensors);

/// A model that is only ever run in evaluation mode and without recording gradients, and that does not change: by type, so
/// that no loop can forget it.
class RAREFY_API Teacher {
 public:
  Teacher(Model model) : model_(std::move(model)) {}  // NOLINT(google-explicit-constructor): a model is a teacher
  template <typename M>
    requires(!std::same_as<std::remove_cvref_t<M>, Teacher> && std::convertible_to<M, Model>)
  Teacher(M model) : model_(Model(std::move(model))) {}  // NOLINT(google-explicit-constructor)

  /// Outputs without a gradient. In evaluation mode between enter() and its way back.
  Outputs operator()(const Batch& batch) const;
  /// Evaluation mode, and capture; returns what ends both.
  Model::Restore enter() const;
  /// Lets a teacher that follows the student follow it.
  void after_step() const;

  /// A 64-bit hash of the bytes of each parameter and buffer, with its name, shape and dtype. Empty for a model without
  /// tensors, and for one that follows the student.
  std::vector<std::pair<std::string, uint64_t>> hashes() const;
  /// Of the same tensors; an empty string where there are none.
  std::string fingerprint() const;
  /// Throws c10::ValueError that names the tensors whose hash is not `expected` (of hashes()).
  void check_unchanged(const std::vector<std::pair<std::string, uint64_t>>& expected) const;

 private:
  Model model_;
};

}  // namespace rarefy::distillation
