// Fake-quantizes a tensor through the installed library and compares it with the formula, written out.
// Arguments: the versions of rarefy and of torch that find_package reported; the library must say the same.
#include <ATen/ATen.h>
#include <rarefy/rarefy.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <string>
#include <vector>

int main(int argc, char** argv) {
  if (argc != 3 || rarefy::version() != argv[1] || rarefy::torch_version() != argv[2] ||
      rarefy::version() != RAREFY_VERSION) {
    std::fprintf(stderr, "the library is %s for torch %s, its header %s\n", rarefy::version().c_str(),
                 rarefy::torch_version().c_str(), RAREFY_VERSION);
    return 1;
  }

  // Ties (0.125 / 0.25), both ends of the range, zero.
  const std::vector<float> values{0.0f, 0.125f, 0.375f, -0.125f, 1.0f, -3.3f, 100.0f, -100.0f};
  constexpr float kScale = 0.25f;
  constexpr int kZeroPoint = 3;
  const auto quantized = rarefy::ops::fake_quantize(at::tensor(values), at::tensor({kScale}),
                                                    at::tensor({kZeroPoint}, at::kInt), std::nullopt, -128, 127);
  for (size_t i = 0; i < values.size(); ++i) {
    const float q = std::clamp(std::nearbyint(values[i] / kScale) + kZeroPoint, -128.0f, 127.0f);
    const float expected = (q - kZeroPoint) * kScale;
    const float actual = quantized[static_cast<int64_t>(i)].item<float>();
    if (actual != expected) {
      std::fprintf(stderr, "fake_quantize(%g) is %g, expected %g\n", values[i], actual, expected);
      return 1;
    }
  }

  try {
    rarefy::ops::fake_quantize(at::ones({2}), at::tensor({-1.0f}), at::tensor({0}, at::kInt), std::nullopt, -128, 127);
    std::fprintf(stderr, "a negative scale was accepted\n");
    return 1;
  } catch (const c10::ValueError& error) {  // the exception's type crosses the library boundary
    std::printf("expected error: %s\n", error.what_without_backtrace());
  }
  std::printf("rarefy %s, torch %s: %zu values as expected\n", rarefy::version().c_str(),
              rarefy::torch_version().c_str(), values.size());
  return 0;
}
