// Remove half of the work of an image classifier with only C++: channels that are really gone, in two steps with
// fine-tuning between, saved, and loaded into a fresh model.
//
//   prune_cnn --out out/prune_cnn [--seed N] [--quick]
//
// The images are made up: bars in four directions under noise. Everything else is as in a program of your own: modules of
// torch::nn, a training loop, one optimizer from start to end.

#include <rarefy/graph/timing.h>
#include <rarefy/rarefy.h>
#include <torch/nn/functional/loss.h>
#include <torch/nn/modules/batchnorm.h>
#include <torch/nn/modules/conv.h>
#include <torch/nn/modules/linear.h>
#include <torch/optim/adam.h>
#include <torch/utils.h>

#include <charconv>
#include <cstdio>
#include <filesystem>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

namespace fs = std::filesystem;

constexpr int64_t kSize = 16;  // of an image
constexpr int64_t kClasses = 4;
constexpr int64_t kBatchSize = 64;
constexpr int64_t kSteps = 2;

// ---- command line ---------------------------------------------------------------------------------------------------

constexpr const char* kUsage = "usage: prune_cnn --out DIR [--seed N] [--quick]";

/// A mistake of the user, who is told how the program is called.
struct UsageError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Options {
  fs::path out;
  uint32_t seed = 0;
  bool quick = false;
};

Options parse_options(const std::vector<std::string>& arguments) {
  Options options;
  for (size_t i = 0; i < arguments.size(); ++i) {
    const std::string& name = arguments[i];
    if (name == "--quick") {
      options.quick = true;
      continue;
    }
    if (name != "--out" && name != "--seed") {
      throw UsageError("unknown option " + name);
    }
    if (++i == arguments.size()) {
      throw UsageError(name + " must be followed by a value");
    }
    const std::string& value = arguments[i];
    if (name == "--out") {
      options.out = value;
      continue;
    }
    const auto [end, error] = std::from_chars(value.data(), value.data() + value.size(), options.seed);
    if (error != std::errc() || end != value.data() + value.size()) {
      throw UsageError("--seed must be an integer from 0 to 4294967295, got '" + value + "'");
    }
  }
  if (options.out.empty()) {
    throw UsageError("--out must be given");
  }
  return options;
}

// ---- data -----------------------------------------------------------------------------------------------------------

/// x float32 [N, 1, 16, 16], y int64 [N].
struct Examples {
  torch::Tensor x, y;
};

/// A bar through each image, at 0, 45, 90 or 135 degrees and at a place of its own, under noise.
Examples make_examples(int64_t count) {
  const torch::Tensor y = torch::randint(kClasses, {count});
  const torch::Tensor angle = (y.to(torch::kFloat32) * (M_PI / kClasses)).view({count, 1, 1});
  const torch::Tensor offset = torch::rand({count, 1, 1}) * 8 - 4;
  const torch::Tensor axis = torch::arange(kSize, torch::kFloat32) - (kSize - 1) / 2.0;
  const torch::Tensor distance =
      angle.cos() * axis.view({1, kSize, 1}) + angle.sin() * axis.view({1, 1, kSize}) - offset;
  const torch::Tensor x = torch::exp(-distance.square()) + 0.7 * torch::randn({count, kSize, kSize});
  return {x.unsqueeze(1), y};
}

// ---- model ----------------------------------------------------------------------------------------------------------

/// A residual network of modules of torch::nn: nothing in it knows of pruning.
struct NetImpl : torch::nn::Module {
  torch::nn::Conv2d stem{nullptr}, conv1{nullptr}, conv2{nullptr}, conv3{nullptr};
  torch::nn::BatchNorm2d bn{nullptr}, bn1{nullptr}, bn2{nullptr}, bn3{nullptr};
  torch::nn::Linear fc{nullptr};

  NetImpl() {
    const auto conv = [](int64_t in, int64_t out, int64_t stride) {
      return torch::nn::Conv2d(torch::nn::Conv2dOptions(in, out, 3).stride(stride).padding(1).bias(false));
    };
    stem = register_module("stem", conv(1, 16, 1));
    bn = register_module("bn", torch::nn::BatchNorm2d(16));
    conv1 = register_module("conv1", conv(16, 32, 1));
    bn1 = register_module("bn1", torch::nn::BatchNorm2d(32));
    conv2 = register_module("conv2", conv(32, 16, 1));
    bn2 = register_module("bn2", torch::nn::BatchNorm2d(16));
    conv3 = register_module("conv3", conv(16, 64, 2));
    bn3 = register_module("bn3", torch::nn::BatchNorm2d(64));
    fc = register_module("fc", torch::nn::Linear(64, kClasses));
  }

  torch::Tensor forward(torch::Tensor x) {
    x = torch::relu(bn(stem(x)));
    const torch::Tensor y = torch::relu(bn1(conv1(x)));
    x = torch::relu(x + bn2(conv2(y)));
    x = torch::relu(bn3(conv3(x)));
    return fc(x.mean({2, 3}));
  }
};
TORCH_MODULE(Net);

void train(Net& net, torch::optim::Optimizer& optimizer, const Examples& data, int64_t epochs) {
  net->train();
  for (int64_t epoch = 0; epoch < epochs; ++epoch) {
    for (const torch::Tensor& index : torch::randperm(data.y.size(0)).split(kBatchSize)) {
      const auto logits = net->forward(data.x.index_select(0, index));
      const auto loss = torch::nn::functional::cross_entropy(logits, data.y.index_select(0, index));
      optimizer.zero_grad();
      loss.backward();
      optimizer.step();
    }
  }
}

torch::Tensor predict(Net& net, const torch::Tensor& x) {
  const torch::NoGradGuard no_grad;
  net->eval();
  return net->forward(x);
}

// ---- table ----------------------------------------------------------------------------------------------------------

struct Row {
  const char* model;
  double accuracy, parameters, macs, milliseconds;
};

Row measure(const char* name, Net& net, const Examples& test, double macs) {
  const double accuracy = 100 * (predict(net, test.x).argmax(1) == test.y).to(torch::kFloat32).mean().item<double>();
  double parameters = 0;
  for (const auto& parameter : net->parameters()) {
    parameters += static_cast<double>(parameter.numel());
  }
  const torch::Tensor batch = test.x.narrow(0, 0, kBatchSize);
  return {name, accuracy, parameters, macs, rarefy::graph::measure([&] { predict(net, batch); }).milliseconds};
}

void run(const Options& options) {
  fs::create_directories(options.out);
  torch::manual_seed(options.seed);
  const Examples training = make_examples(options.quick ? 640 : 2048), test = make_examples(512);
  Net net;
  torch::optim::Adam optimizer(net->parameters(), torch::optim::AdamOptions(3e-3));
  train(net, optimizer, training, options.quick ? 2 : 6);

  // One run on example inputs is recorded: which channels can only go together is read off it.
  const torch::Tensor example = test.x.narrow(0, 0, 2);
  rarefy::pruning::StructuredPruner pruner(
      *net, [&] { return std::vector{net->forward(example)}; }, {example},
      {.choice = {.target = rarefy::pruning::Macs{0.5}, .round_to = 4}, .steps = kSteps});
  auto report = pruner.preview();  // changes nothing
  std::vector<Row> rows{measure("original", net, test, report.before.macs)};
  for (int64_t step = 0; step < kSteps; ++step) {
    report = pruner.prune({&optimizer});
    train(net, optimizer, training, options.quick ? 1 : 3);
  }
  rows.push_back(measure("pruned", net, test, report.after.macs));
  std::printf("%s\n", report.to_string().c_str());

  // A file for the class above: what is left of each tensor, and the values.
  const fs::path path = options.out / "pruned.safetensors";
  rarefy::pruning::save_pruned(*net, pruner.manifest(), path);
  Net loaded;
  rarefy::pruning::load_pruned(*loaded, path);
  if (!torch::equal(predict(loaded, test.x), predict(net, test.x))) {
    throw std::runtime_error("the loaded model gives other outputs");
  }
  rows.push_back(measure("loaded", loaded, test, report.after.macs));

  std::printf("%-10s %10s %11s %11s %15s\n", "model", "accuracy %", "parameters", "MACs", "ms / 64 images");
  for (const Row& row : rows) {
    std::printf("%-10s %10.2f %11.0f %11.0f %15.3f\n", row.model, row.accuracy, row.parameters, row.macs,
                row.milliseconds);
  }
  std::printf("\n%s: loaded into a fresh model, equal outputs\n", path.string().c_str());
}

}  // namespace

int main(int argc, char** argv) {
  try {
    run(parse_options({argv + 1, argv + argc}));
    return 0;
  } catch (const UsageError& error) {
    std::fprintf(stderr, "prune_cnn: %s\n%s\n", error.what(), kUsage);
    return 2;
  } catch (const c10::Error& error) {
    std::fprintf(stderr, "prune_cnn: %s\n", error.what_without_backtrace());
  } catch (const std::exception& error) {
    std::fprintf(stderr, "prune_cnn: %s\n", error.what());
  }
  return 1;
}
