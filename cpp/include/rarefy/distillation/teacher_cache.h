#pragma once

#include <rarefy/distillation/top_k.h>
#include <rarefy/export.h>

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <ostream>
#include <string>
#include <vector>

// Teacher outputs on disk: for each sample the k largest logits, the tail of the others at a stated temperature, and what
// was lost. One file, memory-mapped for reading, keyed by a sample id (int64 or string); C++ and Python read the same files.
//
// A sample is one row of logits [classes] or a sequence of them [length, classes]. Stored are the differences from the
// largest logit, as float16 or as uint8 with a scale per row, and float32 for the largest and the tail.
namespace rarefy::distillation {

/// What a cache holds. Two runs may write to one file when these are equal.
struct RAREFY_API TeacherCacheOptions {
  int64_t classes = 0;            // of the teacher, 1 to 2^31 - 1
  int64_t k = 64;                 // logits kept per row, at most `classes`
  double temperature = 4.0;       // T > 0
  std::string dtype = "float16";  // of the differences: "float16" or "uint8"
  std::string key = "int64";      // of the sample ids: "int64" or "string"
  std::string fingerprint;        // says which teacher: a hash of its weights, at most 128 bytes without zeros

  /// Throws c10::ValueError for a field out of range.
  void validate() const;
  bool operator==(const TeacherCacheOptions&) const = default;
};
RAREFY_API std::ostream& operator<<(std::ostream& stream, const TeacherCacheOptions& options);

/// How far a loss with the cached teacher may be from the loss with the full one, over all rows of a cache; derived in
/// docs/dev/numerics.md. With T the cache's temperature, e the largest error of a stored logit of a row and m the teacher's
/// probability outside the row's k classes at T:
struct RAREFY_API TeacherCacheBound {
  int64_t samples = 0, rows = 0;
  double temperature = 0.0;
  double logit_error_mean = 0.0, logit_error_max = 0.0;  // e, measured when the rows were written
  double log_probability_error_max = 0.0;                // 2 e / T: of the log-probability of any of the k + 1 outcomes
  double tail_mass_mean = 0.0, tail_mass_max = 0.0;      // m
  /// L1 norm of the error of the gradient of T^2 KL(teacher || student) in a row's student logits, for every student:
  /// T * (2 tanh(e / (2 T)) + 2 m).
  double gradient_error_mean = 0.0, gradient_error_max = 0.0;
  /// Of T^2 KL itself: m R^2 / 8 + e (R + e) / 2 for every student whose logits differ from the teacher's, class by class,
  /// within an interval of length R. Here R is the teacher's widest row (greatest minus least logit) plus `student_range`,
  /// the widest row of the student; absent when that was not given.
  double teacher_range = 0.0;
  std::optional<double> student_range, loss_error_mean, loss_error_max;
};
RAREFY_API std::ostream& operator<<(std::ostream& stream, const TeacherCacheBound& bound);

/// Writes a cache, batch by batch, to `path` + ".partial"; finish() gives it its name. A run that stops anywhere is resumed
/// by opening the same path with equal options: batches that were written whole are there, half a batch is cut off.
class RAREFY_API TeacherCacheWriter {
 public:
  /// Opens a new file or resumes one. Throws c10::ValueError when the options differ from those of the file, or when `path`
  /// exists already, c10::Error when another process writes to it or the file cannot be opened.
  TeacherCacheWriter(const std::filesystem::path& path, const TeacherCacheOptions& options);
  TeacherCacheWriter(TeacherCacheWriter&&) noexcept;
  TeacherCacheWriter& operator=(TeacherCacheWriter&&) noexcept;
  ~TeacherCacheWriter();

  /// Whether a sample has been written.
  bool contains(int64_t key) const;
  bool contains(const std::string& key) const;

  /// Writes a batch of logits [batch, classes], or [batch, length, classes] of which the positions where the bool mask
  /// [batch, length] is true are kept, in order. keys: int64 [batch], or strings. On return the batch is on the disk; when
  /// something is thrown nothing of it is, and what was written before stays. Throws c10::ValueError for wrong shapes, a
  /// key that is there already, and rows with NaN, +inf or only -inf; c10::Error when the file cannot be written.
  void append(const torch::Tensor& keys, const torch::Tensor& logits, const torch::Tensor& mask = {});
  void append(const std::vector<std::string>& keys, const torch::Tensor& logits, const torch::Tensor& mask = {});

  /// Samples in the file.
  int64_t samples() const;
  const TeacherCacheOptions& options() const;
  /// Writes the end and renames the file to `path`. Nothing can be appended after it. Throws c10::ValueError where there is
  /// a file of that name by now, c10::Error where it cannot be renamed: samples are kept, and finish() can be called again.
  void finish();

 private:
  struct State;
  std::unique_ptr<State> state_;
};

/// A finished cache. Samples are read from the mapped file; copies share it.
class RAREFY_API TeacherCache {
 public:
  /// Throws c10::ValueError when the file is no cache, of another version, not finished, or damaged.
  explicit TeacherCache(const std::filesystem::path& path);

  const TeacherCacheOptions& options() const;
  int64_t samples() const;
  bool contains(int64_t key) const;
  bool contains(const std::string& key) const;

  /// The logits of samples, float32 on the CPU: [batch, k], or [batch, length, k] for sequences. With a bool mask
  /// [batch, length] the rows of a sample go to the positions where it is true, in order, and there must be as many. Without
  /// one they come first, and length is the longest. Other positions hold equal logits for the classes 0 to k - 1: they are
  /// for the loss's mask to leave out. Throws c10::IndexError for a key that is not there, c10::ValueError when samples with
  /// and without a sequence are mixed, when the mask does not fit, or when the rows are not as they were written.
  TopKLogits get(const torch::Tensor& keys, const torch::Tensor& mask = {}) const;
  TopKLogits get(const std::vector<std::string>& keys, const torch::Tensor& mask = {}) const;

  /// The bound over all rows. student_range: the widest row of the student's logits (greatest minus least), if it is known.
  TeacherCacheBound bound(std::optional<double> student_range = std::nullopt) const;
  /// Compares the checksums of all rows. Throws c10::ValueError at the first that differs.
  void verify() const;

 private:
  struct State;
  std::shared_ptr<State> state_;
};

}  // namespace rarefy::distillation
