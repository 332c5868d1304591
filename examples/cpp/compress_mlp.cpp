// Compress a classifier from start to end with only C++: teacher, distillation, pruning, quantization, int8, ONNX.
//
//   python examples/cpp/write_digits_csv.py digits.csv
//   compress_mlp digits.csv --out out/compress_mlp [--seed N] [--quick]
//
// A large network is trained and teaches a small one. The small one is pruned while it trains, trained on with 8-bit
// weights and activations, written as an ONNX file, and switched to integer kernels. A table shows what each stage costs and
// gains.

#include <rarefy/rarefy.h>
#include <torch/nn/functional/loss.h>
#include <torch/nn/modules/activation.h>
#include <torch/nn/modules/container/sequential.h>
#include <torch/nn/modules/linear.h>
#include <torch/optim/adam.h>
#include <torch/serialize.h>
#include <torch/utils.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <filesystem>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "digits.h"

namespace {

namespace fs = std::filesystem;
using namespace digits;  // NOLINT(google-build-using-namespace)
using rarefy::distillation::BatchSource;

// ---- command line ---------------------------------------------------------------------------------------------------

constexpr const char* kUsage = "usage: compress_mlp DIGITS.csv --out DIR [--seed N] [--quick]";

/// A mistake of the user, who is told how the program is called.
struct UsageError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Options {
  fs::path csv;
  fs::path out;
  int64_t seed = 0;
  bool quick = false;
};

Options parse_options(const std::vector<std::string>& arguments) {
  Options options;
  for (size_t i = 0; i < arguments.size(); ++i) {
    const std::string& name = arguments[i];
    const auto value = [&]() -> const std::string& {
      if (i + 1 == arguments.size()) {
        throw UsageError(name + " must be followed by a value");
      }
      return arguments[++i];
    };
    if (name == "--out") {
      options.out = value();
    } else if (name == "--seed") {
      const std::string& text = value();
      if (!parse_integer(text, 0, INT32_MAX, options.seed)) {
        throw UsageError("--seed must be an integer from 0 to 2147483647, got '" + text + "'");
      }
    } else if (name == "--quick") {
      options.quick = true;
    } else if (name.starts_with("-")) {
      throw UsageError("unknown option " + name);
    } else if (options.csv.empty()) {
      options.csv = name;
    } else {
      throw UsageError("one CSV file must be given, got also '" + name + "'");
    }
  }
  if (options.csv.empty()) {
    throw UsageError("a CSV file must be given");
  }
  if (options.out.empty()) {
    throw UsageError("--out must be given");
  }
  return options;
}

// ---- models ---------------------------------------------------------------------------------------------------------

/// The teacher stays in floating point: modules of torch are good enough.
torch::nn::Sequential make_teacher() {
  return torch::nn::Sequential(torch::nn::Linear(kPixels, 512), torch::nn::ReLU(), torch::nn::Linear(512, 512),
                               torch::nn::ReLU(), torch::nn::Linear(512, kClasses));
}

/// The student is built of rarefy::nn::Linear, which takes the place of torch::nn::Linear and can be quantized.
struct StudentImpl : torch::nn::Cloneable<StudentImpl> {
  StudentImpl() { reset(); }

  void reset() override {
    fc1 = register_module("fc1", rarefy::nn::Linear(kPixels, 128));
    fc2 = register_module("fc2", rarefy::nn::Linear(128, 128));
    fc3 = register_module("fc3", rarefy::nn::Linear(128, kClasses));
  }

  torch::Tensor forward(torch::Tensor x) {
    x = torch::relu(fc1->forward(x));
    x = torch::relu(fc2->forward(x));
    return fc3->forward(x);
  }

  rarefy::nn::Linear fc1{nullptr}, fc2{nullptr}, fc3{nullptr};
};
TORCH_MODULE(Student);

// ---- measuring ------------------------------------------------------------------------------------------------------

using Forward = std::function<torch::Tensor(const torch::Tensor&)>;

/// Percent of the examples that a model recognizes.
template <typename Module>
double accuracy(Module& model, const Examples& test) {
  const torch::NoGradGuard no_grad;
  model->eval();
  return 100 * (model->forward(test.x).argmax(1) == test.y).to(torch::kFloat32).mean().template item<double>();
}

struct Counts {
  int64_t parameters = 0, nonzero = 0;
};

/// Weights and biases, which are buffers once they are integers.
Counts count_values(const torch::nn::Module& model) {
  Counts counts;
  const auto add = [&](const std::string& name, const torch::Tensor& value) {
    if (name.ends_with(".weight") || name.ends_with(".bias")) {
      counts.parameters += value.numel();
      counts.nonzero += value.count_nonzero().item<int64_t>();
    }
  };
  for (const auto& item : model.named_parameters()) {
    add(item.key(), item.value());
  }
  for (const auto& item : model.named_buffers()) {
    add(item.key(), item.value());
  }
  return counts;
}

/// Median wall-clock microseconds of each model on x. They take turns, so that a busy machine is the same for all.
std::vector<double> interleaved_medians(const std::vector<Forward>& models, const torch::Tensor& x, int64_t rounds) {
  const torch::NoGradGuard no_grad;
  std::vector<std::vector<double>> times(models.size());
  for (int64_t round = -5; round < rounds; ++round) {
    for (size_t i = 0; i < models.size(); ++i) {
      const auto start = std::chrono::steady_clock::now();
      models[i](x);
      const std::chrono::duration<double, std::micro> elapsed = std::chrono::steady_clock::now() - start;
      if (round >= 0) {  // the first rounds warm up
        times[i].push_back(elapsed.count());
      }
    }
  }
  std::vector<double> medians;
  for (auto& values : times) {
    std::nth_element(values.begin(), values.begin() + values.size() / 2, values.end());
    medians.push_back(values[values.size() / 2]);
  }
  return medians;
}

/// Saves under a temporary name and renames, so that the file is whole or not there. Returns its size in bytes.
template <typename Module>
uintmax_t save(const Module& model, const fs::path& path) {
  const fs::path temporary = path.string() + ".tmp";
  torch::save(model, temporary.string());
  fs::rename(temporary, path);
  return fs::file_size(path);
}

struct Row {
  std::string stage;
  double accuracy;
  Counts counts;
  uintmax_t bytes;
  std::string latency;
};

void print_table(const std::vector<Row>& rows) {
  std::printf("\n%-28s %10s %10s %10s %10s %14s\n", "stage", "accuracy %", "parameters", "non-zero", "file KiB",
              "us / 64 images");
  for (const Row& row : rows) {
    std::printf("%-28s %10.2f %10lld %10lld %10.1f %14s\n", row.stage.c_str(), row.accuracy,
                static_cast<long long>(row.counts.parameters), static_cast<long long>(row.counts.nonzero),
                static_cast<double>(row.bytes) / 1024, row.latency.c_str());
  }
}

std::string format(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%.1f", value);
  return text;
}

// ---- stages ---------------------------------------------------------------------------------------------------------

/// Lowers the learning rate of Adam from `peak` to 0 over `steps` steps.
void set_rate(torch::optim::Adam& optimizer, double peak, int64_t step, int64_t steps) {
  const double left = std::max(0.0, 1.0 - static_cast<double>(step) / static_cast<double>(steps));
  for (auto& group : optimizer.param_groups()) {
    group.options().set_lr(peak * left);
  }
}

void train_teacher(torch::nn::Sequential& teacher, const Examples& train, int64_t epochs) {
  torch::optim::Adam optimizer(teacher->parameters(), torch::optim::AdamOptions(2e-3));
  const int64_t steps = epochs * ((train.y.size(0) + kBatchSize - 1) / kBatchSize);
  const BatchSource next_batch = training_batches(train);
  teacher->train();
  int64_t step = 0;
  for (int64_t epoch = 0; epoch < epochs; ++epoch) {
    while (const auto batch = next_batch()) {
      const auto loss = torch::nn::functional::cross_entropy(teacher->forward(batch->inputs), batch->labels);
      optimizer.zero_grad();
      loss.backward();
      optimizer.step();
      set_rate(optimizer, 2e-3, ++step, steps);
    }
  }
}

/// Trains the student on the teacher's logits and the labels; `after_step` is the place of a pruner.
void distill(Student& student, torch::nn::Sequential& teacher, const Examples& train, int64_t epochs, double rate,
             const std::function<void()>& after_step) {
  torch::optim::Adam optimizer(student->parameters(), torch::optim::AdamOptions(rate));
  const int64_t steps = epochs * ((train.y.size(0) + kBatchSize - 1) / kBatchSize);
  const rarefy::distillation::DistillationLossOptions loss_options{.temperature = 4.0, .alpha = 0.7};
  const rarefy::distillation::DistillationTrainerOptions trainer_options;
  rarefy::distillation::DistillationTrainer trainer(
      student, teacher, optimizer, rarefy::distillation::DistillationLoss(loss_options), trainer_options);
  rarefy::distillation::Callbacks callbacks;
  callbacks.on_step = [&](int64_t step, double) {
    after_step();
    set_rate(optimizer, rate, step, steps);
  };
  trainer.fit(training_batches(train), epochs, callbacks);
}

void run(const Options& options) {
  const Examples data = read_csv(options.csv);
  fs::create_directories(options.out);
  torch::manual_seed(static_cast<uint64_t>(options.seed));
  const torch::Tensor order = torch::randperm(data.y.size(0));
  const int64_t test_size = data.y.size(0) / 5;
  const auto pick = [&](const torch::Tensor& index) {
    return Examples{data.x.index_select(0, index), data.y.index_select(0, index)};
  };
  const Examples test = pick(order.narrow(0, 0, test_size));
  const Examples train = pick(order.narrow(0, test_size, data.y.size(0) - test_size));
  std::printf("%lld images to train, %lld to test\n", static_cast<long long>(train.y.size(0)),
              static_cast<long long>(test.y.size(0)));

  const int64_t epochs = options.quick ? 4 : 30;
  std::vector<Row> rows;
  const auto note = [&](const std::string& stage, auto& model, const char* file) {
    rows.push_back({stage, accuracy(model, test), count_values(*model), save(model, options.out / file), "-"});
    std::printf("%s: accuracy %.2f %%\n", stage.c_str(), rows.back().accuracy);
    std::fflush(stdout);
  };

  // 1. A teacher that is as good as it gets.
  auto teacher = make_teacher();
  train_teacher(teacher, train, epochs);
  note("teacher", teacher, "teacher.pt");

  // 2. A student with a fourteenth of the parameters, which learns from it.
  Student student;
  distill(student, teacher, train, epochs, 3e-3, [] {});
  note("student, distilled", student, "student.pt");
  auto dense = std::dynamic_pointer_cast<StudentImpl>(student->clone());

  // 3. Four of five weights go, little by little, while training goes on.
  const int64_t steps_per_epoch = (train.y.size(0) + kBatchSize - 1) / kBatchSize;
  rarefy::pruning::MagnitudePruner pruner(*student, {.sparsity = 0.8,
                                                     .schedule = rarefy::pruning::PolynomialSchedule{
                                                         .end = epochs * steps_per_epoch * 2 / 3, .every = 10}});
  distill(student, teacher, train, epochs, 2e-3, [&] { pruner.step(); });
  note("student, pruned", student, "student_pruned.pt");
  std::printf("%s\n", pruner.report().to_string().c_str());

  // 4. Training with 8-bit weights and activations. The masks stay on: zero is on every grid and stays zero.
  rarefy::quantization::prepare_qat(*student, rarefy::quantization::QConfig::int8());
  distill(student, teacher, train, std::max<int64_t>(epochs / 3, 2), 5e-4, [&] { pruner.step(); });
  pruner.finalize();
  note("student, pruned, QAT", student, "student_qat.pt");

  // 5. The trained integers as a file for other runtimes.
  const auto report = rarefy::export_onnx(student, test.x.narrow(0, 0, 2), options.out / "student.onnx");
  std::printf("%s\n", report.str().c_str());

  // 6. Integers from here on.
  rarefy::quantization::convert(*student);
  note("student, pruned, int8", student, "student_int8.pt");
  std::printf("%s\n", rarefy::quantization::report(*student).c_str());

  // Dense kernels do not skip zeros: the pruned model is as fast as the dense one, and smaller only once compressed.
  at::set_num_threads(1);
  dense->eval();
  const std::vector<Forward> models{
      [&](const torch::Tensor& x) { return teacher->forward(x); },
      [&](const torch::Tensor& x) { return dense->forward(x); },
      [&](const torch::Tensor& x) { return student->forward(x); },
  };
  const auto medians =
      interleaved_medians(models, test.x.narrow(0, 0, kBatchSize).contiguous(), options.quick ? 100 : 1000);
  rows[0].latency = format(medians[0]);
  rows[1].latency = format(medians[1]);
  rows[4].latency = format(medians[2]);
  print_table(rows);
  std::printf("\none thread, medians of interleaved runs; files are in %s\n", options.out.string().c_str());
}

}  // namespace

int main(int argc, char** argv) {
  try {
    run(parse_options({argv + 1, argv + argc}));
    return 0;
  } catch (const UsageError& error) {
    std::fprintf(stderr, "compress_mlp: %s\n%s\n", error.what(), kUsage);
    return 2;
  } catch (const c10::Error& error) {
    std::fprintf(stderr, "compress_mlp: %s\n", error.what_without_backtrace());
  } catch (const std::exception& error) {
    std::fprintf(stderr, "compress_mlp: %s\n", error.what());
  }
  return 1;
}
