#include <rarefy/quantization/distributed.h>
#include <rarefy/quantization/fake_quantizer.h>

namespace rarefy::quantization {

void set_process_group(torch::nn::Module& model, const c10::intrusive_ptr<c10d::ProcessGroup>& group) {
  std::function<void(torch::Tensor&)> all_reduce_max;
  if (group) {
    all_reduce_max = [group](torch::Tensor& values) {
      std::vector<at::Tensor> tensors{values};
      c10d::AllreduceOptions options;
      options.reduceOp = c10d::ReduceOp::MAX;
      group->allreduce(tensors, options)->wait();
    };
  }
  bool any = false;
  for (const auto& module : model.modules()) {
    auto* quantizer = module->as<FakeQuantizerImpl>();
    if (quantizer != nullptr && !std::holds_alternative<Latest>(quantizer->options.observer)) {
      quantizer->all_reduce_max = all_reduce_max;
      any = true;
    }
  }
  TORCH_CHECK_VALUE(any, "[set_process_group] the model must have prepared layers; call prepare_qat or prepare first");
}

}  // namespace rarefy::quantization
