// Distill a convolutional network into one with a twenty-fifth of its parameters, with only C++.
//
//   python examples/cpp/write_digits_csv.py digits.csv
//   distill_cnn digits.csv [--seed N] [--quick]
//
// The large network learns from 1,198 images. The small one gets a tenth of them, and is trained twice from the same start,
// on the same batches: on the labels alone, and on the large network's logits too, which say more about an image than its
// label does (the experiment of Hinton et al., 2015, arXiv:1503.02531, section 6). A table shows the means of three starts.

#include <rarefy/graph/timing.h>
#include <rarefy/rarefy.h>
#include <torch/nn/functional/loss.h>
#include <torch/nn/modules/batchnorm.h>
#include <torch/nn/modules/conv.h>
#include <torch/nn/modules/linear.h>
#include <torch/optim/adam.h>
#include <torch/utils.h>

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <stdexcept>
#include <string>
#include <vector>

#include "digits.h"

namespace {

using namespace digits;                // NOLINT(google-build-using-namespace)
using namespace rarefy::distillation;  // NOLINT(google-build-using-namespace)

constexpr int64_t kSide = 8;
constexpr int64_t kStarts = 3;
constexpr int64_t kTeacherWidth = 32, kStudentWidth = 6;

// ---- command line ---------------------------------------------------------------------------------------------------

constexpr const char* kUsage = "usage: distill_cnn DIGITS.csv [--seed N] [--quick]";

/// A mistake of the user, who is told how the program is called.
struct UsageError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Options {
  std::filesystem::path csv;
  int64_t seed = 0;
  bool quick = false;
};

Options parse_options(const std::vector<std::string>& arguments) {
  Options options;
  for (size_t i = 0; i < arguments.size(); ++i) {
    const std::string& name = arguments[i];
    if (name == "--quick") {
      options.quick = true;
    } else if (name == "--seed") {
      if (++i == arguments.size()) {
        throw UsageError("--seed must be followed by a value");
      }
      if (!parse_integer(arguments[i], 0, INT32_MAX, options.seed)) {
        throw UsageError("--seed must be an integer from 0 to 2147483647, got '" + arguments[i] + "'");
      }
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
  return options;
}

// ---- model ----------------------------------------------------------------------------------------------------------

/// Three convolutions and a classifier, on images [N, 64].
struct NetImpl : torch::nn::Module {
  torch::nn::Conv2d conv1{nullptr}, conv2{nullptr}, conv3{nullptr};
  torch::nn::BatchNorm2d bn1{nullptr}, bn2{nullptr}, bn3{nullptr};
  torch::nn::Linear fc{nullptr};

  explicit NetImpl(int64_t width) {
    const auto conv = [](int64_t in, int64_t out, int64_t stride) {
      return torch::nn::Conv2d(torch::nn::Conv2dOptions(in, out, 3).stride(stride).padding(1).bias(false));
    };
    conv1 = register_module("conv1", conv(1, width, 1));
    bn1 = register_module("bn1", torch::nn::BatchNorm2d(width));
    conv2 = register_module("conv2", conv(width, 2 * width, 2));
    bn2 = register_module("bn2", torch::nn::BatchNorm2d(2 * width));
    conv3 = register_module("conv3", conv(2 * width, 2 * width, 2));
    bn3 = register_module("bn3", torch::nn::BatchNorm2d(2 * width));
    fc = register_module("fc", torch::nn::Linear(2 * width, kClasses));
  }

  torch::Tensor forward(torch::Tensor x) {
    x = torch::relu(bn1(conv1(x.view({-1, 1, kSide, kSide}))));
    x = torch::relu(bn2(conv2(x)));
    x = torch::relu(bn3(conv3(x)));
    return fc(x.mean({2, 3}));
  }
};
TORCH_MODULE(Net);

// ---- training -------------------------------------------------------------------------------------------------------

int64_t steps_per_epoch(const Examples& data) { return (data.y.size(0) + kBatchSize - 1) / kBatchSize; }

/// Lowers the learning rate of Adam from `peak` to 0 over `steps` steps.
void set_rate(torch::optim::Adam& optimizer, double peak, int64_t step, int64_t steps) {
  const double left = std::max(0.0, 1.0 - static_cast<double>(step) / static_cast<double>(steps));
  for (auto& group : optimizer.param_groups()) {
    group.options().set_lr(peak * left);
  }
}

/// On the labels alone.
void train(Net& net, const Examples& data, int64_t epochs, double rate) {
  torch::optim::Adam optimizer(net->parameters(), torch::optim::AdamOptions(rate));
  const BatchSource next_batch = training_batches(data);
  net->train();
  int64_t step = 0;
  for (int64_t epoch = 0; epoch < epochs; ++epoch) {
    while (const auto batch = next_batch()) {
      const auto loss = torch::nn::functional::cross_entropy(net->forward(batch->inputs), batch->labels);
      optimizer.zero_grad();
      loss.backward();
      optimizer.step();
      set_rate(optimizer, rate, ++step, epochs * steps_per_epoch(data));
    }
  }
}

/// On the teacher's logits and the labels.
void distill(Net& student, Net& teacher, const Examples& data, int64_t epochs, double rate) {
  torch::optim::Adam optimizer(student->parameters(), torch::optim::AdamOptions(rate));
  const DistillationLoss loss(DistillationLossOptions{.temperature = 4.0, .alpha = 0.9});
  const DistillationTrainerOptions options;
  DistillationTrainer trainer(student, teacher, optimizer, loss, options);
  Callbacks callbacks;
  callbacks.on_step = [&](int64_t step, double) { set_rate(optimizer, rate, step, epochs * steps_per_epoch(data)); };
  trainer.fit(training_batches(data), epochs, callbacks);
}

// ---- table ----------------------------------------------------------------------------------------------------------

torch::Tensor predict(Net& net, const torch::Tensor& x) {
  const torch::NoGradGuard no_grad;
  net->eval();
  return net->forward(x);
}

struct Row {
  const char* model;
  double accuracy = 0, agreement = 0, divergence = 0, parameters = 0, milliseconds = 0;

  /// Adds one start's share to the means.
  void add(Net& net, Net& teacher, const Examples& test) {
    const torch::Tensor logits = predict(net, test.x), target = predict(teacher, test.x);
    const auto percent = [](const torch::Tensor& equal) {
      return 100 * equal.to(torch::kFloat32).mean().item<double>();
    };
    DistillationLoss divergence_of(DistillationLossOptions{.temperature = 1.0, .alpha = 1.0});
    accuracy += percent(logits.argmax(1) == test.y) / kStarts;
    agreement += percent(logits.argmax(1) == target.argmax(1)) / kStarts;
    divergence += divergence_of(logits, target).item<double>() / kStarts;
    parameters = 0;
    for (const auto& parameter : net->parameters()) {
      parameters += static_cast<double>(parameter.numel());
    }
    const torch::Tensor batch = test.x.narrow(0, 0, kBatchSize);
    milliseconds += rarefy::graph::measure([&] { predict(net, batch); }).milliseconds / kStarts;
  }
};

void run(const Options& options) {
  const Examples data = read_csv(options.csv);
  torch::manual_seed(static_cast<uint64_t>(options.seed));
  const int64_t test_size = data.y.size(0) / 3;
  const auto parts = torch::randperm(data.y.size(0)).split_with_sizes({test_size, data.y.size(0) - test_size});
  const auto pick = [&](const torch::Tensor& index) {
    return Examples{data.x.index_select(0, index), data.y.index_select(0, index)};
  };
  const Examples test = pick(parts[0]), training = pick(parts[1]);
  std::printf("%lld images to train, %lld to test, %lld starts\n", static_cast<long long>(training.y.size(0)),
              static_cast<long long>(test.y.size(0)), static_cast<long long>(kStarts));

  const Examples few{training.x.narrow(0, 0, training.y.size(0) / 10),
                     training.y.narrow(0, 0, training.y.size(0) / 10)};
  Net teacher(kTeacherWidth);
  train(teacher, training, options.quick ? 6 : 20, 3e-3);
  const int64_t epochs = options.quick ? 100 : 300;  // of two batches
  Row rows[] = {{"teacher"}, {"student alone"}, {"student distilled"}};
  for (int64_t start = 0; start < kStarts; ++start) {
    rows[0].add(teacher, teacher, test);
    for (const bool distilled : {false, true}) {
      torch::manual_seed(static_cast<uint64_t>(options.seed + 1 + start));  // the same weights, batches and noise
      Net student(kStudentWidth);
      if (distilled) {
        distill(student, teacher, few, epochs, 1e-2);
      } else {
        train(student, few, epochs, 1e-2);
      }
      rows[distilled ? 2 : 1].add(student, teacher, test);
    }
  }

  std::printf("\n%-18s %10s %11s %15s %11s %15s\n", "model", "accuracy %", "agreement %", "KL from teacher",
              "parameters", "ms / 64 images");
  for (const Row& row : rows) {
    std::printf("%-18s %10.2f %11.2f %15.4f %11.0f %15.3f\n", row.model, row.accuracy, row.agreement, row.divergence,
                row.parameters, row.milliseconds);
  }
}

}  // namespace

int main(int argc, char** argv) {
  try {
    run(parse_options({argv + 1, argv + argc}));
    return 0;
  } catch (const UsageError& error) {
    std::fprintf(stderr, "distill_cnn: %s\n%s\n", error.what(), kUsage);
    return 2;
  } catch (const c10::Error& error) {
    std::fprintf(stderr, "distill_cnn: %s\n", error.what_without_backtrace());
  } catch (const std::exception& error) {
    std::fprintf(stderr, "distill_cnn: %s\n", error.what());
  }
  return 1;
}
