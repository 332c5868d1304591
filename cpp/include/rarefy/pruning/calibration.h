#pragma once

#include <ATen/core/Tensor.h>
#include <rarefy/export.h>
#include <rarefy/pruning/calibrated.h>
#include <rarefy/pruning/calibration_report.h>
#include <rarefy/pruning/hessian.h>

#include <functional>
#include <map>
#include <string>
#include <utility>
#include <variant>
#include <vector>

// Calibrated pruning of a whole model, layer by layer, as a transaction. How data gets to the layers is the caller's: a
// callable per stage runs the model and hands over what each layer was given.
namespace rarefy::pruning {

/// A layer whose weight is pruned in place.
struct RAREFY_API CalibratedLayer {
  std::string name;  // of the weight
  at::Tensor weight;
  LayerShape shape;
};

/// Takes an input of the layer of this index of the stage.
using InputSink = std::function<void(size_t layer, const at::Tensor& input)>;

/// Layers whose statistics are gathered in one run over the data.
struct RAREFY_API CalibrationStage {
  std::vector<CalibratedLayer> layers;
  std::function<void(const InputSink&)> run;
};

/// The method that only refits what masks keep.
struct RAREFY_API MaskRefit {
  std::map<std::string, at::Tensor> masks;       // bool, true = kept, by name of the weight: one for each layer
  std::map<std::string, at::Tensor> dense = {};  // weights whose outputs are fitted; those of the model where unset
  RefitOptions refit = {};
};

struct RAREFY_API CalibrationOptions {
  std::variant<WandaOptions, SparseGptOptions, MaskRefit> method = SparseGptOptions{};
  std::optional<RefitOptions> refit = std::nullopt;  // refits the masks of Wanda and SparseGPT at once
  /// Own sparsities of weights that a pattern names (see select_parameters()); the first that fits counts.
  std::vector<std::pair<std::string, double>> layers = {};
  bool propagate = true;  // true: a stage sees what the pruned stages before it give. false: what the dense model gives
  bool float64 = false;   // statistics and solutions in float64
  bool errors = true;     // Wanda without refit: gather Hessians, which it does not need, to report errors
  std::function<void(const std::string&)> on_layer = {};  // called with the name of each weight that is done

  /// Throws c10::ValueError when a field is out of range.
  void validate() const;
};

struct RAREFY_API CalibrationResult {
  std::map<std::string, at::Tensor> masks;  // bool, true = kept, by name of the weight
  CalibrationReport report;
};

/// Prunes the weights of all stages, in order:
///
///   for (size_t i...) stages.push_back({{{"fc1.weight", net->fc1->weight, {net->fc1->weight.sizes().vec()}}},
///                                       [&](const InputSink& see) { for (x : batches) see(0, x.flatten(1)); }});
///   auto result = prune_calibrated(stages, {.method = SparseGptOptions{.pattern = NM{2, 4}}});
///
/// Each stage is run once. A layer that sees no finite batch is left alone, with the reason in the report. Memory beside
/// the model: the statistics of one stage (4 features^2 bytes per layer), and a copy of the weights written so far.
/// Throws c10::ValueError for options out of range, for weights that are not finite, do not have the pattern or come
/// twice, for masks that are missing or name no layer, before any stage runs; when no layer sees a finite batch; and
/// what sparse_gpt(), wanda(), refit() and the callables throw. Then all weights are as they were.
RAREFY_API CalibrationResult prune_calibrated(const std::vector<CalibrationStage>& stages,
                                              const CalibrationOptions& options = {});

}  // namespace rarefy::pruning
