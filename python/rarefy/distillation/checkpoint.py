"""Checkpoints of a training run: one file, written whole or not at all."""

import collections
import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

_PLAIN = (torch.Tensor, bool, int, float, complex, str, bytes, type(None), tuple, torch.dtype, torch.device, set)
_MAPPINGS = (dict, collections.OrderedDict, collections.Counter)

FORMAT = "rarefy.distillation.checkpoint/1"


class Stateful(Protocol):
    """What has a state: modules, optimizers, schedulers, schedules."""

    def state_dict(self) -> Any: ...  # noqa: D102
    def load_state_dict(self, state: Any) -> Any: ...  # noqa: D102


def collect(parts: Mapping[str, Stateful], teacher: str) -> dict[str, Any]:
    """Return what `save` writes: the states of `parts` and the teacher's fingerprint.

    Raises:
        TypeError: a state holds a value that `read` would not take; the message names the part.
    """
    return {"format": FORMAT, "teacher": teacher} | {
        name: _plain(part.state_dict(), name) for name, part in parts.items()
    }


def _plain(value: Any, name: str) -> Any:
    """The value with NumPy's numbers as Python's (a schedule's lambda makes them): what torch.load takes without pickle."""
    if isinstance(value, Mapping):
        copied = {key: _plain(item, name) for key, item in value.items()}
        return type(value)(copied) if type(value) in _MAPPINGS else copied
    if type(value) in (list, tuple):
        return type(value)(_plain(item, name) for item in value)
    if type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0:  # some of them are floats to isinstance
        return value.item()
    if not isinstance(value, _PLAIN):
        raise TypeError(
            f"[DistillationTrainer] a checkpoint holds tensors and plain values, got a {type(value).__name__} in the "
            f"state of {name!r}"
        )
    return value


def save(path: str | os.PathLike[str], content: Mapping[str, Any]) -> None:
    """Write what `collect` returned: to a temporary name, renamed when it is complete.

    Raises:
        OSError: the file could not be written (the disk is full, say). What was at `path` is still there.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(dict(content), file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # torch's writer reports a full disk as a RuntimeError
        raise OSError(f"[DistillationTrainer] {path} could not be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return what `save` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a checkpoint.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"[DistillationTrainer] there must be a checkpoint at {path}, found none")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"[DistillationTrainer] {path} must be a checkpoint, could not be read: {error}") from error
    if not isinstance(content, Mapping) or content.get("format") != FORMAT:
        got = content.get("format") if isinstance(content, Mapping) else type(content).__name__
        raise ValueError(f"[DistillationTrainer] {path} must be a checkpoint of the format {FORMAT}, got {got!r}")
    return dict(content)


def load(path: str | os.PathLike[str], parts: Mapping[str, Stateful], teacher: str) -> None:
    """Load a file of `save` into `parts`: all of them, or none.

    Raises:
        FileNotFoundError, ValueError: as `read`.
        ValueError: the teacher is another one, the file holds other parts, or a part does not take its state. Every part
            is as it was then.
    """
    content = read(path)
    if content["teacher"] != teacher:
        raise ValueError(
            f"[DistillationTrainer] {path} must be of a run with this teacher, got the fingerprint "
            f"{content['teacher'] or 'none'} where the teacher has {teacher or 'none'}"
        )
    names = content.keys() - {"format", "teacher"}
    if names != parts.keys():
        raise ValueError(f"[DistillationTrainer] {path} must hold the states of {sorted(parts)}, got {sorted(names)}")
    before = {name: copy.deepcopy(part.state_dict()) for name, part in parts.items()}
    try:
        for name, part in parts.items():
            part.load_state_dict(content[name])
    except Exception as error:
        for done, part in parts.items():
            part.load_state_dict(before[done])
        raise ValueError(f"[DistillationTrainer] {path} does not fit: {name}: {error}") from error
