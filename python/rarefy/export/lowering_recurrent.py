"""Recurrent layers as programs of integers: step by step, with the integers of every product in the open."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from rarefy import nn as rnn
from rarefy.export.lowering import Form, quantize_dequantize
from rarefy.export.lowering_formats import FormatWeight, is_bytes, stored_parts
from rarefy.nn.recurrent import Direction, State


class LoweredWeight(nn.Module):
    """A weight [out, in] as an int8 buffer behind a dequantize operator, or a float one behind both operators.

    Stored as the product reads it: [in, out] for `matmul`, [out, in] for `linear`.
    """

    def __init__(self, values: Tensor, module: nn.Module, form: Form) -> None:
        super().__init__()
        self.matmul = form.linear == "matmul"
        self.axis: int | None = None if module.axis is None else int(self.matmul)
        values = values.detach().t() if self.matmul else values.detach()
        self.register_buffer("integers", values.contiguous().clone())
        self.limits = (int(module.qmin), int(module.qmax), values.dtype)
        if self.axis is None:
            self.scale, self.zero_point = float(module.scale), int(module.zero_point)
        else:
            self.register_buffer("scale", module.scale.detach().clone())
            self.register_buffer("zero_point", module.zero_point.detach().to(torch.int64))
        self.quantizes = False
        if form.weights == "quantize":  # (q * s) / s is less than half a step from q: quantizing gives q back
            self.integers = self()
            self.quantizes = True

    def forward(self) -> Tensor:
        """The float numbers."""
        ops, values = torch.ops.quantized_decomposed, self.integers
        if self.axis is None:
            if self.quantizes:
                values = ops.quantize_per_tensor(values, self.scale, self.zero_point, *self.limits)
            return ops.dequantize_per_tensor(values, self.scale, self.zero_point, *self.limits)
        grid = (self.scale, self.zero_point, self.axis, *self.limits)
        if self.quantizes:
            values = ops.quantize_per_channel(values, *grid)
        return ops.dequantize_per_channel(values, *grid)


def product(x: Tensor, weight: Tensor, bias: Tensor | None, matmul: bool) -> Tensor:
    """x [..., in] times a weight, [in, out] for `matmul`."""
    if not matmul:
        return F.linear(x, weight, bias)
    y = torch.matmul(x, weight)
    return y if bias is None else y + bias


def _biases(module: rnn.RecurrentLayer) -> dict[str, Tensor]:
    names = (name.replace("weight", "bias") for name in module.weight_names() if module.sizes.bias)
    return {name: getattr(module, name).detach().float().clone() for name in names}


class LoweredRecurrent(nn.Module):
    """A recurrent layer, unrolled over the steps of the example, in any size of the batch."""

    def __init__(self, module: rnn.RecurrentLayer | rnn.QuantizedRecurrent, form: Form) -> None:
        super().__init__()
        self.sizes, self.kind = module.sizes, type(module).__name__.removeprefix("Quantized")
        for name in ("input_size", "hidden_size", "num_layers", "batch_first", "bidirectional"):
            if hasattr(module, name):
                setattr(self, name, getattr(module, name))
        quant: rnn.QuantState = module.quant
        formats: dict[str, FormatWeight] = {}
        self.matmul = form.linear == "matmul"
        self.quant = nn.Module()
        if isinstance(module, rnn.RecurrentLayer):
            for name in module.weight_names():
                quantizer = quant.find(name)
                assert quantizer is not None
                if not is_bytes(quantizer):
                    if not form.formats:
                        raise ValueError(f"[lower] weights must be integers of at most 8 bits, got {quantizer.scheme}")
                    formats[name] = FormatWeight(stored_parts(quantizer, getattr(module, name)), self.matmul)
            tensors = _biases(module) if formats else module.integer_tensors()
        else:
            tensors = dict(module.named_buffers(recurse=False))
        for name, weight in formats.items():
            self.add_module(name, weight)
        for name, tensor in tensors.items():
            if name.startswith("weight"):
                self.add_module(name, LoweredWeight(tensor, quant.find(name), form))
            else:
                self.register_buffer(name, tensor.detach().clone())
        for name, quantizer in quant.named_children():
            if not name.startswith("weight"):
                self.quant.add_module(name, quantize_dequantize(quantizer, form))

    def flatten_parameters(self) -> None:
        """Nothing, as models may ask for it."""

    def _quantized(self, name: str, x: Tensor) -> Tensor:
        module = self.quant._modules.get(name)
        return x if module is None else module(x)

    def _product(self, part: str, direction: Direction) -> Callable[[Tensor], Tensor]:
        lowered: LoweredWeight | FormatWeight = getattr(self, f"weight_{part}{direction.suffix}")
        bias, weight = getattr(self, f"bias_{part}{direction.suffix}", None), lowered()
        return lambda x: product(x, weight, bias, self.matmul)

    def _step(self, gates: Tensor, product: Tensor | None, h: Tensor | None, c: Tensor | None) -> State:
        """One step; without a product and states the first one, of zeros."""
        if self.sizes.kind == "LSTM":
            i, f, g, o = (gates if product is None else gates + product).chunk(4, -1)
            new = torch.sigmoid(i) * torch.tanh(g)
            c = new if c is None else torch.sigmoid(f) * c + new
            return torch.sigmoid(o) * torch.tanh(c), c
        assert product is not None
        a, d = gates.chunk(3, -1), product.chunk(3, -1)
        reset, update = torch.sigmoid(a[0] + d[0]), torch.sigmoid(a[1] + d[1])
        n = torch.tanh(a[2] + reset * d[2])
        return (n - update * n if h is None else n + update * (h - n)), None

    def _first_product(self, gates: Tensor, direction: Direction) -> Tensor | None:
        """That of a hidden state of zeros: the bias alone."""
        bias = getattr(self, f"bias_hh{direction.suffix}", None)
        if bias is None:
            return None if self.sizes.kind == "LSTM" else torch.zeros_like(gates)
        return bias.expand_as(gates)

    def _run_direction(self, gates: Tensor, direction: Direction, start: State | None) -> tuple[Tensor, State]:
        """All steps [T, N, gates] to hidden states [T, N, hidden]."""
        product = self._product("hh", direction)
        h, c = (None, None) if start is None else start
        outputs: list[Tensor] = []
        steps = range(gates.shape[0])
        for t in reversed(steps) if direction.reverse else steps:
            if h is None:
                hidden = self._first_product(gates[t], direction)
            else:
                hidden = product(self._quantized(f"hidden{direction.suffix}", h))
            h, c = self._step(gates[t], hidden, h, c)
            outputs.append(h)
        if direction.reverse:
            outputs.reverse()
        assert h is not None
        return torch.stack(outputs), (h, c)

    def run(self, steps: Tensor, start: State | None) -> tuple[Tensor, State]:
        """[T, N, in] to [T, N, hidden * directions] and the last states [layers * directions, N, hidden]."""
        h_n: list[Tensor] = []
        c_n: list[Tensor | None] = []
        for layer in self.sizes.layers():
            x = self._quantized(f"input{layer[0].layer}", steps)
            outputs = []
            for direction in layer:
                gates = self._product("ih", direction)(x)
                given = None if start is None else tuple(s if s is None else s[len(h_n)] for s in start)
                y, (h, c) = self._run_direction(gates, direction, given)
                outputs.append(y)
                h_n.append(h)
                c_n.append(c)
            steps = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
        return steps, (torch.stack(h_n), None if self.sizes.kind == "GRU" else torch.stack(c_n))

    def _run_layer(self, x: Tensor | PackedSequence, start: State | None) -> tuple[Tensor, State]:
        if isinstance(x, PackedSequence):
            raise TypeError(f"[lower] {self.kind} must be given a tensor to be exported, got a PackedSequence")
        if x.dim() == 2:
            if start is not None:
                start = (start[0].unsqueeze(1), None if start[1] is None else start[1].unsqueeze(1))
            y, (h, c) = self.run(x.unsqueeze(1), start)
            return y.squeeze(1), (h.squeeze(1), None if c is None else c.squeeze(1))
        y, state = self.run(x.transpose(0, 1) if self.sizes.batch_first else x, start)
        return (y.transpose(0, 1) if self.sizes.batch_first else y), state

    def _run_cell(self, x: Tensor, start: State | None) -> State:
        batched = x.dim() == 2
        if start is not None:
            start = tuple(  # type: ignore[assignment]
                s if s is None else s.unsqueeze(0) if batched else s.view(1, 1, -1) for s in start
            )
        _, (h, c) = self.run((x if batched else x.unsqueeze(0)).unsqueeze(0), start)
        h, c = h[0], None if c is None else c[0]
        return (h, c) if batched else (h[0], None if c is None else c[0])

    def forward(self, input: Tensor, hx: object = None) -> object:
        """As the layer that it stands for."""
        if self.sizes.kind == "LSTM":
            return self._run_cell(input, hx) if self.sizes.is_cell else self._run_layer(input, hx)  # type: ignore[arg-type]
        start = None if hx is None else (hx, None)
        if self.sizes.is_cell:
            return self._run_cell(input, start)[0]  # type: ignore[arg-type]
        y, (h, _) = self._run_layer(input, start)  # type: ignore[arg-type]
        return y, h


LOWERED_RECURRENT: dict[type[nn.Module], Callable[[nn.Module, Form], nn.Module]] = dict.fromkeys(
    (
        rnn.LSTM,
        rnn.GRU,
        rnn.LSTMCell,
        rnn.GRUCell,
        rnn.QuantizedLSTM,
        rnn.QuantizedGRU,
        rnn.QuantizedLSTMCell,
        rnn.QuantizedGRUCell,
    ),
    LoweredRecurrent,
)
