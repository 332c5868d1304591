"""A linear layer that stores its weight transposed."""

from __future__ import annotations

from rarefy.nn.linear import LinearLayer


class TransposedLinear(LinearLayer):
    """A linear layer whose weight is [in, out], as Hugging Face's ``Conv1D`` (GPT-2) stores it: x [..., in] to [..., out].

    Made by ``rarefy.quantization.prepare_qat`` and ``prepare`` from a ``transformers.pytorch_utils.Conv1D``, whose
    Parameter objects, names and layout it keeps.
    """

    channel_axis = 1

    nx: int
    nf: int

    def extra_repr(self) -> str:
        """Sizes."""
        return f"{self.weight.shape[0]}, {self.weight.shape[1]}"
