#include <rarefy/rarefy.h>
#include <torch/torch.h>

#include "catch.h"

using namespace rarefy::quantization;
namespace rnn = rarefy::nn;
using Catch::Matchers::ContainsSubstring;

namespace {

std::string message_of(const std::function<void()>& body) {
  try {
    body();
  } catch (const c10::Error& e) {
    return e.what_without_backtrace();
  }
  return "nothing was thrown";
}

template <typename To, typename From>
void copy_parameters(To& to, const From& from) {
  const torch::NoGradGuard no_grad;
  for (const auto& item : from->named_parameters()) {
    to->named_parameters()[item.key()].copy_(item.value());
  }
}

/// A model that holds one recurrent layer and a head.
struct TaggerImpl : torch::nn::Module {
  explicit TaggerImpl(const rnn::LSTMOptions& options)
      : rnn(register_module("rnn", rnn::LSTM(options))), fc(register_module("fc", rnn::Linear(12, 3))) {}
  torch::Tensor forward(const torch::Tensor& x) { return fc(std::get<0>(rnn->forward(x))); }
  rnn::LSTM rnn;
  rnn::Linear fc;
};
TORCH_MODULE(Tagger);

rnn::LSTMOptions options() { return rnn::LSTMOptions(5, 6).num_layers(2).bidirectional(true).batch_first(true); }

}  // namespace

TEST_CASE("recurrent layers are torch's until prepared", "[nn][recurrent]") {
  torch::manual_seed(0);
  const auto x = torch::randn({3, 4, 5});
  rnn::LSTM lstm(options());
  torch::nn::LSTM reference(torch::nn::LSTMOptions(5, 6).num_layers(2).bidirectional(true).batch_first(true));
  copy_parameters(reference, lstm);
  const std::tuple state(torch::randn({4, 3, 6}), torch::randn({4, 3, 6}));
  const auto [y, last] = lstm->forward(x, state);
  const auto [expected, expected_last] = reference->forward(x, state);
  REQUIRE(torch::allclose(y, expected, 1e-5, 1e-6));
  REQUIRE(torch::allclose(std::get<0>(last), std::get<0>(expected_last), 1e-5, 1e-6));
  REQUIRE(torch::allclose(std::get<1>(last), std::get<1>(expected_last), 1e-5, 1e-6));
  const auto packed = torch::nn::utils::rnn::pack_padded_sequence(x, torch::tensor({2, 4, 1}), true, false);
  const auto [a, a_last] = lstm->forward_with_packed_input(packed, state);
  const auto [b, b_last] = reference->forward_with_packed_input(packed, state);
  REQUIRE(torch::allclose(a.data(), b.data(), 1e-5, 1e-6));
  REQUIRE(torch::allclose(std::get<1>(a_last), std::get<1>(b_last), 1e-5, 1e-6));

  rnn::GRU gru(5, 6);
  torch::nn::GRU gru_reference(5, 6);
  copy_parameters(gru_reference, gru);
  REQUIRE(torch::allclose(std::get<0>(gru->forward(x)), std::get<0>(gru_reference->forward(x)), 1e-5, 1e-6));

  rnn::LSTMCell lstm_cell(5, 6);
  torch::nn::LSTMCell lstm_cell_reference(5, 6);
  copy_parameters(lstm_cell_reference, lstm_cell);
  REQUIRE(torch::allclose(std::get<1>(lstm_cell->forward(x[0])), std::get<1>(lstm_cell_reference->forward(x[0])), 1e-5,
                          1e-6));
  rnn::GRUCell gru_cell(5, 6);
  torch::nn::GRUCell gru_cell_reference(5, 6);
  copy_parameters(gru_cell_reference, gru_cell);
  REQUIRE(torch::allclose(gru_cell->forward(x[0]), gru_cell_reference->forward(x[0]), 1e-5, 1e-6));
}

TEST_CASE("a recurrent layer trains, converts and comes back from a folder", "[nn][recurrent]") {
  torch::manual_seed(0);
  Tagger model(options());
  prepare_qat(*model, QConfig::int8());
  torch::optim::SGD optimizer(model->parameters(), 0.1);
  for (int i = 0; i < 5; ++i) {
    optimizer.zero_grad();
    model->forward(torch::randn({3, 4, 5})).square().mean().backward();
    for (const auto& parameter : model->parameters()) {
      REQUIRE(parameter.grad().defined());
    }
    optimizer.step();
  }
  model->eval();
  const torch::NoGradGuard no_grad;
  const auto x = torch::randn({3, 4, 5});
  const auto simulated = model->forward(x);
  convert(*model, [&] { return std::vector{model->forward(x)}; });
  const auto y = model->forward(x);
  REQUIRE((y - simulated).abs().max().item<float>() < 0.02);
  REQUIRE(model->rnn->named_buffers()["weight_hh_l1_reverse"].scalar_type() == torch::kInt8);
  REQUIRE_THAT(report(*model), ContainsSubstring("LSTM"));

  const auto folder = std::filesystem::temp_directory_path() / "rarefy_recurrent";
  save_quantized(*model, folder);
  Tagger again(options());
  load_quantized(*again, folder);
  REQUIRE(torch::equal(again->forward(x), y));
  Tagger other(options().bias(false));
  REQUIRE_THAT(message_of([&] { load_quantized(*other, folder); }), ContainsSubstring("layer rnn has no rnn.bias_"));
  std::filesystem::remove_all(folder);
}

TEST_CASE("a hidden state is on the grid of [-1, 1] until it is observed", "[nn][recurrent]") {
  torch::manual_seed(0);
  Tagger model(rnn::LSTMOptions(5, 12));
  prepare_qat(*model, QConfig::int8());
  auto* hidden = model->rnn->quant->find("hidden_l0");
  REQUIRE(!hidden->calibrated());
  const auto y = std::get<0>(model->rnn->forward(torch::randn({4, 2, 5})));
  REQUIRE(torch::allclose(hidden->max_val, 1 + 0.01 * (y.detach().max() - 1)));
}

TEST_CASE("recurrent layers say what does not fit", "[nn][recurrent]") {
  REQUIRE_THAT(message_of([] { rnn::LSTM(rnn::LSTMOptions(4, 6).proj_size(3)); }),
               ContainsSubstring("[LSTM] proj_size is not supported, got 3"));
  rnn::GRU gru(4, 6);
  REQUIRE_THAT(message_of([&] { gru->forward(torch::randn({2, 3, 5})); }),
               ContainsSubstring("[GRU] input must have 4 features"));
  REQUIRE_THAT(message_of([&] { gru->forward(torch::randn({2, 3, 4}), torch::randn({1, 2, 6})); }),
               ContainsSubstring("[GRU] the state must have shape [1, 3, 6], got [1, 2, 6]"));
}
