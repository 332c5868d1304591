#include <rarefy/rarefy.h>
#include <torch/torch.h>

#include <sstream>

#include "catch.h"

using Catch::Matchers::ContainsSubstring;
using rarefy::distillation::DistillationLoss;
using rarefy::distillation::DistillationLossOptions;

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

double value(DistillationLoss& loss, const torch::Tensor& s, const torch::Tensor& t, const torch::Tensor& y = {},
             const torch::Tensor& weights = {}, const torch::Tensor& mask = {}) {
  return loss->forward(s, t, y, weights, mask).item<double>();
}

}  // namespace

TEST_CASE("DistillationLoss treats classes that only one model has as it is told", "[distillation]") {
  torch::manual_seed(1);
  const auto wide = torch::randn({4, 9}, torch::kDouble), narrow = torch::randn({4, 6}, torch::kDouble);
  const auto labels = torch::randint(0, 6, {4});
  DistillationLoss plain;
  CHECK_THROWS_WITH(
      plain(wide, narrow, labels),
      ContainsSubstring("[DistillationLoss] student and teacher must have the same number of classes, got "
                        "9 and 6"));
  DistillationLoss truncate(DistillationLossOptions{.vocabulary = "truncate"});
  CHECK(value(truncate, wide, narrow, labels) == value(plain, wide.narrow(1, 0, 6).contiguous(), narrow, labels));
  CHECK(value(truncate, narrow, wide, labels) == value(plain, narrow, wide.narrow(1, 0, 6).contiguous(), labels));
  DistillationLoss pad(DistillationLossOptions{.vocabulary = "pad"});
  const auto padded = torch::constant_pad_nd(narrow, {0, 3}, -kInfinity);
  CHECK(value(pad, wide, narrow, labels) == value(plain, wide, padded, labels));
  CHECK(std::isfinite(value(pad, wide, narrow, labels)));
  CHECK_THROWS_WITH(pad(narrow, wide, labels),
                    ContainsSubstring("gives the student probability 0 on classes that the teacher has alone"));
  const auto map = torch::tensor({2, 0, -1, 5, 4, 8}, torch::kLong);
  DistillationLoss mapped(DistillationLossOptions{.vocabulary = "map", .label_map = map});
  auto expected = wide.index_select(1, map.clamp_min(0));
  expected.select(1, 2).fill_(-kInfinity);
  CHECK(value(mapped, narrow, wide, labels) == value(plain, narrow, expected, labels));
  CHECK_THROWS_WITH(mapped(narrow, narrow, labels),
                    ContainsSubstring("label_map must hold teacher classes in [0, 6) or -1, got 8"));
}

TEST_CASE("DistillationLoss shifts labels and weights, not logits", "[distillation]") {
  torch::manual_seed(2);
  const auto student = torch::randn({2, 5, 7}), teacher = torch::randn({2, 5, 7});
  const auto labels = torch::randint(0, 7, {2, 5});
  const auto mask = torch::rand({2, 5}) > 0.3;
  DistillationLoss plain, shifted(DistillationLossOptions{.shift = true});
  const auto cut = [](const torch::Tensor& x) { return x.narrow(1, 0, 4).contiguous(); };
  const auto next = [](const torch::Tensor& x) { return x.narrow(1, 1, 4).contiguous(); };
  CHECK(value(shifted, student, teacher, labels) ==
        Approx(value(plain, cut(student), cut(teacher), next(labels))).epsilon(1e-6));
  CHECK(value(shifted, student, teacher, labels, {}, mask) ==
        Approx(value(plain, cut(student), cut(teacher), next(labels), {}, next(mask))).epsilon(1e-6));
  DistillationLoss rows(DistillationLossOptions{.alpha = 1.0, .reduction = "none", .shift = true});
  CHECK(rows(student, teacher).sizes() == torch::IntArrayRef{2, 4});
}

TEST_CASE("DistillationLoss takes several teachers as their mixture", "[distillation]") {
  torch::manual_seed(3);
  const auto student = torch::randn({6, 8}, torch::kDouble);
  const std::vector<torch::Tensor> teachers{torch::randn({6, 8}, torch::kDouble), torch::randn({6, 8}, torch::kDouble)};
  const double t = 3.0;
  DistillationLoss loss(DistillationLossOptions{.temperature = t, .alpha = 1.0, .teacher_weights = {3.0, 1.0}});
  const auto p = 0.75 * torch::softmax(teachers[0] / t, -1) + 0.25 * torch::softmax(teachers[1] / t, -1);
  const double expected = t * t * (p * (p.log() - torch::log_softmax(student / t, -1))).sum().item<double>() / 6.0;
  CHECK(loss->forward(student, teachers).item<double>() == Approx(expected).epsilon(1e-12));
  CHECK_THROWS_WITH(loss->forward(student, teachers[0]), ContainsSubstring("one number per teacher, got 2 for 1"));
}

TEST_CASE("DistillationLoss says what it computes and refuses what it cannot", "[distillation]") {
  std::ostringstream text;
  text << *DistillationLoss(DistillationLossOptions{.divergence = "reverse_kl", .shift = true});
  CHECK(text.str() ==
        "rarefy::distillation::DistillationLoss(temperature=4, alpha=0.5, divergence=reverse_kl, shift=1)");
  CHECK_THROWS_WITH(DistillationLoss(DistillationLossOptions{.vocabulary = "cut"}),
                    ContainsSubstring("vocabulary must be 'error', 'truncate', 'pad' or 'map', got 'cut'"));
  CHECK_THROWS_WITH(DistillationLoss(DistillationLossOptions{.vocabulary = "map"}),
                    ContainsSubstring("label_map must be given with vocabulary 'map' and only then, got none"));
  CHECK_THROWS_WITH(DistillationLoss(DistillationLossOptions{.teacher_weights = {1.0, 0.0}}),
                    ContainsSubstring("teacher_weights must be positive and finite, got 0"));
  DistillationLoss loss;
  const auto logits = torch::randn({3, 4});
  CHECK_THROWS_AS(loss(logits, logits, torch::zeros({3}, torch::kLong), torch::Tensor(), torch::ones({3})),
                  c10::TypeError);
}
