// The images that write_digits_csv.py writes, for the examples that train on them.
#pragma once

#include <rarefy/distillation/trainer.h>
#include <torch/types.h>

#include <algorithm>
#include <charconv>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace digits {

constexpr int64_t kPixels = 64;
constexpr int64_t kClasses = 10;
constexpr int64_t kBatchSize = 64;

/// The whole text as a number in [low, high]; false for anything else.
inline bool parse_integer(std::string_view text, int64_t low, int64_t high, int64_t& value) {
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  return error == std::errc() && end == text.data() + text.size() && value >= low && value <= high;
}

/// x float32 [N, 64] in [-1, 1], y int64 [N].
struct Examples {
  torch::Tensor x, y;
};

/// Reads lines of 64 pixels in 0..16 and a label in 0..9, separated by commas. Throws std::runtime_error that names the line.
inline Examples read_csv(const std::filesystem::path& path) {
  std::ifstream file(path);
  if (!file) {
    throw std::runtime_error(path.string() + " cannot be read");
  }
  std::vector<float> pixels;
  std::vector<int64_t> labels;
  std::string line;
  for (int64_t number = 1; std::getline(file, line); ++number) {
    const std::string where = path.string() + ", line " + std::to_string(number) + ": ";
    if (line.ends_with('\r')) {
      line.pop_back();
    }
    std::string_view rest = line;
    for (int64_t column = 0; column <= kPixels; ++column) {
      const size_t comma = rest.find(',');
      if ((comma == std::string_view::npos) != (column == kPixels)) {
        const auto fields = std::count(line.begin(), line.end(), ',') + 1;
        throw std::runtime_error(where + "65 fields expected (64 pixels and a label), got " + std::to_string(fields));
      }
      const std::string_view field = rest.substr(0, comma);
      const bool is_label = column == kPixels;
      int64_t value = 0;
      if (!parse_integer(field, 0, is_label ? kClasses - 1 : 16, value)) {
        throw std::runtime_error(where + (is_label ? "a label from 0 to 9" : "a pixel from 0 to 16") +
                                 " expected in column " + std::to_string(column + 1) + ", got '" + std::string(field) +
                                 "'");
      }
      if (is_label) {
        labels.push_back(value);
      } else {
        pixels.push_back(static_cast<float>(value) / 8 - 1);
        rest.remove_prefix(comma + 1);
      }
    }
  }
  const auto count = static_cast<int64_t>(labels.size());
  if (count < 10 * kBatchSize) {
    throw std::runtime_error(path.string() + ": at least 640 images expected, got " + std::to_string(count));
  }
  return {torch::tensor(pixels).view({count, kPixels}), torch::tensor(labels)};
}

/// Shuffled batches with a little noise, which keeps the large network from learning 1,400 images by heart.
inline rarefy::distillation::BatchSource training_batches(const Examples& data) {
  return [data, order = std::vector<torch::Tensor>(),
          next = size_t{0}]() mutable -> std::optional<rarefy::distillation::Batch> {
    if (next == order.size()) {
      const bool finished = !order.empty();
      order.clear();
      next = 0;
      if (finished) {
        return std::nullopt;
      }
      order = torch::randperm(data.y.size(0)).split(kBatchSize);
    }
    const torch::Tensor index = order[next++];
    const torch::Tensor x = data.x.index_select(0, index);
    return rarefy::distillation::Batch{x + 0.15 * torch::randn_like(x), data.y.index_select(0, index)};
  };
}

}  // namespace digits
