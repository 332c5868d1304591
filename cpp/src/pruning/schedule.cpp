#include <c10/util/Exception.h>
#include <fmt/format.h>
#include <rarefy/pruning/schedule.h>

#include <cmath>

namespace rarefy::pruning {

void ConstantSchedule::validate() const {
  TORCH_CHECK_VALUE(begin >= 0, "[ConstantSchedule] begin must not be negative, got ", begin);
}

double ConstantSchedule::sparsity_at(int64_t step, double final_sparsity) const {
  return step < begin ? 0.0 : final_sparsity;
}

bool ConstantSchedule::updates_at(int64_t step) const { return step == begin; }

std::string ConstantSchedule::to_string() const { return fmt::format("ConstantSchedule(begin={})", begin); }

void PolynomialSchedule::validate() const {
  TORCH_CHECK_VALUE(begin >= 0, "[PolynomialSchedule] begin must not be negative, got ", begin);
  TORCH_CHECK_VALUE(end > begin, "[PolynomialSchedule] end must be larger than begin, got begin ", begin, " and end ",
                    end);
  TORCH_CHECK_VALUE(every > 0, "[PolynomialSchedule] every must be positive, got ", every);
  TORCH_CHECK_VALUE(initial >= 0.0 && initial < 1.0, "[PolynomialSchedule] initial must be in [0, 1), got ", initial);
  TORCH_CHECK_VALUE(power > 0.0 && std::isfinite(power), "[PolynomialSchedule] power must be positive and finite, got ",
                    power);
}

double PolynomialSchedule::sparsity_at(int64_t step, double final_sparsity) const {
  if (step < begin) {
    return 0.0;
  }
  if (step >= end) {
    return final_sparsity;
  }
  const double left = 1.0 - static_cast<double>(step - begin) / static_cast<double>(end - begin);
  return final_sparsity + (initial - final_sparsity) * std::pow(left, power);
}

bool PolynomialSchedule::updates_at(int64_t step) const {
  return step == end || (step >= begin && step < end && (step - begin) % every == 0);
}

std::string PolynomialSchedule::to_string() const {
  return fmt::format("PolynomialSchedule(begin={}, end={}, every={}, initial={}, power={})", begin, end, every, initial,
                     power);
}

}  // namespace rarefy::pruning
