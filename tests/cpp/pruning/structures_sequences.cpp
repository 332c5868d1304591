// Layers on sequences: linear chains, parameters without a layer, embeddings, recurrence, operators that nobody knows.
#include <torch/library.h>

#include <tuple>

#include "structures.h"

namespace structures {
namespace nn = torch::nn;

namespace {

Tensor smooth(const Tensor& x) { return x + 0.5 * x.roll(1, -1); }
Tensor call_smooth(const Tensor& x) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("rarefy_tests::smooth", "").typed<Tensor(const Tensor&)>();
  return op.call(x);
}

void add_linear(Table& table) {
  define(table, "mlp", sequence(), [](Net& net) {
    auto layers =
        net.add("layers", nn::Sequential(nn::Linear(5, 9), nn::GELU(), nn::Linear(nn::LinearOptions(9, 7).bias(false)),
                                         nn::Tanh(), nn::Linear(7, 3)));
    return [=](const Tensor& x) mutable { return layers->forward(x); };
  });
  define(table, "mean_pooling", sequence(), [](Net& net) {
    return [up = net.linear("up", 5, 8), fc = net.linear("fc", 8, 3)](const Tensor& input) mutable {
      const auto x = up(input);
      return fc(x.mean(1) + x.amax(1) - x.sum(1) / x.size(1));
    };
  });
  define(table, "stacked_heads", sequence(), [](Net& net) {
    return [a = net.linear("a", 5, 8), b = net.linear("b", 5, 8),
            out = net.linear("out", 8, 3)](const Tensor& input) mutable {
      const auto x = torch::stack({a(input), b(input)}, 1);
      const auto parts = x.unbind(1);
      return out(x.sum(1).relu() + parts[0] * parts[1]);
    };
  });
  define(table, "einsum_weight", sequence(), [](Net& net) {
    return [w1 = net.parameter("w1", {5, 2, 4}), w2 = net.parameter("w2", {2, 4, 7}),
            out = net.linear("out", 7, 3)](const Tensor& input) mutable {
      const auto x = torch::einsum("bli,ihd->bhld", {input, w1});
      return out(torch::einsum("bhld,hdo->blo", {x.relu(), w2}).tanh());
    };
  });
  define(table, "functional_linear", sequence(), [](Net& net) {
    return [weight1 = net.parameter("weight1", {8, 5}), weight2 = net.parameter("weight2", {8, 6}),
            bias2 = net.parameter("bias2", {6}), weight3 = net.parameter("weight3", {6, 3})](const Tensor& input) {
      const auto x = torch::linear(input, weight1).relu();
      return torch::matmul(torch::addmm(bias2, x.flatten(0, 1), weight2).relu(), weight3);
    };
  });
  define(table, "layer_scale", sequence(), [](Net& net) {
    return [embed = net.linear("embed", 5, 8), mix = net.linear("mix", 8, 8), gamma = net.parameter("gamma", {8}),
            out = net.linear("out", 8, 3)](const Tensor& input) mutable {
      const auto x = embed(input);
      return out((x + gamma * mix(x)).relu());
    };
  });
}

void add_shared(Table& table) {
  define(table, "embedding_tied_head", words(), [](Net& net) {
    auto embed = net.add("embed", nn::Embedding(11, 8));
    net.add("head", std::make_shared<Net>())->register_parameter("weight", embed->weight);
    return [=, up = net.linear("up", 8, 12), down = net.linear("down", 12, 8)](const Tensor& ids) mutable {
      const auto x = embed(ids);
      return torch::linear(x + down(up(x).relu()), embed->weight);
    };
  });
  define(table, "shared_parameter", sequence(), [](Net& net) {
    auto a = net.linear("a", 8, 6);
    auto b = net.add("b", std::make_shared<Net>());
    b->register_parameter("weight", a->weight);
    return [=, bias = b->parameter("bias", {6}), embed = net.linear("embed", 5, 8),
            out = net.linear("out", 6, 3)](const Tensor& input) mutable {
      const auto x = embed(input).relu();
      return out(a(x).relu()) + out(torch::linear(x * 2, a->weight, bias).sigmoid());
    };
  });
  define(table, "module_twice", sequence(), [](Net& net) {
    return [embed = net.linear("embed", 5, 8), mix = net.linear("mix", 8, 8), out = net.linear("out", 8, 3)](
               const Tensor& x) mutable { return out(mix(mix(embed(x).relu()).relu()).relu()); };
  });
  define(table, "positions_and_class_token", words(), [](Net& net) {
    auto embed = net.add("embed", nn::Embedding(nn::EmbeddingOptions(11, 8).padding_idx(0)));
    auto types = net.add("types", nn::Embedding(2, 8));
    return [=, token = net.parameter("token", {1, 1, 8}), positions = net.parameter("positions", {1, 7, 8}),
            norm = net.layer_norm("norm", {8}), head = net.linear("head", 8, 3)](const Tensor& ids) mutable {
      auto x = torch::cat({token.expand({ids.size(0), -1, -1}), embed(ids)}, 1) + positions;
      x = x + types(torch::zeros({ids.size(0), 1}, torch::kLong));
      return head(norm(x).select(1, 0));
    };
  });
}

template <class Recurrent>
void add_recurrent(Table& table, const std::string& name, Recurrent recurrent, int64_t outputs = 7) {
  define(table, name, sequence(), [=](Net& net) {
    return [embed = net.linear("embed", 5, 6), layer = net.add(name == "gru" ? "gru" : "lstm", recurrent()),
            out = net.linear("out", outputs, 3)](const Tensor& x) mutable {
      return out(std::get<0>(layer(embed(x).relu())));
    };
  });
}

void add_recurrence(Table& table) {
  const auto options = nn::LSTMOptions(6, 7).batch_first(true);
  define(table, "lstm", sequence(), [=](Net& net) {
    auto lstm = net.add("lstm", nn::LSTM(options));
    return [=, embed = net.linear("embed", 5, 6), out = net.linear("out", 7, 3)](const Tensor& x) mutable {
      const auto result = lstm(embed(x));
      return out(std::get<0>(result).select(1, -1)) + out(std::get<0>(std::get<1>(result)).select(0, 0));
    };
  });
  add_recurrent(table, "lstm_two_layers", [=] { return nn::LSTM(nn::LSTMOptions(options).num_layers(2)); });
  add_recurrent(
      table, "lstm_bidirectional", [=] { return nn::LSTM(nn::LSTMOptions(options).bidirectional(true).bias(false)); },
      14);
  add_recurrent(table, "gru", [] { return nn::GRU(nn::GRUOptions(6, 7).batch_first(true)); });
  define(table, "lstm_cell", sequence(), [](Net& net) {
    auto cell = net.add("cell", nn::LSTMCell(6, 7));
    return [=, embed = net.linear("embed", 5, 6), out = net.linear("out", 7, 3)](const Tensor& input) mutable {
      const auto x = embed(input);
      auto state = cell(x.select(1, 0));
      for (int64_t i = 1; i < x.size(1); ++i) state = cell(x.select(1, i), state);
      return out(std::get<0>(state));
    };
  });
}

template <class Unknown>
void add_unknown(Table& table, const std::string& name, Unknown unknown) {
  define(table, name, sequence(), [unknown](Net& net) {
    return [unknown, embed = net.linear("embed", 5, 8), mix = net.linear("mix", 8, 6),
            out = net.linear("out", 6, 3)](const Tensor& x) mutable { return out(mix(unknown(embed(x))).relu()); };
  });
}

}  // namespace

TORCH_LIBRARY(rarefy_tests, library) {
  library.def("smooth(Tensor x) -> Tensor", torch::dispatch(c10::DispatchKey::CompositeExplicitAutograd, smooth));
}

void add_sequence_structures(Table& table) {
  add_linear(table);
  add_shared(table);
  add_recurrence(table);
  add_unknown(table, "unknown_sort", [](const Tensor& x) { return std::get<0>(x.sort(-1)); });
  add_unknown(table, "unknown_cumsum", [](const Tensor& x) { return x.cumsum(-1); });
  add_unknown(table, "unknown_custom", call_smooth);
}

}  // namespace structures
