#define CATCH_CONFIG_RUNNER
#include <ATen/Context.h>

#include <cstdlib>

#include "catch.h"

namespace {

#ifdef RAREFY_CATCH2_V3
using Listener = Catch::EventListenerBase;
#else
using Listener = Catch::TestEventListenerBase;
#endif

// LibTorch seeds its generator from the system's randomness: a test would draw other numbers in every run.
// RAREFY_TEST_SEED=N tries others.
struct Seed : Listener {
  using Listener::Listener;
  void testCaseStarting(const Catch::TestCaseInfo& info) override {
    Listener::testCaseStarting(info);
    const char* seed = std::getenv("RAREFY_TEST_SEED");
    at::manual_seed(seed == nullptr ? 0 : std::strtoull(seed, nullptr, 10));
  }
};

}  // namespace

CATCH_REGISTER_LISTENER(Seed)

int main(int argc, char** argv) { return Catch::Session().run(argc, argv); }
