#include <fmt/format.h>
#include <fmt/ranges.h>
#include <rarefy/nn/quantizable.h>
#include <rarefy/quantization/weight_importance.h>
#include <torch/autograd.h>
#include <torch/types.h>

#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

namespace rarefy::quantization {
namespace {

/// A weight that is searched for, and what was summed up for it.
struct Watched {
  std::string name;
  nn::Quantizable* layer;
  FakeQuantizerImpl* weight;
  torch::Tensor sum = {};  // float64
  double count = 0;
  bool finite = true;
};

/// In floating point and evaluation as long as it lives.
class Floating {
 public:
  Floating(torch::nn::Module& model, const char* function) {
    std::set<const nn::Quantizable*> seen;
    bool any = false;
    for (const auto& item : model.named_modules("", /*include_self=*/false)) {
      modules_.emplace_back(item.value(), item.value()->is_training());
      auto* layer = dynamic_cast<nn::Quantizable*>(item.value().get());
      if (layer == nullptr || layer->mode() != nn::Quantizable::Mode::prepared || !seen.insert(layer).second) {
        continue;
      }
      any = true;
      for (const auto& [key, quantizer] : layer->quant_state()->quantizers()) {
        switches_.push_back({quantizer, quantizer->observe, quantizer->quantize});
        if (std::holds_alternative<MSE>(quantizer->options.observer) && layer->input_axis(4).has_value()) {
          weights.push_back({item.key() + ".quant." + key, layer, quantizer.get()});
        }
      }
    }
    TORCH_CHECK_VALUE(any, "[", function, "] the model must have prepared layers; call prepare_qat or prepare first");
    TORCH_CHECK_VALUE(
        !weights.empty(), "[", function,
        "] the model must have a linear layer or convolution whose weight has the observer MSE, but has none");
    self_ = {&model, model.is_training()};
    model.eval();
    for (const auto& item : switches_) {
      item.quantizer->observe = item.quantizer->quantize = false;
    }
  }
  Floating(const Floating&) = delete;
  Floating& operator=(const Floating&) = delete;
  ~Floating() {
    for (const auto& item : switches_) {
      item.quantizer->observe = item.observe;
      item.quantizer->quantize = item.quantize;
    }
    for (const auto& item : weights) {
      item.layer->quant_state()->watch = nullptr;
      item.weight->watch = nullptr;
    }
    self_.first->train(self_.second);
    for (const auto& [module, training] : modules_) {
      module->train(training);
    }
  }

  std::vector<Watched> weights;

 private:
  struct Switch {
    std::shared_ptr<FakeQuantizerImpl> quantizer;
    bool observe, quantize;
  };
  std::vector<Switch> switches_;
  std::vector<std::pair<std::shared_ptr<torch::nn::Module>, bool>> modules_;
  std::pair<torch::nn::Module*, bool> self_;
};

void add(Watched& item, const torch::Tensor& sum, double count) {
  item.sum = item.sum.defined() ? item.sum + sum : sum;
  item.count += count;
}

/// Checks everything before the first quantizer is written to.
void store(const char* function, std::vector<Watched>& weights, bool by_input) {
  std::vector<std::string> missed, not_finite;
  for (auto& item : weights) {
    if (!item.sum.defined()) {
      missed.push_back(item.name);
    } else if (!torch::isfinite(item.sum).all().item<bool>()) {
      not_finite.push_back(item.name);
    }
  }
  TORCH_CHECK_VALUE(missed.empty(), "[", function,
                    "] every weight with an observer MSE must be reached, but none reached: ",
                    fmt::format("{}", fmt::join(missed, ", ")));
  TORCH_CHECK_VALUE(not_finite.empty(), "[", function, "] data must be finite, but NaN or infinite values reached: ",
                    fmt::format("{}", fmt::join(not_finite, ", ")));
  for (auto& item : weights) {
    const auto mean = (item.sum / item.count).to(torch::kFloat32);
    item.weight->importance = by_input ? item.layer->by_input(mean) : mean;
    item.weight->refresh();  // a range that was searched for before is not the one to be searched for now
  }
}

}  // namespace

void collect_importance(torch::nn::Module& model, const std::function<void()>& run) {
  constexpr const char* function = "collect_importance";
  Floating floating(model, function);
  auto& weights = floating.weights;
  for (auto& item : weights) {
    item.layer->quant_state()->watch = [&item](const torch::Tensor& x) {
      const auto channels = x.detach().movedim(*item.layer->input_axis(x.dim()), 0).flatten(1).to(torch::kFloat64);
      add(item, channels.square().sum(1), static_cast<double>(channels.size(1)));
    };
  }
  {
    const torch::NoGradGuard no_grad;
    run();
  }
  store(function, weights, /*by_input=*/true);
}

void collect_gradient_importance(torch::nn::Module& model, const std::function<torch::Tensor()>& loss,
                                 int64_t batches) {
  constexpr const char* function = "collect_gradient_importance";
  TORCH_CHECK_VALUE(batches >= 1, "[", function, "] batches must be at least 1, got ", batches);
  Floating floating(model, function);
  auto& weights = floating.weights;
  // What quantizers are given: the weight itself, or with a batch normalization folded in.
  std::vector<std::pair<Watched*, torch::Tensor>> rounded;
  for (auto& item : weights) {
    item.weight->watch = [&](const torch::Tensor& w) {
      if (w.requires_grad()) {
        rounded.emplace_back(&item, w);
      }
    };
  }
  const torch::AutoGradMode grad(true);
  for (int64_t i = 0; i < batches; ++i) {
    rounded.clear();
    const auto value = loss();
    TORCH_CHECK_VALUE(value.numel() == 1, "[", function, "] loss must give one number, got shape ", value.sizes());
    torch::autograd::variable_list inputs;
    for (const auto& [item, w] : rounded) {
      inputs.push_back(w);
    }
    const auto gradients = inputs.empty() ? inputs
                                          : torch::autograd::grad({value.sum()}, inputs, {}, std::nullopt,
                                                                  /*create_graph=*/false, /*allow_unused=*/true);
    // A layer that is called twice has one gradient: the sum.
    std::vector<std::pair<Watched*, torch::Tensor>> totals;
    for (size_t k = 0; k < gradients.size(); ++k) {
      if (!gradients[k].defined()) {
        continue;
      }
      auto* item = rounded[k].first;
      const bool is_leaf = rounded[k].second.is_leaf();
      auto known = totals.begin();
      while (known != totals.end() && known->first != item) {
        ++known;
      }
      if (known == totals.end()) {
        totals.emplace_back(item, gradients[k].to(torch::kFloat64));
      } else if (!is_leaf) {  // of a parameter itself each call has the whole gradient already
        known->second = known->second + gradients[k];
      }
    }
    for (const auto& [item, gradient] : totals) {
      add(*item, gradient.square(), 1.0);
    }
  }
  store(function, weights, /*by_input=*/false);
}

}  // namespace rarefy::quantization
