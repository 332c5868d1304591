// The network of tests/python/test_quantization.py (class Parity), for tests that hold both languages equal.
#pragma once

#include <rarefy/rarefy.h>
#include <torch/torch.h>

struct ParityImpl : torch::nn::Module {
  rarefy::nn::ConvBn2d conv{nullptr};
  rarefy::nn::Conv2d plain{nullptr};
  rarefy::nn::Add add{nullptr};
  rarefy::nn::Linear fc{nullptr};

  ParityImpl()
      : conv(register_module("conv", rarefy::nn::ConvBn2d(2, 4, 3))),
        plain(register_module("plain", rarefy::nn::Conv2d(4, 4, 1))),
        add(register_module("add", rarefy::nn::Add())),
        fc(register_module("fc", rarefy::nn::Linear(4, 3))) {}

  torch::Tensor forward(const torch::Tensor& x) {
    const auto y = torch::relu(conv(x));
    return fc(add(y, plain(y)).mean({2, 3}));
  }
};
TORCH_MODULE(Parity);
