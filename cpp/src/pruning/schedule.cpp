#include <c10/util/Exception.h>
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <rarefy/pruning/schedule.h>

#include <algorithm>
#include <cmath>
#include <numbers>

namespace rarefy::pruning {
namespace {

void check_begin(const char* type, int64_t begin) {
  TORCH_CHECK_VALUE(begin >= 0, "[", type, "] begin must not be negative, got ", begin);
}

void check_end(const char* type, int64_t begin, int64_t end) {
  check_begin(type, begin);
  TORCH_CHECK_VALUE(end > begin, "[", type, "] end must be larger than begin, got begin ", begin, " and end ", end);
}

void check_positive(const char* type, const char* field, int64_t value) {
  TORCH_CHECK_VALUE(value > 0, "[", type, "] ", field, " must be positive, got ", value);
}

void check_power(const char* type, double power) {
  TORCH_CHECK_VALUE(power > 0.0 && std::isfinite(power), "[", type, "] power must be positive and finite, got ", power);
}

/// The fields that rising schedules share.
template <typename Rising>
void check_rising(const char* type, const Rising& schedule) {
  check_end(type, schedule.begin, schedule.end);
  check_positive(type, "every", schedule.every);
  TORCH_CHECK_VALUE(schedule.initial >= 0.0 && schedule.initial < 1.0, "[", type, "] initial must be in [0, 1), got ",
                    schedule.initial);
}

/// curve(x) between begin and end, and the ends exactly.
template <typename Rising, typename Curve>
double rise(const Rising& schedule, int64_t step, double final_sparsity, const Curve& curve) {
  if (step < schedule.begin) {
    return 0.0;
  }
  if (step >= schedule.end) {
    return final_sparsity;
  }
  return curve(static_cast<double>(step - schedule.begin) / static_cast<double>(schedule.end - schedule.begin));
}

template <typename Rising>
bool rising_updates_at(const Rising& schedule, int64_t step) {
  return step == schedule.end ||
         (step >= schedule.begin && step < schedule.end && (step - schedule.begin) % schedule.every == 0);
}

template <typename Rising>
std::string rising_text(const char* type, const Rising& schedule) {
  return fmt::format("{}(begin={}, end={}, every={}, initial={})", type, schedule.begin, schedule.end, schedule.every,
                     schedule.initial);
}

/// A step's place in its cycle: 0 for the first step of a cycle, `length - 1` for its last.
struct Place {
  int64_t offset;
  int64_t length;
};

/// For begin < step <= end.
Place place_in_cycle(const CyclicSchedule& schedule, int64_t step) {
  const int64_t length = schedule.end - schedule.begin;
  const auto start = [&](int64_t cycle) { return schedule.begin + cycle * length / schedule.cycles; };
  int64_t cycle = (step - 1 - schedule.begin) * schedule.cycles / length;
  while (start(cycle + 1) < step) {  // the division above may be one short of the cycle's own rounding
    ++cycle;
  }
  return {step - start(cycle) - 1, start(cycle + 1) - start(cycle)};
}

}  // namespace

// --- ConstantSchedule ------------------------------------------------------------------------------------------------

void ConstantSchedule::validate() const { check_begin("ConstantSchedule", begin); }

double ConstantSchedule::sparsity_at(int64_t step, double final_sparsity) const {
  return step < begin ? 0.0 : final_sparsity;
}

bool ConstantSchedule::updates_at(int64_t step) const { return step == begin; }

std::string ConstantSchedule::to_string() const { return fmt::format("ConstantSchedule(begin={})", begin); }

// --- rising ----------------------------------------------------------------------------------------------------------

void LinearSchedule::validate() const { check_rising("LinearSchedule", *this); }

double LinearSchedule::sparsity_at(int64_t step, double final_sparsity) const {
  return rise(*this, step, final_sparsity, [&](double x) { return initial + (final_sparsity - initial) * x; });
}

bool LinearSchedule::updates_at(int64_t step) const { return rising_updates_at(*this, step); }

std::string LinearSchedule::to_string() const { return rising_text("LinearSchedule", *this); }

void PolynomialSchedule::validate() const {
  check_rising("PolynomialSchedule", *this);
  check_power("PolynomialSchedule", power);
}

double PolynomialSchedule::sparsity_at(int64_t step, double final_sparsity) const {
  return rise(*this, step, final_sparsity,
              [&](double x) { return final_sparsity + (initial - final_sparsity) * std::pow(1.0 - x, power); });
}

bool PolynomialSchedule::updates_at(int64_t step) const { return rising_updates_at(*this, step); }

std::string PolynomialSchedule::to_string() const {
  return fmt::format("PolynomialSchedule(begin={}, end={}, every={}, initial={}, power={})", begin, end, every, initial,
                     power);
}

void CosineSchedule::validate() const { check_rising("CosineSchedule", *this); }

double CosineSchedule::sparsity_at(int64_t step, double final_sparsity) const {
  return rise(*this, step, final_sparsity, [&](double x) {
    return final_sparsity + (initial - final_sparsity) * (0.5 * (1.0 + std::cos(std::numbers::pi * x)));
  });
}

bool CosineSchedule::updates_at(int64_t step) const { return rising_updates_at(*this, step); }

std::string CosineSchedule::to_string() const { return rising_text("CosineSchedule", *this); }

void ExponentialSchedule::validate() const { check_rising("ExponentialSchedule", *this); }

double ExponentialSchedule::sparsity_at(int64_t step, double final_sparsity) const {
  return rise(*this, step, final_sparsity,
              [&](double x) { return 1.0 - (1.0 - initial) * std::pow((1.0 - final_sparsity) / (1.0 - initial), x); });
}

bool ExponentialSchedule::updates_at(int64_t step) const { return rising_updates_at(*this, step); }

std::string ExponentialSchedule::to_string() const { return rising_text("ExponentialSchedule", *this); }

// --- CyclicSchedule --------------------------------------------------------------------------------------------------

void CyclicSchedule::validate() const {
  constexpr const char* type = "CyclicSchedule";
  check_end(type, begin, end);
  check_positive(type, "cycles", cycles);
  TORCH_CHECK_VALUE((end - begin) / cycles >= 2, "[", type, "] a cycle must have 2 or more steps, got ", end - begin,
                    " steps for ", cycles, " cycles");
  check_positive(type, "every", every);
  check_power(type, power);
}

double CyclicSchedule::sparsity_at(int64_t step, double final_sparsity) const {
  if (step <= begin) {
    return 0.0;
  }
  if (step >= end) {
    return final_sparsity;
  }
  const auto [offset, length] = place_in_cycle(*this, step);
  if (offset == length - 1) {
    return final_sparsity;
  }
  const double left = 1.0 - static_cast<double>(offset) / static_cast<double>(length - 1);
  return final_sparsity - final_sparsity * std::pow(left, power);
}

bool CyclicSchedule::updates_at(int64_t step) const {
  if (step <= begin || step > end) {
    return false;
  }
  const auto [offset, length] = place_in_cycle(*this, step);
  return offset % every == 0 || offset == length - 1;
}

bool CyclicSchedule::releases_at(int64_t step) const {
  return step > begin && step <= end && place_in_cycle(*this, step).offset == 0;
}

std::string CyclicSchedule::to_string() const {
  return fmt::format("CyclicSchedule(begin={}, end={}, cycles={}, every={}, power={})", begin, end, cycles, every,
                     power);
}

// --- ACDC ------------------------------------------------------------------------------------------------------------

void ACDC::validate() const {
  check_end("ACDC", begin, end);
  check_positive("ACDC", "sparse", sparse);
  check_positive("ACDC", "dense", dense);
}

bool ACDC::is_sparse(int64_t step) const {
  return step >= end || (step >= begin && (step - begin) % (sparse + dense) < sparse);
}

double ACDC::sparsity_at(int64_t step, double final_sparsity) const { return is_sparse(step) ? final_sparsity : 0.0; }

bool ACDC::updates_at(int64_t step) const {
  return step == begin || (step > begin && step <= end && is_sparse(step) != is_sparse(step - 1));
}

int64_t ACDC::last_update() const {
  if (!is_sparse(end - 1)) {
    return end;
  }
  return end - 1 - (end - 1 - begin) % (sparse + dense);  // the sparse phase that `end` falls into goes on
}

std::string ACDC::to_string() const {
  return fmt::format("ACDC(begin={}, end={}, sparse={}, dense={})", begin, end, sparse, dense);
}

// --- Iterative -------------------------------------------------------------------------------------------------------

Rewind parse_rewind(const std::string& name) {
  TORCH_CHECK_VALUE(name == "none" || name == "weights" || name == "learning_rate",
                    "[Iterative] rewind must be 'weights', 'learning_rate' or 'none', got '", name, "'");
  return name == "weights" ? Rewind::weights : name == "none" ? Rewind::none : Rewind::learning_rate;
}

const char* name(Rewind rewind) {
  return rewind == Rewind::weights ? "weights" : rewind == Rewind::none ? "none" : "learning_rate";
}

void Iterative::validate() const {
  check_positive("Iterative", "rounds", rounds);
  check_positive("Iterative", "steps_per_round", steps_per_round);
  TORCH_CHECK_VALUE(rewind_to >= 0 && rewind_to < steps_per_round, "[Iterative] rewind_to must be in [0, ",
                    steps_per_round, "), got ", rewind_to);
  TORCH_CHECK_VALUE(rewind_to == 0 || rewind != Rewind::none,
                    "[Iterative] rewind_to must be 0 when nothing is rewound, got ", rewind_to);
}

int64_t Iterative::round_at(int64_t step) const {
  return step < steps_per_round ? 0 : std::min(rounds, 1 + (step - steps_per_round) / (steps_per_round - rewind_to));
}

double Iterative::sparsity_at(int64_t step, double final_sparsity) const {
  const int64_t round = round_at(step);
  return round == rounds
             ? final_sparsity
             : 1.0 - std::pow(1.0 - final_sparsity, static_cast<double>(round) / static_cast<double>(rounds));
}

bool Iterative::updates_at(int64_t step) const { return step > 0 && round_at(step) > round_at(step - 1); }

int64_t Iterative::last_update() const { return steps_per_round + (rounds - 1) * (steps_per_round - rewind_to); }

int64_t Iterative::training_step(int64_t step) const {
  const int64_t round = round_at(step);
  if (round == 0 || rewind == Rewind::none) {
    return step;
  }
  return rewind_to + step - (steps_per_round + (round - 1) * (steps_per_round - rewind_to));
}

std::string Iterative::to_string() const {
  return fmt::format("Iterative(rounds={}, steps_per_round={}, rewind='{}', rewind_to={})", rounds, steps_per_round,
                     name(rewind), rewind_to);
}

// --- CustomSchedule --------------------------------------------------------------------------------------------------

void CustomSchedule::validate() const {
  TORCH_CHECK_VALUE(function != nullptr && *function, "[CustomSchedule] function must be given, got none");
  TORCH_CHECK_VALUE(!updates.empty() && updates.front() >= 0 &&
                        std::adjacent_find(updates.begin(), updates.end(), std::greater_equal<>()) == updates.end(),
                    "[CustomSchedule] updates must be one or more steps, not negative and ascending, got [",
                    fmt::format("{}", fmt::join(updates, ", ")), "]");
}

double CustomSchedule::sparsity_at(int64_t step, double final_sparsity) const {
  if (step >= updates.back()) {
    return final_sparsity;
  }
  const double sparsity = (*function)(step);
  TORCH_CHECK_VALUE(sparsity >= 0.0 && sparsity < 1.0,
                    "[CustomSchedule] the function must give a sparsity in [0, 1), got ", sparsity, " at step ", step);
  return sparsity;
}

bool CustomSchedule::updates_at(int64_t step) const { return std::binary_search(updates.begin(), updates.end(), step); }

std::string CustomSchedule::to_string() const {
  return fmt::format("CustomSchedule({} updates from {} to {}, regrow={})", updates.size(), updates.front(),
                     updates.back(), regrow ? "True" : "False");
}

// --- Schedule --------------------------------------------------------------------------------------------------------

void validate(const Schedule& schedule) {
  std::visit([](const auto& s) { s.validate(); }, schedule);
}

double sparsity_at(const Schedule& schedule, int64_t step, double final_sparsity) {
  return std::visit([&](const auto& s) { return s.sparsity_at(step, final_sparsity); }, schedule);
}

bool updates_at(const Schedule& schedule, int64_t step) {
  return std::visit([&](const auto& s) { return s.updates_at(step); }, schedule);
}

bool releases_at(const Schedule& schedule, int64_t step) {
  return std::visit(
      [&](const auto& s) {
        if constexpr (requires { s.releases_at(step); }) {
          return s.releases_at(step);
        } else {
          return false;
        }
      },
      schedule);
}

int64_t last_update(const Schedule& schedule) {
  return std::visit([](const auto& s) { return s.last_update(); }, schedule);
}

std::string to_string(const Schedule& schedule) {
  return std::visit([](const auto& s) { return s.to_string(); }, schedule);
}

}  // namespace rarefy::pruning
