#include "structures.h"

#include <fstream>
#include <map>
#include <sstream>
#include <stdexcept>

namespace structures {
namespace nn = torch::nn;

nn::Conv2d Net::conv(const std::string& name, int64_t inputs, int64_t outputs, int64_t size, int64_t stride,
                     int64_t groups, bool bias) {
  auto options = nn::Conv2dOptions(inputs, outputs, size).stride(stride).padding(size / 2).groups(groups).bias(bias);
  return add(name, nn::Conv2d(options));
}

nn::Linear Net::linear(const std::string& name, int64_t inputs, int64_t outputs, bool bias) {
  return add(name, nn::Linear(nn::LinearOptions(inputs, outputs).bias(bias)));
}

nn::BatchNorm2d Net::batch_norm(const std::string& name, int64_t channels) {
  return add(name, nn::BatchNorm2d(channels));
}

nn::LayerNorm Net::layer_norm(const std::string& name, std::vector<int64_t> shape, bool affine) {
  return add(name, nn::LayerNorm(nn::LayerNormOptions(std::move(shape)).elementwise_affine(affine)));
}

Tensor Net::parameter(const std::string& name, torch::IntArrayRef shape) {
  return register_parameter(name, 0.4 * torch::randn(shape, torch::kFloat64));
}

namespace {

struct DefaultFloat64 {
  DefaultFloat64() { torch::set_default_dtype(caffe2::TypeMeta::fromScalarType(torch::kFloat64)); }
  ~DefaultFloat64() { torch::set_default_dtype(before); }
  const caffe2::TypeMeta before = torch::get_default_dtype();
};

}  // namespace

Model Structure::build(uint64_t seed) const {
  const DefaultFloat64 float64;  // Module::to would make the integer buffers floating-point ones
  torch::manual_seed(seed);
  auto net = std::make_shared<Net>();
  Model model{net, define(*net)};
  net->eval();
  const torch::NoGradGuard no_grad;
  for (auto& parameter : net->parameters()) parameter.add_(0.1 * torch::randn_like(parameter));
  for (auto& item : net->named_buffers()) {
    auto& buffer = item.value();
    if (item.key().ends_with("running_mean")) buffer.copy_(0.3 * torch::randn_like(buffer));
    if (item.key().ends_with("running_var")) buffer.copy_(0.5 + torch::rand_like(buffer));
  }
  return model;
}

Tensors Structure::inputs(uint64_t seed) const {
  torch::manual_seed(1000 + seed);
  return draw();
}

namespace {

struct Expectation {
  std::vector<int64_t> groups;
  std::vector<Pin> pins;
};

/// Lines "name: 4 8; conv.weight 0 aten::slice; ...": the units of the groups, then what is pinned.
std::map<std::string, Expectation> read_expectations() {
  std::ifstream file(std::string(RAREFY_TESTS_DIR) + "/structures.txt");
  if (!file) throw std::runtime_error("tests/structures.txt is not there");
  std::map<std::string, Expectation> table;
  for (std::string line; std::getline(file, line);) {
    if (line.empty() || line[0] == '#') continue;
    const auto colon = line.find(':');
    auto& expectation = table[line.substr(0, colon)];
    std::istringstream fields(line.substr(colon + 1));
    std::string field;
    std::getline(fields, field, ';');
    std::istringstream groups(field);
    for (int64_t units = 0; groups >> units;) expectation.groups.push_back(units);
    while (std::getline(fields, field, ';')) {
      std::istringstream words(field);
      Pin pin;
      words >> pin.tensor >> pin.dim >> pin.word;
      expectation.pins.push_back(pin);
    }
  }
  return table;
}

}  // namespace

const std::vector<Structure>& all() {
  static const auto table = [] {
    Table structures;
    add_image_structures(structures);
    add_norm_structures(structures);
    add_sequence_structures(structures);
    add_attention_structures(structures);
    const auto expectations = read_expectations();
    for (auto& structure : structures) {
      const auto found = expectations.find(structure.name);
      if (found == expectations.end()) throw std::runtime_error(structure.name + " is not in tests/structures.txt");
      structure.groups = found->second.groups;
      structure.pins = found->second.pins;
    }
    return structures;
  }();
  return table;
}

std::vector<std::string> expected_names() {
  std::vector<std::string> names;
  for (const auto& [name, expectation] : read_expectations()) names.push_back(name);
  return names;
}

std::function<Tensors()> image(int64_t channels, int64_t size) {
  return [=]() -> Tensors { return {torch::randn({2, channels, size, size}, torch::kFloat64)}; };
}

std::function<Tensors()> sequence(int64_t channels, int64_t length) {
  return [=]() -> Tensors { return {torch::randn({2, length, channels}, torch::kFloat64)}; };
}

std::function<Tensors()> words(int64_t vocabulary, int64_t length) {
  return [=]() -> Tensors { return {torch::randint(0, vocabulary, {2, length})}; };
}

Tensor pool(const Tensor& x) { return x.mean({2, 3}); }

}  // namespace structures
