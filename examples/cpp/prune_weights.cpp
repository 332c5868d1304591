// Prune nine of ten weights of a classifier while it trains, with only C++; write it to a compressed file, read that into a
// fresh model, and run its linear layers sparse where this machine is faster so.
//
//   prune_weights --out out/prune_weights [--quick]

#include <rarefy/rarefy.h>
#include <torch/nn/functional/loss.h>
#include <torch/nn/modules/container/sequential.h>
#include <torch/nn/modules/linear.h>
#include <torch/optim/sgd.h>
#include <torch/utils.h>

#include <cstdio>
#include <filesystem>
#include <string>

namespace {

namespace fs = std::filesystem;
namespace pruning = rarefy::pruning;

constexpr int64_t kFeatures = 256;
constexpr int64_t kClasses = 8;
constexpr int64_t kBatchSize = 64;
constexpr double kSparsity = 0.9;
constexpr const char* kUsage = "usage: prune_weights --out DIR [--quick]";

/// x float32 [N, 256], y int64 [N].
struct Examples {
  torch::Tensor x, y;
};

/// Noise around one of two centres for each class.
Examples make_examples(int64_t count, const torch::Tensor& centres) {
  const torch::Tensor which = torch::randint(2 * kClasses, {count});
  return {centres.index_select(0, which) + 1.2 * torch::randn({count, kFeatures}), which.remainder(kClasses)};
}

/// Modules of torch::nn and of rarefy::nn; nothing in it knows of pruning. As a typed member, a rarefy::nn::Linear can switch to
/// sparse execution; a torch::nn::Linear could not be replaced there.
struct NetImpl : torch::nn::Module {
  rarefy::nn::Linear first{nullptr}, second{nullptr}, last{nullptr};

  NetImpl() {
    first = register_module("first", rarefy::nn::Linear(kFeatures, 1024));
    second = register_module("second", rarefy::nn::Linear(1024, 1024));
    last = register_module("last", rarefy::nn::Linear(1024, kClasses));
  }
  torch::Tensor forward(const torch::Tensor& x) { return last(torch::relu(second(torch::relu(first(x))))); }
};
TORCH_MODULE(Net);

void train(Net& net, torch::optim::Optimizer& optimizer, const Examples& data, int64_t epochs,
           pruning::MagnitudePruner* pruner = nullptr) {
  net->train();
  for (int64_t epoch = 0; epoch < epochs; ++epoch) {
    for (const torch::Tensor& index : torch::randperm(data.y.size(0)).split(kBatchSize)) {
      const auto logits = net->forward(data.x.index_select(0, index));
      optimizer.zero_grad();
      torch::nn::functional::cross_entropy(logits, data.y.index_select(0, index)).backward();
      optimizer.step();
      if (pruner != nullptr) {
        pruner->step();
      }
    }
  }
  net->eval();
}

double accuracy(Net& net, const Examples& data) {
  const torch::NoGradGuard no_grad;
  return 100 * (net->forward(data.x).argmax(1) == data.y).to(torch::kFloat32).mean().item<double>();
}

void run(const fs::path& out, bool quick) {
  fs::create_directories(out);
  torch::manual_seed(0);
  const torch::Tensor centres = torch::randn({2 * kClasses, kFeatures}) * 0.35;
  const Examples training = make_examples(quick ? 1024 : 4096, centres), test = make_examples(1024, centres);
  const int64_t epochs = quick ? 3 : 6, batches = (training.y.size(0) + kBatchSize - 1) / kBatchSize;

  Net net;
  torch::optim::SGD optimizer(net->parameters(), torch::optim::SGDOptions(0.02).momentum(0.9));
  train(net, optimizer, training, epochs);
  const double before = accuracy(net, test);

  pruning::MagnitudePruner pruner(
      *net, {.sparsity = kSparsity,
             .schedule = pruning::PolynomialSchedule{.begin = 1, .end = 2 * epochs * batches / 3, .every = 5}});
  train(net, optimizer, training, epochs, &pruner);
  pruner.finalize();
  std::printf("%s\n", pruner.report().to_string().c_str());
  std::printf("accuracy: dense %.2f %%, pruned %.2f %%\n\n", before, accuracy(net, test));

  const auto path = out / "pruned.safetensors";
  const auto file = pruning::save_sparse(*net, path);
  Net loaded;
  pruning::load_sparse(*loaded, path);
  loaded->eval();
  {
    const torch::NoGradGuard no_grad;
    TORCH_CHECK(torch::equal(loaded->forward(test.x), net->forward(test.x)), "the loaded model gives other outputs");
  }
  std::printf("%s: %lld of %lld bytes (%.4f), equal outputs\n\n", path.string().c_str(),
              static_cast<long long>(file.bytes), static_cast<long long>(file.dense_bytes), file.ratio());

  // One image at a time: what a measurement says for batches of another size is another matter.
  const torch::Tensor x = test.x.narrow(0, 0, 1);
  const auto forward = [&] { return std::vector{loaded->forward(x)}; };
  pruning::SparsifyOptions options;
  options.seconds = quick ? 0.01 : 0.1;
  std::printf("%s\n", pruning::measure_sparse(*loaded, forward, {x}, options, quick ? 0.05 : 0.5).to_string().c_str());
  const auto report = pruning::sparsify(*loaded, forward, {x}, options);
  std::printf("sparse: %lld of %zu layers, accuracy %.2f %%\n", static_cast<long long>(report.sparse()),
              report.layers.size(), accuracy(loaded, test));
}

}  // namespace

int main(int argc, char** argv) {
  fs::path out;
  bool quick = false;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    if (argument == "--quick") {
      quick = true;
    } else if (argument == "--out" && i + 1 < argc) {
      out = argv[++i];
    } else {
      std::fprintf(stderr, "prune_weights: unknown or incomplete option %s\n%s\n", argument.c_str(), kUsage);
      return 2;
    }
  }
  if (out.empty()) {
    std::fprintf(stderr, "prune_weights: --out must be given\n%s\n", kUsage);
    return 2;
  }
  try {
    run(out, quick);
    return 0;
  } catch (const c10::Error& error) {
    std::fprintf(stderr, "prune_weights: %s\n", error.what_without_backtrace());
  } catch (const std::exception& error) {
    std::fprintf(stderr, "prune_weights: %s\n", error.what());
  }
  return 1;
}
