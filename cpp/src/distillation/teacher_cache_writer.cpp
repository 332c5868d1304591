#include <ATen/ops/aminmax.h>
#include <ATen/ops/isfinite.h>
#include <fcntl.h>
#include <rarefy/distillation/teacher_cache.h>
#include <sys/file.h>
#include <torch/utils.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <unordered_set>
#include <utility>

#include "distillation/mapped_file.h"
#include "distillation/teacher_cache_keys.h"
#include "ops/distillation_rule.h"

namespace rarefy::distillation {
namespace {

using namespace cache;  // NOLINT(google-build-using-namespace)

std::filesystem::path partial_of(const std::filesystem::path& path) {
  auto partial = path;
  partial += ".partial";
  return partial;
}

/// Renames a file unless there is one of the new name. Returns 0, or -1 with errno set and nothing changed.
int rename_new(const std::filesystem::path& from, const std::filesystem::path& to) {
  if (::renameat2(AT_FDCWD, from.c_str(), AT_FDCWD, to.c_str(), RENAME_NOREPLACE) == 0) {
    return 0;
  }
  if (errno != EINVAL && errno != ENOSYS) {
    return -1;
  }
  // Some network file systems cannot do both at once.
  if (std::filesystem::exists(to)) {
    errno = EEXIST;
    return -1;
  }
  return ::rename(from.c_str(), to.c_str());
}

std::string text_of(const TeacherCacheOptions& options) {
  std::ostringstream text;
  text << options;
  return text.str();
}

}  // namespace

void TeacherCacheOptions::validate() const {
  ops::resolve("TeacherCache", {.temperature = temperature});
  TORCH_CHECK_VALUE(classes >= 1 && classes <= std::numeric_limits<int32_t>::max(),
                    "[TeacherCache] classes must be in [1, 2^31 - 1], got ", classes);
  TORCH_CHECK_VALUE(k >= 1 && k <= classes, "[TeacherCache] k must be in [1, ", classes, "] (the classes), got ", k);
  TORCH_CHECK_VALUE(dtype == "float16" || dtype == "uint8", "[TeacherCache] dtype must be 'float16' or 'uint8', got '",
                    dtype, "'");
  TORCH_CHECK_VALUE(key == "int64" || key == "string", "[TeacherCache] key must be 'int64' or 'string', got '", key,
                    "'");
  TORCH_CHECK_VALUE(fingerprint.size() <= kFingerprint && fingerprint.find('\0') == std::string::npos,
                    "[TeacherCache] fingerprint must have at most ", kFingerprint, " bytes without zeros, got ",
                    fingerprint.size(), " bytes");
}

std::ostream& operator<<(std::ostream& stream, const TeacherCacheOptions& options) {
  return stream << "TeacherCacheOptions(classes=" << options.classes << ", k=" << options.k
                << ", temperature=" << options.temperature << ", dtype='" << options.dtype << "', key='" << options.key
                << "', fingerprint='" << options.fingerprint << "')";
}

struct TeacherCacheWriter::State {
  State(const std::filesystem::path& to, const TeacherCacheOptions& given)
      : path(to),
        partial(partial_of(to)),
        options(checked(to, given)),
        header(to_header(given)),
        file(partial, O_RDWR | O_CREAT) {
    TORCH_CHECK(::flock(file.get(), LOCK_EX | LOCK_NB) == 0, "[TeacherCache] ", partial.string(),
                " is being written by another process");
    const Mapping mapping(file, partial);
    if (mapping.size() < sizeof(Header)) {  // new, or it ended before the header was whole
      truncate(0);
      write(&header, sizeof(header));
      return;
    }
    const auto found = to_options(read_header(mapping.data(), mapping.size(), partial.string()));
    TORCH_CHECK_VALUE(found == options, "[TeacherCache] ", partial.string(), " must hold ", text_of(options), ", got ",
                      text_of(found), ": delete the file to begin anew");
    const auto contents = scan(header, mapping.data(), mapping.size(), /*check_rows=*/true);
    for (const auto& block : contents.blocks) {
      for (const auto& sample : block.samples) {
        keys.insert(sample.key);
      }
    }
    truncate(contents.end);  // what a crash left half written, or the end of a run that could not rename
  }

  static const TeacherCacheOptions& checked(const std::filesystem::path& path, const TeacherCacheOptions& options) {
    options.validate();
    TORCH_CHECK_VALUE(!std::filesystem::exists(path), "[TeacherCache] ", path.string(),
                      " must not exist: it is a finished cache, and would be replaced");
    return options;
  }

  void truncate(uint64_t size) {
    TORCH_CHECK(::ftruncate(file.get(), static_cast<off_t>(size)) == 0 &&
                    ::lseek(file.get(), static_cast<off_t>(size), SEEK_SET) >= 0,
                "[TeacherCache] cannot write ", partial.string(), ": ", last_error());
    end = size;
  }

  /// Appends bytes and waits until they are on the disk. All of them or none.
  void write(const void* data, size_t size) {
    const auto* bytes = static_cast<const char*>(data);
    size_t left = size;
    while (left > 0) {
      const auto written = ::write(file.get(), bytes, left);
      if (written > 0) {
        bytes += written;
        left -= static_cast<size_t>(written);
      } else if (written == 0 || errno != EINTR) {
        fail(size);
      }
    }
    if (::fsync(file.get()) != 0) {
      fail(size);
    }
    end += size;
  }

  [[noreturn]] void fail(size_t size) {
    const auto reason = last_error();
    truncate(end);
    TORCH_CHECK(false, "[TeacherCache] cannot write ", size, " bytes to ", partial.string(), ": ", reason, ". The ",
                keys.size(), " samples before are kept: make room and run again to go on from there");
  }

  void append(std::vector<std::string> batch, const torch::Tensor& logits, const torch::Tensor& mask);

  std::filesystem::path path, partial;
  TeacherCacheOptions options;
  Header header;
  Descriptor file;
  uint64_t end = 0;  // bytes of whole blocks
  std::unordered_set<std::string> keys;
  bool finished = false;
};

void TeacherCacheWriter::State::append(std::vector<std::string> batch, const torch::Tensor& logits,
                                       const torch::Tensor& given_mask) {
  TORCH_CHECK_VALUE(!finished, "[TeacherCache] ", path.string(), " is finished, and nothing can be appended");
  const auto count = static_cast<int64_t>(batch.size());
  TORCH_CHECK_TYPE(logits.is_floating_point(), "[TeacherCache] logits must be floating point, got ",
                   logits.scalar_type());
  TORCH_CHECK_VALUE(
      (logits.dim() == 2 || logits.dim() == 3) && logits.size(0) == count && logits.size(-1) == options.classes,
      "[TeacherCache] logits must have shape [", count, ", ", options.classes, "] or [", count, ", length, ",
      options.classes, "], got ", logits.sizes());
  const auto mask = dense_mask(given_mask, count);
  const bool sequences = logits.dim() == 3;
  TORCH_CHECK_VALUE(!mask.defined() || (sequences && mask.size(1) == logits.size(1)),
                    "[TeacherCache] mask must have the logits' shape without classes, got ", mask.sizes(), " for ",
                    logits.sizes());
  std::unordered_set<std::string> fresh;
  for (const auto& key : batch) {
    TORCH_CHECK_VALUE(!keys.contains(key) && fresh.insert(key).second, "[TeacherCache] sample ids must differ, got ",
                      key_text(header.string_keys != 0, key), " twice");
  }
  if (count == 0) {
    return;
  }

  const torch::NoGradGuard no_grad;
  const int64_t length = sequences ? logits.size(1) : 1;
  auto rows = logits.detach().reshape({-1, options.classes});
  if (mask.defined()) {
    rows = rows.index_select(0, mask.view({-1}).nonzero().view({-1}).to(rows.device()));
  }
  std::vector<Sample> samples;
  for (int64_t i = 0; i < count; ++i) {
    const auto kept = mask.defined() ? mask[i].sum().item<int64_t>() : length;
    samples.push_back({std::move(batch[static_cast<size_t>(i)]), sequences ? kept : -1, 0});
  }

  const auto bytes = row_bytes(header);
  std::vector<uint8_t> data(static_cast<size_t>(rows.size(0)) * bytes);
  Losses losses;
  const int64_t step = std::max<int64_t>(1, (int64_t{1} << 21) / options.classes);
  for (int64_t first = 0; first < rows.size(0); first += step) {
    const auto part = rows.narrow(0, first, std::min(step, rows.size(0) - first)).to(at::kDouble);
    const auto [least, most] = at::aminmax(part, 1);
    TORCH_CHECK_VALUE(at::isfinite(most).all().item<bool>(),
                      "[TeacherCache] logits must have a finite maximum in every row and no NaN");
    const auto top = topk_logits(part, options.k, options.temperature);
    const auto values = top.values.cpu().contiguous(), indices = top.indices.cpu().contiguous();
    const auto tail = top.tail.cpu(), range = (most - least).cpu();
    // Relative to the largest logit, so that nothing overflows.
    const auto all = ((part - most.unsqueeze(1)) / options.temperature).exp_().sum(1).cpu();
    const auto other = ((top.tail - most) / options.temperature).exp_().cpu();
    for (int64_t row = 0; row < part.size(0); ++row) {
      const double error =
          encode_row(header, values.const_data_ptr<double>() + row * options.k,
                     indices.const_data_ptr<int64_t>() + row * options.k, tail.const_data_ptr<double>()[row],
                     data.data() + static_cast<size_t>(first + row) * bytes);
      const double mass = other.const_data_ptr<double>()[row] / all.const_data_ptr<double>()[row];
      losses.add({1, error, error * error, error, mass, mass, range.const_data_ptr<double>()[row]});
    }
  }
  const auto block = format_block(samples, data, losses);
  write(block.data(), block.size());
  keys.merge(fresh);
}

TeacherCacheWriter::TeacherCacheWriter(const std::filesystem::path& path, const TeacherCacheOptions& options)
    : state_(std::make_unique<State>(path, options)) {}
TeacherCacheWriter::TeacherCacheWriter(TeacherCacheWriter&&) noexcept = default;
TeacherCacheWriter& TeacherCacheWriter::operator=(TeacherCacheWriter&&) noexcept = default;
TeacherCacheWriter::~TeacherCacheWriter() = default;

bool TeacherCacheWriter::contains(int64_t key) const {
  check_key_kind(state_->options, "int64");
  return state_->keys.contains(key_bytes(key));
}

bool TeacherCacheWriter::contains(const std::string& key) const {
  check_key_kind(state_->options, "string");
  return state_->keys.contains(key);
}

void TeacherCacheWriter::append(const torch::Tensor& keys, const torch::Tensor& logits, const torch::Tensor& mask) {
  check_key_kind(state_->options, "int64");
  state_->append(key_bytes(keys), logits, mask);
}

void TeacherCacheWriter::append(const std::vector<std::string>& keys, const torch::Tensor& logits,
                                const torch::Tensor& mask) {
  check_key_kind(state_->options, "string");
  state_->append(keys, logits, mask);
}

int64_t TeacherCacheWriter::samples() const { return static_cast<int64_t>(state_->keys.size()); }

const TeacherCacheOptions& TeacherCacheWriter::options() const { return state_->options; }

void TeacherCacheWriter::finish() {
  TORCH_CHECK_VALUE(!state_->finished, "[TeacherCache] ", state_->path.string(), " is finished already");
  const auto block = format_end(samples());
  const auto end = state_->end;
  state_->write(block.data(), block.size());
  if (rename_new(state_->partial, state_->path) != 0) {
    const auto error = errno;
    state_->truncate(end);  // so that more can be appended
    TORCH_CHECK_VALUE(
        error != EEXIST, "[TeacherCache] ", state_->path.string(),
        " must not exist: it was made while the cache was written, and would be replaced. The samples are kept in ",
        state_->partial.string());
    TORCH_CHECK(false, "[TeacherCache] cannot rename ", state_->partial.string(), " to ", state_->path.string(), ": ",
                std::generic_category().message(error));
  }
  state_->finished = true;
}

}  // namespace rarefy::distillation
