#include <rarefy/rarefy.h>
#include <torch/torch.h>

#include <cmath>
#include <functional>
#include <limits>
#include <sstream>

#include "catch.h"

using Catch::Matchers::ContainsSubstring;
using namespace rarefy::distillation;
using torch::Tensor;

namespace {

Tensor rand64(at::IntArrayRef size, uint64_t seed) {
  torch::manual_seed(seed);
  return torch::randn(size, torch::kDouble);
}

double value(const Tensor& x) { return x.item<double>(); }

/// Largest difference between the gradient and central differences, in float64.
double gradient_error(const std::function<Tensor(const Tensor&)>& loss, const Tensor& x) {
  auto leaf = x.clone().requires_grad_();
  loss(leaf).backward();
  const torch::NoGradGuard no_grad;
  double worst = 0.0;
  for (int64_t i = 0; i < x.numel(); ++i) {
    auto above = x.clone(), below = x.clone();
    above.view(-1)[i] += 1e-5;
    below.view(-1)[i] -= 1e-5;
    const double slope = (value(loss(above)) - value(loss(below))) / 2e-5;
    worst = std::max(worst, std::abs(slope - leaf.grad().view(-1)[i].item<double>()));
  }
  return worst;
}

struct Named {
  const char* name;
  std::function<Tensor(const Tensor&, const Tensor&)> loss;
  std::vector<int64_t> size;
  bool zero = true;  // where student and teacher agree
};

std::vector<Named> losses() {
  const auto labels = torch::tensor({2, 0, -100, 1});
  return {
      {"hint", [](auto& s, auto& t) { return hint_loss(s, t); }, {3, 4, 5}},
      {"hint smooth_l1", [](auto& s, auto& t) { return hint_loss(s, t, std::nullopt, "smooth_l1"); }, {3, 5}},
      {"cosine", [](auto& s, auto& t) { return HiddenCosine()(s, t); }, {3, 4, 5}},
      {"attention transfer", [](auto& s, auto& t) { return AttentionTransfer()(s, t); }, {2, 3, 2, 2}},
      {"attention transfer, code",
       [](auto& s, auto& t) { return AttentionTransfer(AttentionTransferOptions{"code", 2.0, {}})(s, t); },
       {2, 3, 2, 2}},
      {"similarity", [](auto& s, auto& t) { return SimilarityPreserving()(s, t); }, {4, 5}},
      {"distance", [](auto& s, auto& t) { return RelationalDistance()(s, t); }, {4, 5}},
      {"angle", [](auto& s, auto& t) { return RelationalAngle()(s, t); }, {4, 5}},
      {"pkt", [](auto& s, auto& t) { return ProbabilisticKnowledgeTransfer()(s, t); }, {4, 5}},
      {"minilm",
       [](auto& s, auto& t) {
         return MiniLMRelations(MiniLMRelationsOptions{2, {1, 0.5, 2}})(QueryKeyValue{s, s * 2, s / 4},
                                                                        QueryKeyValue{t, t * 2, t / 4});
       },
       {2, 3, 4}},
      {"maps", [](auto& s, auto& t) { return AttentionMaps(AttentionMapsOptions{"kl", true})(s, t); }, {2, 2, 3, 3}},
      {"contrastive kl", [](auto& s, auto& t) { return ContrastiveKL()(s, t); }, {4, 3}},
      {"affinity",
       [](auto& s, auto& t) { return AffinityMimicking()(ImageText{s[0], s[1]}, ImageText{t[0], t[1]}); },
       {2, 4, 5}},
      {"embedding", [](auto& s, auto& t) { return EmbeddingMSE()(s, t); }, {4, 5}},
      {"dkd", [=](auto& s, auto& t) { return DKD()(s, t, labels); }, {4, 5}},
      {"nkd", [=](auto& s, auto& t) { return NKD()(s, t, labels); }, {4, 5}, false},
      {"dist", [=](auto& s, auto& t) { return DIST()(s, t, labels); }, {4, 5}},
      {"logit mse", [=](auto& s, auto& t) { return LogitMSE()(s, t, labels); }, {4, 5}},
  };
}

}  // namespace

TEST_CASE("losses on features and logits: gradient, zero where models agree, a constant teacher",
          "[distillation][features]") {
  for (const auto& [name, loss, size, zero] : losses()) {
    INFO(name);
    const auto s = rand64(size, 1);
    auto t = rand64(size, 2).requires_grad_();
    CHECK(gradient_error([&, &loss = loss](const Tensor& x) { return loss(x, t); }, s) < 1e-6);
    CHECK(value(loss(s, t)) > 1e-3);
    if (zero) {
      CHECK(std::abs(value(loss(s, s))) < 1e-13);
    }
    auto leaf = s.to(torch::kBFloat16).requires_grad_();
    const auto low = loss(leaf, t.detach());
    low.backward();
    CHECK(low.scalar_type() == torch::kFloat);
    CHECK(leaf.grad().scalar_type() == torch::kBFloat16);
    CHECK(value(low) ==
          Approx(value(loss(leaf.detach().to(torch::kDouble), t.detach().to(torch::kFloat)))).epsilon(1e-4));
    CHECK_FALSE(t.grad().defined());
    CHECK_THROWS_AS(loss(s.to(torch::kLong), t), c10::TypeError);
    CHECK_THROWS_AS(loss(s.narrow(size.size() > 1 && std::string(name) == "affinity" ? 1 : 0, 0, 0), t),
                    c10::ValueError);
  }
}

TEST_CASE("logit losses follow their formulas", "[distillation][features]") {
  const auto s = rand64({3, 4}, 1), t = rand64({3, 4}, 2);
  const auto labels = torch::tensor({3, 0, 2});
  const double temperature = 2.0;
  double dkd = 0.0, nkd = 0.0;
  for (int64_t row = 0; row < 3; ++row) {
    const auto label = labels[row].item<int64_t>();
    const auto others = torch::arange(4).masked_select(torch::arange(4) != label);
    const auto p = torch::softmax(t[row] / temperature, 0), q = torch::softmax(s[row] / temperature, 0);
    const auto p_rest = torch::softmax(t[row].index_select(0, others) / temperature, 0);
    const auto q_rest = torch::softmax(s[row].index_select(0, others) / temperature, 0);
    const double a = p[label].item<double>(), b = q[label].item<double>();
    const double target = a * std::log(a / b) + (1 - a) * std::log((1 - a) / (1 - b));
    dkd += temperature * temperature * (1.5 * target + 3.0 * value((p_rest * (p_rest / q_rest).log()).sum()));
    const auto plain_p = torch::softmax(t[row], 0), plain_q = torch::softmax(s[row], 0);
    nkd -= value(plain_p[label] * plain_q[label].log()) +
           0.7 * temperature * temperature * value((p_rest * q_rest.log()).sum());
  }
  CHECK(value(DKD(DKDOptions{temperature, 1.5, 3.0, -100})(s, t, labels)) == Approx(dkd / 3));
  CHECK(value(NKD(NKDOptions{temperature, 0.7, -100})(s, t, labels)) == Approx(nkd / 3));
  CHECK_THROWS_AS(DKD()(s, t, torch::tensor({3, 4, 2})), c10::IndexError);
  CHECK_THROWS_WITH(DKD()(s, t, Tensor()), ContainsSubstring("[DKD] labels must be given, got none"));
  CHECK_THROWS_WITH(LogitMSE()(s, t, torch::full({3}, -100)), ContainsSubstring("at least one row must count"));
}

TEST_CASE("a hint's adapter: sizes from options or from the first call, clones, states", "[distillation][features]") {
  torch::manual_seed(0);
  const auto student = torch::randn({2, 5, 3, 3}), teacher = torch::randn({2, 7, 3, 3});
  Hint lazy, sized(HintOptions{"mse", 5, 7, {}});
  CHECK(lazy->parameters().empty());
  CHECK(sized->named_parameters()["adapter.weight"].sizes() == at::IntArrayRef{7, 5});
  CHECK(value(lazy(student, teacher)) > 0);
  CHECK(lazy->named_parameters().keys() == std::vector<std::string>{"adapter.weight", "adapter.bias"});
  const auto copy = std::dynamic_pointer_cast<HintImpl>(lazy->clone());
  CHECK(value(copy->forward(student, teacher)) == value(lazy(student, teacher)));
  CHECK(copy->adapter->weight.data_ptr() != lazy->adapter->weight.data_ptr());

  torch::optim::SGD optimizer(sized->parameters(), 0.05);
  const double before = value(sized(student, teacher));
  for (int i = 0; i < 20; ++i) {
    optimizer.zero_grad();
    sized(student, teacher).backward();
    optimizer.step();
  }
  CHECK(value(sized(student, teacher)) < before);

  const auto mask = torch::ones({2, 3, 3}, torch::kBool);
  mask[0][1].fill_(false);
  auto dirty = student.clone();
  dirty.index_put_({0, torch::indexing::Slice(), 1}, std::numeric_limits<float>::quiet_NaN());
  sized->zero_grad();
  const auto masked = sized(dirty, teacher, mask);
  masked.backward();
  CHECK(value(masked) == value(sized(student, teacher, mask)));
  CHECK(sized->adapter->weight.grad().isfinite().all().item<bool>());

  CHECK_THROWS_WITH(Hint(HintOptions{"mse", 5, {}, {}}),
                    ContainsSubstring("[Hint] student_features and teacher_features must be given together"));
  CHECK_THROWS_WITH(Hint(HintOptions{"l1", {}, {}, {}}), ContainsSubstring("[Hint] loss must be one of 'mse'"));
}

TEST_CASE("contrastive representation: memories, negatives, a resumed run", "[distillation][features]") {
  ContrastiveRepresentationOptions options;
  options.dataset_size = 20;
  options.student_features = 6;
  options.teacher_features = 8;
  options.features = 4;
  options.negatives = 5;
  torch::manual_seed(1);
  ContrastiveRepresentation loss(options);
  const auto s = torch::randn({3, 6}), t = torch::randn({3, 8});
  const auto index = torch::tensor({4, 0, 19});
  const auto before = loss->teacher_memory.clone();
  CHECK(before.norm(2, -1).allclose(torch::ones({20})));

  const auto negatives = contrastive_negatives(index, loss->step, 1000, 20, options.seed);
  CHECK(value(negatives.min()) == 0);
  CHECK(value(negatives.max()) == 19);
  CHECK_FALSE((negatives == index.unsqueeze(1)).any().item<bool>());

  const auto copy = std::dynamic_pointer_cast<ContrastiveRepresentationImpl>(loss->clone());
  const auto first = loss(s, t, index);
  first.backward();
  CHECK(value(first) > 0);
  CHECK(loss->step.item<int64_t>() == 1);
  CHECK(loss->student_embedding->weight.grad().isfinite().all().item<bool>());
  const auto changed = (loss->teacher_memory != before).any(-1);
  CHECK(changed.nonzero().flatten().equal(torch::tensor({0, 4, 19})));
  CHECK(loss->teacher_memory.norm(2, -1).allclose(torch::ones({20})));
  const auto second = loss(s, t, index);
  CHECK(value(second) != value(first));
  CHECK(value(copy->forward(s, t, index)) == value(first));
  CHECK(value(copy->forward(s, t, index)) == value(second));

  loss->eval();
  const auto kept = loss->teacher_memory.clone();
  loss(s, t, index);
  CHECK(loss->teacher_memory.equal(kept));
  CHECK(loss->step.item<int64_t>() == 2);
  CHECK_THROWS_AS(loss(s, t, torch::tensor({4, 0, 20})), c10::IndexError);
  options.momentum = 1.0;
  CHECK_THROWS_WITH(ContrastiveRepresentation(options), ContainsSubstring("momentum must be in [0, 1), got 1"));
}

TEST_CASE("losses print what they are", "[distillation][features]") {
  std::ostringstream stream;
  stream << *Hint(HintOptions{"cosine", 5, 7, {}}) << "\n" << *DKD() << "\n" << *AttentionTransfer();
  CHECK_THAT(stream.str(), ContainsSubstring("Hint(loss=cosine)"));
  CHECK_THAT(stream.str(), ContainsSubstring("FeatureAdapter(5 -> 7)"));
  CHECK_THAT(stream.str(), ContainsSubstring("DKD(temperature=4, alpha=1, beta=8)"));
  CHECK_THAT(stream.str(), ContainsSubstring("AttentionTransfer(variant=paper, power=2)"));
}
