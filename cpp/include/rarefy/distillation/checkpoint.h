#pragma once

#include <rarefy/distillation/trainer.h>
#include <rarefy/export.h>
#include <torch/nn/module.h>
#include <torch/optim/optimizer.h>
#include <torch/optim/schedulers/lr_scheduler.h>
#include <torch/serialize/archive.h>

#include <functional>
#include <map>
#include <string>

namespace rarefy::distillation {

/// What a run goes on from beside the trainer's own state. All of it outlives the call.
struct CheckpointParts {
  torch::nn::Module& student;
  torch::optim::Optimizer& optimizer;
  /// A fresh one is taken as many steps forward as the saved one was; LibTorch's schedules save no state.
  torch::optim::LRScheduler* scheduler = nullptr;

  struct Part {
    std::function<void(torch::serialize::OutputArchive&)> save;
    std::function<void(torch::serialize::InputArchive&)> load;
  };
  std::map<std::string, Part> others = {};
};

/// Writes a checkpoint: parameters and buffers of the student, the optimizer, the trainer's state with the random state of
/// now, the other parts, and the teacher's fingerprint. To a temporary name, renamed when it is complete; what was at
/// `path` is there until then. Throws c10::Error when it cannot be written, c10::ValueError when weights
/// of the student are not zero where its pruning masks prune.
RAREFY_API void save_checkpoint(const std::string& path, const DistillationTrainer& trainer,
                                const CheckpointParts& parts);

/// Continues from a file of save_checkpoint. Throws c10::ValueError when it is none, when it is of another teacher, or when
/// names, shapes, dtypes or parts are not those of the run: student, optimizer and trainer are as they were then.
RAREFY_API void load_checkpoint(const std::string& path, DistillationTrainer& trainer, const CheckpointParts& parts);

}  // namespace rarefy::distillation
