#include <rarefy/rarefy.h>
#include <torch/torch.h>

#include <cmath>
#include <limits>
#include <sstream>
#include <stdexcept>

#include "catch.h"

using Catch::Matchers::ContainsSubstring;
using namespace rarefy::distillation;

namespace {

struct NetImpl : torch::nn::Module {
  explicit NetImpl(int64_t width)
      : first(register_module("first", torch::nn::Linear(6, width))),
        norm(register_module("norm", torch::nn::BatchNorm1d(width))),
        last(register_module("last", torch::nn::Linear(width, 3))) {}
  torch::Tensor forward(const torch::Tensor& x) { return last(torch::relu(norm(first(x)))); }
  torch::nn::Linear first;
  torch::nn::BatchNorm1d norm;
  torch::nn::Linear last;
};
TORCH_MODULE(Net);

/// A teacher that knows the rule, and batches.
struct Problem {
  Problem() {
    torch::manual_seed(0);
    rule = torch::randn({6, 3});
    for (int i = 0; i < 5; ++i) {
      const auto inputs = torch::randn({24, 6});
      batches.push_back({inputs, teacher_rule(inputs).argmax(-1)});
    }
    student = Net(12);
  }
  torch::Tensor teacher_rule(const torch::Tensor& x) const { return torch::matmul(x, rule) * 3; }
  BatchSource source() const {
    return [this, next = size_t{0}]() mutable -> std::optional<Batch> {
      if (next == batches.size()) {
        next = 0;
        return std::nullopt;
      }
      return batches[next++];
    };
  }
  torch::Tensor rule;
  std::vector<Batch> batches;
  Net student{nullptr};
};

std::vector<torch::Tensor> copy(const Net& net) {
  std::vector<torch::Tensor> all;
  for (const auto& parameter : net->parameters()) {
    all.push_back(parameter.detach().clone());
  }
  for (const auto& buffer : net->buffers()) {
    all.push_back(buffer.clone());
  }
  return all;
}

bool same(const std::vector<torch::Tensor>& a, const std::vector<torch::Tensor>& b) {
  bool equal = a.size() == b.size();
  for (size_t i = 0; equal && i < a.size(); ++i) {
    equal = torch::equal(a[i], b[i]);
  }
  return equal;
}

}  // namespace

TEST_CASE("DistillationLoss is the operator as a module", "[distillation]") {
  const auto student = torch::randn({4, 7}), teacher = torch::randn({4, 7});
  const auto labels = torch::randint(0, 7, {4});
  DistillationLoss loss(DistillationLossOptions{3.0, 0.25});
  CHECK(torch::equal(loss(student, teacher, labels),
                     rarefy::ops::distillation_loss(student, teacher, labels, std::nullopt, {3.0, 0.25})));
  DistillationLoss soft(DistillationLossOptions{2.0, 1.0});
  CHECK(torch::equal(soft(student, teacher),
                     rarefy::ops::distillation_loss(student, teacher, std::nullopt, std::nullopt, {2.0, 1.0})));
  std::ostringstream text;
  text << *loss;
  CHECK(text.str() == "rarefy::distillation::DistillationLoss(temperature=3, alpha=0.25)");
  CHECK_THROWS_WITH(DistillationLoss(DistillationLossOptions{-1.0}),
                    ContainsSubstring("[DistillationLoss] temperature must be positive and finite, got -1"));
  CHECK_THROWS_WITH(DistillationLoss(DistillationLossOptions{1.0, 2.0}),
                    ContainsSubstring("[DistillationLoss] alpha must be in [0, 1], got 2"));
}

TEST_CASE("the trainer learns and keeps its history", "[distillation]") {
  const Problem problem;
  torch::optim::SGD optimizer(problem.student->parameters(), torch::optim::SGDOptions(0.05).momentum(0.9));
  std::vector<int64_t> steps, epochs;
  DistillationTrainer trainer(
      problem.student, [&](const torch::Tensor& x) { return problem.teacher_rule(x); }, optimizer, DistillationLoss());
  const auto before = trainer.evaluate(problem.source());
  const auto& history = trainer.fit(problem.source(), 12,
                                    {[&](int64_t step, double) { steps.push_back(step); },
                                     [&](int64_t epoch, const EpochMetrics& metrics) {
                                       epochs.push_back(epoch);
                                       CHECK(trainer.state().epoch == epoch);
                                       CHECK(metrics.epoch == epoch);
                                     }},
                                    problem.source());
  CHECK(history.size() == 12);
  CHECK(steps.size() == 60);
  CHECK(steps.back() == 60);
  CHECK(epochs.back() == 12);
  CHECK(history.back().evaluation->accuracy.value() > 0.9);
  CHECK(history.back().evaluation->loss < 0.5 * before.loss);
  CHECK(trainer.evaluate(problem.source()).loss == history.back().evaluation->loss);
}

TEST_CASE("the trainer equals a hand-written loop", "[distillation]") {
  const Problem problem;
  Net twin(12);
  {
    const torch::NoGradGuard no_grad;
    for (size_t i = 0; i < twin->parameters().size(); ++i) {
      twin->parameters()[i].copy_(problem.student->parameters()[i]);
    }
  }
  DistillationLoss loss(DistillationLossOptions{4.0, 0.7});
  const double clip = 0.1;
  torch::optim::Adam optimizer(problem.student->parameters()), twin_optimizer(twin->parameters());
  DistillationTrainer trainer(problem.student, [&](const torch::Tensor& x) { return problem.teacher_rule(x); },
                              optimizer, loss, {clip, -100});
  trainer.fit(problem.source(), 2);
  for (int epoch = 0; epoch < 2; ++epoch) {
    for (const auto& batch : problem.batches) {
      twin_optimizer.zero_grad();
      loss(twin(batch.inputs), problem.teacher_rule(batch.inputs), batch.labels).backward();
      torch::nn::utils::clip_grad_norm_(twin->parameters(), clip);
      twin_optimizer.step();
    }
  }
  CHECK(same(copy(problem.student), copy(twin)));
}

TEST_CASE("the trainer leaves the teacher and all modes as they were", "[distillation]") {
  const Problem problem;
  Net teacher(8);
  teacher->train();
  teacher->norm->eval();  // a mode of its own
  auto student = problem.student;
  student->eval();
  student->last->train();
  const auto before = copy(teacher);
  torch::optim::SGD optimizer(student->parameters(), 0.1);
  int calls = 0;
  Model watched(teacher.ptr());  // a shared_ptr is as good as a holder
  watched.forward = [&, inner = watched.forward](const Batch& batch) {
    ++calls;
    CHECK_FALSE(teacher->is_training());
    CHECK_FALSE(torch::GradMode::is_enabled());
    return inner(batch);
  };
  DistillationTrainer trainer(student, watched, optimizer, DistillationLoss());
  const auto check_modes = [&] {
    CHECK(teacher->is_training());
    CHECK_FALSE(teacher->norm->is_training());
    CHECK(teacher->last->is_training());
    CHECK_FALSE(student->is_training());
    CHECK_FALSE(student->norm->is_training());
    CHECK(student->last->is_training());
  };
  trainer.fit(problem.source(), 1, {[&](int64_t, double) { CHECK(student->norm->is_training()); }, {}},
              problem.source());
  CHECK(calls == 10);
  check_modes();
  CHECK_THROWS_AS(trainer.fit(problem.source(), 2, {[](int64_t, double) { throw std::out_of_range("stop"); }, {}}),
                  std::out_of_range);
  check_modes();
  CHECK(same(copy(teacher), before));
}

TEST_CASE("a run can be saved and resumed", "[distillation]") {
  const Problem whole, halves;
  const auto train = [](const Problem& problem, const std::vector<int64_t>& parts) {
    torch::optim::SGD optimizer(problem.student->parameters(), 0.05);
    TrainerState state;
    for (const int64_t epochs : parts) {
      DistillationTrainer trainer(
          problem.student, [&](const torch::Tensor& x) { return problem.teacher_rule(x); }, optimizer,
          DistillationLoss());
      std::stringstream stream;
      torch::save(state, stream);
      TrainerState loaded;
      torch::load(loaded, stream);
      trainer.load_state(loaded);
      trainer.fit(problem.source(), epochs, {}, epochs == 3 ? problem.source() : BatchSource());
      state = trainer.state();
    }
    return state;
  };
  const auto expected = train(whole, {3});
  const auto resumed = train(halves, {1, 2, 3});
  CHECK(same(copy(whole.student), copy(halves.student)));
  CHECK(resumed.epoch == 3);
  CHECK(resumed.step == 15);
  REQUIRE(resumed.history.size() == 3);
  CHECK_FALSE(resumed.history[1].evaluation.has_value());
  CHECK(resumed.history[2].evaluation->accuracy == expected.history[2].evaluation->accuracy);
  for (size_t i = 0; i < 3; ++i) {
    CHECK(resumed.history[i].loss == expected.history[i].loss);
    CHECK(resumed.history[i].step == expected.history[i].step);
  }
}

TEST_CASE("the trainer takes LibTorch's data loader", "[distillation]") {
  const Problem problem;
  struct Rows : torch::data::datasets::Dataset<Rows> {
    explicit Rows(Batch all) : all_(std::move(all)) {}
    torch::data::Example<> get(size_t i) override {
      const auto row = static_cast<int64_t>(i);
      return {all_.inputs[row], all_.labels[row]};
    }
    torch::optional<size_t> size() const override { return static_cast<size_t>(all_.inputs.size(0)); }
    Batch all_;
  };
  auto loader = torch::data::make_data_loader<torch::data::samplers::SequentialSampler>(
      Rows(problem.batches[0]).map(torch::data::transforms::Stack<>()), 10);
  torch::optim::SGD optimizer(problem.student->parameters(), 0.05);
  DistillationTrainer trainer(
      problem.student, [&](const torch::Tensor& x) { return problem.teacher_rule(x); }, optimizer, DistillationLoss());
  trainer.fit(batches(*loader), 2);
  CHECK(trainer.state().step == 6);  // 24 rows in tens, twice
  CHECK(trainer.history()[1].loss < trainer.history()[0].loss);
}

TEST_CASE("the trainer refuses a loss that is not finite, before the step", "[distillation]") {
  Problem problem;
  problem.batches[1].inputs = problem.batches[1].inputs.clone();
  problem.batches[1].inputs[0][0] = std::numeric_limits<float>::quiet_NaN();
  torch::optim::SGD optimizer(problem.student->parameters(), 0.05);
  DistillationTrainer trainer(
      problem.student, [&](const torch::Tensor& x) { return problem.teacher_rule(x); }, optimizer, DistillationLoss());
  std::vector<torch::Tensor> after_first;
  const Callbacks callbacks{[&](int64_t, double) {
                              for (const auto& p : problem.student->parameters()) {
                                after_first.push_back(p.detach().clone());
                              }
                            },
                            {}};
  CHECK_THROWS_WITH(trainer.fit(problem.source(), 1, callbacks),
                    ContainsSubstring("the loss must be finite, got") && ContainsSubstring("at step 2"));
  CHECK(trainer.state().step == 1);
  std::vector<torch::Tensor> now;
  for (const auto& p : problem.student->parameters()) {
    now.push_back(p.detach());
  }
  CHECK(same(after_first, now));
}

TEST_CASE("the trainer says what is wrong", "[distillation]") {
  const Problem problem;
  torch::optim::SGD optimizer(problem.student->parameters(), 0.05);
  const auto make = [&](DistillationTrainerOptions options) {
    return DistillationTrainer(
        problem.student, [&](const torch::Tensor& x) { return problem.teacher_rule(x); }, optimizer, DistillationLoss(),
        options);
  };
  CHECK_THROWS_WITH(make({-1.0, -100}),
                    ContainsSubstring("max_grad_norm must be 0 (no clipping) or positive and finite, got -1"));
  auto trainer = make({});
  const BatchSource empty = [] { return std::optional<Batch>(); };
  CHECK_THROWS_WITH(trainer.fit(empty, 1),
                    ContainsSubstring("an epoch must have at least one batch, got none in epoch 1"));
  CHECK_THROWS_WITH(trainer.fit(problem.source(), -2), ContainsSubstring("epochs must be 0 or more, got -2"));
  CHECK_THROWS_WITH(trainer.evaluate(empty), ContainsSubstring("at least one valid row, got 0 batches"));
  CHECK_THROWS_WITH(trainer.load_state({3, 3, {}}),
                    ContainsSubstring("one entry per epoch, got 0 entries for 3 epochs"));
  CHECK(trainer.state().epoch == 0);
}
