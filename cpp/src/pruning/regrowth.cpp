#include <c10/util/Exception.h>
#include <fmt/format.h>
#include <rarefy/pruning/regrowth.h>

#include <cmath>
#include <numbers>

namespace rarefy::pruning {
namespace {

template <typename Exchange>
void check_exchange(const char* type, const Exchange& exchange) {
  TORCH_CHECK_VALUE(exchange.begin >= 0, "[", type, "] begin must not be negative, got ", exchange.begin);
  TORCH_CHECK_VALUE(exchange.end > exchange.begin, "[", type, "] end must be larger than begin, got begin ",
                    exchange.begin, " and end ", exchange.end);
  TORCH_CHECK_VALUE(exchange.every > 0, "[", type, "] every must be positive, got ", exchange.every);
  TORCH_CHECK_VALUE(exchange.fraction > 0.0 && exchange.fraction <= 1.0, "[", type,
                    "] fraction must be in (0, 1], got ", exchange.fraction);
}

template <typename Exchange>
bool exchanges_at(const Exchange& exchange, int64_t step) {
  return step > exchange.begin && step < exchange.end && (step - exchange.begin) % exchange.every == 0;
}

template <typename Exchange>
double exchanged_at(const Exchange& exchange, int64_t step) {
  const double x = static_cast<double>(step - exchange.begin) / static_cast<double>(exchange.end - exchange.begin);
  switch (exchange.decay) {
    case Decay::constant:
      return exchange.fraction;
    case Decay::linear:
      return exchange.fraction * (1.0 - x);
    case Decay::cosine:
      break;
  }
  return exchange.fraction * (0.5 * (1.0 + std::cos(std::numbers::pi * x)));
}

template <typename Exchange>
std::string exchange_text(const char* type, const Exchange& exchange) {
  return fmt::format("{}(begin={}, end={}, every={}, fraction={}, decay='{}'", type, exchange.begin, exchange.end,
                     exchange.every, exchange.fraction, name(exchange.decay));
}

}  // namespace

Decay parse_decay(const std::string& name) {
  TORCH_CHECK_VALUE(name == "constant" || name == "linear" || name == "cosine",
                    "[parse_decay] decay must be 'constant', 'linear' or 'cosine', got '", name, "'");
  return name == "constant" ? Decay::constant : name == "linear" ? Decay::linear : Decay::cosine;
}

const char* name(Decay decay) {
  return decay == Decay::constant ? "constant" : decay == Decay::linear ? "linear" : "cosine";
}

void SET::validate() const { check_exchange("SET", *this); }
bool SET::updates_at(int64_t step) const { return exchanges_at(*this, step); }
double SET::fraction_at(int64_t step) const { return exchanged_at(*this, step); }
std::string SET::to_string() const { return exchange_text("SET", *this) + fmt::format(", seed={})", seed); }

void RigL::validate() const { check_exchange("RigL", *this); }
bool RigL::updates_at(int64_t step) const { return exchanges_at(*this, step); }
double RigL::fraction_at(int64_t step) const { return exchanged_at(*this, step); }
std::string RigL::to_string() const { return exchange_text("RigL", *this) + ")"; }

void StraightThrough::validate() const {
  TORCH_CHECK_VALUE(end > 0, "[StraightThrough] end must be positive, got ", end);
  TORCH_CHECK_VALUE(every > 0, "[StraightThrough] every must be positive, got ", every);
  TORCH_CHECK_VALUE(decay >= 0.0 && std::isfinite(decay),
                    "[StraightThrough] decay must be finite and not negative, got ", decay);
}

bool StraightThrough::updates_at(int64_t step) const {
  return step == end || (step > 0 && step < end && step % every == 0);
}

std::string StraightThrough::to_string() const {
  return fmt::format("StraightThrough(end={}, every={}, decay={})", end, every, decay);
}

}  // namespace rarefy::pruning
