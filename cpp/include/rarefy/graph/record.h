#pragma once

#include <rarefy/export.h>
#include <rarefy/graph/graph.h>

#include <functional>
#include <string>
#include <utility>
#include <vector>

namespace torch::nn {
class Module;
}

namespace rarefy::graph {

/// A tensor that exists before the run, with the name that the recording gives it.
struct RAREFY_API NamedTensor {
  std::string name;
  at::Tensor value;
  Origin origin = Origin::parameter;
};

/// Where the model's code is at this moment: the path of the running module and "file:line".
struct RAREFY_API Location {
  std::string module;
  std::string source;
};

struct RAREFY_API RecordOptions {
  /// Called at the start of every operator that the model's code calls. Unset: the module is read off the parameters
  /// that an operator uses ("layer1.0.conv1" for layer1.0.conv1.weight), and there is no source line.
  std::function<Location()> location = nullptr;
  /// Leaves out the work of convolutions and matrix products, which give zeros: the operators, their shapes and constants
  /// are what they are, unless the model's code looks at values.
  bool shapes_only = false;
};

/// Runs `forward` once, under no-grad, and records every operator that it calls on this thread.
///   forward  returns the model's outputs, tensors only, in a fixed order
///   tensors  parameters, buffers and inputs by name. A tensor that comes again under another name keeps the first.
/// The caller sets evaluation mode. An exception from `forward` passes through; when `partial` is given it then holds
/// what had been recorded. Operators that threw have Node::failed, the innermost being the last of them.
/// Under autocast, the operators that the model calls have the tensors that it gives them; the conversions run inside.
/// Tensors that leave torch on the way (through numpy, item(), tolist()) come back as constants.
/// Throws c10::ValueError when an input or a parameter is undefined or sparse, and when a recording runs already on
/// this thread.
RAREFY_API Graph record(const std::function<std::vector<at::Tensor>()>& forward,
                        const std::vector<NamedTensor>& tensors, const RecordOptions& options = {},
                        Graph* partial = nullptr);

/// Records model.forward for a module of one or more tensor inputs, in evaluation mode, which ends when the call does,
/// by an exception too. The module may be on the stack or belong to a shared pointer.
/// `forward` calls it: [&] { return std::vector{net->forward(x)}; }
RAREFY_API Graph record(const torch::nn::Module& model, const std::function<std::vector<at::Tensor>()>& forward,
                        const std::vector<at::Tensor>& inputs);

/// All parameters and buffers of a module by path.
RAREFY_API std::vector<NamedTensor> named_tensors(const torch::nn::Module& model);

}  // namespace rarefy::graph
