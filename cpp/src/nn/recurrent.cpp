#include <ATen/ops/cat.h>
#include <ATen/ops/dropout.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>
#include <rarefy/nn/recurrent.h>
#include <rarefy/ops/fake_quantize.h>
#include <rarefy/ops/integer.h>
#include <rarefy/ops/quantized.h>
#include <torch/nn/init.h>

#include <cmath>
#include <ostream>

namespace rarefy::nn {
namespace {

using quantization::FakeQuantizerImpl;
using torch::nn::utils::rnn::PackedSequence;

std::optional<torch::Tensor> optional(const torch::Tensor& x) { return x.defined() ? std::optional(x) : std::nullopt; }

/// The grid of [-1, 1], where nothing has been observed.
void start_grid(FakeQuantizerImpl& quantizer) {
  if (quantizer.calibrated()) {
    return;
  }
  const torch::NoGradGuard no_grad;
  const auto& scheme = quantizer.options.scheme;
  quantizer.min_val.fill_(-1);
  quantizer.max_val.fill_(1);
  const auto [scale, zero_point] =
      ops::choose_qparams(quantizer.min_val, quantizer.max_val, scheme.qmin(), scheme.qmax(), scheme.symmetric);
  quantizer.scale.copy_(scale);
  quantizer.zero_point.copy_(zero_point);
}

ops::ByteGrid grid_of(const FakeQuantizerImpl& quantizer) {
  const auto& scheme = quantizer.options.scheme;
  return {quantizer.scale, quantizer.zero_point, scheme.qmin(), scheme.qmax()};
}

}  // namespace

template <typename Derived>
RecurrentModule<Derived>::RecurrentModule(RecurrentShape shape, int64_t proj_size) : shape_(std::move(shape)) {
  TORCH_CHECK_VALUE(shape_.input_size > 0 && shape_.hidden_size > 0 && shape_.num_layers > 0, "[", shape_.kind,
                    "] input_size, hidden_size and num_layers must be at least 1, got ", shape_.input_size, ", ",
                    shape_.hidden_size, " and ", shape_.num_layers);
  TORCH_CHECK_VALUE(proj_size == 0, "[", shape_.kind, "] proj_size is not supported, got ", proj_size);
  for (int64_t layer = 0; layer < shape_.num_layers; ++layer) {
    const auto inputs = layer == 0 ? shape_.input_size : shape_.hidden_size * shape_.directions();
    for (int64_t d = 0; d < shape_.directions(); ++d) {
      directions_.push_back({layer_suffix(layer) + (d == 1 ? "_reverse" : ""), inputs, {}, {}, {}, {}, false});
    }
  }
}

template <typename Derived>
void RecurrentModule<Derived>::reset() {
  const bool converted = mode_ == Mode::converted;
  const auto make = [&](const std::string& name, at::IntArrayRef sizes, bool is_weight) {
    if (!converted) {
      return this->register_parameter(name, torch::empty(sizes));
    }
    return this->register_buffer(name, torch::empty(sizes, is_weight ? torch::kInt8 : torch::kFloat32));
  };
  for (auto& d : directions_) {
    d.weight_ih = make("weight_ih" + d.suffix, {shape_.gates(), d.inputs}, true);
    d.weight_hh = make("weight_hh" + d.suffix, {shape_.gates(), shape_.hidden_size}, true);
    if (shape_.bias) {
      d.bias_ih = make("bias_ih" + d.suffix, {shape_.gates()}, false);
      d.bias_hh = make("bias_hh" + d.suffix, {shape_.gates()}, false);
    }
  }
  if (!specs_.empty()) {
    quant = this->register_module("quant", QuantState(specs_));
  }
}

template <typename Derived>
void RecurrentModule<Derived>::reset_parameters() {
  const double bound = 1.0 / std::sqrt(static_cast<double>(shape_.hidden_size));
  for (auto& parameter : this->parameters(/*recurse=*/false)) {
    torch::nn::init::uniform_(parameter, -bound, bound);
  }
}

template <typename Derived>
void RecurrentModule<Derived>::pretty_print(std::ostream& stream) const {
  stream << "rarefy::nn::" << shape_.kind << "(input_size=" << shape_.input_size
         << ", hidden_size=" << shape_.hidden_size;
  if (!shape_.is_cell()) {
    stream << ", num_layers=" << shape_.num_layers << ", bidirectional=" << std::boolalpha << shape_.bidirectional;
  }
  stream << ")";
}

template <typename Derived>
void RecurrentModule<Derived>::prepare(const quantization::LayerConfig& config,
                                       const quantization::Observer& default_observer) {
  TORCH_CHECK_VALUE(mode_ == Mode::floating, "[prepare] ", kind(), " must be floating point, but is already prepared");
  if (!config.weight.has_value()) {
    return;
  }
  const auto observer = config.observer.value_or(default_observer);
  const auto refuse_learned = [this](const quantization::Observer& each) {
    TORCH_CHECK_VALUE(!quantization::is_learned(each), "[prepare] ", kind(),
                      " must have observers of ranges (its steps run on a grid that is fixed for the sequence), got ",
                      quantization::str(each), "; give it an override");
  };
  refuse_learned(observer);
  if (config.weight_observer.has_value()) {
    refuse_learned(*config.weight_observer);
  }
  const auto of_weight = [&](const torch::Tensor& weight) {
    return quantization::FakeQuantizerOptions{*config.weight, quantization::Latest{}, shape_.gates(),
                                              weight.sizes().vec()};
  };
  for (const auto& d : directions_) {
    const bool first = !d.suffix.ends_with("_reverse");
    if (config.activation.has_value()) {
      if (first) {
        specs_.push_back({"input" + d.suffix, {*config.activation, observer, 1}});
      }
      specs_.push_back({"hidden" + d.suffix, {*config.activation, observer, 1}});
    }
    specs_.push_back({"weight_ih" + d.suffix, of_weight(d.weight_ih)});
    specs_.push_back({"weight_hh" + d.suffix, of_weight(d.weight_hh)});
  }
  quant = this->register_module("quant", QuantState(specs_));
  quant->train(this->is_training());
  quant->to(directions_[0].weight_ih.device());
  execution = config.execution;
  gradient_dtype = config.gradient_dtype;
  float_reason_ = config.why_not_integer();
  if (!float_reason_.has_value() && !ops::has_exact_integer_products()) {
    float_reason_ = "the processor sums products of bytes in 16 bits";
  }
  mode_ = Mode::prepared;
}

template <typename Derived>
void RecurrentModule<Derived>::become_integer(const std::vector<std::pair<std::string, torch::Tensor>>& tensors) {
  for (const auto& [name, tensor] : tensors) {
    this->parameters_.erase(name);
  }
  const auto take = [&](const std::string& name, torch::Tensor& place) {
    for (const auto& [key, tensor] : tensors) {
      if (key == name) {
        place = this->register_buffer(name, tensor);
      }
    }
  };
  for (auto& d : directions_) {
    take("weight_ih" + d.suffix, d.weight_ih);
    take("weight_hh" + d.suffix, d.weight_hh);
    take("bias_ih" + d.suffix, d.bias_ih);
    take("bias_hh" + d.suffix, d.bias_hh);
  }
  mode_ = Mode::converted;
}

template <typename Derived>
void RecurrentModule<Derived>::convert() {
  TORCH_CHECK_VALUE(mode_ == Mode::prepared, "[convert] ", kind(), " must be prepared");
  const torch::NoGradGuard no_grad;
  std::vector<std::pair<std::string, torch::Tensor>> tensors;
  const auto integers = [&](const std::string& name, const torch::Tensor& weight) {
    auto* quantizer = quant->find(name);
    if (quantizer->observe) {
      quantizer->forward(weight);
    }
    tensors.emplace_back(name, quantizer->quantize_to_integer(weight));
  };
  for (const auto& d : directions_) {
    integers("weight_ih" + d.suffix, d.weight_ih);
    integers("weight_hh" + d.suffix, d.weight_hh);
    if (shape_.bias) {
      tensors.emplace_back("bias_ih" + d.suffix, d.bias_ih.detach().to(torch::kFloat32).clone());
      tensors.emplace_back("bias_hh" + d.suffix, d.bias_hh.detach().to(torch::kFloat32).clone());
    }
  }
  become_integer(tensors);
}

template <typename Derived>
std::vector<std::string> RecurrentModule<Derived>::tensor_names() const {
  std::vector<std::string> names;
  for (const auto& d : directions_) {
    names.insert(names.end(), {"weight_ih" + d.suffix, "weight_hh" + d.suffix});
    if (shape_.bias) {
      names.insert(names.end(), {"bias_ih" + d.suffix, "bias_hh" + d.suffix});
    }
  }
  return names;
}

template <typename Derived>
void RecurrentModule<Derived>::restore(const ConvertedState& state) {
  TORCH_CHECK_VALUE(mode_ == Mode::floating, "[restore] ", kind(), " must be floating point");
  specs_ = state.quantizers;
  quant = this->register_module("quant", QuantState(specs_));
  quant->train(this->is_training());
  quant->to(directions_[0].weight_ih.device());
  target = state.target;
  become_integer(state.tensors);
}

template <typename Derived>
torch::Tensor RecurrentModule<Derived>::dequantized(const std::string& name, const torch::Tensor& weight) const {
  return weight.to(torch::kFloat32) * quant->find(name)->scale.view({-1, 1});
}

template <typename Derived>
bool RecurrentModule<Derived>::has_bytes(const std::string& layer, const std::string& direction) const {
  return quant->has_bytes("input" + layer) && quant->has_bytes("hidden" + direction);
}

template <typename Derived>
bool RecurrentModule<Derived>::trains_in_integers(const torch::Tensor& x, const std::string& layer,
                                                  const Direction& direction) const {
  const auto *input = quant->find("input" + layer), *weight = quant->find("weight_ih" + direction.suffix);
  if (execution == quantization::Execution::simulated || input == nullptr || !input->quantize || !weight->quantize) {
    return false;
  }
  std::string reason = float_reason_.value_or("");
  if (reason.empty() && direction.inputs > ops::kLongestSum) {
    reason = "int32 does not hold sums of " + std::to_string(direction.inputs) + " products";
  }
  if (reason.empty() && x.scalar_type() == torch::kFloat64) {
    reason = "float64 has no integer kernels";
  }
  if (reason.empty() && !x.device().is_cpu() && !x.device().is_cuda()) {
    reason = "there are no integer kernels on " + x.device().str();
  }
  TORCH_CHECK_VALUE(reason.empty() || execution != quantization::Execution::integer, "[", kind(),
                    "] execution = integer must be possible for its input, but ", reason);
  return reason.empty();
}

template <typename Derived>
ops::HiddenProduct RecurrentModule<Derived>::hidden_product(Direction& direction, bool integers) {
  const auto name = "weight_hh" + direction.suffix;
  const auto bias = optional(direction.bias_hh);
  if (mode_ == Mode::floating) {
    return {direction.weight_hh, std::nullopt, bias, std::nullopt};
  }
  auto* hidden = quant->find("hidden" + direction.suffix);
  if (mode_ == Mode::converted) {
    if (integers) {
      return {direction.weight_hh, quant->find(name)->scale, bias, grid_of(*hidden)};
    }
    const auto grid = hidden == nullptr ? std::nullopt : std::optional(grid_of(*hidden));
    return {dequantized(name, direction.weight_hh), std::nullopt, bias, grid};
  }
  ops::HiddenProduct product{quant->rounded(name, direction.weight_hh), std::nullopt, bias, std::nullopt};
  if (hidden != nullptr && hidden->quantize) {
    if (!direction.started) {
      start_grid(*hidden);
      direction.started = true;
    }
    product.grid = grid_of(*hidden);
  }
  return product;
}

template <typename Derived>
std::pair<torch::Tensor, RecurrentState> RecurrentModule<Derived>::run_rows(
    torch::Tensor rows, at::IntArrayRef batch_sizes, const std::optional<RecurrentState>& start) {
  const int64_t count = shape_.directions(), batch = batch_sizes.empty() ? 0 : batch_sizes[0];
  TORCH_CHECK_VALUE(rows.dim() == 2 && rows.size(1) == shape_.input_size, "[", kind(), "] input must have ",
                    shape_.input_size, " features, got shape ", rows.sizes());
  const std::vector<int64_t> expected{shape_.num_layers * count, batch, shape_.hidden_size};
  for (const auto* state : {start ? &start->h : nullptr, start && shape_.is_lstm() ? &start->c : nullptr}) {
    TORCH_CHECK_VALUE(state == nullptr || state->sizes() == at::IntArrayRef(expected), "[", kind(),
                      "] the state must have shape ", at::IntArrayRef(expected), ", got ",
                      state == nullptr ? at::IntArrayRef() : state->sizes());
  }
  std::vector<torch::Tensor> last_h, last_c;
  for (int64_t layer = 0; layer < shape_.num_layers; ++layer) {
    const auto suffix = layer_suffix(layer);
    auto* input = mode_ == Mode::floating ? nullptr : quant->find("input" + suffix);
    const bool converted = mode_ == Mode::converted;
    auto* first = &directions_[static_cast<size_t>(layer * count)];
    const bool bytes = converted && has_bytes(suffix, suffix);
    const bool integers = mode_ == Mode::prepared && trains_in_integers(rows, suffix, *first);
    // The input is observed and rounded once, whatever the number of directions.
    auto x = rows;
    if (integers) {
      input->update(rows);
    } else if (bytes) {
      x = ops::requantize(rows, grid_of(*input), grid_of(*input));
    } else if (input != nullptr) {
      x = input->forward(rows);
    }
    std::vector<torch::Tensor> outputs;
    for (int64_t i = 0; i < count; ++i) {
      auto& d = first[i];
      const auto name = "weight_ih" + d.suffix;
      torch::Tensor gates;
      if (bytes) {
        gates = ops::quantized_linear(x, d.weight_ih, quant->find(name)->scale, optional(d.bias_ih), grid_of(*input));
      } else if (integers) {
        auto* weights = quant->find(name);
        weights->update(d.weight_ih);
        const auto &xs = input->options.scheme, &ws = weights->options.scheme;
        const ops::IntegerGrids grids{input->scale,   input->zero_point,   xs.qmin(), xs.qmax(),
                                      weights->scale, weights->zero_point, ws.qmin(), ws.qmax()};
        gates = ops::integer_linear(x, d.weight_ih, optional(d.bias_ih), grids, /*transposed=*/false,
                                    {false, gradient_dtype == c10::ScalarType::BFloat16, std::nullopt});
      } else {
        const auto weight = mode_ == Mode::floating   ? d.weight_ih
                            : mode_ == Mode::prepared ? quant->rounded(name, d.weight_ih)
                                                      : dequantized(name, d.weight_ih);
        gates = at::linear(x, weight, optional(d.bias_ih));
      }
      const auto index = layer * count + i;
      const auto zeros = [&] { return at::zeros({batch, shape_.hidden_size}, gates.options()); };
      const auto h0 = start ? start->h[index].to(gates.scalar_type()) : zeros();
      const auto c0 = !shape_.is_lstm() ? torch::Tensor() : start ? start->c[index].to(gates.scalar_type()) : zeros();
      const auto [y, h, c] = ops::recurrence(gates, hidden_product(d, bytes), h0, optional(c0), batch_sizes, i == 1);
      if (auto* hidden = mode_ == Mode::prepared ? quant->find("hidden" + d.suffix) : nullptr) {
        hidden->update(start ? at::cat({h0, y}).detach() : y.detach());
      }
      outputs.push_back(y);
      last_h.push_back(h);
      last_c.push_back(c);
    }
    rows = outputs.size() == 1 ? outputs[0] : at::cat(outputs, 1);
    if (shape_.dropout > 0 && layer + 1 < shape_.num_layers) {
      rows = at::dropout(rows, shape_.dropout, this->is_training());
    }
  }
  return {rows, {at::stack(last_h), shape_.is_lstm() ? at::stack(last_c) : torch::Tensor()}};
}

template <typename Derived>
std::pair<torch::Tensor, RecurrentState> RecurrentModule<Derived>::run_padded(
    const torch::Tensor& x, const std::optional<RecurrentState>& start) {
  TORCH_CHECK_VALUE(x.dim() == 2 || x.dim() == 3, "[", kind(), "] input must have 2 or 3 dimensions, got shape ",
                    x.sizes());
  if (x.dim() == 2) {  // one sequence
    auto with_batch = start;
    if (with_batch.has_value()) {
      with_batch->h = with_batch->h.unsqueeze(1);
      with_batch->c = with_batch->c.defined() ? with_batch->c.unsqueeze(1) : with_batch->c;
    }
    auto [y, state] = run_rows(x, std::vector<int64_t>(static_cast<size_t>(x.size(0)), 1), with_batch);
    return {y, {state.h.squeeze(1), state.c.defined() ? state.c.squeeze(1) : state.c}};
  }
  const auto steps = shape_.batch_first ? x.transpose(0, 1) : x;
  TORCH_CHECK_VALUE(steps.size(0) > 0, "[", kind(), "] sequences must have a step, got shape ", x.sizes());
  const std::vector<int64_t> batch_sizes(static_cast<size_t>(steps.size(0)), steps.size(1));
  auto [y, state] = run_rows(steps.reshape({-1, x.size(2)}), batch_sizes, start);
  y = y.view({steps.size(0), steps.size(1), -1});
  return {shape_.batch_first ? y.transpose(0, 1) : y, state};
}

template <typename Derived>
std::pair<PackedSequence, RecurrentState> RecurrentModule<Derived>::run_packed(
    const PackedSequence& x, const std::optional<RecurrentState>& start) {
  const auto reordered = [](const torch::Tensor& state, const torch::Tensor& order) {
    return state.defined() && order.defined() ? state.index_select(1, order) : state;
  };
  const auto sizes = x.batch_sizes().contiguous();
  const std::vector<int64_t> batch_sizes(sizes.const_data_ptr<int64_t>(),
                                         sizes.const_data_ptr<int64_t>() + sizes.numel());
  auto sorted = start;
  if (sorted.has_value()) {
    *sorted = {reordered(start->h, x.sorted_indices()), reordered(start->c, x.sorted_indices())};
  }
  auto [y, state] = run_rows(x.data(), batch_sizes, sorted);
  return {PackedSequence(y, x.batch_sizes(), x.sorted_indices(), x.unsorted_indices()),
          {reordered(state.h, x.unsorted_indices()), reordered(state.c, x.unsorted_indices())}};
}

namespace {

template <typename Options>
RecurrentShape layer_shape(const char* kind, const Options& o) {
  return {kind,     o.input_size(),  o.hidden_size(),   o.num_layers(),
          o.bias(), o.batch_first(), o.bidirectional(), o.dropout()};
}

template <typename Options>
RecurrentShape cell_shape(const char* kind, const Options& o) {
  return {kind, o.input_size(), o.hidden_size(), 1, o.bias(), false, false, 0};
}

std::optional<RecurrentState> state_of(const std::optional<LSTMImpl::States>& hx) {
  return hx.has_value() ? std::optional(RecurrentState{std::get<0>(*hx), std::get<1>(*hx)}) : std::nullopt;
}

std::optional<RecurrentState> state_of(const torch::Tensor& hx) {
  return hx.defined() ? std::optional(RecurrentState{hx, {}}) : std::nullopt;
}

/// A cell's state with the axis of layers, and of samples where it has none.
std::optional<RecurrentState> cell_state(std::optional<RecurrentState> state, bool batched) {
  if (state.has_value()) {
    for (auto* part : {&state->h, &state->c}) {
      if (part->defined()) {
        *part = batched ? part->unsqueeze(0) : part->unsqueeze(0).unsqueeze(0);
      }
    }
  }
  return state;
}

}  // namespace

LSTMImpl::LSTMImpl(const LSTMOptions& options_)
    : RecurrentModule(layer_shape("LSTM", options_), options_.proj_size()), options(options_) {
  reset();
  reset_parameters();
}

std::tuple<torch::Tensor, LSTMImpl::States> LSTMImpl::forward(const torch::Tensor& x, std::optional<States> hx) {
  auto [y, state] = run_padded(x, state_of(hx));
  return {y, {state.h, state.c}};
}

std::tuple<PackedSequence, LSTMImpl::States> LSTMImpl::forward_with_packed_input(const PackedSequence& x,
                                                                                 std::optional<States> hx) {
  auto [y, state] = run_packed(x, state_of(hx));
  return {y, {state.h, state.c}};
}

GRUImpl::GRUImpl(const GRUOptions& options_) : RecurrentModule(layer_shape("GRU", options_), 0), options(options_) {
  reset();
  reset_parameters();
}

std::tuple<torch::Tensor, torch::Tensor> GRUImpl::forward(const torch::Tensor& x, torch::Tensor hx) {
  auto [y, state] = run_padded(x, state_of(hx));
  return {y, state.h};
}

std::tuple<PackedSequence, torch::Tensor> GRUImpl::forward_with_packed_input(const PackedSequence& x,
                                                                             const torch::Tensor& hx) {
  auto [y, state] = run_packed(x, state_of(hx));
  return {y, state.h};
}

LSTMCellImpl::LSTMCellImpl(const LSTMCellOptions& options_)
    : RecurrentModule(cell_shape("LSTMCell", options_), 0), options(options_) {
  reset();
  reset_parameters();
}

LSTMCellImpl::States LSTMCellImpl::forward(const torch::Tensor& x, std::optional<States> hx) {
  const bool batched = x.dim() == 2;
  const auto rows = batched ? x : x.unsqueeze(0);
  const auto [y, state] = run_rows(rows, {rows.size(0)}, cell_state(state_of(hx), batched));
  return batched ? States(state.h[0], state.c[0]) : States(state.h[0][0], state.c[0][0]);
}

GRUCellImpl::GRUCellImpl(const GRUCellOptions& options_)
    : RecurrentModule(cell_shape("GRUCell", options_), 0), options(options_) {
  reset();
  reset_parameters();
}

torch::Tensor GRUCellImpl::forward(const torch::Tensor& x, const torch::Tensor& hx) {
  const bool batched = x.dim() == 2;
  const auto rows = batched ? x : x.unsqueeze(0);
  const auto [y, state] = run_rows(rows, {rows.size(0)}, cell_state(state_of(hx), batched));
  return batched ? state.h[0] : state.h[0][0];
}

template class RecurrentModule<LSTMImpl>;
template class RecurrentModule<GRUImpl>;
template class RecurrentModule<LSTMCellImpl>;
template class RecurrentModule<GRUCellImpl>;

}  // namespace rarefy::nn
