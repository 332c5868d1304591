#include <c10/util/Exception.h>
#include <fmt/format.h>
#include <rarefy/quantization/observer.h>

#include <cmath>

namespace rarefy::quantization {
namespace {

template <typename... Cases>
struct Match : Cases... {
  using Cases::operator()...;
};
template <typename... Cases>
Match(Cases...) -> Match<Cases...>;

void check_bins(const char* kind, int64_t bins) {
  TORCH_CHECK_VALUE(bins >= 16 && bins <= 65536, "[", kind, "] bins must be in 16..65536, got ", bins);
}

void check_gradient_scale(const char* kind, std::optional<double> scale) {
  TORCH_CHECK_VALUE(!scale.has_value() || (*scale > 0.0 && std::isfinite(*scale)), "[", kind,
                    "] gradient_scale must be finite and positive, got ", scale.value_or(0.0));
}

void check_norm(const char* kind, double norm) {
  TORCH_CHECK_VALUE(norm >= 1.0 && norm <= 8.0, "[", kind, "] norm must be in [1, 8], got ", norm);
}

}  // namespace

std::optional<double> averaging_constant(const Observer& observer) {
  if (const auto* average = std::get_if<MovingAverage>(&observer)) {
    return average->constant;
  }
  return follows_latest(observer) ? std::optional<double>(1.0) : std::nullopt;
}

bool follows_latest(const Observer& observer) {
  return std::holds_alternative<Latest>(observer) || std::holds_alternative<MSE>(observer) ||
         std::holds_alternative<HalfQuadratic>(observer);
}

std::optional<int64_t> histogram_bins(const Observer& observer) {
  using Bins = std::optional<int64_t>;
  return std::visit(
      Match{[](const Histogram& o) { return Bins(o.bins); }, [](const Percentile& o) { return Bins(o.bins); },
            [](const SQNR& o) { return Bins(o.bins); }, [](const auto&) { return Bins(); }},
      observer);
}

bool is_learned(const Observer& observer) {
  return std::visit(Match{[](const LSQ&) { return true; }, [](const LSQPlus&) { return true; },
                          [](const PACT&) { return true; }, [](const TQT&) { return true; },
                          [](const LearnedBits&) { return true; }, [](const auto&) { return false; }},
                    observer);
}

bool follows_a_range(const Observer& observer) {
  return std::holds_alternative<MinMax>(observer) || std::holds_alternative<MovingAverage>(observer) ||
         std::holds_alternative<Latest>(observer);
}

bool chooses_at_end(const Observer& observer) {
  return histogram_bins(observer).has_value() || std::holds_alternative<MeanNoOutliers>(observer);
}

void validate(const Observer& observer) {
  std::visit(
      Match{[](const MovingAverage& o) {
              TORCH_CHECK_VALUE(o.constant > 0.0 && o.constant <= 1.0,
                                "[MovingAverage] constant must be in (0, 1], got ", o.constant);
            },
            [](const Histogram& o) {
              check_bins("Histogram", o.bins);
              check_norm("Histogram", o.norm);
            },
            [](const Percentile& o) {
              check_bins("Percentile", o.bins);
              TORCH_CHECK_VALUE(o.percentile > 50.0 && o.percentile <= 100.0,
                                "[Percentile] percentile must be in (50, 100], got ", o.percentile);
            },
            [](const SQNR& o) {
              check_bins("SQNR", o.bins);
              TORCH_CHECK_VALUE(o.clip_weight >= 1.0 && std::isfinite(o.clip_weight),
                                "[SQNR] clip_weight must be finite and at least 1, got ", o.clip_weight);
            },
            [](const MeanNoOutliers& o) {
              TORCH_CHECK_VALUE(!o.sigma.has_value() || !o.quantile.has_value(),
                                "[MeanNoOutliers] one of sigma and quantile must be set, got both");
              TORCH_CHECK_VALUE(!o.sigma.has_value() || (*o.sigma > 0.0 && std::isfinite(*o.sigma)),
                                "[MeanNoOutliers] sigma must be finite and positive, got ", o.sigma.value_or(0.0));
              TORCH_CHECK_VALUE(!o.quantile.has_value() || (*o.quantile >= 0.0 && *o.quantile < 0.5),
                                "[MeanNoOutliers] quantile must be in [0, 0.5), got ", o.quantile.value_or(0.0));
              TORCH_CHECK_VALUE(o.batches >= 2 && o.batches <= 65536 && o.batches % 2 == 0,
                                "[MeanNoOutliers] batches must be even and in 2..65536, got ", o.batches);
            },
            [](const MSE& o) {
              check_norm("MSE", o.norm);
              TORCH_CHECK_VALUE(o.steps >= 1 && o.steps <= 10000, "[MSE] steps must be in 1..10000, got ", o.steps);
              if (o.bins != 0) {
                check_bins("MSE", o.bins);
              }
            },
            [](const HalfQuadratic& o) {
              TORCH_CHECK_VALUE(o.norm > 0.0 && o.norm <= 1.0, "[HalfQuadratic] norm must be in (0, 1], got ", o.norm);
              TORCH_CHECK_VALUE(o.beta > 0.0 && std::isfinite(o.beta),
                                "[HalfQuadratic] beta must be finite and positive, got ", o.beta);
              TORCH_CHECK_VALUE(o.kappa >= 1.0 && o.kappa <= 10.0, "[HalfQuadratic] kappa must be in [1, 10], got ",
                                o.kappa);
              TORCH_CHECK_VALUE(o.iterations >= 0 && o.iterations <= 10000,
                                "[HalfQuadratic] iterations must be in 0..10000, got ", o.iterations);
            },
            [](const LSQ& o) { check_gradient_scale("LSQ", o.gradient_scale); },
            [](const LSQPlus& o) { check_gradient_scale("LSQPlus", o.gradient_scale); },
            [](const LearnedBits& o) {
              TORCH_CHECK_VALUE(o.lowest >= 2 && o.lowest <= 8, "[LearnedBits] lowest must be in 2..8, got ", o.lowest);
            },
            [](const auto&) {}},
      observer);
}

std::string str(const Observer& observer) {
  const auto search = [](RangeSearch kind) {
    return kind == RangeSearch::none ? "None" : kind == RangeSearch::mse ? "'mse'" : "'kl'";
  };
  const auto optional = [](std::optional<double> value) {
    return value.has_value() ? fmt::format("{}", *value) : std::string("None");
  };
  return std::visit(
      Match{[](const MinMax&) { return std::string("MinMax()"); },
            [](const MovingAverage& o) { return fmt::format("MovingAverage(constant={})", o.constant); },
            [](const Latest&) { return std::string("Latest()"); },
            [&](const Histogram& o) {
              return fmt::format("Histogram(bins={}, search={}, norm={})", o.bins, search(o.search), o.norm);
            },
            [](const Percentile& o) { return fmt::format("Percentile(percentile={}, bins={})", o.percentile, o.bins); },
            [](const SQNR& o) { return fmt::format("SQNR(clip_weight={}, bins={})", o.clip_weight, o.bins); },
            [&](const MeanNoOutliers& o) {
              return fmt::format("MeanNoOutliers(sigma={}, quantile={}, batches={})", optional(o.sigma),
                                 optional(o.quantile), o.batches);
            },
            [](const MSE& o) { return fmt::format("MSE(norm={}, steps={}, bins={})", o.norm, o.steps, o.bins); },
            [](const HalfQuadratic& o) {
              return fmt::format("HalfQuadratic(norm={}, beta={}, kappa={}, iterations={})", o.norm, o.beta, o.kappa,
                                 o.iterations);
            },
            [&](const LSQ& o) { return fmt::format("LSQ(gradient_scale={})", optional(o.gradient_scale)); },
            [&](const LSQPlus& o) { return fmt::format("LSQPlus(gradient_scale={})", optional(o.gradient_scale)); },
            [](const PACT&) { return std::string("PACT()"); }, [](const TQT&) { return std::string("TQT()"); },
            [](const LearnedBits& o) { return fmt::format("LearnedBits(lowest={})", o.lowest); }},
      observer);
}

}  // namespace rarefy::quantization
