"""LSTM, GRU and their cells with fake-quantized input, hidden state and weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from rarefy._core.quantization import LONGEST_INTEGER_SUM, Latest, learned_kind
from rarefy.nn._base import _EXACT_PRODUCTS, QuantizableLayer, QuantState, activation_quantizer
from rarefy.quantization import checkpoint
from rarefy.quantization.fake_quantizer import FakeQuantizer
from rarefy.quantization.qconfig import QConfig

if TYPE_CHECKING:
    from typing_extensions import Self

State = tuple[Tensor, Tensor | None]  #: hidden and, of an LSTM, cell state: [layers * directions, N, hidden]


class Direction(NamedTuple):
    """One direction of one layer."""

    layer: str  #: the suffix of names of the layer: "_l0"; "" of a cell
    suffix: str  #: the suffix of names of the direction: "_l0", "_l0_reverse"; "" of a cell
    reverse: bool


class Sizes(NamedTuple):
    """The sizes of a recurrent layer, and the order of the axes of its input."""

    kind: str  #: "LSTM" or "GRU"
    input_size: int
    hidden_size: int
    num_layers: int = 1
    bias: bool = True
    batch_first: bool = False
    dropout: float = 0.0
    bidirectional: bool = False
    is_cell: bool = False

    @property
    def gates(self) -> int:
        """The rows of a weight."""
        return (4 if self.kind == "LSTM" else 3) * self.hidden_size

    def layers(self) -> list[list[Direction]]:
        """The directions of each layer."""
        if self.is_cell:
            return [[Direction("", "", False)]]
        names = [f"_l{i}" for i in range(self.num_layers)]
        backward = [f"{name}_reverse" for name in names] if self.bidirectional else None
        return [
            [Direction(name, name, False), *([] if backward is None else [Direction(name, backward[i], True)])]
            for i, name in enumerate(names)
        ]


def sizes_of(module: nn.Module) -> Sizes:
    """The sizes of an ``nn.LSTM``, ``nn.GRU``, ``nn.LSTMCell`` or ``nn.GRUCell``."""
    kind = "LSTM" if isinstance(module, (nn.LSTM, nn.LSTMCell)) else "GRU"
    if isinstance(module, nn.RNNCellBase):
        return Sizes(kind, module.input_size, module.hidden_size, bias=module.bias, is_cell=True)
    return Sizes(
        kind,
        module.input_size,
        module.hidden_size,
        module.num_layers,
        module.bias,
        module.batch_first,
        float(module.dropout),
        module.bidirectional,
    )


class Run:
    """What the prepared and the converted layers share: a layer over all steps, direction by direction.

    A subclass gives the products.
    """

    sizes: Sizes
    training: bool

    def _layer_input(self, rows: Tensor, layer: str) -> Tensor:
        """The input of a layer, as ``_input_gates`` takes it."""
        raise NotImplementedError

    def _input_gates(self, x: Tensor, direction: Direction) -> Tensor:
        """The input's share of the gates, its bias included: [rows, gates]."""
        raise NotImplementedError

    def _hidden(self, direction: Direction) -> tuple[object, ...]:
        """The weight of the hidden state, its scale, bias and the grid of the hidden state: as ``recurrence`` takes them."""
        raise NotImplementedError

    def _saw(self, direction: Direction, h0: Tensor | None, y: Tensor) -> None:
        """Told of the hidden states that a direction went through."""

    def _run_rows(self, rows: Tensor, batch_sizes: Sequence[int], start: State | None) -> tuple[Tensor, State]:
        """Rows of all steps, one after the other, step t having ``batch_sizes[t]``: as ``rarefy::recurrence`` takes them."""
        sizes, batch, layers = self.sizes, batch_sizes[0], self.sizes.layers()
        name = type(self).__name__
        if rows.dim() != 2 or rows.shape[1] != sizes.input_size:
            raise ValueError(f"[{name}] input must have {sizes.input_size} features, got shape {tuple(rows.shape)}")
        expected = (sum(len(layer) for layer in layers), batch, sizes.hidden_size)
        for state in () if start is None else start:
            if state is not None and tuple(state.shape) != expected:
                raise ValueError(f"[{name}] the state must have shape {expected}, got {tuple(state.shape)}")
        h_n: list[Tensor] = []
        c_n: list[Tensor] = []
        for number, layer in enumerate(layers):
            x = self._layer_input(rows, layer[0].layer)
            outputs = []
            for direction in layer:
                gates = self._input_gates(x, direction)
                given = None if start is None else tuple(s if s is None else s[len(h_n)].to(gates.dtype) for s in start)
                h0, c0 = (None, None) if given is None else given
                zeros = gates.new_zeros(batch, sizes.hidden_size)
                cell = None if sizes.kind == "GRU" else zeros if c0 is None else c0
                y, h, c = torch.ops.rarefy.recurrence(
                    gates,
                    *self._hidden(direction),
                    zeros if h0 is None else h0,
                    cell,
                    list(batch_sizes),
                    direction.reverse,
                )
                self._saw(direction, h0, y)
                outputs.append(y)
                h_n.append(h)
                c_n.append(c)
            rows = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)
            if sizes.dropout > 0 and number + 1 < sizes.num_layers:
                rows = F.dropout(rows, sizes.dropout, self.training)
        return rows, (torch.stack(h_n), None if sizes.kind == "GRU" else torch.stack(c_n))

    def _run(self, x: Tensor | PackedSequence, start: State | None) -> tuple[Tensor | PackedSequence, State]:
        """A packed sequence; or [T, N, in], or [N, T, in] where ``batch_first`` says so; without N for one sequence."""
        if isinstance(x, PackedSequence):
            return self._run_packed(x, start)
        name = type(self).__name__
        if x.dim() not in (2, 3):
            raise ValueError(f"[{name}] input must have 2 or 3 dimensions, got shape {tuple(x.shape)}")
        if x.dim() == 2:
            if start is not None:
                start = (start[0].unsqueeze(1), None if start[1] is None else start[1].unsqueeze(1))
            y, (h, c) = self._run_rows(x, [1] * x.shape[0], start)
            return y, (h.squeeze(1), None if c is None else c.squeeze(1))
        steps = x.transpose(0, 1) if self.sizes.batch_first else x
        length, batch = steps.shape[:2]
        if length == 0:
            raise ValueError(f"[{name}] sequences must have a step, got shape {tuple(x.shape)}")
        y, state = self._run_rows(steps.reshape(length * batch, x.shape[2]), [batch] * length, start)
        y = y.view(length, batch, y.shape[1])
        return (y.transpose(0, 1) if self.sizes.batch_first else y), state

    def _run_packed(self, x: PackedSequence, start: State | None) -> tuple[PackedSequence, State]:
        def reordered(state: State, order: Tensor | None) -> State:
            if order is None:
                return state
            h, c = state
            return h.index_select(1, order), None if c is None else c.index_select(1, order)

        if start is not None:
            start = reordered(start, x.sorted_indices)
        y, state = self._run_rows(x.data, x.batch_sizes.tolist(), start)
        packed = PackedSequence(y, x.batch_sizes, x.sorted_indices, x.unsorted_indices)
        return packed, reordered(state, x.unsorted_indices)

    def _run_cell(self, x: Tensor, start: State | None) -> State:
        """One step: x [N, in] or [in], a state of [N, hidden] or [hidden]."""
        batched = x.dim() == 2
        if x.dim() not in (1, 2):
            raise ValueError(f"[{type(self).__name__}] input must have 1 or 2 dimensions, got shape {tuple(x.shape)}")
        rows = x if batched else x.unsqueeze(0)

        def stacked(state: Tensor | None) -> Tensor | None:
            return None if state is None else state.unsqueeze(0) if batched else state.view(1, 1, -1)

        if start is not None:
            start = (stacked(start[0]), stacked(start[1]))  # type: ignore[assignment]
        _, (h, c) = self._run_rows(rows, [rows.shape[0]], start)
        h, c = h[0], None if c is None else c[0]
        return (h, c) if batched else (h[0], None if c is None else c[0])


class LSTMForward(Run):
    """The arguments and results of ``nn.LSTM``."""

    def forward(
        self, input: Tensor | PackedSequence, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor | PackedSequence, tuple[Tensor, Tensor | None]]:
        """As ``nn.LSTM.forward``."""
        return self._run(input, hx)


class GRUForward(Run):
    """The arguments and results of ``nn.GRU``."""

    def forward(
        self, input: Tensor | PackedSequence, hx: Tensor | None = None
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        """As ``nn.GRU.forward``."""
        y, (h, _) = self._run(input, None if hx is None else (hx, None))
        return y, h


class LSTMCellForward(Run):
    """The arguments and results of ``nn.LSTMCell``."""

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor | None]:
        """As ``nn.LSTMCell.forward``."""
        return self._run_cell(input, hx)


class GRUCellForward(Run):
    """The arguments and results of ``nn.GRUCell``."""

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """As ``nn.GRUCell.forward``."""
        return self._run_cell(input, None if hx is None else (hx, None))[0]


class RecurrentLayer(Run, QuantizableLayer):
    """What the recurrent layers share.

    The input of each layer (``quant.input_l0``, ...) and the hidden state of each direction (``quant.hidden_l0``,
    ``quant.hidden_l0_reverse``, ...) are quantized per tensor, the weights (``quant.weight_ih_l0``, ``quant.weight_hh_l0``,
    ...) per row where the configuration says per channel. Gates and cell state are floating point. The products with the
    input are computed in integers, for all steps at once; those with the hidden state in floating point on the grids, and in
    integers after ``convert``. A hidden state is on the grid of [-1, 1], which no state of an LSTM leaves, until it has
    been observed; it is observed once per forward pass, as a whole. Names of cells have no ``_l0``.
    """

    fuses_relu = False
    quantizes_output = False
    has_weight = True
    _integer_devices: ClassVar[tuple[str, ...]] = ("cpu", "cuda")

    float_reason: str | None
    saved_tensors: dict[str, Tensor] | None = None  #: of a file, in place of those of the float weights

    @classmethod
    def unsupported(cls, module: nn.Module) -> str | None:
        """Why a recurrent layer cannot be quantized, or None."""
        return "proj_size is not supported" if getattr(module, "proj_size", 0) else None

    @property
    def sizes(self) -> Sizes:
        """The sizes of the layer."""
        return sizes_of(self)

    @classmethod
    def from_float(
        cls, module: nn.Module, config: QConfig, *, relu: bool = False, quantize_output: bool = False
    ) -> Self:
        """A quantized layer over the parameters of ``module``."""
        layer = super().from_float(module, config, relu=relu, quantize_output=quantize_output)
        return layer._own_lists()

    @classmethod
    def with_quantizers(cls, module: nn.Module, quant: QuantState, *, relu: bool = False) -> Self:
        """A quantized layer over the parameters of ``module``, with quantizers that exist: a file's."""
        return super().with_quantizers(module, quant, relu=relu)._own_lists()

    def _own_lists(self) -> Self:
        # torch's recurrent layers write to these when a parameter is replaced.
        for name in ("_flat_weights", "_flat_weights_names", "_flat_weight_refs"):
            if name in self.__dict__:
                self.__dict__[name] = list(self.__dict__[name])
        return self

    def _attach(self, config: QConfig, relu: bool, quantize_output: bool) -> None:
        super()._attach(config, relu, quantize_output)
        self.quant.to(next(self.parameters()).device)
        self.float_reason = config.why_not_integer() or (
            None if _EXACT_PRODUCTS else "the processor sums products of bytes in 16 bits"
        )

    def _make_quantizers(self, config: QConfig) -> dict[str, FakeQuantizer]:
        assert config.weight is not None
        for observer in (config.observer, config.weight_observer):
            if observer is not None and learned_kind(observer):
                raise ValueError(
                    f"[{type(self).__name__}] must have observers of ranges (its steps run on a grid that is fixed for the "
                    f"sequence), got {observer}; give it an override"
                )
        quantizers = {}
        for layer in self.sizes.layers():
            for direction in layer:
                if config.activation is not None:
                    if not direction.reverse:
                        quantizers[f"input{direction.layer}"] = activation_quantizer(config)
                    quantizers[f"hidden{direction.suffix}"] = activation_quantizer(config)
                for part in ("ih", "hh"):
                    name = f"weight_{part}{direction.suffix}"
                    shape = getattr(self, name).shape
                    quantizers[name] = FakeQuantizer(config.weight, Latest(), self.sizes.gates, shape)
        return quantizers

    def weight_names(self) -> list[str]:
        """The names of the weights, direction by direction."""
        return [
            f"weight_{part}{direction.suffix}"
            for layer in self.sizes.layers()
            for direction in layer
            for part in ("ih", "hh")
        ]

    @torch.no_grad()
    def integer_tensors(self) -> dict[str, Tensor]:
        """The trained weights as int8, and the biases as float32, by name."""
        if self.saved_tensors is not None:
            return self.saved_tensors
        tensors = {}
        for name in self.weight_names():
            weight, quantizer = getattr(self, name), self.quant.find(name)
            assert quantizer is not None
            if quantizer.observe:
                quantizer(weight)
            tensors[name] = quantizer.quantize_to_integer(weight)
            if self.sizes.bias:
                bias = name.replace("weight", "bias")
                tensors[bias] = getattr(self, bias).detach().float().clone()
        return tensors

    def _runs_in_integers(self, x: Tensor, direction: Direction) -> bool:
        weight = self.quant.find(f"weight_ih{direction.suffix}")
        input_ = self.quant.find(f"input{direction.layer}")
        if self.execution == "simulated" or weight is None or not weight.quantize:
            return False
        if input_ is None or not input_.quantize:
            return False
        reason = self.float_reason
        if reason is None and x.shape[-1] > LONGEST_INTEGER_SUM:
            reason = f"int32 does not hold sums of {x.shape[-1]} products"
        if reason is None and x.dtype is torch.float64:
            reason = "float64 has no integer kernels"
        if reason is None and x.device.type not in self._integer_devices:
            reason = f"there are no integer kernels on {x.device.type}"
        if reason is not None and self.execution == "integer":
            raise ValueError(
                f"[{type(self).__name__}] execution='integer' must be possible for its input, but {reason}"
            )
        return reason is None

    def _layer_input(self, rows: Tensor, layer: str) -> Tensor:
        quantizer = self.quant.find(f"input{layer}")
        if quantizer is None:
            return rows
        if self._runs_in_integers(rows, Direction(layer, layer, False)):
            quantizer.grid(rows)  # once for both directions
            return rows
        return quantizer(rows)

    def _input_gates(self, x: Tensor, direction: Direction) -> Tensor:
        name = f"weight_ih{direction.suffix}"
        weight, bias = getattr(self, name), getattr(self, f"bias_ih{direction.suffix}") if self.sizes.bias else None
        w, q = self.quant.find(name), self.quant.find(f"input{direction.layer}")
        assert w is not None
        if self._runs_in_integers(x, direction):
            assert q is not None
            grids = (q.scale, q.zero_point, q.qmin, q.qmax, *w.grid(weight), w.qmin, w.qmax)
            bf16 = self.gradient_dtype is torch.bfloat16
            return torch.ops.rarefy.integer_linear(x, weight, bias, *grids, False, False, bf16, None)
        return F.linear(x, self._rounded(name), bias)

    def _rounded(self, name: str) -> Tensor:
        """The weight of this name on its grid."""
        weight, quantizer = getattr(self, name), self.quant.find(name)
        assert quantizer is not None
        keeper = self._keeper
        return quantizer(weight) if keeper is None else keeper.get(name, (weight,), lambda: quantizer(weight))

    def _hidden(self, direction: Direction) -> tuple[object, ...]:
        name = f"weight_hh{direction.suffix}"
        q = self.quant.find(f"hidden{direction.suffix}")
        bias = getattr(self, f"bias_hh{direction.suffix}") if self.sizes.bias else None
        weight = self._rounded(name)
        if q is None or not q.quantize:
            return weight, None, bias, None, None, 0, 255
        return weight, None, bias, *_held_grid(q), q.qmin, q.qmax

    def _saw(self, direction: Direction, h0: Tensor | None, y: Tensor) -> None:
        quantizer = self.quant.find(f"hidden{direction.suffix}")
        if quantizer is not None and _observes(quantizer):
            quantizer.grid((y if h0 is None else torch.cat([h0, y])).detach())


def _observes(q: FakeQuantizer) -> bool:
    return q.observe and (q.training or not q.quantize)


def _held_grid(q: FakeQuantizer) -> tuple[Tensor, Tensor]:
    """The grid that a quantizer has before it observes; that of [-1, 1] where it has observed nothing."""
    if torch.compiler.is_compiling():
        return q.scale, q.zero_point
    tape = checkpoint.current_tape()
    if _observes(q) and checkpoint.is_recomputing():
        return (q.scale, q.zero_point) if tape is None else tape.replay(q)
    if not q._has_observed and not q.calibrated:
        with torch.no_grad():
            q.min_val.fill_(-1.0)
            q.max_val.fill_(1.0)
            scale, zero_point = torch.ops.rarefy.choose_qparams(
                q.min_val, q.max_val, q.qmin, q.qmax, q.scheme.symmetric
            )
            q.scale.copy_(scale)
            q.zero_point.copy_(zero_point)
        q._has_observed = True
    if tape is not None and _observes(q):
        tape.record(q)
    return q.scale, q.zero_point


class LSTM(LSTMForward, RecurrentLayer, nn.LSTM):
    """``torch.nn.LSTM`` in quantization-aware training, with its arguments, packed sequences included.

    Made by ``rarefy.quantization.prepare_qat`` and ``prepare`` from an ``nn.LSTM`` without ``proj_size``, whose Parameter
    objects it keeps.
    """


class GRU(GRUForward, RecurrentLayer, nn.GRU):
    """``torch.nn.GRU`` in quantization-aware training, with its arguments, packed sequences included.

    Made by ``rarefy.quantization.prepare_qat`` and ``prepare`` from an ``nn.GRU``, whose Parameter objects it keeps.
    """


class LSTMCell(LSTMCellForward, RecurrentLayer, nn.LSTMCell):
    """``torch.nn.LSTMCell`` in quantization-aware training.

    Made by ``rarefy.quantization.prepare_qat`` and ``prepare`` from an ``nn.LSTMCell``, whose Parameter objects it keeps.
    """


class GRUCell(GRUCellForward, RecurrentLayer, nn.GRUCell):
    """``torch.nn.GRUCell`` in quantization-aware training.

    Made by ``rarefy.quantization.prepare_qat`` and ``prepare`` from an ``nn.GRUCell``, whose Parameter objects it keeps.
    """
