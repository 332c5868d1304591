// What the Python tests run to compare the two languages. All files are of the safetensors format.
//
// rarefy_parity --train EXECUTION MODEL DATA FIRST LAST OUT: the network with one layer of every kind, of test_parity.py.
//   EXECUTION: integer, simulated, or the name of a learned grid (lsq, lsq_plus, tqt, bits), of test_learned_parity.py.
//   MODEL: its state, of floating point or prepared. DATA: ids<i>, volumes<i> and labels<i> of batch i.
//   Prepares it, trains on the batches FIRST up to LAST, and writes
//   OUT: the prepared state; OUT.converted: that of the converted network;
//   OUT.folder: the converted network as save_quantized writes it, of test_saved.py;
//   OUT.results: `losses`, and `evaluated` and `converted`, the scores of batch 0 before and after conversion.
// rarefy_parity --serve FOLDER DATA OUT: loads the converted network of FOLDER into a fresh one, writes its `scores` of `ids` and
//   `volumes` of DATA to OUT.results, and the network again to OUT, of test_saved.py.
// rarefy_parity --train-more, --serve-more: the same for the network with the layers that the first has not.
// rarefy_parity --continue MODEL BATCH OUT: loads the prepared network's MODEL, writes it again to OUT, and its output on
//   the tensor `x` of BATCH to OUT.evaluated, of test_checkpoint.py.
// rarefy_parity --pruned FILE BATCH OUT: loads the pruned small network's FILE into a fresh one, removes channel 0 of what is
//   left of `fc`'s input, writes it to OUT, and its output on the tensor `x` of BATCH before that to OUT.evaluated, of
//   test_manifest.py.
// rarefy_parity --distill STUDENT TEACHER DATA OUT: the small network distilled from one of its kind, in batches x<i>, y<i>
//   of DATA, as test_parity.py does it; the student to OUT, and `losses` and `evaluated` (loss, accuracy) to OUT.results.
// rarefy_parity --losses HINT CONTRASTIVE DATA OUT: loads the states of a Hint (4 to 6 features) and of a ContrastiveRepresentation,
//   computes every loss of distillation on the tensors of DATA, and writes them to OUT by name. Takes one step of SGD on
//   both, and writes their states to OUT.hint and OUT.contrastive, of test_parity.py.
// rarefy_parity --observe OBSERVER STATE DATA OUT: goes on with the calibration of one uint8 quantizer. OBSERVER: as it prints
//   itself. STATE: the quantizer's. DATA: batches x0, x1, ... Writes its state, range chosen, to OUT, of
//   test_observer_quantizers.py.
// rarefy_parity --read FILE...: one line per file, its tensors' sum of bytes or why it is refused.
#include "parity.h"

#include <rarefy/quantization/learned_grids.h>

#include <algorithm>
#include <iostream>
#include <numeric>

namespace {

rarefy::quantization::QConfig config_of(const std::string& execution) {
  using namespace rarefy::quantization;
  auto config = QConfig::int8();
  if (execution == "integer" || execution == "simulated") {
    config.execution = execution == "integer" ? Execution::integer : Execution::simulated;
    return config;
  }
  TORCH_CHECK(!learned_names(execution).empty(), "EXECUTION must be integer, simulated or a learned grid");
  config.activation->symmetric = execution == "tqt" || execution == "bits";
  if (execution == "tqt") {
    config.weight_observer = config.observer = TQT{};
  } else if (execution == "bits") {
    config.weight_observer = config.observer = LearnedBits{};
  } else {
    config.weight_observer = config.observer = LSQ{};
  }
  if (execution == "lsq_plus") {
    config.observer = LSQPlus{};
  }
  return config;
}

template <typename Model>
int train(char** argv) {
  const std::string execution = argv[2], model_file = argv[3], out = argv[7];
  const auto data = rarefy::load_safetensors(argv[4]).tensors;
  const int first = std::stoi(argv[5]), last = std::stoi(argv[6]);
  const auto config = config_of(execution);

  Model model;
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
  rarefy::quantization::save_quantized(*model, out + ".folder");
  rarefy::save_safetensors(results, out + ".results");
  return 0;
}

template <typename Model>
int serve(char** argv) {
  Model model;
  rarefy::quantization::load_quantized(*model, argv[2]);
  const auto data = rarefy::load_safetensors(argv[3]).tensors;
  const torch::NoGradGuard no_grad;
  rarefy::NamedTensors results;
  results.insert("scores", model(data["ids"], data["volumes"]));
  rarefy::save_safetensors(results, std::string(argv[4]) + ".results");
  rarefy::quantization::save_quantized(*model, argv[4]);
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
  // As Python's StepLR; LibTorch's takes its first step one later.
  const distillation::SchedulerInterface schedule(
      [&optimizer, step = 0](std::optional<double>) mutable {
        if (++step % 3 == 0) {
          auto& options = optimizer.param_groups()[0].options();
          options.set_lr(options.get_lr() * 0.5);
        }
      },
      distillation::SchedulerInterface::When::step);
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

int losses(char** argv) {
  using namespace rarefy::distillation;  // NOLINT(google-build-using-namespace)
  const auto data = rarefy::load_safetensors(argv[4]).tensors;
  const auto &s = data["student"], &t = data["teacher"], &u = data["wide_teacher"], &mask = data["mask"];
  const auto &s_maps = data["student_maps"], &t_maps = data["teacher_maps"], &labels = data["labels"];
  const auto s_rows = s.select(1, 0), t_rows = t.select(1, 0), s_next = s.select(1, 1), t_next = t.select(1, 1);
  rarefy::NamedTensors out;
  out.insert("HiddenCosine", HiddenCosine()(s, t, mask));
  out.insert("AttentionTransfer", AttentionTransfer()(s, u, mask));
  out.insert("AttentionTransfer.code", AttentionTransfer(AttentionTransferOptions{"code", 2.0, {}})(s, u, mask));
  out.insert("SimilarityPreserving", SimilarityPreserving()(s, u, mask));
  out.insert("RelationalDistance", RelationalDistance()(s, u, mask));
  out.insert("RelationalAngle", RelationalAngle()(s, u, mask));
  out.insert("ProbabilisticKnowledgeTransfer", ProbabilisticKnowledgeTransfer()(s, u, mask));
  out.insert("MiniLMRelations", MiniLMRelations(MiniLMRelationsOptions{2, {1.0, 0.0, 0.5}})(
                                    QueryKeyValue{s, s, s * 2}, QueryKeyValue{u, u, u * 2}, mask));
  out.insert("AttentionMaps", AttentionMaps()(s_maps, t_maps, mask));
  out.insert("AttentionMaps.kl", AttentionMaps(AttentionMapsOptions{"kl", true})(s_maps, t_maps, mask));
  out.insert("ContrastiveKL", ContrastiveKL(ContrastiveKLOptions{2.0})(s_rows, t_rows));
  out.insert("AffinityMimicking", AffinityMimicking(AffinityMimickingOptions{10.0, 20.0})(ImageText{s_rows, s_next},
                                                                                          ImageText{t_rows, t_next}));
  out.insert("EmbeddingMSE", EmbeddingMSE()(s_rows, t_rows));
  out.insert("DKD", DKD()(s, t, labels, mask));
  out.insert("NKD", NKD()(s, t, labels, mask));
  out.insert("DIST", DIST()(s, t, labels, mask));
  out.insert("LogitMSE", LogitMSE()(s, t, labels, mask));

  Hint hint(HintOptions{"smooth_l1", 4, 6, {}});
  rarefy::load_safetensors(*hint, argv[2]);
  ContrastiveRepresentationOptions options;
  options.dataset_size = 11;
  options.student_features = 4;
  options.teacher_features = 6;
  options.features = 3;
  options.negatives = 7;
  options.variant = "code";
  options.seed = 5;
  ContrastiveRepresentation contrastive(options);
  rarefy::load_safetensors(*contrastive, argv[3]);
  auto parameters = hint->parameters();
  for (const auto& parameter : contrastive->parameters()) {
    parameters.push_back(parameter);
  }
  torch::optim::SGD optimizer(parameters, torch::optim::SGDOptions(0.1));
  const auto distance = hint(s, u, mask), contrast = contrastive(s_rows, u.select(1, 0), data["index"]);
  (distance + contrast).backward();
  optimizer.step();
  out.insert("Hint", distance.detach());
  out.insert("ContrastiveRepresentation", contrast.detach());
  rarefy::save_safetensors(out, argv[5]);
  rarefy::save_safetensors(*hint, std::string(argv[5]) + ".hint");
  rarefy::save_safetensors(*contrastive, std::string(argv[5]) + ".contrastive");
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

/// The observer of those that test_observer_quantizers.py tries that prints itself so.
rarefy::quantization::Observer observer_called(const std::string& text) {
  using namespace rarefy::quantization;
  const std::vector<Observer> known{
      Histogram{.bins = 256},
      Histogram{.bins = 256, .search = RangeSearch::kl},
      Histogram{.bins = 256, .search = RangeSearch::none},
      Histogram{.bins = 256, .norm = 2.4},
      Percentile{.percentile = 99.0, .bins = 256},
      SQNR{.clip_weight = 3.0, .bins = 256},
      MeanNoOutliers{.batches = 8},
      MeanNoOutliers{.quantile = 0.1},
  };
  for (const auto& observer : known) {
    if (str(observer) == text) {
      return observer;
    }
  }
  TORCH_CHECK(false, "no observer is called ", text);
}

int observe(char** argv) {
  rarefy::quantization::FakeQuantizer quantizer(rarefy::quantization::FakeQuantizerOptions{
      .scheme = {.bits = 8, .symmetric = false}, .observer = observer_called(argv[2])});
  quantizer->eval();
  quantizer->quantize = false;
  rarefy::load_safetensors(*quantizer, argv[3]);
  const auto data = rarefy::load_safetensors(argv[4]).tensors;
  for (int i = 0;; ++i) {
    const std::string number = std::to_string(i);
    if (!data.contains("x" + number)) {
      break;
    }
    quantizer(data["x" + number]);
  }
  TORCH_CHECK(quantizer->calibrated(), "nothing was observed");
  rarefy::save_safetensors(*quantizer, argv[5]);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  const std::string mode = argc > 1 ? argv[1] : "";
  if (mode == "--train" && argc == 8) {
    return train<EveryLayer>(argv);
  }
  if (mode == "--train-more" && argc == 8) {
    return train<MoreLayers>(argv);
  }
  if (mode == "--serve" && argc == 5) {
    return serve<EveryLayer>(argv);
  }
  if (mode == "--serve-more" && argc == 5) {
    return serve<MoreLayers>(argv);
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
  if (mode == "--losses" && argc == 6) {
    return losses(argv);
  }
  if (mode == "--observe" && argc == 6) {
    return observe(argv);
  }
  if (mode == "--read") {
    return read_all(argc, argv);
  }
  std::cerr
      << "usage: rarefy_parity --train EXECUTION MODEL DATA FIRST LAST OUT | --serve FOLDER DATA OUT | --continue MODEL BATCH OUT | "
         "--pruned FILE BATCH OUT | --distill STUDENT TEACHER DATA OUT | --losses HINT CONTRASTIVE DATA OUT | "
         "--observe OBSERVER STATE DATA OUT | --read FILE...\n";
  return 2;
}
