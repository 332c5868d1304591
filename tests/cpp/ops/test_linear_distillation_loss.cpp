#include <rarefy/distillation/linear_loss.h>
#include <rarefy/distillation/top_k.h>
#include <rarefy/ops/distillation_loss.h>
#include <torch/torch.h>

#include "catch.h"

using rarefy::distillation::DistillationLossOptions;
using rarefy::distillation::LinearDistillationLoss;
using rarefy::ops::DistillationLossSettings;
using rarefy::ops::LinearHead;

namespace {

struct Heads {
  LinearHead student, teacher;
  torch::Tensor labels;

  Heads(int64_t rows, int64_t classes, const torch::TensorOptions& options) {
    torch::manual_seed(0);
    student = {torch::randn({rows, 6}, options).requires_grad_(), torch::randn({classes, 6}, options).requires_grad_(),
               torch::randn({classes}, options).requires_grad_()};
    teacher = {torch::randn({rows, 9}, options), torch::randn({classes, 9}, options), torch::randn({classes}, options)};
    labels = torch::randint(classes, {rows}, torch::kLong);
    labels[1] = -100;
  }

  static torch::Tensor logits(const LinearHead& head) { return torch::linear(head.hidden, head.weight, *head.bias); }
};

}  // namespace

TEST_CASE("heads in chunks have the loss and the gradients of their logits", "[linear_distillation_loss]") {
  // The second has rows for several chunks of 64 MiB.
  for (const auto& [rows, classes] : {std::pair<int64_t, int64_t>{13, 21}, {70, 131072}}) {
    const Heads heads(rows, classes, torch::kFloat64);
    const auto weights = torch::rand({rows}, torch::kFloat64);
    const auto mask = torch::rand({rows}) > 0.3;
    DistillationLossOptions options;
    options.temperature = 3.0;
    options.divergence = "reverse_kl";
    LinearDistillationLoss module(options);
    const auto loss = module(heads.student, heads.teacher, heads.labels, weights, mask);
    const auto expected = rarefy::ops::distillation_loss(Heads::logits(heads.student), Heads::logits(heads.teacher),
                                                         heads.labels, weights * mask, options.settings());
    CHECK(torch::allclose(loss, expected, 1e-12));
    const std::vector<torch::Tensor> leaves{heads.student.hidden, heads.student.weight, *heads.student.bias};
    const auto grads = torch::autograd::grad({loss * 2.0}, leaves);
    const auto wanted = torch::autograd::grad({expected * 2.0}, leaves);
    for (size_t i = 0; i < leaves.size(); ++i) {
      CHECK(torch::allclose(grads[i], wanted[i], 1e-9, 1e-12));
    }
  }
}

TEST_CASE("heads that do not fit are refused", "[linear_distillation_loss]") {
  Heads heads(5, 7, torch::kFloat32);
  const DistillationLossSettings settings;
  const auto run = [&] {
    return rarefy::ops::linear_distillation_loss(heads.student, heads.teacher, heads.labels, std::nullopt, settings);
  };
  CHECK_NOTHROW(run());
  heads.teacher.weight = torch::randn({8, 9});
  CHECK_THROWS_AS(run(), c10::ValueError);
  heads.teacher.weight = torch::randn({7, 9}, torch::kFloat64);
  CHECK_THROWS_AS(run(), c10::TypeError);
  CHECK_THROWS_AS(LinearDistillationLoss(DistillationLossOptions{.reduction = "none"}), c10::ValueError);
  const Heads sequences(6, 7, torch::kFloat32);
  const auto in_rows = [](const rarefy::ops::LinearHead& head) {
    return rarefy::ops::LinearHead{head.hidden.view({2, 3, -1}), head.weight, head.bias};
  };
  LinearDistillationLoss module;
  const auto with = [&](const torch::Tensor& weights, const torch::Tensor& mask) {
    return module(in_rows(sequences.student), in_rows(sequences.teacher), sequences.labels.view({2, 3}), weights, mask);
  };
  const auto mask = torch::tensor({true, false, true});
  CHECK_NOTHROW(with(torch::ones({2, 3}), mask.expand({2, 3})));
  CHECK_THROWS_AS(with(torch::ones({2, 3}), mask), c10::ValueError);  // would broadcast
  CHECK_THROWS_AS(with(torch::ones({3}), mask.expand({2, 3})), c10::ValueError);
}

TEST_CASE("all classes as top-k logits have the dense loss", "[top_k]") {
  torch::manual_seed(0);
  const auto student = torch::randn({6, 11}, torch::kFloat64).requires_grad_();
  const auto teacher = torch::randn({6, 11}, torch::kFloat64);
  const auto labels = torch::randint(11, {6}, torch::kLong);
  const DistillationLossSettings settings;
  const auto top = rarefy::distillation::topk_logits(teacher, 11, settings.temperature);
  const auto loss = rarefy::distillation::top_k_distillation_loss(student, top, labels, {}, settings);
  const auto expected = rarefy::ops::distillation_loss(student, teacher, labels, std::nullopt, settings);
  CHECK(torch::allclose(loss, expected, 1e-12));
  CHECK(torch::allclose(torch::autograd::grad({loss}, {student})[0], torch::autograd::grad({expected}, {student})[0],
                        1e-9, 1e-12));
  DistillationLossSettings other;
  other.temperature = 2.0;
  CHECK_THROWS_AS(rarefy::distillation::top_k_distillation_loss(student, top, labels, {}, other), c10::ValueError);
}
