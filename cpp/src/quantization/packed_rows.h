// Rows of a tensor that a format stores, as numbers.
#pragma once

#include <ATen/core/Tensor.h>
#include <rarefy/quantization/packed.h>

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace rarefy::quantization {

/// Reads rows (indices of the first dimension) of a tensor on the CPU, of one or more dimensions, as float32. The numbers are those
/// of dequantize(), bit for bit, for parts whose dtype is not float64.
class PackedRows {
 public:
  /// Throws as check_parts, with `function` at the beginning. The tensors must live as long.
  PackedRows(const char* function, const QuantizedTensorParts& parts);

  int64_t rows() const { return rows_; }
  /// The elements of a row.
  int64_t width() const { return width_; }

  /// Rows [begin, end) to out [end - begin, width]. May be called by several threads.
  void read(int64_t begin, int64_t end, float* out) const;

 private:
  /// Neighbours in a row with one scale.
  struct Run {
    int64_t begin, end, offset;
  };

  void lay_out(const std::vector<int64_t>& shape);
  int64_t first_scale(int64_t row) const { return row / tall_ * stride_; }
  void read_scales(int64_t begin, int64_t end, float* out) const;
  template <typename Code>
  void read_codes(int64_t row, Code* out) const;
  void read_row(const uint8_t* codes, const float* scales, int64_t first, float* out) const;
  void read_wide_row(const uint16_t* codes, const float* scales, int64_t first, float* out) const;
  float zero_of(int64_t scale) const { return zeros_ == nullptr ? zero_ : static_cast<float>(zeros_[scale] - lowest_); }

  const QuantizedTensorParts& parts_;
  std::map<std::string, at::Tensor> kept_;  // contiguous
  int64_t rows_ = 0, width_ = 0, bits_ = 8;
  int64_t tall_ = 1, stride_ = 0, last_offset_ = 0;  // row r has the scales from r / tall_ * stride_ on
  std::vector<Run> runs_;
  const uint8_t* data_ = nullptr;
  bool is_integer_ = false;
  float zero_ = 0;      // the code of 0, of symmetric integers
  int64_t lowest_ = 0;  // the smallest integer
  const int32_t* zeros_ = nullptr;
  std::vector<float> table_;  // of other formats than integers
  const float* codebook_ = nullptr;
  int64_t entries_ = 0;
};

}  // namespace rarefy::quantization
