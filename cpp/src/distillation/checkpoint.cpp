#include <c10/util/Exception.h>
#include <rarefy/distillation/checkpoint.h>
#include <rarefy/masks.h>
#include <torch/serialize.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <sstream>
#include <utility>
#include <vector>

namespace rarefy::distillation {
namespace {

constexpr const char* kFormat = "rarefy.distillation.checkpoint/1";

using NamedTensorList = std::vector<std::pair<std::string, torch::Tensor>>;

NamedTensorList tensors_of(const torch::nn::Module& module) {
  NamedTensorList all;
  for (const auto& item : module.named_parameters()) {
    all.emplace_back(item.key(), item.value());
  }
  for (const auto& item : module.named_buffers()) {
    all.emplace_back(item.key(), item.value());
  }
  return all;
}

c10::List<std::string> names_of(const NamedTensorList& tensors) {
  c10::List<std::string> names;
  for (const auto& item : tensors) {
    names.push_back(item.first);
  }
  return names;
}

c10::IValue read(torch::serialize::InputArchive& archive, const std::string& name) {
  c10::IValue value;
  TORCH_CHECK_VALUE(archive.try_read(name, value), "[load_checkpoint] a checkpoint must hold '", name,
                    "', which this file does not");
  return value;
}

torch::serialize::InputArchive nested(torch::serialize::InputArchive& archive, const std::string& name) {
  torch::serialize::InputArchive inner;
  TORCH_CHECK_VALUE(archive.try_read(name, inner), "[load_checkpoint] a checkpoint must hold '", name,
                    "', which this file does not");
  return inner;
}

/// The saved values for the student's tensors, in their order, checked; nothing has changed yet.
std::vector<torch::Tensor> read_student(torch::serialize::InputArchive& archive, const NamedTensorList& tensors) {
  const auto names = read(archive, "names").toList();
  TORCH_CHECK_VALUE(names.size() == tensors.size(), "[load_checkpoint] the student must have the ", names.size(),
                    " parameters and buffers of the checkpoint, got ", tensors.size());
  std::vector<torch::Tensor> values;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const auto& [name, tensor] = tensors[i];
    const std::string saved = c10::IValue(names.get(i)).toStringRef();
    TORCH_CHECK_VALUE(saved == name, "[load_checkpoint] the student's tensor ", i, " must be '", saved, "', got '",
                      name, "'");
    torch::Tensor value;
    archive.read("tensor" + std::to_string(i), value);
    TORCH_CHECK_VALUE(value.sizes() == tensor.sizes() && value.scalar_type() == tensor.scalar_type(),
                      "[load_checkpoint] '", name, "' must be ", value.scalar_type(), " ", value.sizes(),
                      " as in the checkpoint, got ", tensor.scalar_type(), " ", tensor.sizes());
    values.push_back(std::move(value));
  }
  return values;
}

/// A copy of a part's state, for the way back.
template <typename Save>
std::string snapshot(const Save& save) {
  torch::serialize::OutputArchive archive;
  save(archive);
  std::ostringstream stream;
  archive.save_to(stream);
  return stream.str();
}

template <typename Load>
void put_back(const std::string& state, const Load& load) {
  std::istringstream stream(state);
  torch::serialize::InputArchive archive;
  archive.load_from(stream);
  load(archive);
}

}  // namespace

void save_checkpoint(const std::string& path, const DistillationTrainer& trainer, const CheckpointParts& parts) {
  check_masks(parts.student, "save_checkpoint");
  torch::serialize::OutputArchive archive, student, optimizer, state;
  archive.write("format", c10::IValue(std::string(kFormat)));
  archive.write("teacher", c10::IValue(trainer.teacher().fingerprint()));
  const auto tensors = tensors_of(parts.student);
  student.write("names", c10::IValue(names_of(tensors)));
  for (size_t i = 0; i < tensors.size(); ++i) {
    student.write("tensor" + std::to_string(i), tensors[i].second.detach());
  }
  archive.write("student", student);
  parts.optimizer.save(optimizer);
  archive.write("optimizer", optimizer);
  state << trainer.state();
  archive.write("trainer", state);
  c10::List<std::string> names;
  for (const auto& [name, part] : parts.others) {
    torch::serialize::OutputArchive other;
    part.save(other);
    archive.write("part" + std::to_string(names.size()), other);
    names.push_back(name);
  }
  archive.write("parts", c10::IValue(names));

  // Through memory: torch's writer ends the process when a stream of its own fails.
  std::ostringstream content;
  archive.save_to(content);
  const std::string temporary = path + "." + std::to_string(getpid()) + ".tmp";
  std::ofstream file(temporary, std::ios::binary);
  file << content.view();
  file.close();
  std::error_code error;
  if (file.good()) {
    std::filesystem::rename(temporary, path, error);
  }
  if (!file.good() || error) {
    std::error_code ignored;  // there may be nothing to remove
    std::filesystem::remove(temporary, ignored);
    TORCH_CHECK(false, "[save_checkpoint] ", path, " could not be written", error ? ": " + error.message() : "");
  }
}

void load_checkpoint(const std::string& path, DistillationTrainer& trainer, const CheckpointParts& parts) {
  torch::serialize::InputArchive archive;
  try {
    archive.load_from(path);
  } catch (const std::exception& error) {
    TORCH_CHECK_VALUE(false, "[load_checkpoint] ", path, " must be a checkpoint, could not be read: ", error.what());
  }
  TORCH_CHECK_VALUE(read(archive, "format").toStringRef() == kFormat, "[load_checkpoint] ", path,
                    " must be a checkpoint of the format ", kFormat);
  const auto teacher = trainer.teacher().fingerprint();
  const auto saved_teacher = read(archive, "teacher").toStringRef();
  TORCH_CHECK_VALUE(saved_teacher == teacher, "[load_checkpoint] ", path,
                    " must be of a run with this teacher, got the fingerprint '", saved_teacher, "' where it has '",
                    teacher, "'");
  const auto tensors = tensors_of(parts.student);
  auto student = nested(archive, "student");
  const auto values = read_student(student, tensors);
  TrainerState state;
  auto trainer_archive = nested(archive, "trainer");
  trainer_archive >> state;
  const auto names = read(archive, "parts").toList();
  TORCH_CHECK_VALUE(names.size() == parts.others.size(), "[load_checkpoint] there must be the ", names.size(),
                    " further parts of the checkpoint, got ", parts.others.size());
  size_t i = 0;
  for (const auto& [name, part] : parts.others) {  // a map's order, as it was saved
    const std::string saved = c10::IValue(names.get(i++)).toStringRef();
    TORCH_CHECK_VALUE(saved == name, "[load_checkpoint] a further part must be '", saved, "', got '", name, "'");
  }

  const auto save_optimizer = [&](torch::serialize::OutputArchive& out) { parts.optimizer.save(out); };
  const auto load_optimizer = [&](torch::serialize::InputArchive& in) { parts.optimizer.load(in); };
  const auto before = snapshot(save_optimizer);
  std::map<std::string, std::string> parts_before;
  try {
    auto optimizer = nested(archive, "optimizer");
    load_optimizer(optimizer);
    i = 0;
    for (const auto& [name, part] : parts.others) {
      parts_before[name] = snapshot(part.save);
      auto other = nested(archive, "part" + std::to_string(i++));
      part.load(other);
    }
  } catch (const std::exception& error) {
    put_back(before, load_optimizer);
    for (const auto& [name, saved] : parts_before) {
      put_back(saved, parts.others.at(name).load);
    }
    TORCH_CHECK_VALUE(false, "[load_checkpoint] ", path, " does not fit: ", error.what());
  }
  // From here on nothing fails.
  {
    const torch::NoGradGuard no_grad;
    for (size_t k = 0; k < tensors.size(); ++k) {
      tensors[k].second.detach().copy_(values[k]);
    }
  }
  if (parts.scheduler != nullptr) {
    const auto loaded = snapshot(save_optimizer);
    for (int64_t step = 0; step < state.advances; ++step) {
      parts.scheduler->step();
    }
    put_back(loaded, load_optimizer);  // the rates are the optimizer's own
  }
  trainer.load_state(std::move(state));
}

}  // namespace rarefy::distillation
