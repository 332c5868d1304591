#pragma once

#include <ATen/core/Tensor.h>
#include <rarefy/export.h>

#include <cstdint>
#include <string>
#include <vector>

// Statistics of the inputs that a weight is multiplied with: what calibrated pruning knows about the data.
namespace rarefy::pruning {

/// A layer with a weight, as far as it decides which inputs meet which elements.
///   weight  the sizes of the weight: [out, in] of a linear layer, [out, in / groups, kernel...] of a convolution
struct RAREFY_API LayerShape {
  std::vector<int64_t> weight;
  // Of a convolution, one value per dimension of the kernel; empty for 1, 0 and 1.
  std::vector<int64_t> stride = {};
  std::vector<int64_t> padding = {};  // of zeros, on both sides
  std::vector<int64_t> dilation = {};
  int64_t groups = 1;

  /// Throws c10::ValueError when a field is out of range or does not fit the others.
  void validate() const;

  /// How many inputs meet one row of the weight: the elements of weight[0].
  int64_t features() const;
};

/// The inputs as a matrix per group: [groups, samples, features], features in the order of weight.flatten(1), with the
/// layer's output being rows times the transposed weight plus bias.
///   input  linear: [..., in]. Convolution: [batch, in, size...] or without batch
/// Throws c10::ValueError when the input does not fit the layer.
RAREFY_API at::Tensor input_rows(const LayerShape& layer, const at::Tensor& input);

/// What a HessianAccumulator gathers.
enum class Statistic {
  products,  // the mean of x x^T: groups * features^2 numbers
  squares,   // its diagonal alone: groups * features numbers
};

/// The mean of x x^T over all inputs x that a layer has seen, the Hessian of its squared error (up to a factor):
///
///   HessianAccumulator hessian("fc1", {{512, 1024}});
///   for (const auto& x : batches) { hessian.update(x); }
///   sparse_gpt("fc1.weight", weight, hessian.hessian());
///
/// Batches stream through; nothing but the mean is kept. Products and sums are of float32, or float64 on demand, on the
/// device of the first input. A convolution's inputs are unfolded in parts of at most 64 MiB.
class RAREFY_API HessianAccumulator {
 public:
  /// name: for messages. Throws what LayerShape::validate() does.
  HessianAccumulator(std::string name, LayerShape layer, Statistic statistic = Statistic::products,
                     bool float64 = false);

  /// Adds a batch. One that holds NaN or infinity is left out as a whole, counted, and false is returned. Throws what
  /// input_rows() does; then nothing is added. A batch of no samples adds nothing.
  bool update(const at::Tensor& input);

  /// [groups, features, features], symmetric. Throws c10::ValueError when no finite batch was seen, and for squares.
  at::Tensor hessian() const;

  /// The root of the mean square of each input feature, [groups, features]: the norms of Wanda, divided by the root of
  /// the number of samples, which orders nothing. Throws c10::ValueError when no finite batch was seen.
  at::Tensor norms() const;

  const std::string& name() const { return name_; }
  const LayerShape& layer() const { return layer_; }
  int64_t samples() const { return samples_; }  // rows of input_rows(), of finite batches
  int64_t batches() const { return batches_; }  // finite ones
  int64_t skipped() const { return skipped_; }  // the others
  /// What the statistics hold in memory.
  int64_t bytes() const;

 private:
  void check_seen(const char* function) const;

  std::string name_;
  LayerShape layer_;
  Statistic statistic_;
  at::ScalarType type_;
  at::Tensor mean_;  // [groups, features, features], of which the upper triangle is filled, or [groups, features]
  int64_t samples_ = 0, batches_ = 0, skipped_ = 0;
};

}  // namespace rarefy::pruning
