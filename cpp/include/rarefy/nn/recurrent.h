#pragma once

#include <rarefy/nn/quantizable.h>
#include <rarefy/ops/recurrence.h>
#include <torch/nn/modules/common.h>
#include <torch/nn/modules/container/any.h>
#include <torch/nn/options/rnn.h>
#include <torch/nn/utils/rnn.h>

#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

namespace rarefy::nn {

using LSTMOptions = torch::nn::LSTMOptions;
using GRUOptions = torch::nn::GRUOptions;
using LSTMCellOptions = torch::nn::LSTMCellOptions;
using GRUCellOptions = torch::nn::GRUCellOptions;

/// The sizes of a recurrent layer.
struct RecurrentShape {
  std::string kind;  // "LSTM", "GRU", "LSTMCell" or "GRUCell"
  int64_t input_size = 1, hidden_size = 1, num_layers = 1;
  bool bias = true, batch_first = false, bidirectional = false;
  double dropout = 0;

  bool is_cell() const { return kind.ends_with("Cell"); }
  bool is_lstm() const { return kind.starts_with("LSTM"); }
  int64_t gates() const { return (is_lstm() ? 4 : 3) * hidden_size; }
  int64_t directions() const { return bidirectional ? 2 : 1; }
};

/// The hidden and, of an LSTM, cell state at one end of the sequences: [layers * directions, N, hidden].
struct RecurrentState {
  torch::Tensor h, c;  // c undefined for a GRU
};

/// What LSTM, GRU and their cells share. Prepared, the input of each layer (`quant.input_l0`, ...) and the hidden state of each
/// direction (`quant.hidden_l0`, `quant.hidden_l0_reverse`, ...) are quantized per tensor, and the weights (`quant.weight_ih_l0`,
/// `quant.weight_hh_l0`, ...) per row where the configuration says per channel; gates and cell state are floating point. The
/// products with the input are computed in integers, for all steps at once; those with the hidden state in floating point on
/// the grids while training, and in integers after convert. A hidden state is on the grid of [-1, 1], which no state of an LSTM
/// leaves, until it has been observed; it is observed once per forward pass, as a whole.
/// Names of cells have no "_l0".
template <typename Derived>
class RAREFY_API RecurrentModule : public torch::nn::Cloneable<Derived>, public Quantizable {
 public:
  void reset() override;
  void reset_parameters();
  void pretty_print(std::ostream& stream) const override;
  std::string kind() const override { return shape_.kind; }
  bool has_weight() const override { return true; }
  void prepare(const quantization::LayerConfig& config, const quantization::Observer& default_observer) override;
  void convert() override;
  void restore(const ConvertedState& state) override;

  std::vector<std::string> tensor_names() const override;

  const RecurrentShape& shape() const { return shape_; }

 protected:
  /// Throws c10::ValueError for sizes below 1 and a projection.
  RecurrentModule(RecurrentShape shape, int64_t proj_size);

  /// Rows of all steps, one after the other, with the number of rows of each step; see ops::recurrence.
  std::pair<torch::Tensor, RecurrentState> run_rows(torch::Tensor rows, at::IntArrayRef batch_sizes,
                                                    const std::optional<RecurrentState>& start);
  /// [T, N, in], or [N, T, in] where batch_first says so; without N for one sequence.
  std::pair<torch::Tensor, RecurrentState> run_padded(const torch::Tensor& x,
                                                      const std::optional<RecurrentState>& start);
  std::pair<torch::nn::utils::rnn::PackedSequence, RecurrentState> run_packed(
      const torch::nn::utils::rnn::PackedSequence& x, const std::optional<RecurrentState>& start);

 private:
  /// One direction of one layer.
  struct Direction {
    std::string suffix;  // "_l0", "_l0_reverse"; "" of a cell
    int64_t inputs = 0;
    torch::Tensor weight_ih, weight_hh, bias_ih, bias_hh;
    bool started = false;  // whether the grid of the hidden state is known to be there
  };

  std::string layer_suffix(int64_t layer) const { return shape_.is_cell() ? "" : "_l" + std::to_string(layer); }
  bool has_bytes(const std::string& layer, const std::string& direction) const;
  ops::HiddenProduct hidden_product(Direction& direction, bool integers);
  torch::Tensor dequantized(const std::string& name, const torch::Tensor& weight) const;
  bool trains_in_integers(const torch::Tensor& x, const std::string& layer, const Direction& direction) const;
  void become_integer(const std::vector<std::pair<std::string, torch::Tensor>>& tensors);

  RecurrentShape shape_;
  std::vector<Direction> directions_;  // layer by layer
  QuantStateImpl::Specs specs_;
  std::optional<std::string> float_reason_;
};

/// Takes the place of torch::nn::LSTM, with the names and shapes of its parameters. proj_size is not supported.
class RAREFY_API LSTMImpl : public RecurrentModule<LSTMImpl> {
 public:
  using States = std::tuple<torch::Tensor, torch::Tensor>;
  LSTMImpl(int64_t input_size, int64_t hidden_size) : LSTMImpl(LSTMOptions(input_size, hidden_size)) {}
  explicit LSTMImpl(const LSTMOptions& options);

  std::tuple<torch::Tensor, States> forward(const torch::Tensor& x, std::optional<States> hx = {});
  std::tuple<torch::nn::utils::rnn::PackedSequence, States> forward_with_packed_input(
      const torch::nn::utils::rnn::PackedSequence& x, std::optional<States> hx = {});

  LSTMOptions options;

 protected:
  FORWARD_HAS_DEFAULT_ARGS({1, torch::nn::AnyValue(std::optional<States>())})
};
TORCH_MODULE(LSTM);

/// Takes the place of torch::nn::GRU, with the names and shapes of its parameters.
class RAREFY_API GRUImpl : public RecurrentModule<GRUImpl> {
 public:
  GRUImpl(int64_t input_size, int64_t hidden_size) : GRUImpl(GRUOptions(input_size, hidden_size)) {}
  explicit GRUImpl(const GRUOptions& options);

  std::tuple<torch::Tensor, torch::Tensor> forward(const torch::Tensor& x, torch::Tensor hx = {});
  std::tuple<torch::nn::utils::rnn::PackedSequence, torch::Tensor> forward_with_packed_input(
      const torch::nn::utils::rnn::PackedSequence& x, const torch::Tensor& hx = {});

  GRUOptions options;

 protected:
  FORWARD_HAS_DEFAULT_ARGS({1, torch::nn::AnyValue(torch::Tensor())})
};
TORCH_MODULE(GRU);

/// Takes the place of torch::nn::LSTMCell: x [N, in] or [in], h and c [N, hidden] or [hidden].
class RAREFY_API LSTMCellImpl : public RecurrentModule<LSTMCellImpl> {
 public:
  using States = std::tuple<torch::Tensor, torch::Tensor>;
  LSTMCellImpl(int64_t input_size, int64_t hidden_size) : LSTMCellImpl(LSTMCellOptions(input_size, hidden_size)) {}
  explicit LSTMCellImpl(const LSTMCellOptions& options);

  States forward(const torch::Tensor& x, std::optional<States> hx = {});

  LSTMCellOptions options;

 protected:
  FORWARD_HAS_DEFAULT_ARGS({1, torch::nn::AnyValue(std::optional<States>())})
};
TORCH_MODULE(LSTMCell);

/// Takes the place of torch::nn::GRUCell: x [N, in] or [in], h [N, hidden] or [hidden].
class RAREFY_API GRUCellImpl : public RecurrentModule<GRUCellImpl> {
 public:
  GRUCellImpl(int64_t input_size, int64_t hidden_size) : GRUCellImpl(GRUCellOptions(input_size, hidden_size)) {}
  explicit GRUCellImpl(const GRUCellOptions& options);

  torch::Tensor forward(const torch::Tensor& x, const torch::Tensor& hx = {});

  GRUCellOptions options;

 protected:
  FORWARD_HAS_DEFAULT_ARGS({1, torch::nn::AnyValue(torch::Tensor())})
};
TORCH_MODULE(GRUCell);

}  // namespace rarefy::nn
