"""Convolution weights in the layout that integer kernels want, where the model agrees."""

from __future__ import annotations

import torch
from torch import nn

from rarefy.nn.conv import ConvLayer
from rarefy.nn.registry import row_of
from rarefy.quantization.flow import Flow
from rarefy.quantization.flow import record as record_flow


class ChannelsLast:
    """Lays the weights of a float model's 2-d convolutions out channels-last, and undoes it.

    A convolution with such a weight gives channels-last results, as everywhere in torch, and so the activations of the
    whole model follow: integer convolutions read them without a copy. The Parameter objects and their values stay.

    Args:
        model: floating point, not prepared.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.reason = ""  # why the weights stayed as they are, when a trial failed
        self._before: list[tuple[nn.Parameter, torch.Tensor]] = []

    def _is_candidate(self, module: nn.Module) -> bool:
        row = row_of(module)
        if row is None or not issubclass(row.layer, ConvLayer):
            return False
        weight = module.weight
        return isinstance(weight, nn.Parameter) and weight.dim() == 4 and weight.is_contiguous() and not weight.is_meta

    def lay_out(self) -> None:
        """Change the weights."""
        for module in self.model.modules():
            if self._is_candidate(module):
                weight: nn.Parameter = module.weight  # type: ignore[assignment]
                self._before.append((weight, weight.data))
                weight.data = weight.data.contiguous(memory_format=torch.channels_last)

    @property
    def in_use(self) -> bool:
        """Whether weights are laid out so."""
        return bool(self._before)

    def undo(self) -> None:
        """Put the weights back as they were."""
        for weight, data in self._before:
            weight.data = data
        self._before = []

    def record(self, example_inputs: object, watched) -> Flow:
        """The example run, with channels-last weights when the model runs with them: ``Tensor.view``, say, may refuse."""
        self.lay_out()
        if not self._before:
            return record_flow(self.model, example_inputs, watched)
        try:
            return record_flow(self.model, example_inputs, watched)
        except RuntimeError as error:
            self.undo()
            flow = record_flow(self.model, example_inputs, watched)  # raises if the layout was not the cause
            self.reason = str(error).splitlines()[0]
            return flow
