#include <ATen/core/dispatch/Dispatcher.h>
#include <rarefy/rarefy.h>
#include <torch/torch.h>

#include <filesystem>
#include <functional>
#include <sstream>

#include "catch.h"

using namespace rarefy::pruning;
using Catch::Matchers::ContainsSubstring;

namespace {

struct NetImpl : torch::nn::Module {
  torch::nn::Conv2d conv{nullptr};
  torch::nn::BatchNorm2d bn{nullptr};
  torch::nn::Sequential head;

  NetImpl()
      : conv(register_module("conv", torch::nn::Conv2d(3, 7, 3))),
        bn(register_module("bn", torch::nn::BatchNorm2d(7))),
        head(register_module(
            "head", torch::nn::Sequential(torch::nn::Linear(7, 13), torch::nn::ReLU(), torch::nn::Linear(13, 5)))) {}
  at::Tensor forward(const at::Tensor& x) { return head->forward(bn(conv(x)).relu().mean({2, 3})); }
};
TORCH_MODULE(Net);

/// Booleans of a packed mask, by a loop.
at::Tensor unpacked(const at::Tensor& mask, at::IntArrayRef sizes) {
  auto kept = at::zeros(sizes, at::kBool);
  auto flat = kept.view(-1);
  for (int64_t i = 0; i < flat.numel(); ++i) {
    flat[i] = (mask[i / 8].item<int>() >> (i % 8) & 1) != 0;
  }
  return kept;
}

at::Tensor packed(const at::Tensor& kept) {
  const int64_t n = kept.numel();
  auto mask = at::zeros({(n + 63) / 64 * 8}, at::kByte);
  const auto flat = kept.contiguous().view(-1);
  for (int64_t i = 0; i < n; ++i) {
    if (flat[i].item<bool>()) {
      mask[i / 8] = mask[i / 8].item<int>() | 1 << (i % 8);
    }
  }
  return mask;
}

/// Random masks beside the weights of a model, applied.
void put_masks(torch::nn::Module& model, double kept = 0.5) {
  const torch::NoGradGuard no_grad;
  for (const auto& item : model.named_modules("", /*include_self=*/false)) {
    const auto parameters = item.value()->named_parameters(/*recurse=*/false);
    if (const auto* weight = parameters.find("weight"); weight != nullptr && weight->dim() >= 2) {
      const auto keep = at::rand(weight->sizes()) < kept;
      weight->mul_(keep);
      item.value()->register_buffer("weight_mask_bits", packed(keep));
    }
  }
}

Net make(uint64_t seed = 0) {
  torch::manual_seed(seed);
  Net net;
  put_masks(*net);
  return net;
}

void backward(Net& net, int step) {
  torch::manual_seed(1000 + static_cast<uint64_t>(step));
  const auto x = at::randn({8, 3, 8, 8});
  net->zero_grad();
  at::cross_entropy_loss(net(x), at::randint(0, 5, {8}, at::kLong)).backward();
}

/// The number of nonzero elements where the mask prunes.
int64_t stray(const at::Tensor& tensor, const at::Tensor& mask) {
  return tensor.detach().masked_select(unpacked(mask, tensor.sizes()).logical_not()).count_nonzero().item<int64_t>();
}

int64_t stray(Net& net) {
  int64_t count = 0;
  for (const auto& parameter : masked_parameters(*net).parameters) {
    count += stray(parameter.value, parameter.mask);
  }
  return count;
}

std::string message(const std::function<void()>& call) {
  try {
    call();
  } catch (const c10::ValueError& e) {
    return e.what_without_backtrace();
  }
  return "nothing was thrown";
}

std::filesystem::path temporary(const std::string& name) {
  return std::filesystem::temp_directory_path() / ("rarefy_enforce_" + std::to_string(getpid()) + "_" + name);
}

}  // namespace

TEST_CASE("Composite and CPU kernels of the mask lists agree", "[enforce]") {
  const auto apply = c10::Dispatcher::singleton()
                         .findSchemaOrThrow("rarefy::apply_masks_", "")
                         .typed<void(at::TensorList, at::TensorList)>();
  const auto find = c10::Dispatcher::singleton()
                        .findSchemaOrThrow("rarefy::stray_values", "")
                        .typed<at::Tensor(at::TensorList, at::TensorList)>();
  // Another backend's key reaches the composite, whose operators run where the tensors are.
  const c10::DispatchKeySet other(c10::DispatchKey::XPU);
  torch::manual_seed(1);
  for (const auto type : {at::kFloat, at::kDouble, at::kBFloat16, at::kHalf}) {
    std::vector<at::Tensor> tensors, masks;
    for (const auto& sizes : std::vector<std::vector<int64_t>>{{5, 9}, {0, 3}, {130}, {4, 3, 3, 3}}) {
      const auto keep = at::rand(sizes) < 0.5;
      const auto zeros = at::rand(sizes) < 0.7;
      tensors.push_back(at::randn(sizes).masked_fill_(zeros, -0.0).to(type));
      masks.push_back(packed(keep));
    }
    tensors[3] = tensors[3].contiguous(at::MemoryFormat::ChannelsLast);
    tensors[2][7] = std::numeric_limits<double>::quiet_NaN();
    const auto rows = rarefy::ops::stray_values(tensors, masks);
    CHECK(torch::equal(rows, find.redispatch(other, tensors, masks)));
    for (size_t i = 0; i < tensors.size(); ++i) {
      CHECK(rows[static_cast<int64_t>(i)][0].item<int64_t>() == stray(tensors[i], masks[i]));
    }
    std::vector<at::Tensor> copies;
    for (const auto& tensor : tensors) {
      copies.push_back(tensor.clone());
    }
    rarefy::ops::apply_masks_(tensors, masks);
    apply.redispatch(other, copies, masks);
    for (size_t i = 0; i < tensors.size(); ++i) {
      CHECK(stray(tensors[i], masks[i]) == 0);
      CHECK(at::allclose(tensors[i], copies[i], 0, 0, /*equal_nan=*/true));
    }
  }
  rarefy::ops::apply_masks_({}, {});
  CHECK(rarefy::ops::stray_values({}, {}).sizes() == at::IntArrayRef({0, 2}));
}

TEST_CASE("Values, gradients and moments of LibTorch's optimizers are held", "[enforce]") {
  using Make = std::function<std::unique_ptr<torch::optim::Optimizer>(std::vector<at::Tensor>)>;
  const std::vector<Make> makes{
      [](auto p) {
        return std::make_unique<torch::optim::SGD>(
            p, torch::optim::SGDOptions(0.1).momentum(0.9).nesterov(true).weight_decay(1e-2));
      },
      [](auto p) { return std::make_unique<torch::optim::Adam>(p, torch::optim::AdamOptions(0.01).amsgrad(true)); },
      [](auto p) { return std::make_unique<torch::optim::AdamW>(p, torch::optim::AdamWOptions(0.01)); },
      [](auto p) {
        return std::make_unique<torch::optim::RMSprop>(p,
                                                       torch::optim::RMSpropOptions(0.01).momentum(0.9).centered(true));
      },
      [](auto p) { return std::make_unique<torch::optim::Adagrad>(p, torch::optim::AdagradOptions(0.01)); },
  };
  for (const auto& make_optimizer : makes) {
    auto net = make();
    const auto optimizer = make_optimizer(net->parameters());
    for (int step = 0; step < 2; ++step) {
      backward(net, step);
      optimizer->step();
    }
    CHECK(stray(net) > 0);  // nothing holds them yet
    size_t moments = 0;
    for (int step = 2; step < 5; ++step) {
      backward(net, step);
      optimizer->step();
      const auto state = masked_parameters(*net);
      enforce(state, optimizer.get());
      CHECK(stray(net) == 0);
      const auto kept = moments_of(state, *optimizer);
      for (const auto& [index, moment] : kept) {
        CHECK(stray(moment, state.parameters[index].mask) == 0);
        CHECK(moment.count_nonzero().item<int64_t>() > 0);
      }
      for (const auto& parameter : state.parameters) {
        CHECK(stray(parameter.value.grad(), parameter.mask) == 0);
      }
      moments = kept.size();
    }
    CHECK(moments >= 3);
  }
}

TEST_CASE("Masked gradients keep zeros by themselves", "[enforce]") {
  auto net = make();
  torch::optim::AdamW optimizer(net->parameters(), torch::optim::AdamWOptions(0.01).amsgrad(true));
  for (int step = 0; step < 6; ++step) {
    backward(net, step);
    const auto state = masked_parameters(*net);
    REQUIRE(mask_gradients(state));
    optimizer.step();
    CHECK(stray(net) == 0);
    for (const auto& [index, moment] : moments_of(state, optimizer)) {
      CHECK(stray(moment, state.parameters[index].mask) == 0);
    }
  }
}

namespace {

/// Adds 1 to every weight after the step of SGD.
struct Drifting : torch::optim::SGD {
  using SGD::SGD;
  at::Tensor step(LossClosure closure = nullptr) override {
    auto loss = SGD::step(std::move(closure));
    const torch::NoGradGuard no_grad;
    for (auto& group : param_groups()) {
      for (auto& p : group.params()) {
        p.add_(1.0);
      }
    }
    return loss;
  }
};

}  // namespace

TEST_CASE("Which optimizers keep zeros", "[enforce]") {
  using namespace torch::optim;
  const auto net = make();
  const auto p = net->parameters();
  CHECK(keeps_zeros(SGD(p, SGDOptions(0.1).momentum(0.9))));
  CHECK(keeps_zeros(Adam(p, AdamOptions(0.1))));
  CHECK(keeps_zeros(AdamW(p, AdamWOptions(0.1))));
  CHECK(keeps_zeros(RMSprop(p, RMSpropOptions(0.1))));
  CHECK(keeps_zeros(Adagrad(p, AdagradOptions(0.1))));
  CHECK_FALSE(keeps_zeros(Adam(p, AdamOptions(0.1).eps(0.0))));
  CHECK_FALSE(keeps_zeros(Drifting(p, SGDOptions(0.1))));
  CHECK_FALSE(keeps_zeros(LBFGS(p, LBFGSOptions(0.1))));
}

TEST_CASE("A step of a pruner writes gradients alone where the optimizer keeps zeros", "[enforce]") {
  const auto options = torch::optim::SGDOptions(0.1).momentum(0.9).weight_decay(1e-2);
  for (const bool drifts : {false, true}) {
    torch::manual_seed(2);
    Net net;
    Pruner pruner(*net, {.sparsity = 0.5, .schedule = ConstantSchedule{1}});
    const std::unique_ptr<torch::optim::SGD> optimizer =
        drifts ? std::make_unique<Drifting>(net->parameters(), options)
               : std::make_unique<torch::optim::SGD>(net->parameters(), options);
    const auto run = [&](int step) {
      backward(net, step);
      pruner.step(*optimizer);
      CHECK(stray(net) == 0);
      for (const auto& [index, moment] : moments_of(pruner.state(), *optimizer)) {
        CHECK(stray(moment, pruner.state().parameters[index].mask) == 0);
      }
      for (const auto& parameter : pruner.state().parameters) {
        CHECK(stray(parameter.value.grad(), parameter.mask) == 0);
      }
    };
    run(0);
    run(1);
    const auto version = [&] { return net->conv->weight._version(); };
    // LibTorch's own step writes through data(), which is not counted; the one that drifts counts once.
    auto before = version();
    run(2);
    CHECK(version() - before == (drifts ? 2 : 0));
    {  // someone else writes values: all is written, once more
      const torch::NoGradGuard no_grad;
      net->conv->weight.add_(1.0);
    }
    before = version();
    run(3);
    CHECK(version() - before == (drifts ? 3 : 1));
    {  // moments, as loading a state does
      const torch::NoGradGuard no_grad;
      for (const auto& moment : moments_of(pruner.state(), *optimizer)) {
        at::Tensor value = moment.value;
        value.add_(1.0);
      }
    }
    run(4);
    before = version();
    run(5);
    CHECK(version() - before == (drifts ? 2 : 0));
  }
}

TEST_CASE("A write that no version tells is found within 100 steps", "[enforce]") {
  torch::manual_seed(3);
  Net net;
  Pruner pruner(*net, {.sparsity = 0.5, .schedule = ConstantSchedule{1}});
  torch::optim::SGD optimizer(net->parameters(), torch::optim::SGDOptions(1e-3));
  for (int step = 0; step < 100; ++step) {
    backward(net, step);
    if (step == 50) {
      net->conv->weight.data().add_(1.0);
    }
    pruner.step(optimizer);
    CHECK((stray(net) == 0) == (step < 50 || step == 99));
  }
}

TEST_CASE("Optimizers that are not understood are refused", "[enforce]") {
  auto net = make(), other = make(1);
  const auto state = masked_parameters(*net);
  torch::optim::SGD foreign(other->parameters(), torch::optim::SGDOptions(0.1).momentum(0.9));
  CHECK_THAT(message([&] { enforce(state, &foreign); }), ContainsSubstring("must hold parameters of the model"));
  backward(net, 0);
  CHECK_THAT(message([&] { enforce(state, {{0, at::zeros({3})}}); }),
             ContainsSubstring("a moment of 'conv.weight' must have its shape [7, 3, 3, 3], got [3]"));
}

TEST_CASE("Saving a model whose zeros left the mask is an error", "[enforce]") {
  auto net = make();
  const auto file = temporary("model.safetensors");
  rarefy::save_safetensors(*net, file);
  const auto state = masked_parameters(*net);
  CHECK(state.parameters.size() == 3);
  CHECK(state.parameters[0].name == "conv.weight");
  const auto kept = unpacked(state.parameters[1].mask, state.parameters[1].value.sizes());
  const auto places = kept.view(-1).logical_not().nonzero().view(-1);
  {
    const torch::NoGradGuard no_grad;
    state.parameters[1].value.view(-1).index_put_({places.slice(0, 2)}, 0.5);
  }
  const std::string expected = "'head.0.weight' must be zero where its mask prunes, but " +
                               std::to_string(places.numel() - 2) + " values are not, the first at flat index " +
                               std::to_string(places[2].item<int64_t>());
  std::filesystem::remove(file);
  CHECK_THAT(message([&] { rarefy::save_safetensors(*net, file); }),
             ContainsSubstring("[save_safetensors] " + expected));
  CHECK_THAT(message([&] { save_pruned(*net, Manifest(), file); }), ContainsSubstring("[save_pruned] " + expected));
  CHECK_THAT(message([&] { rarefy::quantization::save_quantized(*net, file); }),
             ContainsSubstring("[save_quantized] " + expected));
  CHECK_THAT(message([&] { check_masks(*net); }), ContainsSubstring("[check_masks] " + expected));
  CHECK(!std::filesystem::exists(file));
  CHECK(stray_values(state).size() == 1);
  CHECK(remask(*net) == places.numel() - 2);
  CHECK(remask(*net) == 0);
  rarefy::save_safetensors(*net, file);
  std::filesystem::remove(file);
}

TEST_CASE("Masks without a parameter, and masks that do not fit", "[enforce]") {
  auto net = make();
  net->register_buffer("lost_mask_bits", at::zeros({8}, at::kByte));
  CHECK_THAT(message([&] { check_masks(*net); }),
             ContainsSubstring("the mask 'lost_mask_bits' must be beside a parameter 'lost'"));
  auto other = make();
  auto state = masked_parameters(*other);
  state.parameters[2].mask = at::zeros({8}, at::kByte);
  const auto before = state.parameters[0].value.clone();
  CHECK_THAT(message([&] { apply_masks(state); }),
             ContainsSubstring("the mask of 'head.2.weight' must hold 16 bytes (uint8) for shape [5, 13], got 8"));
  CHECK(torch::equal(state.parameters[0].value, before));
}

TEST_CASE("Averages are in the masks of what they average", "[enforce]") {
  torch::manual_seed(3);
  Net student, average;
  for (auto* net : {&student, &average}) {
    for (const auto& [key, module] : std::vector<std::pair<std::string, std::shared_ptr<torch::nn::Module>>>{
             {"weight_mask_bits", (*net)->conv.ptr()}}) {
      module->register_buffer(key, rarefy::ops::full_mask((*net)->conv->weight));
    }
  }
  rarefy::distillation::Ema ema({.decay = 0.5, .warmup = 0});
  ema.update(*average, *student);
  CHECK((average->conv->weight == 0).sum().item<int64_t>() == 0);
  const auto keep = at::rand(student->conv->weight.sizes()) < 0.5;
  {
    const torch::NoGradGuard no_grad;
    student->named_buffers()["conv.weight_mask_bits"].copy_(packed(keep));
    student->conv->weight.mul_(keep);
  }
  ema.update(*average, *student);
  CHECK(stray(average) == 0);
  CHECK(torch::equal(average->conv->weight != 0, keep));
}

TEST_CASE("Masks go with layers that prepare_qat puts in, and convert ends them", "[enforce]") {
  torch::manual_seed(4);
  torch::nn::Sequential net(torch::nn::Conv2d(3, 6, 3), torch::nn::ReLU(), torch::nn::Flatten(),
                            torch::nn::Linear(6 * 36, 5));
  MagnitudePruner pruner(*net, {.sparsity = 0.5, .schedule = ConstantSchedule{1}});
  pruner.step();
  const auto zeros = [&] {
    int64_t count = 0;
    for (const auto& parameter : masked_parameters(*net).parameters) {
      count +=
          parameter.value.numel() -
          rarefy::ops::stray_values({at::ones(parameter.value.sizes())}, {parameter.mask}).select(1, 0).item<int64_t>();
      CHECK(stray(parameter.value, parameter.mask) == 0);
    }
    return count;
  };
  const int64_t kept = zeros();
  rarefy::quantization::prepare_qat(*net, rarefy::quantization::QConfig::int8());
  CHECK(masked_parameters(*net).parameters.size() == 2);
  CHECK(zeros() == kept);
  MagnitudePruner again(*net, {.sparsity = 0.5, .schedule = ConstantSchedule{1}});
  CHECK(again.steps() == 1);
  torch::optim::SGD optimizer(net->parameters(), torch::optim::SGDOptions(0.1).momentum(0.9));
  for (int step = 0; step < 3; ++step) {
    optimizer.zero_grad();
    net->forward(at::randn({2, 3, 8, 8})).pow(2).mean().backward();
    optimizer.step();
    again.step();
    enforce(masked_parameters(*net), &optimizer);
  }
  std::map<std::string, at::Tensor> masks;
  for (const auto& parameter : masked_parameters(*net).parameters) {
    masks.emplace(parameter.name, unpacked(parameter.mask, parameter.value.sizes()));
  }
  {
    const torch::NoGradGuard no_grad;
    auto weight = masked_parameters(*net).parameters[0].value;
    const auto before = weight.clone();
    weight.fill_(1.0);
    CHECK_THAT(message([&] { rarefy::quantization::convert(*net); }),
               ContainsSubstring("[convert] '0.weight' must be zero where its mask prunes"));
    weight.copy_(before);
  }
  rarefy::quantization::convert(*net);
  CHECK(masked_parameters(*net).parameters.empty());
  const auto buffers = net->named_buffers();
  for (const auto& item : buffers) {
    CHECK(item.key().find("mask") == std::string::npos);
    CHECK(item.key() != kStepKey);
  }
  for (const auto& [name, keep] : masks) {
    CHECK(buffers[name].scalar_type() == at::kChar);
    CHECK(buffers[name].masked_select(keep.logical_not()).count_nonzero().item<int64_t>() == 0);
  }
  const auto folder = temporary("quantized");
  rarefy::quantization::save_quantized(*net, folder);
  std::filesystem::remove_all(folder);
}
