#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <rarefy/distillation/teacher_cache.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <unordered_map>

#include "distillation/mapped_file.h"
#include "distillation/teacher_cache_keys.h"

namespace rarefy::distillation {
namespace {

using namespace cache;  // NOLINT(google-build-using-namespace)

struct Place {
  uint32_t block;
  int64_t length;  // as Sample's
  uint64_t offset;
};

}  // namespace

struct TeacherCache::State {
  explicit State(const std::filesystem::path& from)
      : name(from.string()),
        mapping(Descriptor(from, O_RDONLY), from),
        header(read_header(mapping.data(), mapping.size(), name)),
        options(to_options(header)) {
    auto contents = scan(header, mapping.data(), mapping.size(), /*check_rows=*/false);
    TORCH_CHECK_VALUE(contents.complete, "[TeacherCache] ", name, " must be finished and whole, got ", contents.samples,
                      " samples and then, at byte ", contents.end, " of ", mapping.size(),
                      ", something else than the end");
    losses = contents.losses;
    blocks = std::move(contents.blocks);
    places.reserve(static_cast<size_t>(contents.samples));
    for (size_t i = 0; i < blocks.size(); ++i) {
      for (auto& sample : blocks[i].samples) {
        places.emplace(std::move(sample.key), Place{static_cast<uint32_t>(i), sample.length, sample.offset});
      }
      blocks[i].samples = {};
    }
    checked = std::vector<std::atomic<bool>>(blocks.size());
  }

  /// Compares a block's checksum, the first time that it is read.
  void check(size_t block) {
    if (!checked[block].load(std::memory_order_relaxed)) {
      const auto& b = blocks[block];
      TORCH_CHECK_VALUE(checksum(mapping.data() + b.data_offset, b.data_bytes) == b.data_checksum, "[TeacherCache] ",
                        name, " is damaged: the rows at bytes ", b.data_offset, " to ", b.data_offset + b.data_bytes,
                        " are not as they were written");
      checked[block].store(true, std::memory_order_relaxed);
    }
  }

  TopKLogits get(const std::vector<std::string>& keys, const torch::Tensor& given_mask);

  std::string name;
  Mapping mapping;
  Header header;
  TeacherCacheOptions options;
  Losses losses;
  std::vector<Block> blocks;
  std::vector<std::atomic<bool>> checked;
  std::unordered_map<std::string, Place> places;
};

TopKLogits TeacherCache::State::get(const std::vector<std::string>& keys, const torch::Tensor& given_mask) {
  const auto batch = static_cast<int64_t>(keys.size());
  const auto mask = dense_mask(given_mask, batch);
  std::vector<Place> found;
  int64_t longest = 0;
  for (const auto& key : keys) {
    const auto place = places.find(key);
    TORCH_CHECK_INDEX(place != places.end(), "[TeacherCache] a sample id must be one of the ", places.size(), " in ",
                      name, ", got ", key_text(header.string_keys != 0, key));
    found.push_back(place->second);
    TORCH_CHECK_VALUE((found.back().length < 0) == (found.front().length < 0),
                      "[TeacherCache] the samples of a batch must all be sequences or all be single rows, got both");
    longest = std::max(longest, found.back().length);
  }
  const bool sequences = batch > 0 && found.front().length >= 0;
  TORCH_CHECK_VALUE(!mask.defined() || sequences || batch == 0,
                    "[TeacherCache] mask must be given for sequences only, got one for single rows");
  const int64_t length = !sequences ? 1 : mask.defined() ? mask.size(1) : longest;
  const int64_t k = header.k;
  auto values = at::zeros({batch, length, k}, at::kFloat);
  auto indices = at::arange(k, at::kLong).expand({batch, length, k}).contiguous();
  auto tail =
      at::full({batch, length}, k < header.classes ? 0.0 : -std::numeric_limits<double>::infinity(), at::kFloat);
  const auto bytes = row_bytes(header);
  for (int64_t i = 0; i < batch; ++i) {
    const auto& place = found[static_cast<size_t>(i)];
    const int64_t rows = sequences ? place.length : 1;
    check(place.block);
    int64_t row = 0;
    for (int64_t position = 0; position < length; ++position) {
      if (mask.defined() ? !mask.const_data_ptr<bool>()[i * length + position] : position >= rows) {
        continue;
      }
      if (row < rows) {
        const int64_t at = i * length + position;
        decode_row(header, mapping.data() + place.offset + static_cast<size_t>(row) * bytes,
                   values.mutable_data_ptr<float>() + at * k, indices.mutable_data_ptr<int64_t>() + at * k,
                   tail.mutable_data_ptr<float>() + at);
      }
      ++row;
    }
    TORCH_CHECK_VALUE(row == rows, "[TeacherCache] mask must be true at ", rows, " positions for sample ",
                      key_text(header.string_keys != 0, keys[static_cast<size_t>(i)]), ", got ", row);
  }
  if (!sequences) {
    values = values.squeeze(1);
    indices = indices.squeeze(1);
    tail = tail.squeeze(1);
  }
  return {values, indices, tail, header.temperature, header.classes};
}

TeacherCache::TeacherCache(const std::filesystem::path& path) : state_(std::make_shared<State>(path)) {}

const TeacherCacheOptions& TeacherCache::options() const { return state_->options; }

int64_t TeacherCache::samples() const { return static_cast<int64_t>(state_->places.size()); }

bool TeacherCache::contains(int64_t key) const {
  check_key_kind(state_->options, "int64");
  return state_->places.contains(key_bytes(key));
}

bool TeacherCache::contains(const std::string& key) const {
  check_key_kind(state_->options, "string");
  return state_->places.contains(key);
}

TopKLogits TeacherCache::get(const torch::Tensor& keys, const torch::Tensor& mask) const {
  check_key_kind(state_->options, "int64");
  return state_->get(key_bytes(keys), mask);
}

TopKLogits TeacherCache::get(const std::vector<std::string>& keys, const torch::Tensor& mask) const {
  check_key_kind(state_->options, "string");
  return state_->get(keys, mask);
}

TeacherCacheBound TeacherCache::bound(std::optional<double> student_range) const {
  TORCH_CHECK_VALUE(!student_range.has_value() || (std::isfinite(*student_range) && *student_range >= 0.0),
                    "[TeacherCache] student_range must be finite and not negative, got ", student_range.value_or(0.0));
  const auto& losses = state_->losses;
  const auto rows = static_cast<double>(std::max<int64_t>(losses.rows, 1));
  const double t = state_->options.temperature;
  const double error = losses.error_sum / rows, tail = losses.tail_sum / rows;
  // tanh is concave here, so that of the mean is no less than the mean of it.
  const auto gradient = [t](double e, double m) { return 2.0 * t * (std::tanh(e / (2.0 * t)) + m); };
  TeacherCacheBound bound{samples(),
                          losses.rows,
                          t,
                          error,
                          losses.error_max,
                          2.0 * losses.error_max / t,
                          tail,
                          losses.tail_max,
                          gradient(error, tail),
                          gradient(losses.error_max, losses.tail_max),
                          losses.range_max,
                          student_range,
                          std::nullopt,
                          std::nullopt};
  if (student_range.has_value()) {
    const double range = losses.range_max + *student_range;
    const double squared = range * range / 8.0;
    const auto truncation = [squared](double m) { return m == 0.0 ? 0.0 : m * squared; };
    const auto rounding = [range](double e, double e_squared) {
      return e == 0.0 ? 0.0 : 0.5 * (e * range + e_squared);
    };
    bound.loss_error_mean = truncation(tail) + rounding(error, losses.error_squares / rows);
    bound.loss_error_max =
        truncation(losses.tail_max) + rounding(losses.error_max, losses.error_max * losses.error_max);
  }
  return bound;
}

void TeacherCache::verify() const {
  for (size_t block = 0; block < state_->blocks.size(); ++block) {
    state_->checked[block].store(false, std::memory_order_relaxed);
    state_->check(block);
  }
}

std::ostream& operator<<(std::ostream& stream, const TeacherCacheBound& bound) {
  stream << "TeacherCacheBound of " << bound.samples << " samples, " << bound.rows << " rows, at temperature "
         << bound.temperature << " (mean, max)\n  error of a stored logit        " << bound.logit_error_mean << ", "
         << bound.logit_error_max << "\n  probability left to the tail   " << bound.tail_mass_mean << ", "
         << bound.tail_mass_max << "\n  gradient of T^2 KL, L1 error   " << bound.gradient_error_mean << ", "
         << bound.gradient_error_max;
  if (bound.loss_error_mean.has_value()) {
    stream << "\n  T^2 KL, error                  " << *bound.loss_error_mean << ", " << *bound.loss_error_max
           << "  for students whose logits span at most " << *bound.student_range;
  }
  return stream;
}

}  // namespace rarefy::distillation
