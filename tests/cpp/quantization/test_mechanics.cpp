// What training with quantization does beside the arithmetic: data that is not finite, configurations, the schedule,
// several processes.
#include <rarefy/quantization/distributed.h>
#include <rarefy/rarefy.h>
#include <torch/torch.h>

#include <barrier>
#include <limits>
#include <thread>
#include <torch/csrc/distributed/c10d/HashStore.hpp>

#include "catch.h"
#include "parity.h"

using namespace rarefy::quantization;
using Catch::Matchers::ContainsSubstring;

namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

std::string message_of(const std::function<void()>& body) {
  try {
    body();
  } catch (const c10::Error& e) {
    return e.what_without_backtrace();
  }
  return "nothing was thrown";
}

/// Keeps the text of every warning.
class Warnings : public c10::WarningHandler {
 public:
  Warnings() : guard_(this) {}
  void process(const c10::Warning& warning) override { texts.push_back(warning.msg()); }
  std::vector<std::string> texts;

 private:
  c10::WarningUtils::WarningHandlerGuard guard_;
};

struct MlpImpl : torch::nn::Module {
  rarefy::nn::Linear a{nullptr}, b{nullptr}, c{nullptr};
  MlpImpl()
      : a(register_module("a", rarefy::nn::Linear(4, 6))),
        b(register_module("b", rarefy::nn::Linear(6, 6))),
        c(register_module("c", rarefy::nn::Linear(6, 2))) {}
  torch::Tensor forward(const torch::Tensor& x) { return c(torch::relu(b(torch::relu(a(x))))); }
};
TORCH_MODULE(Mlp);

std::vector<bool> prepared(const Mlp& model) {
  return {model->a->quant_state() != nullptr, model->b->quant_state() != nullptr, model->c->quant_state() != nullptr};
}

/// An all-reduce between the threads of one process.
struct Meeting {
  explicit Meeting(int count) : size(count), barrier(count) {}
  int size;
  std::barrier<> barrier;
  std::mutex mutex;
  torch::Tensor total;
};

class DoneWork : public c10d::Work {
 public:
  bool wait(std::chrono::milliseconds) override { return true; }
};

class ThreadBackend : public c10d::Backend {
 public:
  ThreadBackend(int rank, Meeting& meeting) : Backend(rank, meeting.size), meeting_(meeting) {}
  const std::string getBackendName() const override { return "threads"; }
  c10::intrusive_ptr<c10d::Work> allreduce(std::vector<at::Tensor>& tensors,
                                           const c10d::AllreduceOptions& options) override {
    TORCH_CHECK(options.reduceOp == c10d::ReduceOp::MAX && tensors.size() == 1);
    {
      const std::lock_guard lock(meeting_.mutex);
      meeting_.total = meeting_.total.defined() ? torch::maximum(meeting_.total, tensors[0]) : tensors[0].clone();
    }
    meeting_.barrier.arrive_and_wait();
    tensors[0].copy_(meeting_.total);
    meeting_.barrier.arrive_and_wait();
    if (getRank() == 0) {
      meeting_.total.reset();
    }
    meeting_.barrier.arrive_and_wait();
    return c10::make_intrusive<DoneWork>();
  }

 private:
  Meeting& meeting_;
};

/// Runs body(rank, group) in two threads that are the processes of one group.
void in_two_processes(const std::function<void(int, const c10::intrusive_ptr<c10d::ProcessGroup>&)>& body) {
  Meeting meeting(2);
  const auto store = c10::make_intrusive<c10d::HashStore>();
  std::vector<std::thread> threads;
  for (int rank = 0; rank < 2; ++rank) {
    threads.emplace_back([&, rank] {
      const auto group = c10::make_intrusive<c10d::ProcessGroup>(store, rank, 2);
      group->setBackend(c10::DeviceType::CPU, c10d::ProcessGroup::BackendType::CUSTOM,
                        c10::make_intrusive<ThreadBackend>(rank, meeting));
      body(rank, group);
    });
  }
  for (auto& thread : threads) {
    thread.join();
  }
}

}  // namespace

TEST_CASE("a batch that is not finite is left out, counted and named", "[quantization]") {
  Warnings warnings;
  FakeQuantizer quantizer(FakeQuantizerOptions{.scheme = Scheme{.symmetric = false}, .observer = MovingAverage{0.5}});
  quantizer->name = "fc.quant.input";
  quantizer(torch::tensor({-1.0f, 1.0f}));
  const auto scale = quantizer->scale.clone();
  for (int i = 0; i < 2; ++i) {
    REQUIRE(quantizer(torch::tensor({0.0f, kNaN, 90.0f}))[1].isnan().item<bool>());
  }
  REQUIRE(quantizer->skipped.item<int64_t>() == 2);
  REQUIRE(torch::equal(quantizer->scale, scale));
  REQUIRE(quantizer->max_val.item<float>() == 1.0f);
  REQUIRE(warnings.texts.size() == 1);
  REQUIRE_THAT(warnings.texts[0], ContainsSubstring("fc.quant.input met a batch with NaN or infinite values"));
}

TEST_CASE("a weight that is not finite is an error that names its layer", "[quantization]") {
  Mlp model;
  prepare_qat(*model, QConfig::int8());
  const auto x = torch::randn({3, 4});
  model(x);
  {
    const torch::NoGradGuard no_grad;
    model->b->weight[1][2] = std::numeric_limits<float>::infinity();
  }
  REQUIRE_THAT(message_of([&] { model(x); }),
               ContainsSubstring("the weight of b.quant.weight must be finite, got 1 NaN or infinite values of 36"));
  REQUIRE(model->b->quant->find("weight")->skipped.item<int64_t>() == 0);
}

TEST_CASE("calibration leaves batches out that are not finite", "[quantization]") {
  torch::manual_seed(0);
  Warnings warnings;
  Mlp model, reference;
  {
    const torch::NoGradGuard no_grad;
    for (const auto& item : model->named_parameters()) {
      reference->named_parameters()[item.key()].copy_(item.value());
    }
  }
  const auto first = torch::randn({3, 4}), second = torch::randn({3, 4}), bad = torch::full({3, 4}, kNaN);
  prepare(*reference, QConfig::int8());
  calibrate(*reference, [&] {
    reference(first);
    reference(second);
  });
  REQUIRE(warnings.texts.empty());
  prepare(*model, QConfig::int8());
  REQUIRE_THAT(
      message_of([&] { calibrate(*model, [&] { model(bad); }); }),
      ContainsSubstring("every batch held NaN or infinite values at: a.quant.input, b.quant.input, c.quant.input"));
  REQUIRE(model->a->quant->find("input")->skipped.item<int64_t>() == 0);  // as it was
  REQUIRE(!model->a->quant->find("weight")->calibrated());
  warnings.texts.clear();
  calibrate(*model, [&] {
    model(first);
    model(bad);
    model(second);
  });
  REQUIRE(torch::equal(model->c->quant->find("input")->scale, reference->c->quant->find("input")->scale));
  REQUIRE_THAT(warnings.texts.back(),
               ContainsSubstring("[calibrate] batches with NaN or infinite values were left out at: "
                                 "a.quant.input (1), b.quant.input (1), c.quant.input (1)"));
  REQUIRE_THAT(report(*model), ContainsSubstring("(1 batches not finite)"));
}

TEST_CASE("first and last layer in FP32", "[quantization]") {
  auto config = QConfig::int8();
  config.first_last_fp32 = true;
  Mlp model;
  prepare_qat(*model, config);
  REQUIRE(prepared(model) == std::vector<bool>{false, true, false});
  REQUIRE_THAT(report(*model), ContainsSubstring("kept in FP32 as the first layer (first_last_fp32)"));
  config.overrides = {{"a", QConfig::int8()}};
  Mlp other;
  prepare_qat(*other, config);
  REQUIRE(prepared(other) == std::vector<bool>{true, true, false});
}

TEST_CASE("strict preparation names what it leaves alone", "[quantization]") {
  struct TypedImpl : torch::nn::Module {
    rarefy::nn::Linear ours{nullptr};
    torch::nn::Linear typed{nullptr};
    TypedImpl()
        : ours(register_module("ours", rarefy::nn::Linear(4, 4))),
          typed(register_module("typed", torch::nn::Linear(4, 4))) {}
  };
  TypedImpl model;
  auto config = QConfig::int8();
  REQUIRE_THAT(message_of([&] { prepare_qat(model, config); }),
               ContainsSubstring("[prepare_qat] every layer must be quantized or excluded") &&
                   ContainsSubstring("typed (a typed member cannot be replaced: make it a rarefy::nn::Linear)"));
  REQUIRE(model.ours->quant_state() == nullptr);
  config.overrides = {{"typed", std::nullopt}, {"typo", std::nullopt}};
  REQUIRE_THAT(message_of([&] { prepare_qat(model, config); }), ContainsSubstring("override 'typo' must match"));
  prepare_qat(model, config, /*strict=*/false);
  REQUIRE(model.ours->quant_state() != nullptr);
}

TEST_CASE("execution and gradient type reach the layers", "[quantization]") {
  auto config = QConfig::int8();
  config.execution = Execution::integer;
  config.gradient_dtype = torch::kBFloat16;
  LayerConfig weights_only{.weight = config.weight};
  config.overrides = {{"b", weights_only}};
  Mlp model;
  prepare_qat(*model, config);
  REQUIRE(model->a->execution == Execution::integer);
  REQUIRE(model->a->gradient_dtype == torch::kBFloat16);
  REQUIRE(!model->b->execution.has_value());
  weights_only.execution = Execution::integer;
  config.overrides = {{"b", weights_only}};
  Mlp other;
  REQUIRE_THAT(
      message_of([&] { prepare_qat(*other, config); }),
      ContainsSubstring("[prepare_qat] layer b cannot execute in integers: the input stays in floating point"));
  REQUIRE(prepared(other) == std::vector<bool>(3, false));
  config.gradient_dtype = torch::kHalf;
  REQUIRE_THAT(message_of([&] { prepare_qat(*other, config); }),
               ContainsSubstring("[QConfig] gradient_dtype must be float32 or bfloat16, got Half"));
}

TEST_CASE("a forward inside of a backward pass does not observe", "[quantization]") {
  struct Recompute : torch::autograd::Function<Recompute> {
    static torch::Tensor forward(torch::autograd::AutogradContext* ctx, const torch::Tensor& x, FakeQuantizerImpl* q) {
      ctx->save_for_backward({x});
      ctx->saved_data["quantizer"] = reinterpret_cast<int64_t>(q);
      const torch::NoGradGuard no_grad;
      return q->forward(x);
    }
    static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                   torch::autograd::variable_list grads) {
      auto* quantizer = reinterpret_cast<FakeQuantizerImpl*>(ctx->saved_data["quantizer"].toInt());
      const torch::AutoGradMode with_gradient(true);
      const auto x = ctx->get_saved_variables()[0].detach().requires_grad_();
      return {torch::autograd::grad({quantizer->forward(x)}, {x}, {grads[0]})[0], {}};
    }
  };
  FakeQuantizer saving(FakeQuantizerOptions{.scheme = Scheme{.symmetric = false}, .observer = MovingAverage{0.5}});
  saving(torch::tensor({0.0f, 1.0f}));
  auto plain = std::dynamic_pointer_cast<FakeQuantizerImpl>(saving->clone());
  const auto x = torch::tensor({-1.0f, 0.5f, 9.0f}).requires_grad_(), y = x.detach().clone().requires_grad_();
  Recompute::apply(x, saving.get()).sum().backward();
  plain->forward(y).sum().backward();
  REQUIRE(torch::equal(x.grad(), y.grad()));
  REQUIRE(torch::equal(saving->max_val, plain->max_val));
  REQUIRE(saving->max_val.item<float>() == 5.0f);
}

TEST_CASE("a schedule sets the switches of each step", "[quantization]") {
  QATSchedule schedule({.observe_from = 1, .quantize_from = 2, .freeze_observers_at = 4});
  Mlp model;
  REQUIRE_THAT(message_of([&] { schedule.step(*model); }), ContainsSubstring("must have prepared layers"));
  REQUIRE(schedule.steps() == 0);
  prepare_qat(*model, QConfig::int8());
  std::stringstream saved;
  const auto* quantizer = model->a->quant->find("input");
  for (int64_t step = 0; step < 6; ++step) {
    schedule.step(*model);
    REQUIRE(quantizer->observe == (step >= 1 && step < 4));
    REQUIRE(quantizer->quantize == (step >= 2));
    REQUIRE(schedule.steps() == step + 1);
    if (step == 2) {
      torch::serialize::OutputArchive archive;
      schedule.save(archive);
      archive.save_to(saved);
    }
  }
  QATSchedule resumed(schedule.options());
  torch::serialize::InputArchive archive;
  archive.load_from(saved);
  resumed.load(archive);
  REQUIRE(resumed.steps() == 3);
  resumed.apply(*model);  // of step 2
  REQUIRE((quantizer->observe && quantizer->quantize));
  resumed.step(*model);
  resumed.step(*model);  // 4
  REQUIRE(!quantizer->observe);
  REQUIRE(
      resumed.to_string() ==
      "QATSchedule(observe_from=1, quantize_from=2, freeze_observers_at=4, freeze_batch_norm_at=None): 5 steps begun");
  REQUIRE_THAT(message_of([] { QATSchedule({.observe_from = 3, .quantize_from = 1}); }),
               ContainsSubstring("[QATSchedule] quantize_from must not be before observe_from (3), got 1"));
}

TEST_CASE("a schedule freezes batch normalization", "[quantization]") {
  torch::manual_seed(0);
  Parity model;
  const auto x = torch::randn({4, 2, 6, 6});
  prepare_qat(*model, QConfig::int8());
  QATSchedule schedule({.freeze_batch_norm_at = 2});
  for (int64_t step = 0; step < 4; ++step) {
    model->train();
    schedule.step(*model);
    const auto before = model->conv->bn->running_mean.clone();
    model(x + static_cast<double>(step)).sum().backward();
    REQUIRE(torch::equal(before, model->conv->bn->running_mean) == (step >= 2));
  }
  REQUIRE(model->conv->bn->weight.grad().defined());
  Mlp without;
  prepare_qat(*without, QConfig::int8());
  QATSchedule other({.freeze_batch_norm_at = 2});
  REQUIRE_THAT(message_of([&] { other.step(*without); }),
               ContainsSubstring("[QATSchedule] freeze_batch_norm_at needs"));
  REQUIRE(other.steps() == 0);
}

TEST_CASE("ranges are those of all processes of a group", "[quantization]") {
  std::vector<std::vector<torch::Tensor>> states(2);
  std::vector<Mlp> models(2);
  for (auto& model : models) {
    auto config = QConfig::int8();
    config.observer = MinMax{};
    prepare_qat(*model, config);
  }
  in_two_processes([&](int rank, const c10::intrusive_ptr<c10d::ProcessGroup>& group) {
    auto& model = models[static_cast<size_t>(rank)];
    set_process_group(*model, group);
    auto* input = model->a->quant->find("input");
    model->a(torch::full({2, 4}, rank == 0 ? 1.0f : 100.0f));
    auto& state = states[static_cast<size_t>(rank)];
    for (const auto& tensor : {input->min_val, input->max_val, input->scale, input->zero_point}) {
      state.push_back(tensor.clone());
    }
    model->a(torch::full({2, 4}, rank == 0 ? kNaN : 200.0f));  // counts for the other process, and is counted in both
    state.push_back(input->max_val.clone());
    state.push_back(input->skipped.clone());
    model->eval();
    calibrate(*model, [&] {
      for (int i = 0; i <= rank; ++i) {  // not as many batches in each process
        model(torch::full({2, 4}, rank == 0 ? -300.0f : 3.0f));
      }
    });
    state.push_back(input->min_val.clone());
    set_process_group(*model, nullptr);
  });
  for (size_t i = 0; i < states[0].size(); ++i) {
    REQUIRE(torch::equal(states[0][i], states[1][i]));
  }
  REQUIRE(states[0][0].item<float>() == 1.0f);
  REQUIRE(states[0][1].item<float>() == 100.0f);
  REQUIRE(states[0][4].item<float>() == 200.0f);
  REQUIRE(states[0][5].item<int64_t>() == 1);
  REQUIRE(states[0][6].item<float>() == -300.0f);
  REQUIRE_THAT(message_of([] { set_process_group(*Mlp(), nullptr); }), ContainsSubstring("must have prepared layers"));
}
