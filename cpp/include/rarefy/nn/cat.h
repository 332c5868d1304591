#pragma once

#include <rarefy/nn/add.h>

namespace rarefy::nn {

/// Concatenation along `dim`. Prepared, every input is quantized with the parameters of `quant.input`, whose range covers
/// all of them, so that concatenating moves integers and changes none.
class RAREFY_API CatImpl : public OperationModule<CatImpl> {
 public:
  explicit CatImpl(int64_t dim = 0) : dim_(dim) {}
  void pretty_print(std::ostream& stream) const override;
  std::string kind() const override { return "Cat"; }
  /// One or more tensors of equal size but in dim.
  torch::Tensor forward(const std::vector<torch::Tensor>& tensors);

 protected:
  std::vector<std::string> inputs() const override { return {"input"}; }

 private:
  int64_t dim_;
};
TORCH_MODULE(Cat);

}  // namespace rarefy::nn
