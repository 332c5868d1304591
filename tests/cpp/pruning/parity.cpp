// What tests/python/test_pruning_parity.py runs to compare pruners of the two languages. Files are of the safetensors format.
//
// rarefy_pruning_parity RUN DATA OUT: prunes the parameters "a.weight" and "b.weight" of DATA as the run of that name below
//   says, with the gradients "<parameter>.grad.<step>" of DATA and w -= 0.1 * gradient for an optimizer, and writes parameters
//   and buffers after every step to OUT as "<step>.<key>". "score.<parameter>" of DATA are given scores.
#include <rarefy/checkpoint.h>
#include <rarefy/pruning/pruner.h>
#include <torch/torch.h>

#include <iostream>

namespace {

using namespace rarefy::pruning;

PrunerOptions options_of(const std::string& run, const std::map<std::string, at::Tensor>& scores) {
  const LinearSchedule linear{.end = 9, .every = 2};
  const std::map<std::string, PrunerOptions> runs{
      {"one_shot", {.sparsity = 0.7}},
      {"linear", {.sparsity = 0.7, .schedule = linear}},
      {"polynomial", {.sparsity = 0.7, .scope = Scope::local, .schedule = PolynomialSchedule{.end = 9, .every = 2}}},
      {"cosine", {.sparsity = 0.7, .scope = Scope::erk, .schedule = CosineSchedule{.end = 9, .initial = 0.1}}},
      {"exponential", {.sparsity = 0.7, .schedule = ExponentialSchedule{.end = 9}, .layers = {{"a", 0.4}}}},
      {"cyclic", {.sparsity = 0.7, .schedule = CyclicSchedule{.end = 10, .cycles = 2}}},
      {"acdc", {.sparsity = 0.7, .schedule = ACDC{.begin = 1, .end = 9, .sparse = 2, .dense = 2}}},
      {"iterative", {.sparsity = 0.7, .schedule = Iterative{3, 4, Rewind::weights, 1}}},
      {"custom",
       {.sparsity = 0.7,
        .schedule = CustomSchedule{std::make_shared<const CustomSchedule::Function>(
                                       [](int64_t step) { return static_cast<double>(step) / 20.0; }),
                                   {1, 4, 9}}}},
      {"blocks", {.sparsity = 0.5, .schedule = linear, .pattern = Block{2, 2}}},
      {"nm", {.sparsity = 0.5, .schedule = linear, .pattern = NM{2, 4}}},
      {"movement", {.sparsity = 0.7, .schedule = linear, .criterion = Movement{}}},
      {"taylor", {.sparsity = 0.7, .schedule = linear, .pattern = Row{}, .criterion = Taylor{}}},
      {"random", {.sparsity = 0.7, .schedule = linear, .criterion = Random{5}}},
      {"set", {.sparsity = 0.7, .regrowth = SET{.end = 12, .every = 2, .seed = 3}}},
      {"rigl", {.sparsity = 0.7, .schedule = linear, .regrowth = RigL{.end = 12, .every = 2}}},
      {"soft",
       {.sparsity = 0.5, .pattern = NM{2, 4}, .regrowth = StraightThrough{.end = 9, .every = 2, .decay = 0.01}}},
      {"scores", {.sparsity = 0.7, .schedule = linear, .scores = scores}},
  };
  return runs.at(run);
}

int prune(const std::string& run, const std::string& data_file, const std::string& out) {
  const auto data = rarefy::load_safetensors(data_file).tensors;
  std::vector<NamedParameter> parameters;
  std::map<std::string, at::Tensor> scores;
  for (const std::string name : {"a.weight", "b.weight"}) {
    parameters.push_back({name, data[name].clone().requires_grad_()});
    scores.emplace(name, data["score." + name]);
  }
  Pruner pruner(parameters, options_of(run, scores));
  torch::OrderedDict<std::string, at::Tensor> written;
  for (int step = 1; step <= 13; ++step) {
    for (auto& [name, value] : parameters) {
      value.mutable_grad() = data[name + ".grad." + std::to_string(step)].clone();
    }
    if (pruner.needs_accumulate()) {
      pruner.accumulate();
    }
    {
      const torch::NoGradGuard no_grad;
      for (auto& [name, value] : parameters) {
        value.add_(value.grad(), -0.1);
      }
    }
    pruner.step();
    const std::string prefix = std::to_string(step) + ".";
    for (const auto& [name, value] : parameters) {
      written.insert(prefix + name, value.detach().clone());
    }
    for (const auto& [key, value] : pruner.buffers()) {
      written.insert(prefix + key, value.clone());
    }
  }
  rarefy::save_safetensors(written, out);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    TORCH_CHECK(argc == 4, "usage: rarefy_pruning_parity RUN DATA OUT");
    return prune(argv[1], argv[2], argv[3]);
  } catch (const std::exception& error) {
    std::cerr << error.what() << "\n";
    return 1;
  }
}
