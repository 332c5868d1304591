"""Quantization-aware training of other libraries, each by its own defaults. None of them needs to be installed.

A function takes the float model and an example input and returns the model to train; ImportError says what is missing.
"""

import contextlib
import io
import warnings
from collections.abc import Callable

import torch
from models import BasicBlock, ResNet18
from torch import Tensor, nn


class _QuantizableBlock(BasicBlock):
    """The block as torch.ao's eager mode wants it: with a module for the addition."""

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        return self.add_relu.add_relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))), identity)


def torch_ao(model: nn.Module, x: Tensor) -> nn.Module:
    """Eager mode, the x86 configuration whose observers are fused into the fake quantization."""
    try:
        from torch.ao import quantization as ao
        from torch.ao.nn.quantized import FloatFunctional
    except ImportError as error:
        raise ImportError(f"torch.ao is not a part of this torch: {error}") from error
    fused: list[list[str]] = []
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(module, BasicBlock):
            module.__class__, module.add_relu = _QuantizableBlock, FloatFunctional()
            fused += [[f"{prefix}conv1", f"{prefix}bn1", f"{prefix}relu"], [f"{prefix}conv2", f"{prefix}bn2"]]
            if module.downsample is not None:
                fused.append([f"{prefix}downsample.0", f"{prefix}downsample.1"])
        elif isinstance(module, ResNet18):
            fused.append([f"{prefix}conv1", f"{prefix}bn1", f"{prefix}relu"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if fused:
            model = ao.fuse_modules_qat(model, fused)
        model = ao.QuantWrapper(model)
        model.qconfig = ao.get_default_qat_qconfig("x86", version=1)
        return ao.prepare_qat(model)


def torchao_pt2e(model: nn.Module, x: Tensor) -> nn.Module:
    """The exported graph with the fake quantization that the x86 Inductor backend wants."""
    with contextlib.redirect_stderr(io.StringIO()):  # messages about CUDA libraries that it cannot load
        try:
            from torchao.quantization.pt2e import move_exported_model_to_train
            from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e
            from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86
        except ImportError as error:
            raise ImportError(f"torchao is not installed: {error}") from error
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config(is_qat=True))
    exported = torch.export.export(model, (x,), strict=True).module()
    return move_exported_model_to_train(prepare_qat_pt2e(exported, quantizer))


def torchao_8da4w(model: nn.Module, x: Tensor) -> nn.Module:
    """8-bit activations per token, 4-bit weights in groups of 32: its configuration for language models."""
    if any(isinstance(module, nn.Conv2d) for module in model.modules()):
        raise NotImplementedError("8da4w quantizes Linear only, which is not where this model computes")
    with contextlib.redirect_stderr(io.StringIO()):
        try:
            from torchao.quantization.qat import Int8DynActInt4WeightQATQuantizer
        except ImportError as error:
            raise ImportError(f"torchao is not installed: {error}") from error
    return Int8DynActInt4WeightQATQuantizer(groupsize=32).prepare(model)


def brevitas(model: nn.Module, x: Tensor) -> nn.Module:
    """Every Linear and Conv2d with its 8-bit defaults, input and weight."""
    try:
        from brevitas.graph.quantize import layerwise_quantize
    except ImportError as error:
        raise ImportError(f"brevitas is not installed: {error}") from error
    return layerwise_quantize(model)


PEERS: dict[str, Callable[[nn.Module, Tensor], nn.Module]] = {
    "torch.ao eager": torch_ao,
    "torchao pt2e x86": torchao_pt2e,
    "torchao 8da4w": torchao_8da4w,
    "brevitas": brevitas,
}
