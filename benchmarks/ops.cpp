// Times of the operators as C++ calls them, beside a copy of the same tensor; one JSON line each.
// rarefy_benchmark_ops [ELEMENTS]   (default 1048576)
#include <rarefy/rarefy.h>
#include <torch/torch.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <utility>
#include <vector>

int main(int argc, char** argv) {
  const int64_t elements = argc > 1 ? std::atoll(argv[1]) : int64_t{1} << 20;
  TORCH_CHECK(elements > 0, "ELEMENTS must be positive, got ", elements);
  const auto x = torch::randn({elements});
  auto copy = torch::empty_like(x);
  auto scale = torch::full({1}, 0.02f);
  auto zero_point = torch::full({1}, 128, torch::kInt32);
  auto min_val = torch::full({1}, -2.0f);
  auto max_val = torch::full({1}, 2.0f);
  auto skipped = torch::zeros({1}, torch::kLong);

  using rarefy::ops::fake_quantize_mask;
  const std::vector<std::pair<const char*, std::function<void()>>> functions{
      {"copy", [&] { copy.copy_(x); }},
      {"fake_quantize", [&] { rarefy::ops::fake_quantize(x, scale, zero_point, std::nullopt, 0, 255); }},
      {"fake_quantize with mask", [&] { fake_quantize_mask(x, scale, zero_point, std::nullopt, 0, 255); }},
      {"quantize", [&] { rarefy::ops::quantize(x, scale, zero_point, std::nullopt, 0, 255); }},
      {"observe",
       [&] {
         rarefy::ops::observe(x, min_val, max_val, scale, zero_point, skipped, std::nullopt, 0.01, 0, 255, false);
       }},
  };
  constexpr int kRounds = 31;
  std::vector<std::vector<double>> seconds(functions.size());
  for (int round = -3; round < kRounds; ++round) {  // the first three warm up
    for (size_t i = 0; i < functions.size(); ++i) {
      const auto begin = std::chrono::steady_clock::now();
      functions[i].second();
      const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - begin;
      if (round >= 0) {
        seconds[i].push_back(elapsed.count());
      }
    }
  }
  for (auto& times : seconds) {
    std::nth_element(times.begin(), times.begin() + kRounds / 2, times.end());
  }
  for (size_t i = 0; i < functions.size(); ++i) {
    std::printf("{\"what\": \"%s\", \"elements\": %lld, \"threads\": %d, \"ms\": %.4f, \"ratio_to_copy\": %.2f}\n",
                functions[i].first, static_cast<long long>(elements), torch::get_num_threads(),
                1e3 * seconds[i][kRounds / 2], seconds[i][kRounds / 2] / seconds[0][kRounds / 2]);
  }
  return 0;
}
