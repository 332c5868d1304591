"""Float checkpoints in prepared models."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from rarefy.quantization.fake_quantizer import FakeQuantizer


def load_float_state_dict(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load the parameters and buffers of a float model into a prepared one, strictly: only the quantizers may be missing.

    Quantizers keep the state that they have; calibrate again, or train, when the weights are others.

    Args:
        model: prepared.
        state: ``state_dict()`` of the model before it was prepared.

    Raises:
        ValueError: keys are missing or unexpected (they are listed), or a tensor has another shape. Nothing is loaded then.
    """
    own = model.state_dict()
    quantizers = {
        f"{name}.{key}"
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, FakeQuantizer)
        for key in module.state_dict()
    }
    wanted = own.keys() - quantizers
    if not quantizers:
        raise ValueError(
            "[load_float_state_dict] the model must have prepared layers; call prepare_qat or prepare first"
        )
    problems = [f"missing {key}" for key in own if key in wanted and key not in state]
    problems += [f"unexpected {key}" for key in state if key not in wanted]
    problems += [
        f"{key} of shape {list(state[key].shape)} instead of {list(own[key].shape)}"
        for key in own
        if key in wanted and key in state and state[key].shape != own[key].shape
    ]
    if problems:
        raise ValueError(
            f"[load_float_state_dict] state must be that of the model before it was prepared, but: {', '.join(problems)}"
        )
    model.load_state_dict(state, strict=False)
