#include <rarefy/rarefy.h>
#include <torch/torch.h>

#include "catch.h"

namespace ops = rarefy::ops;
using Catch::Matchers::ContainsSubstring;

namespace {

/// A weight with whole blocks that are kept, of small whole numbers, whose sums are exact.
at::Tensor block_weight(int64_t rows, int64_t columns, int64_t height, int64_t width) {
  const auto kept = (at::rand({rows, columns}) < 0.4).to(at::kFloat);
  const auto mask = kept.repeat_interleave(height, 0).repeat_interleave(width, 1);
  return at::randint(-9, 10, mask.sizes(), at::kFloat) * mask;
}

}  // namespace

TEST_CASE("sparse_linear is the product with the dense weight", "[sparse_linear]") {
  torch::manual_seed(1);
  const int64_t blocks[][2] = {{1, 1}, {4, 4}, {16, 1}, {1, 16}, {2, 3}, {8, 8}, {4, 16}};
  for (const auto& [height, width] : blocks) {
    const auto weight = block_weight(9, 11, height, width);
    const auto sparse = ops::to_sparse_weight(weight, height, width);
    REQUIRE(at::equal(ops::to_dense_weight(sparse, weight.size(1)), weight));
    const auto bias = at::randint(-9, 10, {weight.size(0)}, at::kFloat);
    for (const int64_t samples : {0, 1, 2, 16, 33, 70}) {
      const auto x = at::randint(-9, 10, {samples, weight.size(1)}, at::kFloat);
      REQUIRE(at::equal(ops::sparse_linear(x, sparse), x.matmul(weight.t())));
      REQUIRE(at::equal(ops::sparse_linear(x, sparse, bias), x.matmul(weight.t()) + bias));
      // Products of integers below 2^8 are exact in bfloat16, and so are sums of a few of them.
      const auto small = ops::to_sparse_weight(weight.sign().to(at::kBFloat16), height, width);
      const auto y = ops::sparse_linear(x.sign().to(at::kBFloat16), small);
      REQUIRE(y.scalar_type() == at::kBFloat16);
      REQUIRE(at::equal(y.to(at::kFloat), x.sign().matmul(weight.sign().t())));
    }
  }
}

TEST_CASE("sparse_linear refuses what does not fit", "[sparse_linear]") {
  const auto sparse = ops::to_sparse_weight(at::eye(4));
  REQUIRE_THROWS_WITH(ops::sparse_linear(at::ones({2, 3}), sparse),
                      ContainsSubstring("[sparse_linear] columns must be in [0, 3) for an input of 3 features"));
  REQUIRE_THROWS_WITH(ops::sparse_linear(at::ones({2, 4}, at::kDouble), sparse),
                      ContainsSubstring("[sparse_linear] input must be of the type of the values"));
  REQUIRE_THROWS_WITH(ops::to_sparse_weight(at::ones({3, 4}), 2, 2),
                      ContainsSubstring("[to_sparse_weight] the sizes of the weight must be multiples of the block's"));
  auto x = at::ones({2, 4}).requires_grad_();
  REQUIRE_THROWS_WITH(ops::sparse_linear(x, sparse).sum().backward(),
                      ContainsSubstring("[sparse_linear] is for inference and has no gradient"));
}
