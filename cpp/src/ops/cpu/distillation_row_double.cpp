#include "ops/cpu/distillation_row_double.h"

#include <algorithm>
#include <cmath>

namespace rarefy::ops {
namespace {

double log_sum_exp(const double* x, int64_t n, double max, double temperature) {
  double sum = 0.0;
  for (int64_t i = 0; i < n; ++i) {
    sum += std::exp((x[i] - max) / temperature);
  }
  return std::log(sum);
}

void log_softmax(const double* x, double temperature, std::vector<double>& out) {
  const auto n = static_cast<int64_t>(out.size());
  const double max = *std::max_element(x, x + n), log_sum = log_sum_exp(x, n, max, temperature);
  for (int64_t i = 0; i < n; ++i) {
    out[static_cast<size_t>(i)] = (x[i] - max) / temperature - log_sum;
  }
}

/// What one class adds to a divergence, and its derivative in q up to a constant that is the same for all classes.
struct Term {
  double value;
  double slope;
};

/// log(e^a + e^b), where at least one of them is above -inf.
double log_add_exp(double a, double b) {
  const double high = a > b ? a : b, low = a > b ? b : a;
  return high + std::log1p(std::exp(low - high));
}

/// x beside a mixture m of it.
struct Ratio {
  double log;     // log(x / m)
  double excess;  // x / m - 1
};

/// From x / m - 1 formed by differences where that is near 0, so that x == m gives exactly 0. Elsewhere it has lost what makes
/// x small beside m, and the logarithms have not.
Ratio ratio(double excess, double log_x, double log_m) {
  return std::abs(excess) < 0.5 ? Ratio{std::log1p(excess), excess}
                                : Ratio{log_x - log_m, std::exp(log_x - log_m) - 1.0};
}

/// x * log(x / m), where x = 0 counts as 0 whatever the logarithm is.
double weighted(double x, const Ratio& of) { return x == 0.0 ? 0.0 : x * of.log; }

Term term(const DistillationRule& rule, double log_p, double log_q) {
  const double p = std::exp(log_p), q = std::exp(log_q), skew = rule.skew;
  switch (rule.divergence) {
    case Divergence::kl:
      return {p == 0.0 ? 0.0 : p * (log_p - log_q), 0.0};  // its slope -p / q is q - p once it is multiplied by q
    case Divergence::reverse_kl:
      return q == 0.0 ? Term{0.0, 0.0} : Term{q * (log_q - log_p), log_q - log_p};
    case Divergence::total_variation:
      return {0.5 * std::abs(p - q), p == q ? 0.0 : std::isnan(p - q) ? p - q : q > p ? 0.5 : -0.5};
    default:
      break;
  }
  if (p == 0.0 && q == 0.0) {
    return {0.0, 0.0};
  }
  // The mixture m is written so that p == q gives m == q exactly.
  const double log_skew = std::log(skew), log_rest = std::log1p(-skew);
  if (rule.divergence == Divergence::skewed_reverse_kl) {
    const double m = p + skew * (q - p);
    const auto of_q = ratio((1.0 - skew) * (q - p) / m, log_q, log_add_exp(log_skew + log_q, log_rest + log_p));
    return {weighted(q, of_q), q == 0.0 ? 0.0 : of_q.log - skew * of_q.excess};
  }
  const double m = q + skew * (p - q), log_m = log_add_exp(log_skew + log_p, log_rest + log_q);
  const auto of_p = ratio((1.0 - skew) * (p - q) / m, log_p, log_m);
  if (rule.divergence == Divergence::skewed_kl) {
    return {weighted(p, of_p), -(1.0 - skew) * of_p.excess};
  }
  const auto of_q = ratio(skew * (q - p) / m, log_q, log_m);
  return {skew * weighted(p, of_p) + (1.0 - skew) * weighted(q, of_q), q == 0.0 ? 0.0 : (1.0 - skew) * of_q.log};
}

}  // namespace

DoubleRowDistiller::DoubleRowDistiller(const DistillationRule& rule, int64_t classes)
    : rule_(rule),
      classes_(classes),
      log_q_(static_cast<size_t>(classes)),
      log_p_(static_cast<size_t>(classes)),
      slope_(static_cast<size_t>(classes), 0.0) {}

double DoubleRowDistiller::soft(const double* student, const double* teacher) {
  log_softmax(student, rule_.temperature, log_q_);
  log_softmax(teacher, rule_.temperature, log_p_);
  double divergence = 0.0, mean = 0.0;
  for (size_t i = 0; i < slope_.size(); ++i) {
    const auto [value, slope] = term(rule_, log_p_[i], log_q_[i]);
    const double q = std::exp(log_q_[i]);
    divergence += value;
    slope_[i] = slope;
    mean += q == 0.0 ? 0.0 : q * slope;
  }
  for (size_t i = 0; i < slope_.size(); ++i) {
    const double q = std::exp(log_q_[i]);
    slope_[i] = rule_.divergence == Divergence::kl ? q - std::exp(log_p_[i]) : q == 0.0 ? 0.0 : q * (slope_[i] - mean);
  }
  return divergence < 0.0 ? 0.0 : divergence;  // rounding may leave it there
}

double DoubleRowDistiller::hard(const double* student, int64_t label, double scale, double* grad) const {
  const double max = *std::max_element(student, student + classes_);
  const double log_sum = log_sum_exp(student, classes_, max, 1.0), spread = rule_.label_smoothing;
  double loss = (1.0 - spread) * (max + log_sum - student[label]);
  if (spread > 0.0) {
    double sum = 0.0;
    for (int64_t i = 0; i < classes_; ++i) {
      sum += student[i] - max;
    }
    loss += spread * (log_sum - sum / static_cast<double>(classes_));
  }
  for (int64_t i = 0; grad != nullptr && i < classes_; ++i) {
    const double target = spread / static_cast<double>(classes_) + (i == label ? 1.0 - spread : 0.0);
    grad[i] = scale * (std::exp(student[i] - max - log_sum) - target);
  }
  return loss;
}

double DoubleRowDistiller::run(const double* student, const double* teacher, int64_t label, double scale,
                               double* grad) {
  const double t = rule_.temperature;
  double loss = 0.0;
  if (rule_.soft()) {
    loss += rule_.alpha * t * t * soft(student, teacher);
  }
  if (rule_.hard()) {
    loss += (1.0 - rule_.alpha) * hard(student, label, (1.0 - rule_.alpha) * scale, grad);
  } else if (grad != nullptr) {
    std::fill_n(grad, classes_, 0.0);
  }
  for (int64_t i = 0; grad != nullptr && i < classes_; ++i) {
    grad[i] += rule_.alpha * t * scale * slope_[static_cast<size_t>(i)];
  }
  return loss;
}

}  // namespace rarefy::ops
