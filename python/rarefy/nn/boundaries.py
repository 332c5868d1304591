"""Normalizations and activation functions that hand on values on a grid, so that integers flow through a file."""

from __future__ import annotations

import copy

from torch import Tensor, nn

from rarefy.nn._base import QuantizableLayer, QuantState, activation_quantizer
from rarefy.quantization.fake_quantizer import FakeQuantizer
from rarefy.quantization.qconfig import QConfig


class BoundaryLayer(QuantizableLayer):
    """An operation in floating point between quantizers.

    Its result is quantized (``quant.output``), and its input too (``quant.input``) for a target that computes it on integers
    (``TargetProfile.boundary_inputs``). Weights of normalizations stay in floating point. Floating point itself until
    ``prepare_qat`` or ``prepare``, and torch's own module then.
    """

    fuses_relu = False
    quantizes_output = False  # it always has its quantizer

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.relu = False
        self.quant = QuantState()

    def _make_quantizers(self, config: QConfig) -> dict[str, FakeQuantizer]:
        quantizers = {"output": activation_quantizer(config)}
        if config.profile is not None and config.profile.boundary_inputs:
            quantizers["input"] = activation_quantizer(config)
        return quantizers

    def _attach(self, config: QConfig, relu: bool, quantize_output: bool) -> None:
        super()._attach(config, relu, quantize_output)
        parameter = next(self.parameters(recurse=False), None)
        if parameter is not None:
            self.quant.to(parameter.device)

    def forward(self, x: Tensor) -> Tensor:
        """The operation, of the type and shape of torch's, with its result on the grid of ``quant.output``."""
        quantizer = self.quant.input
        return self._finish(super().forward(x if quantizer is None else quantizer(x)))


class LayerNorm(BoundaryLayer, nn.LayerNorm):
    """``torch.nn.LayerNorm`` with a result that can be quantized: see ``BoundaryLayer``."""


class GroupNorm(BoundaryLayer, nn.GroupNorm):
    """``torch.nn.GroupNorm`` with a result that can be quantized: see ``BoundaryLayer``."""


class RMSNorm(BoundaryLayer, nn.RMSNorm):
    """``torch.nn.RMSNorm`` with a result that can be quantized: see ``BoundaryLayer``."""


class GELU(BoundaryLayer, nn.GELU):
    """``torch.nn.GELU`` with a result that can be quantized: see ``BoundaryLayer``."""


class SiLU(BoundaryLayer, nn.SiLU):
    """``torch.nn.SiLU`` with a result that can be quantized: see ``BoundaryLayer``."""


class Hardswish(BoundaryLayer, nn.Hardswish):
    """``torch.nn.Hardswish`` with a result that can be quantized: see ``BoundaryLayer``."""


class Softmax(BoundaryLayer, nn.Softmax):
    """``torch.nn.Softmax`` with a result that can be quantized: see ``BoundaryLayer``."""


_OF: dict[type[nn.Module], type[BoundaryLayer]] = {
    kind.__bases__[1]: kind for kind in (LayerNorm, GroupNorm, RMSNorm, GELU, SiLU, Hardswish, Softmax)
}


def with_boundaries(
    model: nn.Module, kinds: tuple[type[nn.Module], ...] | None = None, *, inplace: bool = False
) -> nn.Module:
    """A model whose normalizations and activation functions can be quantized: each of torch's own types becomes its twin here.

    What ``prepare_qat`` and ``prepare`` then quantize. They leave torch's own types alone, as rounding a normalization's result
    costs accuracy, and gains something only where a runtime goes on with the integers.

    Args:
        model: any; parameters and their names stay.
        kinds: those of torch's types to take; None: LayerNorm, GroupNorm, RMSNorm, GELU, SiLU, Hardswish and Softmax. A type
            that is none of these is an error. Subclasses are left alone.
        inplace: swap in ``model`` itself.

    Raises:
        ValueError: ``kinds`` holds another type, or ``model`` is such a module itself.
    """
    taken = tuple(_OF) if kinds is None else tuple(kinds)
    for kind in taken:
        if kind not in _OF:
            known = ", ".join(known.__name__ for known in _OF)
            raise ValueError(f"[with_boundaries] kinds must be of {known}, got {getattr(kind, '__name__', kind)}")
    if type(model) in taken:
        raise ValueError(
            f"[with_boundaries] model must contain its layers, got a single {type(model).__name__}; wrap it in nn.Sequential"
        )
    if not inplace:
        model = copy.deepcopy(model)
    twins: dict[int, nn.Module] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if type(module) not in taken:
            continue
        if id(module) not in twins:
            twin = _OF[type(module)].__new__(_OF[type(module)])
            twin.__dict__ = module.__dict__.copy()
            twin._modules = module._modules.copy()
            twin.relu, twin.quant = False, QuantState()
            twins[id(module)] = twin
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, twins[id(module)])
    return model
