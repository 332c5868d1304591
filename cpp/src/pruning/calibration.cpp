#include <ATen/core/grad_mode.h>
#include <c10/util/Exception.h>
#include <fmt/format.h>
#include <rarefy/pruning/calibration.h>

#include <algorithm>
#include <chrono>
#include <memory>
#include <set>

#include "pruning/calibrated_checks.h"
#include "pruning/finite.h"
#include "pruning/patterns.h"

namespace rarefy::pruning {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

/// The pattern of a method that chooses masks; null for one that does not.
const Pattern* pattern_of(const CalibrationOptions& options) {
  const auto* gpt = std::get_if<SparseGptOptions>(&options.method);
  const auto* wanda = std::get_if<WandaOptions>(&options.method);
  return gpt != nullptr ? &gpt->pattern : wanda != nullptr ? &wanda->pattern : nullptr;
}

std::string method_text(const CalibrationOptions& options) {
  const auto* pattern = pattern_of(options);
  if (pattern == nullptr) {
    return "refit";
  }
  return fmt::format("{}, {}{}", std::holds_alternative<WandaOptions>(options.method) ? "wanda" : "sparse_gpt",
                     short_name(*pattern), options.refit.has_value() ? ", refit" : "");
}

void check_layers(const std::vector<CalibrationStage>& stages, const CalibrationOptions& options) {
  std::set<const void*> weights;
  std::set<std::string> names;
  for (const auto& stage : stages) {
    TORCH_CHECK_VALUE(stage.run != nullptr, "[prune_calibrated] every stage must have a callable that runs the data");
    for (const auto& [name, weight, shape] : stage.layers) {
      TORCH_CHECK_VALUE(weight.defined() && weight.sizes() == at::IntArrayRef(shape.weight),
                        "[prune_calibrated] the weight of '", name, "' must have the sizes of its layer ", shape.weight,
                        ", got ", weight.defined() ? weight.sizes() : at::IntArrayRef());
      shape.validate();
      TORCH_CHECK_VALUE(is_finite(weight.detach()),
                        "[prune_calibrated] weights must be finite, got NaN or infinity in '", name, "'");
      TORCH_CHECK_VALUE(names.insert(name).second && weights.insert(weight.unsafeGetTensorImpl()).second,
                        "[prune_calibrated] every weight must come once, got '", name, "' twice");
      if (const auto* pattern = pattern_of(options)) {
        const auto reason = misfit(*pattern, weight.sizes());
        TORCH_CHECK_VALUE(reason.empty(), "[prune_calibrated] '", name, "': ", reason);
      }
    }
  }
  TORCH_CHECK_VALUE(!names.empty(), "[prune_calibrated] needs at least one layer, got none");
  for (const auto& [pattern, sparsity] : options.layers) {
    TORCH_CHECK_VALUE(std::any_of(names.begin(), names.end(),
                                  [&p = pattern](const auto& name) { return matches_parameter(p, name); }),
                      "[prune_calibrated] every name in layers must be that of a weight, got '", pattern, "'");
  }
  if (const auto* refit = std::get_if<MaskRefit>(&options.method)) {
    for (const auto& [tensors, what] : {std::pair(&refit->masks, "masks"), {&refit->dense, "dense"}}) {
      for (const auto& [name, tensor] : *tensors) {
        TORCH_CHECK_VALUE(names.contains(name), "[prune_calibrated] every name in ", what,
                          " must be that of a weight, got '", name, "'");
      }
    }
  }
}

/// What a layer is fitted to: the model's own weight, or the one given for it.
at::Tensor dense_of(const CalibratedLayer& layer, const CalibrationOptions& options) {
  if (const auto* refit = std::get_if<MaskRefit>(&options.method)) {
    if (const auto found = refit->dense.find(layer.name); found != refit->dense.end()) {
      return found->second;
    }
  }
  return layer.weight.detach();
}

/// Masks are looked at before any data runs.
void check_masks(const std::vector<CalibrationStage>& stages, const CalibrationOptions& options) {
  const auto* refit = std::get_if<MaskRefit>(&options.method);
  if (refit == nullptr) {
    return;
  }
  for (const auto& stage : stages) {
    for (const auto& layer : stage.layers) {
      const auto found = refit->masks.find(layer.name);
      TORCH_CHECK_VALUE(found != refit->masks.end(), "[prune_calibrated] every weight must have a mask, got none for '",
                        layer.name, "'");
      const auto& mask = found->second;
      const auto dense = dense_of(layer, options);
      TORCH_CHECK_VALUE(mask.defined() && mask.scalar_type() == at::kBool && mask.sizes() == layer.weight.sizes(),
                        "[prune_calibrated] the mask of '", layer.name, "' must be bool of sizes ",
                        layer.weight.sizes(), ", got ", mask.defined() ? mask.scalar_type() : at::ScalarType::Undefined,
                        " and ", mask.defined() ? mask.sizes() : at::IntArrayRef());
      TORCH_CHECK_VALUE(dense.defined() && dense.sizes() == layer.weight.sizes(), "[prune_calibrated] dense '",
                        layer.name, "' must have the weight's sizes ", layer.weight.sizes());
      const auto pruned = dense.masked_select(mask.to(dense.device()).logical_not());
      TORCH_CHECK_VALUE(pruned.numel() == 0 || pruned.count_nonzero().item<int64_t>() > 0,
                        "[prune_calibrated] what the mask prunes must not be zero in the weights that are fitted, got "
                        "zeros in '",
                        layer.name, "': give the dense weights");
    }
  }
}

std::optional<double> own_sparsity(const std::string& name, const CalibrationOptions& options) {
  for (const auto& [pattern, sparsity] : options.layers) {
    if (matches_parameter(pattern, name)) {
      return sparsity;
    }
  }
  return std::nullopt;
}

/// The result of a method on one layer.
CalibratedWeight solve(const CalibratedLayer& layer, const at::Tensor& dense, const at::Tensor& hessian,
                       const HessianAccumulator& statistics, const CalibrationOptions& options) {
  const auto sparsity = own_sparsity(layer.name, options);
  if (const auto* masks = std::get_if<MaskRefit>(&options.method)) {
    return refit(layer.name, dense, masks->masks.at(layer.name).to(dense.device()), hessian, masks->refit);
  }
  CalibratedWeight out;
  if (const auto* gpt = std::get_if<SparseGptOptions>(&options.method)) {
    auto own = *gpt;
    own.sparsity = sparsity.has_value() ? sparsity : own.sparsity;
    out = sparse_gpt(layer.name, dense, hessian, own);
  } else {
    auto own = std::get<WandaOptions>(options.method);
    own.sparsity = sparsity.has_value() ? sparsity : own.sparsity;
    out = wanda(layer.name, dense, statistics.norms(), own);
  }
  if (options.refit.has_value()) {
    auto fitted = refit(layer.name, dense, out.mask, hessian, *options.refit);
    out.weight = fitted.weight;
    out.damping = std::max(out.damping, fitted.damping);
    add_note(out.note, fitted.note.empty() ? "" : "refit: " + fitted.note);
  }
  return out;
}

/// Weights that were written, and what they were; puts them back unless told that all went well.
class Transaction {
 public:
  Transaction() = default;
  ~Transaction() {
    const at::NoGradGuard no_grad;
    for (auto& [weight, before] : written_) {
      weight.copy_(before);
    }
  }
  Transaction(const Transaction&) = delete;
  Transaction& operator=(const Transaction&) = delete;
  Transaction(Transaction&&) = delete;
  Transaction& operator=(Transaction&&) = delete;

  void write(const at::Tensor& weight, const at::Tensor& value) {
    const at::NoGradGuard no_grad;
    auto target = weight.detach();
    written_.emplace_back(target, target.clone());
    bytes_ += static_cast<int64_t>(target.nbytes());
    target.copy_(value);
  }
  void commit() { written_.clear(); }
  int64_t bytes() const { return bytes_; }

 private:
  std::vector<std::pair<at::Tensor, at::Tensor>> written_;
  int64_t bytes_ = 0;
};

void describe(CalibratedTensor& row, const HessianAccumulator& statistics) {
  std::string note;
  const int64_t features = statistics.layer().features();
  const auto norms = statistics.norms();
  if (const auto dead = norms.eq(0).sum().item<int64_t>(); dead > 0) {
    add_note(note, fmt::format("{} of {} inputs are always zero", dead, norms.numel()));
  }
  if (statistics.samples() < features) {
    add_note(note, fmt::format("{} samples for {} features", statistics.samples(), features));
  }
  if (statistics.skipped() > 0) {
    add_note(note, fmt::format("{} batches with NaN or infinity left out", statistics.skipped()));
  }
  add_note(note, row.note);
  row.note = note;
}

}  // namespace

void CalibrationOptions::validate() const {
  std::visit(
      [](const auto& m) {
        if constexpr (requires { m.validate(); }) {
          m.validate();
        } else {
          m.refit.validate();
        }
      },
      method);
  if (refit.has_value()) {
    refit->validate();
    TORCH_CHECK_VALUE(pattern_of(*this) != nullptr,
                      "[prune_calibrated] refit must be unset for a method that is refit");
  }
  for (const auto& [name, sparsity] : layers) {
    TORCH_CHECK_VALUE(pattern_of(*this) != nullptr, "[prune_calibrated] layers must be empty for given masks");
    resolved_sparsity("prune_calibrated", sparsity, *pattern_of(*this));
  }
}

CalibrationResult prune_calibrated(const std::vector<CalibrationStage>& stages, const CalibrationOptions& options) {
  options.validate();
  check_layers(stages, options);
  check_masks(stages, options);
  const auto start = Clock::now();
  const bool needs_products =
      !std::holds_alternative<WandaOptions>(options.method) || options.refit.has_value() || options.errors;
  CalibrationResult out;
  out.report.method = method_text(options);
  Transaction transaction;
  std::vector<std::pair<at::Tensor, at::Tensor>> later;  // without propagation nothing is written before the end
  int64_t later_bytes = 0;
  for (const auto& stage : stages) {
    std::vector<std::unique_ptr<HessianAccumulator>> statistics;
    for (const auto& layer : stage.layers) {
      statistics.push_back(std::make_unique<HessianAccumulator>(
          layer.name, layer.shape, needs_products ? Statistic::products : Statistic::squares, options.float64));
    }
    stage.run([&](size_t index, const at::Tensor& input) {
      TORCH_CHECK_INDEX(index < statistics.size(), "[prune_calibrated] the stage has ", statistics.size(),
                        " layers, got an input of layer ", index);
      statistics[index]->update(input);
    });
    int64_t bytes = transaction.bytes() + later_bytes;
    for (const auto& own : statistics) {
      bytes += own->bytes();
    }
    out.report.peak_bytes = std::max(out.report.peak_bytes, bytes);
    for (size_t i = 0; i < stage.layers.size(); ++i) {
      const auto& layer = stage.layers[i];
      const auto own = std::move(statistics[i]);
      if (own->samples() == 0) {
        out.report.left_alone.push_back({layer.name, layer.weight.numel(),
                                         own->skipped() == 0
                                             ? std::string("no input reached it")
                                             : fmt::format("all {} batches held NaN or infinity", own->skipped())});
        continue;
      }
      const auto began = Clock::now();
      const auto dense = dense_of(layer, options);
      const auto hessian = needs_products ? own->hessian() : at::Tensor();
      auto solved = solve(layer, dense, hessian, *own, options);
      CalibratedTensor row;
      row.name = layer.name;
      row.shape = layer.weight.sizes().vec();
      row.elements = layer.weight.numel();
      row.pruned = row.elements - solved.mask.sum().item<int64_t>();
      if (needs_products) {
        row.error = relative_error(dense, solved.weight, hessian);
      }
      row.damping = solved.damping;
      row.samples = own->samples();
      row.skipped = own->skipped();
      row.note = solved.note;
      describe(row, *own);
      if (options.propagate) {
        transaction.write(layer.weight, solved.weight);
      } else {
        later.emplace_back(layer.weight, solved.weight);
        later_bytes += static_cast<int64_t>(solved.weight.nbytes());
      }
      out.masks.emplace(layer.name, solved.mask);
      row.seconds = seconds_since(began);
      out.report.tensors.push_back(std::move(row));
      if (options.on_layer) {
        options.on_layer(layer.name);
      }
    }
  }
  if (out.masks.empty()) {
    std::string reasons;
    for (const auto& other : out.report.left_alone) {
      reasons += fmt::format("{}{} ({})", reasons.empty() ? "" : ", ", other.name, other.reason);
    }
    TORCH_CHECK_VALUE(false, "[prune_calibrated] some layer must see a finite batch, got none: ", reasons);
  }
  for (const auto& [weight, value] : later) {
    transaction.write(weight, value);
  }
  transaction.commit();
  out.report.seconds = seconds_since(start);
  return out;
}

}  // namespace rarefy::pruning
