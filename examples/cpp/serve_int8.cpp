// Serve an int8 image classifier with only C++: a converted checkpoint is loaded into a fresh model, without Python, without
// data and without the float weights, and answers batches of images.
//
//   serve_int8 [--checkpoint DIR [--float FILE]] [--data DIGITS.csv] [--out DIR] [--batch N]... [--threads N] [--seed N] [--quick]
//
// Without a checkpoint it makes one first: trains a small network for a few seconds, calibrates, converts and saves it to
// DIR/int8 (and the float weights to DIR/float.safetensors), out/serve_int8 by default. A later run serves that checkpoint:
//
//   serve_int8 --checkpoint out/serve_int8/int8 --float out/serve_int8/float.safetensors
//
// The images are made up, digits of seven segments under noise; or scanned ones, with a file of write_digits_csv.py.

#include <rarefy/rarefy.h>
#include <torch/nn/functional/loss.h>
#include <torch/nn/modules/activation.h>
#include <torch/nn/modules/batchnorm.h>
#include <torch/nn/modules/container/sequential.h>
#include <torch/nn/modules/conv.h>
#include <torch/nn/modules/pooling.h>
#include <torch/optim/adam.h>
#include <torch/utils.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "digits.h"

namespace {

namespace fs = std::filesystem;
namespace quantization = rarefy::quantization;

constexpr int64_t kSize = 8;  // of an image

// ---- command line ---------------------------------------------------------------------------------------------------

constexpr const char* kUsage =
    "usage: serve_int8 [--checkpoint DIR [--float FILE]] [--data DIGITS.csv] [--out DIR] [--batch N]... [--threads N] "
    "[--seed N] [--quick]";

/// A mistake of the user, who is told how the program is called.
struct UsageError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Options {
  fs::path checkpoint, floating, data, out = "out/serve_int8";
  std::vector<int64_t> batches;
  int64_t threads = 1, seed = 0;
  bool quick = false;
};

Options parse_options(const std::vector<std::string>& arguments) {
  Options options;
  const auto integer = [](const std::string& name, const std::string& text, int64_t low, int64_t high) {
    int64_t value = 0;
    if (!digits::parse_integer(text, low, high, value)) {
      throw UsageError(name + " must be an integer from " + std::to_string(low) + " to " + std::to_string(high) +
                       ", got '" + text + "'");
    }
    return value;
  };
  for (size_t i = 0; i < arguments.size(); ++i) {
    const std::string& name = arguments[i];
    if (name == "--quick") {
      options.quick = true;
      continue;
    }
    static const std::array<std::string, 7> known{"--checkpoint", "--float",   "--data", "--out",
                                                  "--batch",      "--threads", "--seed"};
    if (std::find(known.begin(), known.end(), name) == known.end()) {
      throw UsageError("unknown option " + name);
    }
    if (++i == arguments.size()) {
      throw UsageError(name + " must be followed by a value");
    }
    const std::string& value = arguments[i];
    if (name == "--checkpoint") {
      options.checkpoint = value;
    } else if (name == "--float") {
      options.floating = value;
    } else if (name == "--data") {
      options.data = value;
    } else if (name == "--out") {
      options.out = value;
    } else if (name == "--batch") {
      options.batches.push_back(integer(name, value, 1, 4096));
    } else if (name == "--threads") {
      options.threads = integer(name, value, 1, 256);
    } else {
      options.seed = integer(name, value, 0, INT32_MAX);
    }
  }
  if (options.checkpoint.empty() && !options.floating.empty()) {
    throw UsageError("--float must come with --checkpoint");
  }
  if (options.batches.empty()) {
    options.batches = {1, 16, 64};
  }
  return options;
}

// ---- data -----------------------------------------------------------------------------------------------------------

/// x float32 [N, 1, 8, 8] in about [-1, 1], y int64 [N].
struct Examples {
  torch::Tensor x, y;
};

/// Digits of seven segments, 7 x 4 pixels each, one of five places in the image, under noise.
Examples draw_digits(int64_t count) {
  // Bits: top, upper left, upper right, middle, lower left, lower right, bottom.
  constexpr std::array<int, 10> kSegments{0b1110111, 0b0010010, 0b1011101, 0b1011011, 0b0111010,
                                          0b1101011, 0b1101111, 0b1010010, 0b1111111, 0b1111011};
  auto glyphs = torch::full({10, 7, 4}, -1.0);
  for (int64_t digit = 0; digit < 10; ++digit) {
    const auto on = [&](int bit, int64_t row, int64_t rows, int64_t column, int64_t columns) {
      if ((kSegments.at(static_cast<size_t>(digit)) >> (6 - bit) & 1) != 0) {
        glyphs[digit].narrow(0, row, rows).narrow(1, column, columns).fill_(1.0);
      }
    };
    for (int line = 0; line < 3; ++line) {
      on(3 * line, int64_t{3} * line, 1, 0, 4);
    }
    for (int half = 0; half < 2; ++half) {
      on(3 * half + 1, int64_t{3} * half, 4, 0, 1);
      on(3 * half + 2, int64_t{3} * half, 4, 3, 1);
    }
  }
  const auto y = torch::randint(10, {count});
  auto x = torch::full({count, 1, kSize, kSize}, -1.0);
  const auto places = torch::randint(5, {count});
  for (int64_t place = 0; place < 5; ++place) {
    const auto index = (places == place).nonzero().squeeze(1);
    auto images = x.index_select(0, index);
    images.narrow(2, place % 2, 7)
        .narrow(3, place, 4)
        .copy_(glyphs.index_select(0, y.index_select(0, index)).unsqueeze(1));
    x.index_copy_(0, index, images);
  }
  return {x + 0.5 * torch::randn_like(x), y};
}

struct Data {
  Examples training, test;
};

Data make_data(const Options& options) {
  if (options.data.empty()) {
    auto training = draw_digits(options.quick ? 640 : 4096);
    return {std::move(training), draw_digits(512)};
  }
  const auto all = digits::read_csv(options.data);
  const auto x = all.x.view({-1, 1, kSize, kSize});
  const int64_t count = all.y.size(0), training = count - count / 4;
  return {{x.narrow(0, 0, training), all.y.narrow(0, 0, training)},
          {x.narrow(0, training, count - training), all.y.narrow(0, training, count - training)}};
}

// ---- model ----------------------------------------------------------------------------------------------------------

/// A small residual network. Layers of torch::nn in Sequentials are replaced when it is prepared or loaded; the addition is
/// a module, so that it computes on integers too.
struct NetImpl : torch::nn::Module {
  torch::nn::Sequential stem, block, tail;
  rarefy::nn::Add add;
  rarefy::nn::Linear fc{nullptr};

  NetImpl() {
    const auto conv = [](int64_t in, int64_t out) {
      return torch::nn::Conv2d(torch::nn::Conv2dOptions(in, out, 3).padding(1).bias(false));
    };
    stem->push_back(conv(1, 32));
    stem->push_back(torch::nn::BatchNorm2d(32));
    stem->push_back(torch::nn::ReLU());
    stem->push_back(conv(32, 64));
    stem->push_back(torch::nn::BatchNorm2d(64));
    stem->push_back(torch::nn::ReLU());
    block->push_back(conv(64, 64));
    block->push_back(torch::nn::BatchNorm2d(64));
    block->push_back(torch::nn::ReLU());
    block->push_back(conv(64, 64));
    block->push_back(torch::nn::BatchNorm2d(64));
    tail->push_back(torch::nn::MaxPool2d(2));
    tail->push_back(conv(64, 128));
    tail->push_back(torch::nn::BatchNorm2d(128));
    tail->push_back(torch::nn::ReLU());
    register_module("stem", stem);
    register_module("block", block);
    register_module("add", add);
    register_module("tail", tail);
    fc = register_module("fc", rarefy::nn::Linear(128, digits::kClasses));
  }

  torch::Tensor forward(torch::Tensor x) {
    x = stem->forward(x);
    x = torch::relu(add(x, block->forward(x)));
    return fc(tail->forward(x).mean({2, 3}));
  }
};
TORCH_MODULE(Net);

torch::Tensor predict(Net& net, const torch::Tensor& x) {
  const c10::InferenceMode guard;
  return net->forward(x);
}

void train(Net& net, const Examples& data, int64_t epochs) {
  torch::optim::Adam optimizer(net->parameters(), torch::optim::AdamOptions(2e-3));
  net->train();
  for (int64_t epoch = 0; epoch < epochs; ++epoch) {
    for (const auto& index : torch::randperm(data.y.size(0)).split(digits::kBatchSize)) {
      const auto loss = torch::nn::functional::cross_entropy(net->forward(data.x.index_select(0, index)),
                                                             data.y.index_select(0, index));
      optimizer.zero_grad();
      loss.backward();
      optimizer.step();
    }
  }
  net->eval();
}

/// Trains, calibrates, converts and saves.
void make_checkpoint(const Options& options, const Examples& training) {
  Net net;
  train(net, training, options.quick ? 2 : 4);
  fs::create_directories(options.out);
  rarefy::save_safetensors(*net, options.floating);
  quantization::prepare(*net, quantization::QConfig::int8());
  quantization::calibrate(*net, [&] { net->forward(training.x.narrow(0, 0, 256)); });
  const auto example = training.x.narrow(0, 0, 2);
  quantization::convert(*net, [&] { return std::vector{net->forward(example)}; });  // bytes between layers
  quantization::save_quantized(*net, options.checkpoint);
}

// ---- measurements ---------------------------------------------------------------------------------------------------

double accuracy(const torch::Tensor& scores, const torch::Tensor& labels) {
  return 100 * (scores.argmax(1) == labels).to(torch::kFloat32).mean().item<double>();
}

double kibibytes(const fs::path& path) {
  if (!fs::is_directory(path)) {
    return static_cast<double>(fs::file_size(path)) / 1024;
  }
  uintmax_t bytes = 0;
  for (const auto& item : fs::directory_iterator(path)) {
    bytes += item.file_size();
  }
  return static_cast<double>(bytes) / 1024;
}

/// In milliseconds.
struct Latency {
  double p50, p95;
};

/// Both models in turn, so that what else the machine does meets both.
std::array<Latency, 2> measure(std::array<Net*, 2> nets, const torch::Tensor& x, int64_t rounds) {
  std::array<std::vector<double>, 2> times;
  for (int64_t round = -rounds / 10 - 1; round < rounds; ++round) {  // the first ones warm up
    for (size_t i = 0; i < nets.size(); ++i) {
      const auto start = std::chrono::steady_clock::now();
      predict(*nets[i], x);
      const std::chrono::duration<double, std::milli> taken = std::chrono::steady_clock::now() - start;
      if (round >= 0) {
        times[i].push_back(taken.count());
      }
    }
  }
  std::array<Latency, 2> result{};
  for (size_t i = 0; i < times.size(); ++i) {
    std::sort(times[i].begin(), times[i].end());
    const auto at = [&](double part) { return times[i][static_cast<size_t>(part * static_cast<double>(rounds - 1))]; };
    result[i] = {at(0.5), at(0.95)};
  }
  return result;
}

void run(Options options) {
  torch::manual_seed(static_cast<uint64_t>(options.seed));
  at::set_num_threads(static_cast<int>(options.threads));
  const auto data = make_data(options);
  if (options.checkpoint.empty()) {
    options.checkpoint = options.out / "int8";
    options.floating = options.out / "float.safetensors";
    make_checkpoint(options, data.training);
    std::printf("trained, converted and saved: %s\n", options.checkpoint.string().c_str());
  }

  // This is all that serving needs: the class, and the folder.
  Net int8;
  quantization::load_quantized(*int8, options.checkpoint);

  Net fp32;  // to compare with; without its weights it is as fast
  fp32->eval();
  const bool has_float = !options.floating.empty();
  if (has_float) {
    rarefy::load_safetensors(*fp32, options.floating);
  }
  const auto scores = predict(int8, data.test.x);
  std::printf("%-6s %10s %12s\n", "model", "accuracy %", "KiB on disk");
  if (has_float) {
    std::printf("%-6s %10.2f %12.1f\n", "fp32", accuracy(predict(fp32, data.test.x), data.test.y),
                kibibytes(options.floating));
  }
  std::printf("%-6s %10.2f %12.1f\n", "int8", accuracy(scores, data.test.y), kibibytes(options.checkpoint));
  if (has_float) {
    const auto same = (scores.argmax(1) == predict(fp32, data.test.x).argmax(1)).to(torch::kFloat32).mean();
    std::printf("both give the same class for %.2f %% of %lld images\n", 100 * same.item<double>(),
                static_cast<long long>(scores.size(0)));
  }

  std::printf("\n%lld thread%s, milliseconds\n%6s %10s %10s %10s %10s %9s\n", static_cast<long long>(options.threads),
              options.threads == 1 ? "" : "s", "batch", "fp32 p50", "fp32 p95", "int8 p50", "int8 p95", "fp32/int8");
  for (const int64_t batch : options.batches) {
    const auto index = torch::arange(batch).remainder(data.test.y.size(0));
    const auto times = measure({&fp32, &int8}, data.test.x.index_select(0, index), options.quick ? 10 : 100);
    std::printf("%6lld %10.3f %10.3f %10.3f %10.3f %9.2f\n", static_cast<long long>(batch), times[0].p50, times[0].p95,
                times[1].p50, times[1].p95, times[0].p50 / times[1].p50);
  }
}

}  // namespace

int main(int argc, char** argv) {
  try {
    run(parse_options({argv + 1, argv + argc}));
    return 0;
  } catch (const UsageError& error) {
    std::fprintf(stderr, "serve_int8: %s\n%s\n", error.what(), kUsage);
    return 2;
  } catch (const c10::Error& error) {
    std::fprintf(stderr, "serve_int8: %s\n", error.what_without_backtrace());
  } catch (const std::exception& error) {
    std::fprintf(stderr, "serve_int8: %s\n", error.what());
  }
  return 1;
}
