// What the Python tests run to compare the two languages. All files are of the safetensors format.
//
// rarefy_parity --train EXECUTION MODEL DATA FIRST LAST OUT: the network with one layer of every kind, of test_parity.py.
//   MODEL: its state, of floating point or prepared. DATA: ids<i>, volumes<i> and labels<i> of batch i.
//   Prepares it, trains on the batches FIRST up to LAST, and writes
//   OUT: the prepared state; OUT.converted: that of the converted network;
//   OUT.results: `losses`, and `evaluated` and `converted`, the scores of batch 0 before and after conversion.
// rarefy_parity --continue MODEL BATCH OUT: loads the prepared network's MODEL, writes it again to OUT, and its output on
//   the tensor `x` of BATCH to OUT.evaluated, of test_checkpoint.py.
// rarefy_parity --pruned FILE BATCH OUT: loads the pruned small network's FILE into a fresh one, removes channel 0 of what is
//   left of `fc`'s input, writes it to OUT, and its output on the tensor `x` of BATCH before that to OUT.evaluated, of
//   test_manifest.py.
// rarefy_parity --distill STUDENT TEACHER DATA OUT: the small network distilled from one of its kind, in batches x<i>, y<i>
//   of DATA, as test_parity.py does it; the student to OUT, and `losses` and `evaluated` (loss, accuracy) to OUT.results.
// rarefy_parity --read FILE...: one line per file, its tensors' sum of bytes or why it is refused.
#include "parity.h"

#include <algorithm>
#include <iostream>
#include <numeric>

namespace {

int train(char** argv) {
  const std::string execution = argv[2], model_file = argv[3], out = argv[7];
  TORCH_CHECK(execution == "integer" || execution == "simulated", "EXECUTION must be integer or simulated");
  const auto data = rarefy::load_safetensors(argv[4]).tensors;
  const int first = std::stoi(argv[5]), last = std::stoi(argv[6]);
  auto config = rarefy::quantization::QConfig::int8();
  config.execution =
      execution == "integer" ? rarefy::quantization::Execution::integer : rarefy::quantization::Execution::simulated;

  EveryLayer model;
  if (rarefy::load_safetensors(model_file).tensors.contains("out.quant.weight.scale")) {
    rarefy::quantization::prepare_qat(*model, config);
    rarefy::load_safetensors(*model, model_file);
  } else {
    rarefy::load_safetensors(*model, model_file);
    rarefy::quantization::prepare_qat(*model, config);
  }
  const auto batch = [&](const std::string& name, int i) { return data[name + std::to_string(i)]; };
  torch::optim::SGD optimizer(model->parameters(), torch::optim::SGDOptions(0.1));
  auto losses = torch::empty({last - first});
  for (int i = first; i < last; ++i) {
    optimizer.zero_grad();
    const auto scores = model(batch("ids", i), batch("volumes", i));
    const auto loss = torch::nn::functional::cross_entropy(scores, batch("labels", i));
    loss.backward();
    optimizer.step();
    losses[i - first] = loss.detach();
  }
  rarefy::save_safetensors(*model, out);

  const torch::NoGradGuard no_grad;
  rarefy::NamedTensors results;
  model->eval();
  results.insert("losses", losses);
  results.insert("evaluated", model(batch("ids", 0), batch("volumes", 0)));
  rarefy::quantization::convert(*model);
  results.insert("converted", model(batch("ids", 0), batch("volumes", 0)));
  rarefy::save_safetensors(*model, out + ".converted");
  rarefy::save_safetensors(results, out + ".results");
  return 0;
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

int load_and_prune(char** argv) {
  namespace pruning = rarefy::pruning;
  Parity model;
  auto manifest = pruning::load_pruned(*model, argv[2]);
  const torch::NoGradGuard no_grad;
  model->eval();
  rarefy::NamedTensors results;
  results.insert("evaluated", model(rarefy::load_safetensors(argv[3]).tensors["x"]));
  rarefy::save_safetensors(results, std::string(argv[4]) + ".evaluated");

  const auto tensors = rarefy::graph::named_tensors(*model);
  std::vector<int64_t> kept(static_cast<size_t>(model->fc->weight.size(1) - 1));
  std::iota(kept.begin(), kept.end(), 1);
  std::vector<pruning::Cut> cuts{{"fc.weight", 1, kept}, {"plain.weight", 1, kept}};
  for (const auto* name : {"conv.weight", "conv.bn.weight", "conv.bn.bias", "conv.bn.running_mean",
                           "conv.bn.running_var", "plain.weight", "plain.bias"}) {
    cuts.push_back({name, 0, kept});
  }
  pruning::Surgery surgery(tensors);
  surgery.apply(cuts);
  manifest.record(surgery, tensors, pruning::resize_modules(*model, surgery));
  surgery.commit();
  pruning::save_pruned(*model, manifest, argv[4]);
  return 0;
}

int distill(char** argv) {
  namespace distillation = rarefy::distillation;
  Parity student, teacher;
  rarefy::load_safetensors(*student, argv[2]);
  rarefy::load_safetensors(*teacher, argv[3]);
  const auto data = rarefy::load_safetensors(argv[4]).tensors;
  const auto source = [&data, i = 0]() mutable -> std::optional<distillation::Batch> {
    const std::string number = std::to_string(i++);
    if (!data.contains("x" + number)) {
      i = 0;
      return std::nullopt;
    }
    return distillation::Batch{data["x" + number], data["y" + number]};
  };
  torch::optim::AdamW optimizer(student->parameters(), torch::optim::AdamWOptions(0.01).weight_decay(0.01));
  torch::optim::StepLR schedule(optimizer, 3, 0.5);
  distillation::DistillationTrainerOptions options;
  options.accumulate = 2;
  options.max_grad_norm = 0.5;
  distillation::DistillationLoss soft(distillation::DistillationLossOptions{3.0, 0.6});
  const std::vector<distillation::LossTerm> terms{
      {"logits", 1.0,
       [&](const auto& s, const auto& t, const auto& batch) { return soft(s.logits, t.logits, batch.labels); }},
      {"distance", 0.1, [](const auto& s, const auto& t, const auto&) { return torch::mse_loss(s.logits, t.logits); }}};
  distillation::DistillationTrainer trainer(student, teacher, optimizer, terms, options, schedule);
  std::vector<double> losses;
  trainer.fit(source, 4, {[&](int64_t, double loss) { losses.push_back(loss); }});
  const auto evaluation = trainer.evaluate(source);
  rarefy::NamedTensors results;
  results.insert("losses", torch::tensor(losses));
  results.insert("evaluated", torch::tensor({evaluation.loss, evaluation.accuracy.value()}));
  rarefy::save_safetensors(results, std::string(argv[5]) + ".results");
  rarefy::save_safetensors(*student, argv[5]);
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
  if (mode == "--train" && argc == 8) {
    return train(argv);
  }
  if (mode == "--continue" && argc == 5) {
    return continue_checkpoint(argv);
  }
  if (mode == "--pruned" && argc == 5) {
    return load_and_prune(argv);
  }
  if (mode == "--distill" && argc == 6) {
    return distill(argv);
  }
  if (mode == "--read") {
    return read_all(argc, argv);
  }
  std::cerr << "usage: rarefy_parity --train EXECUTION MODEL DATA FIRST LAST OUT | --continue MODEL BATCH OUT | "
               "--pruned FILE BATCH OUT | --distill STUDENT TEACHER DATA OUT | --read FILE...\n";
  return 2;
}
