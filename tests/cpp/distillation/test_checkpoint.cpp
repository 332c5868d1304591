// Runs that are stopped and go on, and what the trainer does beyond one plain step.
#include <rarefy/rarefy.h>
#include <torch/torch.h>

#include <filesystem>
#include <fstream>
#include <stdexcept>

#include "catch.h"

using Catch::Matchers::ContainsSubstring;
using namespace rarefy::distillation;

namespace {

struct NoisyImpl : torch::nn::Module {
  explicit NoisyImpl(int64_t width = 10)
      : hidden(register_module("hidden", torch::nn::Linear(5, width))),
        norm(register_module("norm", torch::nn::BatchNorm1d(width))),
        drop(register_module("drop", torch::nn::Dropout(0.2))),
        out(register_module("out", torch::nn::Linear(width, 3))) {}
  torch::Tensor forward(const torch::Tensor& x) { return out(drop(tap("hidden", torch::relu(norm(hidden(x)))))); }
  torch::nn::Linear hidden;
  torch::nn::BatchNorm1d norm;
  torch::nn::Dropout drop;
  torch::nn::Linear out;
};
TORCH_MODULE(Noisy);

/// Batches whose order and noise follow from torch's random state.
BatchSource shuffled() {
  struct State {
    torch::Tensor order;
    int64_t next = 0;
  };
  return [state = State()]() mutable -> std::optional<Batch> {
    if (state.next == 0) {
      state.order = torch::randperm(5);
    }
    if (state.next == 5) {
      state.next = 0;
      return std::nullopt;
    }
    const auto k = state.order[state.next++].item<double>();
    const auto x = torch::linspace(-1 - k, 1 + k, 40).reshape({8, 5}).sin() + 0.1 * torch::randn({8, 5});
    return Batch{x, (x.sum(1) * 3).abs().to(torch::kLong) % 3};
  };
}

struct Run {
  Run() : student(), teacher(20) {
    torch::manual_seed(0);
    student = Noisy();
    teacher = Noisy(20);
    optimizer.emplace(student->parameters(), torch::optim::AdamWOptions(0.02));
    schedule.emplace(*optimizer, 4, 0.5);
    DistillationTrainerOptions options;
    options.log_every = 2;
    DistillationLoss loss(DistillationLossOptions{2.0, 0.5});
    const std::vector<LossTerm> terms{{"logits", 1.0,
                                       [loss](const Outputs& s, const Outputs& t, const Batch& b) mutable {
                                         return loss(s.logits, t.logits, b.labels);
                                       }},
                                      {"hidden", 0.1, [](const Outputs& s, const Outputs& t, const Batch&) {
                                         return torch::mse_loss(s.features.at("hidden").mean(1),
                                                                t.features.at("hidden").mean(1));
                                       }}};
    trainer.emplace(student, teacher, *optimizer, terms, options, *schedule);
  }
  CheckpointParts parts() { return {*student, *optimizer, &*schedule}; }

  Noisy student;
  Noisy teacher;
  std::optional<torch::optim::AdamW> optimizer;
  std::optional<torch::optim::StepLR> schedule;
  std::optional<DistillationTrainer> trainer;
};

std::string file(const std::string& name) {
  return (std::filesystem::temp_directory_path() / ("rarefy_" + name)).string();
}

std::vector<torch::Tensor> values(const Noisy& net) {
  std::vector<torch::Tensor> all;
  for (const auto& parameter : net->parameters()) {
    all.push_back(parameter.detach().clone());
  }
  for (const auto& buffer : net->buffers()) {
    all.push_back(buffer.clone());
  }
  return all;
}

void check_same(const std::vector<torch::Tensor>& a, const std::vector<torch::Tensor>& b) {
  REQUIRE(a.size() == b.size());
  for (size_t i = 0; i < a.size(); ++i) {
    CHECK(torch::equal(a[i], b[i]));
  }
}

}  // namespace

TEST_CASE("a run that is stopped at any step goes on to the same bits", "[distillation]") {
  std::vector<double> expected;
  Run whole;
  whole.trainer->fit(shuffled(), 3, {[&](int64_t, double loss) { expected.push_back(loss); }});
  REQUIRE(expected.size() == 15);
  const auto path = file("resume.pt");
  for (int64_t stop = 1; stop < 15; ++stop) {
    std::vector<double> losses;
    {
      Run first;
      const Callbacks callbacks{[&](int64_t step, double loss) {
        losses.push_back(loss);
        save_checkpoint(path, *first.trainer, first.parts());
        if (step == stop) {
          throw std::runtime_error("killed");
        }
      }};
      CHECK_THROWS_AS(first.trainer->fit(shuffled(), 3, callbacks), std::runtime_error);
    }
    Run second;
    torch::manual_seed(stop);
    load_checkpoint(path, *second.trainer, second.parts());
    second.trainer->fit(shuffled(), 3, {[&](int64_t, double loss) { losses.push_back(loss); }});
    CHECK(losses == expected);
    check_same(values(second.student), values(whole.student));
    CHECK(second.trainer->log().size() == whole.trainer->log().size());
    CHECK(second.trainer->log().back().shares == whole.trainer->log().back().shares);
  }
  std::filesystem::remove(path);
}

TEST_CASE("a checkpoint that does not fit changes nothing", "[distillation]") {
  const auto path = file("refused.pt");
  Run saved;
  saved.trainer->fit(shuffled(), 1);
  save_checkpoint(path, *saved.trainer, saved.parts());
  Run run;
  const auto before = values(run.student);

  Run other;
  {
    const torch::NoGradGuard no_grad;
    other.teacher->out->bias[0] += 1e-3;
  }
  CHECK_THROWS_WITH(load_checkpoint(path, *other.trainer, other.parts()),
                    ContainsSubstring("must be of a run with this teacher, got the fingerprint"));
  Noisy wide(12);
  CHECK_THROWS_WITH(load_checkpoint(path, *run.trainer, {*wide, *run.optimizer}),
                    ContainsSubstring("'hidden.weight' must be") && ContainsSubstring("[10, 5]"));
  auto parts = run.parts();
  parts.others["pruner"] = {[](torch::serialize::OutputArchive&) {}, [](torch::serialize::InputArchive&) {}};
  CHECK_THROWS_WITH(load_checkpoint(path, *run.trainer, parts),
                    ContainsSubstring("there must be the 0 further parts of the checkpoint, got 1"));
  CHECK_THROWS_WITH(load_checkpoint(file("none.pt"), *run.trainer, run.parts()),
                    ContainsSubstring("must be a checkpoint, could not be read"));
  std::ofstream(file("text.pt")) << "not a checkpoint";
  CHECK_THROWS_WITH(load_checkpoint(file("text.pt"), *run.trainer, run.parts()),
                    ContainsSubstring("must be a checkpoint, could not be read"));
  check_same(values(run.student), before);
  CHECK(run.trainer->step() == 0);
  CHECK_THROWS_WITH(save_checkpoint("/nonexistent/x.pt", *run.trainer, run.parts()),
                    ContainsSubstring("could not be written"));
  std::filesystem::remove(path);
  std::filesystem::remove(file("text.pt"));
}

TEST_CASE("a student whose values left their masks is not saved", "[distillation]") {
  const auto path = file("strayed.pt");
  std::filesystem::remove(path);
  Run run;
  run.student->out->register_buffer("weight_mask_bits", torch::zeros({64 / 8}, torch::kByte));
  CHECK_THROWS_WITH(save_checkpoint(path, *run.trainer, run.parts()),
                    ContainsSubstring("[save_checkpoint] 'out.weight' must be zero where its mask prunes"));
  CHECK(!std::filesystem::exists(path));
}

TEST_CASE("further parts are kept, and put back when one does not load", "[distillation]") {
  const auto path = file("parts.pt");
  Run run;
  int64_t value = 5;
  auto parts = run.parts();
  parts.others["counter"] = {[&](torch::serialize::OutputArchive& out) { out.write("value", c10::IValue(value)); },
                             [&](torch::serialize::InputArchive& in) {
                               c10::IValue read;
                               in.read("value", read);
                               value = read.toInt();
                             }};
  save_checkpoint(path, *run.trainer, parts);
  value = 7;
  load_checkpoint(path, *run.trainer, parts);
  CHECK(value == 5);
  value = 7;
  auto broken = parts;
  broken.others["counter"].load = [&, first = true](torch::serialize::InputArchive& in) mutable {
    parts.others["counter"].load(in);
    if (std::exchange(first, false)) {
      throw std::runtime_error("no");
    }
  };
  CHECK_THROWS_WITH(load_checkpoint(path, *run.trainer, broken), ContainsSubstring("does not fit: no"));
  CHECK(value == 7);
  std::filesystem::remove(path);
}

TEST_CASE("gradients do not depend on how a batch is cut", "[distillation]") {
  torch::manual_seed(1);
  const auto x = torch::randn({12, 5});
  auto y = torch::randint(0, 3, {12});
  y.index_put_({torch::indexing::Slice(0, 5)}, -100);
  torch::nn::Linear student(5, 3), teacher(5, 3);
  const auto gradient = [&](int64_t size, int64_t accumulate) {
    torch::optim::SGD optimizer(student->parameters(), 0.0);
    DistillationTrainerOptions options;
    options.accumulate = accumulate;
    DistillationTrainer trainer(student, teacher, optimizer, DistillationLoss(), options);
    const auto source = [&, next = int64_t{0}]() mutable -> std::optional<Batch> {
      if (next == 12) {
        next = 0;
        return std::nullopt;
      }
      const auto begin = std::exchange(next, next + size);
      return Batch{x.narrow(0, begin, size), y.narrow(0, begin, size)};
    };
    trainer.fit(source, 1);
    CHECK(trainer.step() == 1);
    return student->weight.grad().clone();
  };
  const auto whole = gradient(12, 1);
  CHECK(torch::allclose(gradient(4, 3), whole, 1e-5, 1e-7));
  CHECK(torch::allclose(gradient(1, 12), whole, 1e-5, 1e-7));
}

TEST_CASE("training ends out of patience", "[distillation]") {
  Run run;
  DistillationTrainerOptions options;
  options.selection = {"score", true, 0.0, 2};
  DistillationTrainer trainer(run.student, run.teacher, *run.optimizer, DistillationLoss(), options);
  CHECK_THROWS_WITH(trainer.fit(shuffled(), 9),
                    ContainsSubstring("patience needs an evaluation that measures 'score'"));
  Callbacks callbacks;
  callbacks.evaluate = [&, epoch = 0]() mutable {
    CHECK_FALSE(run.student->is_training());
    return std::map<std::string, double>{{"score", epoch++ == 1 ? 1.0 : 0.5}};
  };
  trainer.fit(shuffled(), 9, callbacks);
  CHECK(trainer.epoch() == 4);
  CHECK(trainer.best_epoch() == 2);
  CHECK(trainer.out_of_patience());
}

TEST_CASE("a teacher that changes is named", "[distillation]") {
  Run run;
  const Callbacks callbacks{[&](int64_t step, double) {
    if (step == 2) {
      run.teacher->norm->running_var.mul_(2);
    }
  }};
  CHECK_THROWS_WITH(run.trainer->fit(shuffled(), 1, callbacks), ContainsSubstring("changed: norm.running_var"));
}

TEST_CASE("a teacher may follow its student", "[distillation]") {
  Run run;
  Noisy teacher;
  Ema ema({0.5, 0.0});
  Model average(teacher);
  average.after_step = [&] { ema.update(*teacher, *run.student); };
  DistillationTrainer trainer(run.student, average, *run.optimizer, DistillationLoss());
  auto expected = teacher->out->bias.detach().clone();
  trainer.fit(shuffled(), 2, {[&](int64_t, double) { expected.lerp_(run.student->out->bias.detach(), 0.5); }});
  CHECK(ema.updates() == 10);
  CHECK(torch::allclose(teacher->out->bias, expected, 1e-5, 1e-7));
  CHECK(trainer.teacher().fingerprint().empty());
}

TEST_CASE("frozen parts keep their modes, and batches without valid rows are passed over", "[distillation]") {
  Run run;
  run.student->train();
  run.student->norm->eval();
  const auto before = run.student->norm->running_mean.clone();
  const auto source = [inner = shuffled(), first = true]() mutable -> std::optional<Batch> {
    if (std::exchange(first, false)) {
      return Batch{torch::randn({4, 5}), torch::full({4}, -100, torch::kLong)};
    }
    return inner();
  };
  run.trainer->fit(source, 1);
  CHECK(run.trainer->step() == 5);
  CHECK(torch::equal(run.student->norm->running_mean, before));
  CHECK(run.student->is_training());
  CHECK_FALSE(run.student->norm->is_training());
  CHECK_THROWS_WITH(run.trainer->train_step(torch::randn({4, 5}), torch::full({4}, -100, torch::kLong)),
                    ContainsSubstring("a step must have at least one valid row, got none"));
}

TEST_CASE("objectives are checked", "[distillation]") {
  const LossTerm::Function none = [](const Outputs& s, const Outputs&, const Batch&) { return s.logits.sum(); };
  CHECK_THROWS_WITH(Objective(std::vector<LossTerm>{}), ContainsSubstring("at least one term, got none"));
  CHECK_THROWS_WITH(Objective(std::vector<LossTerm>{{"a", 1.0, none}, {"a", 1.0, none}}),
                    ContainsSubstring("names of terms must differ, got 'a' twice"));
  CHECK_THROWS_WITH(Objective(std::vector<LossTerm>{{"a", std::nan(""), none}}),
                    ContainsSubstring("weight of a term must be finite"));
  CHECK_THROWS_WITH(Objective(std::vector<LossTerm>{{"a", 1.0, {}}}), ContainsSubstring("must have a function"));
}
