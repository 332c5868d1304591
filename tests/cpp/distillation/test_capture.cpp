#include <rarefy/distillation/capture.h>
#include <torch/torch.h>

#include <memory>
#include <thread>

#include "catch.h"

using Catch::Matchers::ContainsSubstring;
using namespace rarefy::distillation;

namespace {

struct NetImpl : torch::nn::Module {
  NetImpl()
      : trunk(register_module("trunk", torch::nn::Linear(4, 5))),
        head(register_module("head", torch::nn::Linear(5, 3))) {}
  torch::Tensor forward(const torch::Tensor& x) { return tap("logits", head(tap("trunk", torch::relu(trunk(x))))); }
  torch::nn::Linear trunk, head;
};
TORCH_MODULE(Net);

}  // namespace

TEST_CASE("a tap records while a capture lives", "[capture]") {
  torch::manual_seed(0);
  Net net;
  const auto x = torch::randn({2, 4});
  const auto plain = net(x);
  TensorMap kept;
  {
    Capture capture;
    const auto logits = net(x);
    CHECK(torch::equal(logits, plain));
    REQUIRE(capture.features().size() == 2);
    CHECK(capture.features().at("logits").is_same(logits));
    kept = capture.take();
    CHECK(capture.features().empty());
    net(x);
    CHECK(capture.features().size() == 2);
  }
  net(x);
  CHECK(torch::equal(kept.at("trunk"), torch::relu(net->trunk(x))));
  kept.at("trunk").sum().backward();  // the record has its history
  CHECK(net->trunk->weight.grad().abs().sum().item<double>() > 0);
  CHECK_FALSE(net->head->weight.grad().defined());
}

TEST_CASE("a capture records the names that it was asked for", "[capture]") {
  Net net;
  const auto x = torch::randn({2, 4});
  Capture capture({"trunk"});
  for (int forward = 0; forward < 2; ++forward) {
    net(x);
    CHECK(capture.features().size() == 1);
    CHECK(capture.take().contains("trunk"));
  }
}

TEST_CASE("captures nest, on one thread", "[capture]") {
  Net net;
  const auto x = torch::randn({2, 4});
  auto outer = std::make_unique<Capture>();
  auto inner = std::make_unique<Capture>();
  net(x);
  CHECK(outer->features().empty());
  CHECK(inner->features().size() == 2);
  std::thread([&] { net(x); }).join();  // not of this thread: no name comes twice
  outer.reset();                        // in the wrong order
  inner->take();
  net(x);
  CHECK(inner->features().size() == 2);
  inner.reset();
  net(x);
}

TEST_CASE("a capture says what is wrong", "[capture]") {
  Net net;
  Capture capture({"trunk", "neck"});
  CHECK_THROWS_WITH(capture.take(),
                    ContainsSubstring("[Capture] a tap must have recorded 'neck' in the forward, got none"));
  net(torch::randn({1, 4}));
  CHECK_THROWS_WITH(capture.take(), ContainsSubstring("a tap must have recorded 'neck' in the forward, got 'trunk'"));
  CHECK(capture.features().size() == 1);
  CHECK_THROWS_WITH(net(torch::randn({1, 4})),
                    ContainsSubstring("[tap] each call in a forward must have a name of its own, got 'trunk' again"));
  CHECK_THROWS_WITH(Capture(std::vector<std::string>{}), ContainsSubstring("[Capture] names must not be empty"));
  CHECK_THROWS_WITH(Capture(std::vector<std::string>{"a", ""}),
                    ContainsSubstring("a name must not be empty, got 'a', ''"));
  Capture fresh({"logits"});
  CHECK_THROWS_AS(Capture(std::vector<std::string>{""}), c10::ValueError);
  net(torch::randn({1, 4}));  // the one that was refused is not the youngest
  CHECK(fresh.take().size() == 1);
}
