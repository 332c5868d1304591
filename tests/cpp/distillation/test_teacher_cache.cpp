#include <rarefy/distillation/teacher_cache.h>
#include <torch/torch.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>

#include "catch.h"

using namespace rarefy::distillation;  // NOLINT(google-build-using-namespace)

namespace {

/// A folder that is gone at the end.
struct Folder {
  std::filesystem::path path = std::filesystem::temp_directory_path() /
                               ("rarefy_cache_" + std::to_string(::getpid()) + "_" + std::to_string(next++));
  Folder() { std::filesystem::create_directories(path); }
  Folder(const Folder&) = delete;
  Folder& operator=(const Folder&) = delete;
  ~Folder() { std::filesystem::remove_all(path); }
  static inline int next = 0;
};

TeacherCacheOptions options_for(const std::string& dtype) { return {40, 6, 2.0, dtype, "int64", "abc"}; }

}  // namespace

TEST_CASE("a cache gives back what was written, within its bound", "[teacher_cache]") {
  torch::manual_seed(0);
  const auto logits = torch::randn({10, 40}) * 4;
  const auto keys = torch::arange(10) * 3;
  for (const std::string dtype : {"float16", "uint8"}) {
    const Folder folder;
    const auto path = folder.path / "cache";
    {
      TeacherCacheWriter writer(path, options_for(dtype));
      writer.append(keys.slice(0, 0, 4), logits.slice(0, 0, 4));
      CHECK(writer.contains(9));
      CHECK_FALSE(writer.contains(12));
    }
    {  // resumed
      TeacherCacheWriter writer(path, options_for(dtype));
      CHECK(writer.samples() == 4);
      CHECK_THROWS_AS(writer.append(keys.slice(0, 3, 10), logits.slice(0, 3, 10)), c10::ValueError);
      writer.append(keys.slice(0, 4, 10), logits.slice(0, 4, 10));
      writer.finish();
      CHECK_THROWS_AS(writer.append(keys + 100, logits), c10::ValueError);
    }
    const TeacherCache cache(path);
    CHECK(cache.options() == options_for(dtype));
    const auto top = cache.get(keys.flip(0));
    const auto exact = topk_logits(logits.flip(0), 6, 2.0);
    CHECK(torch::equal(top.indices, exact.indices));
    const auto bound = cache.bound(20.0);
    const auto error = std::max((top.values - exact.values).abs().max().item<double>(),
                                (top.tail - exact.tail).abs().max().item<double>());
    CHECK(error > 0.0);
    CHECK(error <= bound.logit_error_max + 1e-6);
    CHECK(bound.rows == 10);
    CHECK(bound.loss_error_max.value() > bound.loss_error_mean.value());
    CHECK_THROWS_AS(cache.get(torch::tensor({1})), c10::IndexError);
    CHECK_THROWS_AS(cache.get(std::vector<std::string>{"a"}), c10::TypeError);
    cache.verify();
  }
}

TEST_CASE("a cache does not replace a file, and goes on", "[teacher_cache]") {
  const Folder folder;
  const auto path = folder.path / "cache";
  TeacherCacheWriter writer(path, options_for("uint8"));
  writer.append(torch::arange(4), torch::randn({4, 40}));
  std::ofstream(path) << "another";
  CHECK_THROWS_AS(writer.finish(), c10::ValueError);
  CHECK(std::filesystem::file_size(path) == 7);
  std::filesystem::remove(path);
  writer.append(torch::arange(4, 8), torch::randn({4, 40}));
  writer.finish();
  const TeacherCache cache(path);
  CHECK(cache.samples() == 8);
  cache.verify();
}

TEST_CASE("a damaged cache is refused", "[teacher_cache]") {
  const Folder folder;
  const auto path = folder.path / "cache";
  TeacherCacheWriter writer(path, options_for("uint8"));
  writer.append(torch::arange(8), torch::randn({8, 40}));
  CHECK_THROWS_AS(TeacherCache(path.string() + ".partial"), c10::ValueError);   // not finished
  CHECK_THROWS_AS(TeacherCacheWriter(path, options_for("uint8")), c10::Error);  // written already
  writer.finish();
  CHECK_THROWS_AS(TeacherCacheWriter(path, options_for("uint8")), c10::ValueError);
  {
    std::fstream file(path, std::ios::in | std::ios::out | std::ios::binary);
    file.seekp(-100, std::ios::end);  // in the last row: 88 bytes are the end
    file.put('x');
    file.put('y');
  }
  const TeacherCache cache(path);
  CHECK_THROWS_AS(cache.get(torch::arange(8)), c10::ValueError);
  CHECK_THROWS_AS(cache.verify(), c10::ValueError);
}
