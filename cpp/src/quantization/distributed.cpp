#include <rarefy/quantization/distributed.h>
#include <rarefy/quantization/fake_quantizer.h>

namespace rarefy::quantization {

void set_process_group(torch::nn::Module& model, const c10::intrusive_ptr<c10d::ProcessGroup>& group) {
  std::function<void(torch::Tensor&)> all_reduce_max, all_reduce_sum;
  std::function<std::vector<torch::Tensor>(const torch::Tensor&)> all_gather;
  if (group) {
    const auto all_reduce = [group](torch::Tensor& values, c10d::ReduceOp::RedOpType operation) {
      std::vector<at::Tensor> tensors{values};
      c10d::AllreduceOptions options;
      options.reduceOp = operation;
      group->allreduce(tensors, options)->wait();
    };
    all_reduce_max = [all_reduce](torch::Tensor& values) { all_reduce(values, c10d::ReduceOp::MAX); };
    all_reduce_sum = [all_reduce](torch::Tensor& values) { all_reduce(values, c10d::ReduceOp::SUM); };
    all_gather = [group](const torch::Tensor& values) {
      std::vector<at::Tensor> mine{values};
      std::vector<std::vector<at::Tensor>> all(1);
      for (int i = 0; i < group->getSize(); ++i) {
        all[0].push_back(torch::empty_like(values));
      }
      group->allgather(all, mine)->wait();
      return all[0];
    };
  }
  bool any = false;
  for (const auto& module : model.modules()) {
    auto* quantizer = module->as<FakeQuantizerImpl>();
    if (quantizer != nullptr && !quantizer->is_weight()) {
      quantizer->all_reduce_max = all_reduce_max;
      quantizer->all_reduce_sum = all_reduce_sum;
      quantizer->all_gather = all_gather;
      any = true;
    }
  }
  TORCH_CHECK_VALUE(any, "[set_process_group] the model must have prepared layers; call prepare_qat or prepare first");
}

}  // namespace rarefy::quantization
