// What the Python tests run to compare the two languages.
//
// rarefy_parity IN OUT: continues the training that test_quantization.py began, and writes what became of it.
//   IN: a torch.save'd dict of the prepared network's state, batch0..batch2 and labels. OUT: the same kind of file.
// rarefy_parity --continue MODEL BATCH OUT: loads the prepared network's MODEL, writes it again to OUT, and its output on
//   the tensor `x` of BATCH to OUT.evaluated. All safetensors files, of test_checkpoint.py.
// rarefy_parity --read FILE...: one line per safetensors file, its tensors' sum of bytes or why it is refused.
#include "parity.h"

#include <algorithm>
#include <fstream>
#include <iostream>
#include <iterator>
#include <numeric>

namespace {

std::vector<char> read(const char* path) {
  std::ifstream file(path, std::ios::binary);
  TORCH_CHECK(file, "cannot read ", path);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

int continue_checkpoint(char** argv) {
  Parity model;
  rarefy::quantization::prepare_qat(*model, rarefy::quantization::QConfig::int8());
  rarefy::load_safetensors(*model, argv[2]);
  const torch::NoGradGuard no_grad;
  model->eval();
  rarefy::NamedTensors results;
  results.insert("evaluated", model(rarefy::load_safetensors(argv[3]).tensors["x"]));
  rarefy::save_safetensors(results, std::string(argv[4]) + ".evaluated");
  rarefy::save_safetensors(*model, argv[4]);
  return 0;
}

int read_all(int argc, char** argv) {
  for (int i = 2; i < argc; ++i) {
    try {
      uint64_t sum = 0;
      for (const auto& item : rarefy::load_safetensors(argv[i]).tensors) {
        const auto* bytes = static_cast<const uint8_t*>(item.value().const_data_ptr());
        sum = std::accumulate(bytes, bytes + item.value().nbytes(), sum);
      }
      std::cout << "read " << sum << "\n";
    } catch (const c10::ValueError& error) {
      std::string text = error.what_without_backtrace();
      std::replace(text.begin(), text.end(), '\n', ' ');  // a name in a file may hold one
      std::cout << text << "\n";
    }
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  const std::string mode = argc > 1 ? argv[1] : "";
  if (mode == "--continue" && argc == 5) {
    return continue_checkpoint(argv);
  }
  if (mode == "--read") {
    return read_all(argc, argv);
  }
  TORCH_CHECK(argc == 3, "usage: rarefy_parity IN OUT | --continue MODEL BATCH OUT | --read FILE...");
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
