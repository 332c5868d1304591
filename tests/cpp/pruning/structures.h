// Small models of every structure that channels can be coupled by: those of tests/python/structures.py, over torch::nn.
#pragma once

#include <torch/torch.h>

#include <functional>
#include <memory>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace structures {

using torch::Tensor;
using Tensors = std::vector<Tensor>;

/// A module whose layers are registered one by one.
class Net : public torch::nn::Module {
 public:
  using torch::nn::Module::register_buffer;
  using torch::nn::Module::register_parameter;

  template <class Layer>
  Layer add(const std::string& name, Layer layer) {
    register_module(name, layer);
    return layer;
  }

  /// A convolution that keeps the size of its image.
  torch::nn::Conv2d conv(const std::string& name, int64_t inputs, int64_t outputs, int64_t size = 3, int64_t stride = 1,
                         int64_t groups = 1, bool bias = true);
  torch::nn::Linear linear(const std::string& name, int64_t inputs, int64_t outputs, bool bias = true);
  torch::nn::BatchNorm2d batch_norm(const std::string& name, int64_t channels);
  torch::nn::LayerNorm layer_norm(const std::string& name, std::vector<int64_t> shape, bool affine = true);
  Tensor parameter(const std::string& name, torch::IntArrayRef shape);
};

using Forward = std::function<Tensors(const Tensors&)>;

/// A model that can be run.
struct Model {
  std::shared_ptr<Net> net;
  Forward forward;
};

/// A dimension of which slices must stay, and a word that the reason must hold.
struct Pin {
  std::string tensor;
  int64_t dim = 0;
  std::string word;
};

struct Structure {
  std::string name;
  std::function<Forward(Net&)> define;
  std::function<Tensors()> draw;
  std::vector<int64_t> groups;  // the units of each group, ascending
  std::vector<Pin> pins;

  /// In float64 and evaluation mode, with no two parameters or statistics alike.
  Model build(uint64_t seed = 0) const;
  Tensors inputs(uint64_t seed = 0) const;
};

/// All of them, with what tests/structures.txt says must be found.
const std::vector<Structure>& all();
/// The names in tests/structures.txt.
std::vector<std::string> expected_names();

// What the files of the table share.

using Table = std::vector<Structure>;
void add_image_structures(Table& table);
void add_norm_structures(Table& table);
void add_sequence_structures(Table& table);
void add_attention_structures(Table& table);

/// Adds a model: `build` registers its layers and returns what runs them, of one tensor or of several.
template <class Build>
void define(Table& table, const std::string& name, std::function<Tensors()> draw, Build build) {
  auto wrap = [build](Net& net) -> Forward {
    auto run = build(net);
    if constexpr (std::is_invocable_r_v<Tensor, decltype(run), const Tensor&>) {
      return [run](const Tensors& x) mutable -> Tensors { return {run(x[0])}; };
    } else {
      return run;
    }
  };
  table.push_back({name, wrap, std::move(draw), {}, {}});
}

std::function<Tensors()> image(int64_t channels = 3, int64_t size = 8);
std::function<Tensors()> sequence(int64_t channels = 5, int64_t length = 6);
std::function<Tensors()> words(int64_t vocabulary = 11, int64_t length = 6);
Tensor pool(const Tensor& x);

}  // namespace structures
