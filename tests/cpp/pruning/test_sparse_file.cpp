#include <rarefy/rarefy.h>
#include <torch/torch.h>

#include <filesystem>
#include <fstream>

#include "catch.h"

namespace {

namespace fs = std::filesystem;
using namespace rarefy::pruning;
using Catch::Matchers::ContainsSubstring;

/// A folder that is gone at the end.
struct Folder {
  fs::path path = fs::temp_directory_path() / ("rarefy_sparse_" + std::to_string(::getpid()));
  Folder() {
    fs::remove_all(path);
    fs::create_directories(path);
  }
  Folder(const Folder&) = delete;
  Folder& operator=(const Folder&) = delete;
  ~Folder() { fs::remove_all(path); }
};

bool same_bits(const at::Tensor& a, const at::Tensor& b) {
  if (a.sizes() != b.sizes() || a.scalar_type() != b.scalar_type()) {
    return false;
  }
  const auto x = a.contiguous(), y = b.contiguous();
  return std::memcmp(x.const_data_ptr(), y.const_data_ptr(), x.nbytes()) == 0;
}

/// Without -0, which a product would leave.
at::Tensor sparse(at::IntArrayRef shape, double density) {
  return at::where(at::rand(shape) < density, at::randn(shape), at::zeros({}));
}

struct NetImpl : torch::nn::Module {
  torch::nn::Linear first{nullptr};
  rarefy::nn::Linear second{nullptr};
  torch::nn::Sequential rest{nullptr};

  NetImpl() {
    first = register_module("first", torch::nn::Linear(256, 256));
    second = register_module("second", rarefy::nn::Linear(256, 512));
    rest = register_module(
        "rest", torch::nn::Sequential(torch::nn::ReLU(), torch::nn::Linear(512, 512), torch::nn::Linear(512, 10)));
  }
  at::Tensor forward(const at::Tensor& x) { return rest->forward(second(torch::relu(first(x)))); }
};
TORCH_MODULE(Net);

/// One that takes every form, whatever the machine says.
SparsifyOptions always() {
  SparsifyOptions options;
  options.seconds = 1e-3;
  options.least_sparsity = 0.8;
  return options;
}

void prune(Net& net, double sparsity) {
  MagnitudePruner pruner(*net, {.sparsity = sparsity});
  pruner.step();
  pruner.finalize();
}

}  // namespace

TEST_CASE("Compressed files give tensors back bit for bit", "[sparse_file]") {
  torch::manual_seed(1);
  const Folder folder;
  rarefy::NamedTensors tensors;
  tensors.insert("sparse", sparse({40, 30}, 0.1));
  tensors.insert("half", sparse({40, 30}, 0.1).to(at::kHalf));
  tensors.insert("int8", (sparse({40, 30}, 0.1) * 50).to(at::kChar));
  tensors.insert("strided", sparse({40, 30}, 0.1).t());
  tensors.insert("dense", at::randn({7, 9}));
  auto group = at::zeros({64, 16, 4});
  group.scatter_(2, at::randint(4, {64, 16, 1}), at::randn({64, 16, 1}));
  tensors.insert("one of four", group.flatten(1));
  const auto report = save_sparse(tensors, folder.path / "x", {{"made", "by a test"}});
  REQUIRE(static_cast<uintmax_t>(report.bytes) == fs::file_size(folder.path / "x"));
  REQUIRE(report.bytes == sparse_size(tensors, {{"made", "by a test"}}).bytes);
  const auto loaded = load_sparse(folder.path / "x");
  REQUIRE(loaded.metadata.at("made") == "by a test");
  REQUIRE(loaded.tensors.size() == tensors.size());
  for (const auto& item : tensors) {
    REQUIRE(same_bits(loaded.tensors[item.key()], item.value()));
  }
  const auto form = [&](const std::string& name) {
    for (const auto& tensor : report.tensors) {
      if (tensor.name == name) {
        return tensor.form;
      }
    }
    throw std::runtime_error("no tensor " + name);
  };
  REQUIRE(form("sparse") == SparseForm::bitmask);
  REQUIRE(form("one of four") == SparseForm::one_of_four);
  REQUIRE(form("dense") == SparseForm::dense);
  REQUIRE_THAT(report.to_string(), ContainsSubstring("1:4"));
}

TEST_CASE("A model's masks come back, and pruning goes on", "[sparse_file]") {
  torch::manual_seed(2);
  const Folder folder;
  Net net;
  MagnitudePruner pruner(*net, {.sparsity = 0.9});
  pruner.step();
  const auto report = save_sparse(*net, folder.path / "x");
  REQUIRE(report.ratio() < 0.16);

  Net fresh;
  REQUIRE(load_sparse(*fresh, folder.path / "x").missing.empty());
  for (const auto& item : net->named_parameters()) {
    REQUIRE(same_bits(fresh->named_parameters()[item.key()], item.value()));
  }
  MagnitudePruner goes_on(*fresh, {.sparsity = 0.9});
  REQUIRE(goes_on.steps() == 1);
  REQUIRE(goes_on.sparsity() == pruner.sparsity());

  {
    const torch::NoGradGuard no_grad;
    const auto place = (net->first->weight.flatten() == 0).nonzero()[0].item<int64_t>();
    net->first->weight.view(-1)[place] = 1.0;
  }
  REQUIRE_THROWS_WITH(save_sparse(*net, folder.path / "x"),
                      ContainsSubstring("[save_sparse] what a mask prunes must be zero, got another value in "
                                        "'first.weight'"));
  torch::nn::Linear other(3, 4);
  REQUIRE_THROWS_WITH(load_sparse(*other, folder.path / "x"), ContainsSubstring("names must be those of the model"));
  REQUIRE(other->named_buffers().size() == 0);
}

TEST_CASE("Truncated compressed files are refused by name", "[sparse_file]") {
  const Folder folder;
  rarefy::NamedTensors tensors;
  tensors.insert("w", sparse({40, 30}, 0.1));
  save_sparse(tensors, folder.path / "x");
  const auto size = fs::file_size(folder.path / "x");
  for (const uintmax_t length : {uintmax_t{0}, uintmax_t{20}, size / 2, size - 1}) {
    fs::resize_file(folder.path / "x", length);
    REQUIRE_THROWS_WITH(load_sparse(folder.path / "x"), ContainsSubstring((folder.path / "x").string()));
  }
}

TEST_CASE("sparsify and to_dense keep the numbers, and say why", "[sparsify]") {
  torch::manual_seed(3);
  Net net;
  net->eval();
  prune(net, 0.95);
  const torch::NoGradGuard no_grad;
  const auto x = at::randn({1, 256});
  const auto before = net->forward(x);
  const auto weight = net->second->weight;
  const auto forward = [&] { return std::vector{net->forward(x)}; };

  const auto report = sparsify(*net, forward, {x}, always());
  INFO(report.to_string());
  REQUIRE(report.layers.size() == 4);
  REQUIRE(report.layers[0].name == "first");
  REQUIRE_THAT(report.layers[0].reason, ContainsSubstring("a typed member cannot be replaced: make it a rarefy::nn::"));
  for (const auto& layer : report.layers) {
    if (layer.name != "first") {
      REQUIRE(layer.samples == std::vector<int64_t>{1});
      REQUIRE_THAT(layer.reason, ContainsSubstring("as fast as dense"));
      REQUIRE(layer.sparse == (layer.dense_milliseconds >= 1.1 * layer.sparse_milliseconds));
    }
  }
  REQUIRE(at::allclose(net->forward(x), before, 1e-5, 1e-6));
  REQUIRE(to_dense(*net) == report.sparse());
  REQUIRE(net->second->weight.defined());
  REQUIRE(at::equal(net->second->weight, weight));
  REQUIRE(at::allclose(net->forward(x), before, 1e-5, 1e-6));
  REQUIRE_THAT(report.to_string(), ContainsSubstring("of 4 linear layers are sparse"));
}

TEST_CASE("A Linear of rarefy switches where it is", "[sparsify]") {
  torch::manual_seed(4);
  rarefy::nn::Linear layer(32, 16);
  const torch::NoGradGuard no_grad;
  layer->weight.mul_((at::rand({16, 32}) < 0.2).to(at::kFloat));
  const auto dense = layer->weight.clone();
  const auto x = at::randn({5, 32}), before = layer(x);
  layer->become_sparse(rarefy::ops::to_sparse_weight(dense));
  REQUIRE(layer->is_sparse());
  REQUIRE(!layer->weight.defined());
  REQUIRE(layer->named_buffers().contains("weight_values"));
  REQUIRE(at::allclose(layer(x), before, 1e-5, 1e-6));
  layer->set_relu(true);
  REQUIRE(at::allclose(layer(x), before.relu(), 1e-5, 1e-6));
  layer->set_relu(false);
  const auto copy = std::dynamic_pointer_cast<rarefy::nn::LinearImpl>(layer->clone());
  REQUIRE(copy->is_sparse());
  REQUIRE(at::equal(copy->forward(x), layer(x)));
  REQUIRE_THROWS_WITH(layer->become_sparse(rarefy::ops::to_sparse_weight(dense)),
                      ContainsSubstring("Linear must be dense floating point"));
  layer->become_dense();
  REQUIRE(at::equal(layer->weight, dense));
  REQUIRE(layer->named_parameters().contains("weight"));
  REQUIRE(!layer->named_buffers().contains("weight_values"));
}

TEST_CASE("measure_sparse leaves the model as it was", "[sparsify]") {
  torch::manual_seed(5);
  Net net;
  prune(net, 0.9);
  const auto x = at::randn({1, 256});
  const auto parameters = net->parameters();
  const auto report =
      measure_sparse(*net, [&] { return std::vector{net->forward(x)}; }, {x}, always(), /*seconds=*/0.02);
  REQUIRE(report.macs == 256 * 256 + 256 * 512 + 512 * 512 + 512 * 10);
  int64_t kept = 0;
  for (const auto& parameter : parameters) {
    kept += parameter.dim() == 2 ? parameter.count_nonzero().item<int64_t>() : 0;
  }
  REQUIRE(report.effective_macs == kept);
  REQUIRE(report.file.ratio() < 0.16);
  REQUIRE(report.dense_milliseconds > 0);
  REQUIRE(report.sparse_milliseconds > 0);
  const auto after = net->parameters();
  REQUIRE(after.size() == parameters.size());
  for (size_t i = 0; i < after.size(); ++i) {
    REQUIRE(after[i].is_same(parameters[i]));
  }
  REQUIRE_THAT(report.to_string(), ContainsSubstring("bytes on disk"));
}

TEST_CASE("State of torch.nn.utils.prune goes in and out", "[sparse_file]") {
  rarefy::NamedTensors state;
  const auto value = at::randn({5, 7}), mask = (at::rand({5, 7}) < 0.5).to(at::kFloat);
  state.insert("fc.bias", at::ones({5}));
  state.insert("fc.weight_orig", value);
  state.insert("fc.weight_mask", mask);
  const auto imported = import_torch_pruning(state);
  REQUIRE(at::equal(imported["fc.weight"], value * mask));
  REQUIRE(rarefy::ops::pruned_count(imported["fc.weight_mask_bits"], 35) == 35 - mask.sum().item<int64_t>());
  REQUIRE(imported["pruning_step"].item<int64_t>() == 0);
  const auto back = export_torch_pruning(imported);
  REQUIRE(at::equal(back["fc.weight_orig"], value * mask));
  REQUIRE(at::equal(back["fc.weight_mask"], mask));
  REQUIRE(back.size() == 3);
  rarefy::NamedTensors broken;
  broken.insert("fc.weight_orig", value);
  REQUIRE_THROWS_WITH(import_torch_pruning(broken), ContainsSubstring("must come with 'fc.weight_mask', got none"));
}
