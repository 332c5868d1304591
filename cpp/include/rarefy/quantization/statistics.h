#pragma once

#include <ATen/core/Tensor.h>
#include <rarefy/export.h>
#include <rarefy/quantization/observer.h>
#include <torch/nn/module.h>

#include <filesystem>
#include <map>
#include <optional>
#include <string>

// What calibration has seen, on the disk, so that ranges can be chosen again without data: for another width, for a symmetric
// grid or not, by another search. One file of the safetensors format; its tensors are `<quantizer>.<buffer>`, its metadata say
// how each quantizer observed. Both languages write and read it with these functions.
namespace rarefy::quantization {

/// What a file holds of one quantizer.
struct QuantizerStatistics {
  /// "Histogram(bins=2048, search='mse', norm=2)": how they were gathered; for people and messages.
  std::string observer;
  /// The grid that they were gathered for; for people and messages.
  std::string scheme;
  /// The axis that has one row of statistics per index; unset for one row.
  std::optional<int64_t> axis = std::nullopt;
  /// min_val, max_val and skipped; hist, hist_min and hist_max, or batch_min, batch_max and batches, where there are such.
  std::map<std::string, at::Tensor> tensors;
};
using Statistics = std::map<std::string, QuantizerStatistics>;

/// Writes a file under another name and renames it, so that a failure leaves what was there.
/// Throws c10::ValueError for statistics that are not valid, c10::Error when the file cannot be written.
RAREFY_API void write_statistics(const Statistics& statistics, const std::filesystem::path& path);

/// Reads a file and checks everything: shapes, types, counts that are not negative, ranges that are finite or unset.
/// Throws c10::ValueError that names the file, the quantizer and the rule; c10::Error when it cannot be read.
RAREFY_API Statistics read_statistics(const std::filesystem::path& path);

/// The buffers that a quantizer with this observer takes from a file's: its statistics, and min_val, max_val and skipped. A
/// running range is also taken from a histogram, or from ranges of batches of which none was left out.
/// Throws c10::ValueError, which names the quantizer, where the file has not what the observer keeps (a histogram of as many
/// bins, ranges of as many batches), or has it for another axis or number of rows.
RAREFY_API std::map<std::string, at::Tensor> statistics_for(const std::string& name, const QuantizerStatistics& saved,
                                                            const Observer& observer, std::optional<int64_t> axis,
                                                            int64_t rows);

/// Writes what the activation quantizers of a prepared model have seen. Throws as write_statistics, and c10::ValueError when the
/// model is not prepared or a quantizer has seen nothing (they are named).
RAREFY_API void save_statistics(const torch::nn::Module& model, const std::filesystem::path& path);

/// Gives the activation quantizers of a prepared model, whose names must be those of the file, what the file's have seen, and
/// chooses their ranges; they quantize from now on, as after calibrate().
/// Throws as read_statistics and statistics_for, and c10::ValueError for names that differ (they are listed). The model is then as
/// it was.
RAREFY_API void load_statistics(torch::nn::Module& model, const std::filesystem::path& path);

}  // namespace rarefy::quantization
