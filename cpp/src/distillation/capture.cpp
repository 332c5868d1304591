#include <c10/util/Exception.h>
#include <rarefy/distillation/capture.h>

#include <algorithm>
#include <utility>

namespace rarefy::distillation {
namespace {

thread_local Capture* youngest = nullptr;

std::string joined(const std::vector<std::string>& names) {
  std::string text;
  for (const auto& name : names) {
    text += (text.empty() ? "'" : ", '") + name + "'";
  }
  return text.empty() ? "none" : text;
}

}  // namespace

torch::Tensor tap(const std::string& name, torch::Tensor tensor) {
  if (youngest != nullptr) {
    youngest->record(name, tensor);
  }
  return tensor;
}

Capture::Capture() : outer_(std::exchange(youngest, this)) {}

Capture::Capture(std::vector<std::string> names) : names_(std::move(names)) {
  TORCH_CHECK_VALUE(!names_.empty(), "[Capture] names must not be empty (no argument: all names), got none");
  for (const auto& name : names_) {
    TORCH_CHECK_VALUE(!name.empty(), "[Capture] a name must not be empty, got ", joined(names_));
  }
  std::sort(names_.begin(), names_.end());
  outer_ = std::exchange(youngest, this);
}

Capture::~Capture() {
  // Captures held by pointers may go in any order.
  Capture** link = &youngest;
  while (*link != nullptr && *link != this) {
    link = &(*link)->outer_;
  }
  if (*link == this) {
    *link = outer_;
  }
}

TensorMap Capture::take() {
  for (const auto& name : names_) {
    if (!features_.contains(name)) {
      std::vector<std::string> seen;
      for (const auto& [key, _] : features_) {
        seen.push_back(key);
      }
      TORCH_CHECK_VALUE(false, "[Capture] a tap must have recorded '", name, "' in the forward, got ", joined(seen));
    }
  }
  return std::exchange(features_, {});
}

void Capture::record(const std::string& name, const torch::Tensor& tensor) {
  if (!names_.empty() && !std::binary_search(names_.begin(), names_.end(), name)) {
    return;
  }
  TORCH_CHECK_VALUE(!features_.contains(name), "[tap] each call in a forward must have a name of its own, got '", name,
                    "' again (Capture::take() ends a forward)");
  features_.emplace(name, tensor);
}

}  // namespace rarefy::distillation
