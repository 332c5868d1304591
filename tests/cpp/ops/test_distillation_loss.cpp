#include <rarefy/rarefy.h>
#include <torch/torch.h>

#include <cmath>
#include <functional>
#include <limits>
#include <map>
#include <string>

#include "catch.h"

using Catch::Matchers::ContainsSubstring;
using rarefy::ops::distillation_loss;
using rarefy::ops::distillation_loss_forward;

namespace {

/// The definition in float64, in loops.
double reference(const torch::Tensor& student, const torch::Tensor& teacher, const torch::Tensor& labels, double t,
                 double alpha, int64_t ignore_index = -100) {
  const auto s = student.to(torch::kDouble), u = teacher.to(torch::kDouble);
  const auto classes = s.size(1);
  double total = 0.0;
  int64_t valid = 0;
  for (int64_t row = 0; row < s.size(0); ++row) {
    const auto label = labels.defined() ? labels[row].item<int64_t>() : 0;
    if (labels.defined() && label == ignore_index) {
      continue;
    }
    ++valid;
    const auto log_sum = [&](const torch::Tensor& x, double temperature) {
      double sum = 0.0;
      for (int64_t c = 0; c < classes; ++c) {
        sum += std::exp(x[row][c].item<double>() / temperature);
      }
      return std::log(sum);
    };
    const double sum_s = log_sum(s, t), sum_u = log_sum(u, t);
    double kl = 0.0;
    for (int64_t c = 0; c < classes; ++c) {
      const double log_p = u[row][c].item<double>() / t - sum_u;
      kl += std::exp(log_p) * (log_p - (s[row][c].item<double>() / t - sum_s));
    }
    total += alpha * t * t * kl;
    if (alpha < 1.0) {
      total += (1.0 - alpha) * (log_sum(s, 1.0) - s[row][label].item<double>());
    }
  }
  return total / static_cast<double>(valid);
}

struct Logits {
  torch::Tensor student, teacher, labels;
};

Logits make(int64_t rows, int64_t classes) {
  torch::manual_seed(rows * 1000 + classes);
  return {torch::randn({rows, classes}) * 3, torch::randn({rows, classes}) * 3, torch::randint(0, classes, {rows})};
}

}  // namespace

TEST_CASE("distillation_loss follows the definition", "[ops][distillation]") {
  for (const int64_t classes : {1, 5, 16, 37}) {
    auto [student, teacher, labels] = make(7, classes);
    labels[3] = -100;
    for (const double t : {0.5, 1.0, 3.0, 4.0, 20.0}) {
      for (const double alpha : {0.0, 0.4, 1.0}) {
        const double expected = reference(student, teacher, labels, t, alpha);
        const double loss = distillation_loss(student, teacher, labels, std::nullopt, {t, alpha}).item<double>();
        CHECK(loss == Approx(expected).epsilon(1e-5).margin(1e-6));
        const double exact =
            distillation_loss(student.to(torch::kDouble), teacher.to(torch::kDouble), labels, std::nullopt, {t, alpha})
                .item<double>();
        CHECK(exact == Approx(expected).epsilon(1e-12).margin(1e-13));
      }
    }
  }
}

TEST_CASE("distillation_loss has the gradient of the definition", "[ops][distillation]") {
  auto [student, teacher, labels] = make(4, 9);
  for (const double t : {1.0, 4.0, 5.0}) {
    auto leaf = student.clone().requires_grad_();
    (distillation_loss(leaf, teacher, labels, std::nullopt, {t, 0.6}) * 2.0).backward();
    for (int64_t c = 0; c < 9; ++c) {
      auto up = student.to(torch::kDouble), down = student.to(torch::kDouble);
      up[2][c] += 1e-5;
      down[2][c] -= 1e-5;
      const double slope = (reference(up, teacher, labels, t, 0.6) - reference(down, teacher, labels, t, 0.6)) / 2e-5;
      CHECK(leaf.grad()[2][c].item<double>() == Approx(2.0 * slope).epsilon(1e-4).margin(1e-6));
    }
  }
}

TEST_CASE("distillation_loss gives the same bits with every instruction set", "[ops][distillation]") {
  const auto before = rarefy::instruction_set();
  auto [student, teacher, labels] = make(5, 1043);
  std::vector<std::tuple<at::Tensor, at::Tensor, at::Tensor>> results;
  for (const char* name : {"plain", "avx2", "avx512"}) {
    try {
      rarefy::set_instruction_set(name);
    } catch (const c10::ValueError&) {
      continue;  // this processor does not have it
    }
    results.push_back(distillation_loss_forward(student, teacher, labels, std::nullopt, {4.0, 0.5}));
  }
  rarefy::set_instruction_set(before);
  for (const auto& result : results) {
    CHECK(torch::equal(std::get<0>(result), std::get<0>(results[0])));
    CHECK(torch::equal(std::get<1>(result), std::get<1>(results[0])));
  }
}

TEST_CASE("distillation_loss is zero when teacher and student agree", "[ops][distillation]") {
  auto student = (torch::randn({6, 50}) * 5).requires_grad_();
  const auto loss = distillation_loss(student, student.detach().clone(), std::nullopt, std::nullopt, {4.0, 1.0});
  loss.backward();
  CHECK(loss.item<float>() == 0.0f);
  CHECK(student.grad().count_nonzero().item<int64_t>() == 0);
}

TEST_CASE("distillation_loss says what is wrong", "[ops][distillation]") {
  auto [student, teacher, labels] = make(4, 5);
  CHECK_THROWS_WITH(distillation_loss(student, teacher, labels, std::nullopt, {0.0, 0.5}),
                    ContainsSubstring("[distillation_loss] temperature must be positive and finite, got 0"));
  CHECK_THROWS_WITH(distillation_loss(student, teacher, labels, std::nullopt, {4.0, 1.5}),
                    ContainsSubstring("alpha must be in [0, 1], got 1.5"));
  CHECK_THROWS_WITH(distillation_loss(student, teacher.slice(1, 0, 4), labels, std::nullopt, {4.0, 0.5}),
                    ContainsSubstring("teacher_logits must have the student's shape [4, 5], got [4, 4]"));
  CHECK_THROWS_AS(distillation_loss(student, teacher, labels.to(torch::kInt), std::nullopt, {4.0, 0.5}),
                  c10::TypeError);
  CHECK_THROWS_AS(distillation_loss(student, teacher, labels + 5, std::nullopt, {4.0, 0.5}), c10::IndexError);
  CHECK_THROWS_WITH(distillation_loss(student, teacher, torch::full_like(labels, 7), std::nullopt,
                                      {.temperature = 4.0, .alpha = 0.5, .ignore_index = 7}),
                    ContainsSubstring("at least one row must be valid"));
}

TEST_CASE("distillation_loss with every divergence follows loops in float64", "[ops][distillation]") {
  const auto [student, teacher, labels] = make(5, 23);
  const double t = 3.0, skew = 0.3;
  const auto log_q = torch::log_softmax(student.to(torch::kDouble) / t, -1);
  const auto log_p = torch::log_softmax(teacher.to(torch::kDouble) / t, -1);
  const auto kl = [](double a, double b) { return a * std::log(a / b); };
  const std::map<std::string, std::function<double(double, double)>> terms{
      {"kl", [&](double p, double q) { return kl(p, q); }},
      {"reverse_kl", [&](double p, double q) { return kl(q, p); }},
      {"jensen_shannon",
       [&](double p, double q) {
         const double m = skew * p + (1.0 - skew) * q;
         return skew * kl(p, m) + (1.0 - skew) * kl(q, m);
       }},
      {"total_variation", [&](double p, double q) { return 0.5 * std::abs(p - q); }},
      {"skewed_kl", [&](double p, double q) { return kl(p, skew * p + (1.0 - skew) * q); }},
      {"skewed_reverse_kl", [&](double p, double q) { return kl(q, skew * q + (1.0 - skew) * p); }}};
  const auto weights = torch::tensor({1.0, 0.5, 0.0, 2.0, 1.5}, torch::kDouble);
  for (const auto& [name, term] : terms) {
    double expected = 0.0;
    for (int64_t row = 0; row < 5; ++row) {
      for (int64_t c = 0; c < 23; ++c) {
        expected += weights[row].item<double>() * t * t *
                    term(std::exp(log_p[row][c].item<double>()), std::exp(log_q[row][c].item<double>()));
      }
    }
    rarefy::ops::DistillationLossSettings settings{.temperature = t, .alpha = 1.0, .divergence = name, .skew = skew};
    CHECK(distillation_loss(student, teacher, std::nullopt, weights, settings).item<double>() ==
          Approx(expected / 5.0).epsilon(1e-5));
    settings.reduction = "sum";
    CHECK(distillation_loss(student.to(torch::kDouble), teacher.to(torch::kDouble), labels, weights, settings)
              .item<double>() == Approx(expected).epsilon(1e-11));
    settings.reduction = "none";
    const auto rows = distillation_loss(student, teacher, std::nullopt, weights, settings);
    CHECK(rows.sizes() == torch::IntArrayRef{5});
    CHECK(rows[2].item<float>() == 0.0f);
    CHECK(rows.sum().item<double>() == Approx(expected).epsilon(1e-5));
  }
}
