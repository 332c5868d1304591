// torch's autocast for as long as a guard lives, as torch.autocast does it in Python.
#pragma once

#include <ATen/autocast_mode.h>
#include <rarefy/distillation/trainer.h>

namespace rarefy::distillation {

class AutocastGuard {
 public:
  AutocastGuard(c10::DeviceType device, Precision precision)
      : active_(precision != Precision::float32), device_(device) {
    if (active_) {
      enabled_ = at::autocast::is_autocast_enabled(device_);
      type_ = at::autocast::get_autocast_dtype(device_);
      at::autocast::increment_nesting();
      at::autocast::set_autocast_enabled(device_, true);
      at::autocast::set_autocast_dtype(device_, precision == Precision::bfloat16 ? at::kBFloat16 : at::kHalf);
    }
  }
  ~AutocastGuard() {
    if (active_) {
      if (at::autocast::decrement_nesting() == 0) {
        at::autocast::clear_cache();
      }
      at::autocast::set_autocast_enabled(device_, enabled_);
      at::autocast::set_autocast_dtype(device_, type_);
    }
  }
  AutocastGuard(const AutocastGuard&) = delete;
  AutocastGuard& operator=(const AutocastGuard&) = delete;
  AutocastGuard(AutocastGuard&&) = delete;
  AutocastGuard& operator=(AutocastGuard&&) = delete;

 private:
  bool active_;
  c10::DeviceType device_;
  bool enabled_ = false;
  at::ScalarType type_ = at::kFloat;
};

}  // namespace rarefy::distillation
