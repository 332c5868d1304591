"""What the quantized layers share."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from rarefy._core.quantization import (
    LONGEST_INTEGER_SUM,
    Latest,
    PerChannel,
    QuantizedTensorParts,
    has_exact_integer_products,
    quantize_to,
)
from rarefy.nn.kept import Kept
from rarefy.nn.relu import mark_rectified, rectify
from rarefy.quantization.fake_quantizer import FakeQuantizer
from rarefy.quantization.qconfig import QConfig

if TYPE_CHECKING:
    from typing_extensions import Self

_EXACT_PRODUCTS = has_exact_integer_products()


class ByteGrid(nn.Module):
    """The grid on which a converted layer hands its result on, as bytes: the input grid of the layers that read it.

    Buffers ``scale`` (float32 [1]) and ``zero_point`` (int32 [1]); the integer q of a grid with ``qmin`` < 0 is stored as
    q + 128, so that bytes are always uint8.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, qmin: int, qmax: int, scale: Tensor, zero_point: Tensor) -> None:
        super().__init__()
        self.qmin, self.qmax = qmin, qmax
        self.register_buffer("scale", scale.detach().clone())
        self.register_buffer("zero_point", zero_point.detach().clone())

    def extra_repr(self) -> str:
        """The range."""
        return f"[{self.qmin}, {self.qmax}]"


class QuantState(nn.Module):
    """The fake quantizers of one layer: its child ``quant``. A name that is absent stays in floating point (``find``).

    ``next`` is no quantizer, but the grid of the bytes that a converted layer gives; None where it gives floats.
    """

    input: FakeQuantizer | None
    input0: FakeQuantizer | None
    input1: FakeQuantizer | None
    weight: FakeQuantizer | None
    output: FakeQuantizer | None
    next: ByteGrid | None

    def __init__(self, **quantizers: FakeQuantizer) -> None:
        super().__init__()
        for name in ("input", "input0", "input1", "weight", "output"):
            if name in quantizers:
                self.add_module(name, quantizers[name])
            else:
                self.__dict__[name] = None
        for name, quantizer in quantizers.items():  # of a layer with several weights: weight_ih_l0, hidden_l0, ...
            if name not in self._modules:
                self.add_module(name, quantizer)
        self.__dict__["next"] = None

    def find(self, name: str) -> FakeQuantizer | None:
        """The quantizer of this name, or None."""
        return self._modules.get(name)  # type: ignore[return-value]

    def set_next(self, grid: ByteGrid | None) -> None:
        """Set or take away ``next``."""
        self.__dict__.pop("next", None)
        self._modules.pop("next", None)
        if grid is None:
            self.__dict__["next"] = None
        else:
            self.add_module("next", grid)


class IntegerWeight(NamedTuple):
    """A trained weight as it is deployed."""

    values: Tensor  #: int8, shape of the weight
    scale: Tensor  #: float32, [channels] or [1]
    zero_point: Tensor  #: int32, zeros, shape of scale
    axis: int | None  #: the channel axis of values, None per tensor
    bias: Tensor | None  #: float32 [out]


def activation_quantizer(config: QConfig) -> FakeQuantizer:
    """A quantizer of the configuration's activations."""
    assert config.activation is not None
    return FakeQuantizer(config.activation, config.observer)


class QuantizableLayer(nn.Module):
    """A layer with fake quantizers: floating point while it has none, prepared otherwise."""

    #: Whether a ReLU after the layer can become part of it.
    fuses_relu: ClassVar[bool] = True
    #: Whether a result that only floating-point operations read gets a quantizer of its own.
    quantizes_output: ClassVar[bool] = True
    #: Whether there is something to quantize when the configuration quantizes weights only.
    has_weight: ClassVar[bool] = False

    quant: QuantState
    relu: bool
    execution: str | None  #: as in QConfig
    gradient_dtype: torch.dtype  #: as in QConfig
    target: str | None = None  #: as in QConfig
    _kept: Kept | None = None  #: during a calibration

    @classmethod
    def unsupported(cls, module: nn.Module) -> str | None:
        """Why ``module``, of the floating-point type that this layer replaces, cannot be quantized, or None."""
        return None

    @classmethod
    def from_float(
        cls, module: nn.Module, config: QConfig, *, relu: bool = False, quantize_output: bool = False
    ) -> Self:
        """A quantized layer over the parameters of ``module``: the Parameter objects themselves."""
        layer = cls.__new__(cls)
        layer.__dict__ = module.__dict__.copy()
        layer._modules = module._modules.copy()
        layer._attach(config, relu, quantize_output)
        return layer

    @classmethod
    def with_quantizers(cls, module: nn.Module, quant: QuantState, *, relu: bool = False) -> Self:
        """A quantized layer over the parameters of ``module``, with quantizers that exist: a file's."""
        layer = cls.__new__(cls)
        layer.__dict__ = module.__dict__.copy()
        layer._modules = module._modules.copy()
        layer.quant, layer.relu = quant, relu
        layer.execution, layer.gradient_dtype = None, torch.float32
        return layer

    def _attach(self, config: QConfig, relu: bool, quantize_output: bool) -> None:
        quantizers = self._make_quantizers(config)
        if quantize_output and config.activation is not None:
            quantizers["output"] = activation_quantizer(config)
        self.quant = QuantState(**quantizers)
        self.quant.train(self.training)
        self.relu = relu
        self.execution, self.gradient_dtype, self.target = config.execution, config.gradient_dtype, config.target

    def _make_quantizers(self, config: QConfig) -> dict[str, FakeQuantizer]:
        raise NotImplementedError

    @property
    def _keeper(self) -> Kept | None:
        # Compiled graphs see no identities of tensors, and keep nothing.
        return None if self._kept is None or torch.compiler.is_compiling() else self._kept

    @property
    def prepared(self) -> bool:
        """Whether the layer has quantizers."""
        return bool(self.quant._modules)

    def _finish(self, y: Tensor, rectified: bool = False) -> Tensor:
        if self.relu and not rectified:
            y = rectify(y) if self._keeper is None else torch.relu_(y)
        if self.quant.output is not None:
            y = self.quant.output(y)
        return mark_rectified(y) if self.relu else y


class PairLayer(QuantizableLayer):
    """An operation on two tensors, each with a quantizer of its own."""

    #: The inputs that get a quantizer.
    quantized_inputs: tuple[str, ...] = ("input0", "input1")

    def __init__(self) -> None:
        super().__init__()
        self.relu = False
        self.quant = QuantState()

    @classmethod
    def from_float(
        cls,
        module: nn.Module,
        config: QConfig,
        *,
        relu: bool = False,
        quantize_output: bool = False,
        inputs: tuple[str, ...] = ("input0", "input1"),
    ) -> Self:
        """The operation of ``module`` with quantizers at the inputs of these names."""
        layer = cls.__new__(cls)
        layer.__dict__ = module.__dict__.copy()
        layer._modules = module._modules.copy()
        layer.quantized_inputs = inputs
        layer._attach(config, relu, quantize_output)
        return layer

    def _make_quantizers(self, config: QConfig) -> dict[str, FakeQuantizer]:
        return {name: activation_quantizer(config) for name in self.quantized_inputs}

    def _quantized_inputs(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        first, second = self.quant.input0, self.quant.input1
        return (a if first is None else first(a)), (b if second is None else second(b))


class WeightedLayer(QuantizableLayer):
    """A layer with a weight that is fake-quantized."""

    has_weight = True
    #: The axis of the weight that has one entry per output channel.
    channel_axis: ClassVar[int] = 0

    #: Where LibTorch has integer kernels for the layer.
    _integer_devices: ClassVar[tuple[str, ...]] = ()
    #: Whether the layer trains in integers where the configuration leaves it open: where they are not slower.
    trains_in_integers: ClassVar[bool] = True

    weight: nn.Parameter
    bias: nn.Parameter | None
    float_reason: str | None  #: why the layer never executes in integers, or None
    saved_weight: IntegerWeight | None = None  #: of a file, in place of those of the float weight
    saved_parts: tuple[QuantizedTensorParts, Tensor | None] | None = None  #: of a file, where the weight is packed

    def _make_quantizers(self, config: QConfig) -> dict[str, FakeQuantizer]:
        quantizers = {}
        if config.activation is not None:
            quantizers["input"] = activation_quantizer(config)
        quantizers["weight"] = self._weight_quantizer(config)
        return quantizers

    def _weight_quantizer(self, config: QConfig) -> FakeQuantizer:
        scheme = config.weight
        assert scheme is not None
        if scheme.axis is not None and scheme.axis != self.channel_axis:
            scheme = scheme.with_granularity(PerChannel(self.channel_axis))
        observer = config.weight_observer or Latest()
        return FakeQuantizer(scheme, observer, self._channels(), self._by_channel(self.weight).shape)

    def _channels(self) -> int:
        """The number of output channels."""
        return self.weight.shape[self.channel_axis]

    def _by_channel(self, weight: Tensor) -> Tensor:
        """The weight with all output channels on ``channel_axis``, for a layer that stores them otherwise."""
        return weight

    def _as_stored(self, weight: Tensor) -> Tensor:
        """The inverse of ``_by_channel``."""
        return weight

    def _input_axis(self, dims: int) -> int | None:
        """The axis of an input of ``dims`` dimensions that has an index for each input channel; None where there is none."""
        return None

    def _by_input(self, values: Tensor) -> Tensor:
        """A value for each input channel, in a shape that broadcasts to the weight as its quantizer sees it."""
        return values

    def _attach(self, config: QConfig, relu: bool, quantize_output: bool) -> None:
        super()._attach(config, relu, quantize_output)
        self.quant.to(self.weight.device)
        self.float_reason = self._why_never_integer(config)

    def _why_never_integer(self, config: QConfig) -> str | None:
        if not self._integer_devices:
            return f"{type(self).__name__} has no integer kernel"
        products = self.weight.numel() // self._channels()
        if products > LONGEST_INTEGER_SUM:
            return f"int32 does not hold sums of {products} products"
        return config.why_not_integer() or (
            None if _EXACT_PRODUCTS else "the processor sums products of bytes in 16 bits"
        )

    def folded(self) -> tuple[Tensor, Tensor | None]:
        """The float weight and bias that are quantized."""
        return self.weight, self.bias

    def _sources(self) -> tuple[Tensor | None, ...]:
        """The tensors that ``folded()`` reads."""
        return self.weight, self.bias

    def _rounded(self) -> tuple[Tensor, Tensor | None]:
        """The weight on its grid and the bias: ``folded()`` as evaluation computes with it."""
        keeper = self._keeper
        return self._round() if keeper is None else keeper.get("weight", self._sources(), self._round)

    def _round(self) -> tuple[Tensor, Tensor | None]:
        weight, bias = self.folded()
        assert self.quant.weight is not None
        return self._as_stored(self.quant.weight(self._by_channel(weight))), bias

    @torch.no_grad()
    def integer_weight(self) -> IntegerWeight:
        """The trained integers, with batch normalization folded in where there is one."""
        if self.saved_weight is not None:
            return self.saved_weight
        weight, bias = self.folded()
        quantizer = self.quant.weight
        assert quantizer is not None
        laid_out = self._by_channel(weight)
        if quantizer.observe:
            quantizer(laid_out)
        values = self._as_stored(quantizer.quantize_to_integer(laid_out))
        bias = None if bias is None else bias.detach().float().clone()
        return IntegerWeight(values, quantizer.scale.clone(), quantizer.zero_point.clone(), quantizer.axis, bias)

    @property
    def packs_weight(self) -> bool:
        """Whether conversion keeps the weight as codes and scales: in formats that no integer kernel computes with."""
        if self.saved_parts is not None:
            return True
        weight = self.quant.weight
        return weight is not None and not weight.is_plain and not weight.plan.stochastic

    @torch.no_grad()
    def packed_weight(self) -> tuple[QuantizedTensorParts, Tensor | None]:
        """The trained weight as codes and scales, and the bias, with batch normalization folded in where there is one."""
        if self.saved_parts is not None:
            return self.saved_parts
        weight, bias = self.folded()
        quantizer = self.quant.weight
        assert quantizer is not None
        laid_out = self._by_channel(weight)
        if quantizer.observe:
            quantizer(laid_out)
        given: tuple[Tensor, ...] = ()
        if not quantizer.plan.dynamic:
            given = (quantizer.codebook if quantizer.plan.entries else quantizer.scale, quantizer.zero_point)
        parts = quantize_to(laid_out, quantizer.scheme, *given)
        tensors = {name: tensor.to(weight.device) for name, tensor in parts.tensors.items()}
        parts = QuantizedTensorParts(parts.scheme, parts.shape, parts.dtype, tensors)
        return parts, None if bias is None else bias.detach().clone()

    def _compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's arithmetic, in floating point, on values that may lie on a grid: what a subclass gives."""
        raise NotImplementedError

    def _quantized_input(self, x: Tensor) -> Tensor:
        quantizer = self.quant.input
        return x if quantizer is None else quantizer(x)

    def _why_not_integer(self, x: Tensor) -> str | None:
        """Why this input has to be computed with in floating point, or None. Reads host values only."""
        if self.float_reason is not None:
            return self.float_reason
        if x.dtype is torch.float64:
            return "float64 has no integer kernels"
        return None if x.device.type in self._integer_devices else f"there are no integer kernels on {x.device.type}"

    def _runs_in_integers(self, x: Tensor) -> bool:
        weight, input_ = self.quant.weight, self.quant.input
        if self.execution == "simulated" or (self.execution is None and not self.trains_in_integers):
            return False
        if weight is None or not weight.quantize:
            return False
        if input_ is None or not input_.quantize:
            return False
        reason = self._why_not_integer(x)
        if reason is not None and self.execution == "integer":
            raise ValueError(
                f"[{type(self).__name__}] execution='integer' must be possible for its input, but {reason}"
            )
        return reason is None

    def _grids(self, x: Tensor, weight: Tensor, factor: Tensor | None = None) -> tuple[object, ...]:
        """The arguments of the integer operators that say how input and weight are rounded."""
        q, w = self.quant.input, self.quant.weight
        assert q is not None
        assert w is not None
        return *q.grid(x), q.qmin, q.qmax, *w.grid(self._by_channel(weight), factor), w.qmin, w.qmax

    def _compute_integer(
        self,
        x: Tensor,
        weight: Tensor,
        factor: Tensor | None,
        bias: Tensor | None,
        grids: tuple[object, ...],
        relu: bool,
    ) -> Tensor:
        """The layer's arithmetic in integers, with the weight quantized as ``weight * factor`` and the result divided by
        ``factor`` again where there is one: what a subclass gives."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """The layer on the grids of its input and weight."""
        assert self.quant.weight is not None
        if self._runs_in_integers(x):
            grids = self._grids(x, self.weight)
            y = self._compute_integer(x, self.weight, None, self.bias, grids, self.relu)
            return self._finish(y, rectified=self.relu)
        return self._finish(self._compute(self._quantized_input(x), *self._rounded()))
