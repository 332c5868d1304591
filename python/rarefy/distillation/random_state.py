"""The random state that a training run depends on, as tensors."""

import random
import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

_FIXED = 3  # torch's generator, Python's, NumPy's; then the loader's, then those of CUDA devices


def parts_of(loader: Any) -> list[Any]:
    """Return a loader, its samplers and its data set, each once."""
    found: list[Any] = []
    pending = [loader]
    while pending:
        owner = pending.pop()
        if owner is not None and all(owner is not other for other in found):
            found.append(owner)
            pending += [getattr(owner, name, None) for name in ("batch_sampler", "sampler", "dataset")]
    return found


def loader_generators(loader: Any) -> list[torch.Generator]:
    """Return the generators of a loader and its samplers, each once."""
    found: list[torch.Generator] = []
    for part in parts_of(loader):
        generator = getattr(part, "generator", None)
        if isinstance(generator, torch.Generator) and all(generator is not other for other in found):
            found.append(generator)
    return found


def capture(generators: Iterable[torch.Generator] = ()) -> list[Tensor]:
    """Return the state of torch's, Python's and NumPy's generators, of `generators`, and of CUDA's where it is used."""
    _, words, gauss = random.getstate()
    python = torch.tensor([*words, gauss is not None], dtype=torch.float64)
    states = [torch.get_rng_state(), torch.cat([python, torch.tensor([gauss or 0.0], dtype=torch.float64)]), _numpy()]
    states += [generator.get_state() for generator in generators]
    if torch.cuda.is_initialized():
        states += torch.cuda.get_rng_state_all()
    return states


def restore(states: list[Tensor], generators: Iterable[torch.Generator] = ()) -> None:
    """Put a state of `capture` back.

    Raises:
        ValueError: there are fewer states than generators: the loader is not the one of the saved run.
    """
    generators = list(generators)
    if len(states) < _FIXED + len(generators):
        raise ValueError(
            f"[DistillationTrainer] the random state must cover the loader's {len(generators)} generators, got "
            f"{len(states) - _FIXED} saved"
        )
    torch.set_rng_state(states[0])
    *words, has_gauss, gauss = states[1].tolist()
    random.setstate((3, tuple(int(word) for word in words), gauss if has_gauss else None))
    _set_numpy(states[2])
    for generator, state in zip(generators, states[_FIXED:], strict=False):
        generator.set_state(state)
    devices = states[_FIXED + len(generators) :]
    if devices and torch.cuda.is_available():
        for device, state in enumerate(devices[: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(state, device)


def _numpy() -> Tensor:
    if "numpy" not in sys.modules:
        return torch.empty(0, dtype=torch.float64)
    import numpy as np

    _, words, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return torch.tensor([*words.tolist(), position, has_gauss, gauss], dtype=torch.float64)


def _set_numpy(state: Tensor) -> None:
    if state.numel() == 0:
        return
    import numpy as np

    *words, position, has_gauss, gauss = state.tolist()
    np.random.set_state(("MT19937", np.array(words, dtype=np.uint32), int(position), int(has_gauss), gauss))
