// rarefy_parity IN OUT: continues the training that test_quantization.py began, and writes what became of it.
// IN: a torch.save'd dict of the prepared network's state, batch0..batch2 and labels. OUT: the same kind of file.
#include "parity.h"

#include <fstream>
#include <iterator>

namespace {

std::vector<char> read(const char* path) {
  std::ifstream file(path, std::ios::binary);
  TORCH_CHECK(file, "cannot read ", path);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

}  // namespace

int main(int argc, char** argv) {
  TORCH_CHECK(argc == 3, "usage: rarefy_parity IN OUT");
  const auto given = torch::pickle_load(read(argv[1])).toGenericDict();
  const auto tensor = [&](const std::string& name) { return given.at(name).toTensor(); };

  Parity model;
  rarefy::quantization::prepare_qat(*model, rarefy::quantization::QConfig::int8());
  {
    const torch::NoGradGuard no_grad;
    for (auto& item : model->named_parameters()) {
      item.value().copy_(tensor(item.key()));
    }
    for (auto& item : model->named_buffers()) {
      item.value().copy_(tensor(item.key()));
    }
  }
  torch::optim::SGD optimizer(model->parameters(), torch::optim::SGDOptions(0.1).momentum(0.9));
  for (const char* name : {"batch0", "batch1"}) {
    optimizer.zero_grad();
    torch::nn::functional::cross_entropy(model(tensor(name)), tensor("labels")).backward();
    optimizer.step();
  }
  c10::Dict<std::string, torch::Tensor> results;
  for (const auto& item : model->named_parameters()) {
    results.insert(item.key(), item.value().detach().clone());
  }
  for (const auto& item : model->named_buffers()) {
    results.insert(item.key(), item.value().clone());
  }
  const torch::NoGradGuard no_grad;
  model->eval();
  results.insert("evaluated", model(tensor("batch2")));
  rarefy::quantization::convert(*model);
  results.insert("converted", model(tensor("batch2")));

  const auto bytes = torch::pickle_save(results);
  std::ofstream(argv[2], std::ios::binary).write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  return 0;
}
