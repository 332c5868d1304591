"""The parameters of learned quantizers beside those of the network: for optimizers and losses."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rarefy.quantization.fake_quantizer import FakeQuantizer


def _quantizers(model: nn.Module) -> dict[str, FakeQuantizer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, FakeQuantizer)}


def parameter_groups(model: nn.Module, quantizer_lr: float | None = None) -> list[dict[str, object]]:
    """The parameters of a model that require a gradient, for an optimizer: those of the network, and those of learned
    quantizers without weight decay.

        torch.optim.SGD(parameter_groups(model, quantizer_lr=0.001), lr=0.01, momentum=0.9, weight_decay=1e-4)

    Make the optimizer after ``prepare_qat`` or ``prepare``, which make the quantizers' parameters.

    Args:
        model: prepared, or not.
        quantizer_lr: learning rate of the quantizers' parameters; None: the optimizer's.

    Returns:
        One group, or two where there are learned quantizers.
    """
    own = {id(p): p for quantizer in _quantizers(model).values() for p in quantizer.parameters()}
    groups: list[dict[str, object]] = [
        {"params": [p for p in model.parameters() if p.requires_grad and id(p) not in own]}
    ]
    if own:
        group: dict[str, object] = {"params": [p for p in own.values() if p.requires_grad], "weight_decay": 0.0}
        groups.append(group if quantizer_lr is None else {**group, "lr": quantizer_lr})
    return groups


def model_size_bits(model: nn.Module) -> Tensor:
    """The size of the parameters of a model in bits, as a float32 scalar.

    A quantized weight has the bits of its scheme, or of its ``LearnedBits``, through which the result has a gradient (straight
    through the rounding to whole bits); other parameters have those of their type. Scales and codebooks are not counted.

        loss = criterion(model(x), y) + 0.1 * (model_size_bits(model) / budget - 1).relu()

    Args:
        model: prepared, or not.
    """
    quantizers = _quantizers(model)
    of_weights = {
        "".join((layer, ".", name)): quantizer
        for path, quantizer in quantizers.items()
        if quantizer.is_weight
        for layer, _, name in (path.rpartition(".quant."),)
        if layer
    }
    counted = {id(p) for quantizer in quantizers.values() for p in quantizer.parameters()}
    fixed, total = 0, torch.zeros(())
    for name, parameter in model.named_parameters():
        if id(parameter) in counted:
            continue
        quantizer = of_weights.get(name)
        if quantizer is None:
            fixed += parameter.numel() * 8 * parameter.element_size()
        elif quantizer.learning is not None and quantizer.learning.bits is not None:
            bits = quantizer.bits
            whole = bits.detach().round().clamp(*quantizer.learning.bits) + (bits - bits.detach())
            total = total.to(bits.device) + whole.float().sum() * parameter.numel()
        else:
            fixed += parameter.numel() * quantizer.scheme.bits
    return total + fixed


def pact_penalty(model: nn.Module) -> Tensor:
    """The sum of the squares of all ``PACT`` clipping values, for the loss (Choi et al., 2018, section 3): a float32 scalar
    with a gradient, 0 where there are none."""
    total = torch.zeros(())
    for quantizer in _quantizers(model).values():
        if "alpha" in quantizer._parameters:
            total = total.to(quantizer.alpha.device) + quantizer.alpha.float().square().sum()
    return total
