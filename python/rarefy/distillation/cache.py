"""Teacher outputs on disk: written once, read in every epoch."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import index
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from rarefy._core import distillation as _core
from rarefy.distillation.outputs import to_logits
from rarefy.distillation.top_k import TopKLogits
from rarefy.distillation.unwrap import unwrap


def fingerprint(model: nn.Module) -> str:
    """Return a hash of a model's parameters and buffers: their names, types, shapes and values.

    The same that checkpoints of a `DistillationTrainer` hold of its teacher. It tells one model from another, and is no
    protection against forgery.
    """
    inner = unwrap(model)
    return _core.fingerprint([*inner.named_parameters(), *inner.named_buffers()])


def cache_teacher(
    teacher: Callable[..., Any],
    loader: Iterable[Mapping[str, Any]],
    path: str | PathLike[str],
    *,
    k: int = 64,
    dtype: str = "float16",
    temperature: float = 4.0,
    key: str = "sample_id",
    mask_key: str | None = None,
    input_key: str | None = None,
    label_key: str | None = "labels",
    fingerprint: str | None = None,
    progress: bool = True,
) -> _core.TeacherCacheBound:
    """Write a teacher's outputs for every sample of a loader to a file, and return what the file's rounding may cost.

    Of each row of logits the k largest are kept, and the tail of the others at a temperature. The file is written beside
    `path` and gets its name when it is whole. A run that was interrupted goes on where it stopped: samples that are there are
    not computed again. When `path` is there already, with equal options, nothing is done.

    Args:
        teacher: called with `batch[input_key]`, or without an `input_key` with the batch's other entries as keyword
            arguments. Returns logits [batch, classes] or [batch, length, classes], or something with them in `.logits`. A
            module runs in evaluation mode, and its modes are put back.
        loader: yields dicts.
        path: of the file.
        k: logits kept in each row; all of them when the teacher has fewer classes.
        dtype: of their differences from the largest: "float16", or "uint8" with a scale per row.
        temperature: the one that the loss will have.
        key: the entry that holds the samples' ids: an int64 tensor [batch], or a sequence of integers or of strings.
        mask_key: the entry with the positions [batch, length] of a sequence that count, bool or 0 and 1.
        input_key: the entry with the teacher's input.
        label_key: an entry that the teacher does not get.
        fingerprint: says which teacher; `fingerprint(teacher)` of a module when it is not given.
        progress: show a bar, and print the bound.

    Raises:
        ValueError: a file is there already and holds something else, an option is out of range, or logits are not finite.
        KeyError: a batch lacks an entry.
        TypeError: ids are neither integers nor strings.
        RuntimeError: the file cannot be written. What was complete is kept.
    """
    if fingerprint is None:
        if not isinstance(teacher, nn.Module):
            raise ValueError(
                "[cache_teacher] fingerprint must be given for a teacher that is not a torch.nn.Module, "
                f"got {type(teacher).__name__}"
            )
        fingerprint = _fingerprint(teacher)
    target = Path(fspath(path))
    if target.exists():
        cache = _core.TeacherCache(target)
        _require_same(target, cache.options, k, temperature, dtype, fingerprint)
    else:
        flags = [(m, m.training) for m in teacher.modules()] if isinstance(teacher, nn.Module) else []
        try:
            if isinstance(teacher, nn.Module):
                teacher.eval()
            writer = None
            with torch.no_grad():
                for batch in tqdm(loader, desc=f"caching to {target.name}", unit="batch", disable=not progress):
                    ids = _ids(_entry(batch, key, "key"))
                    if writer is not None and all(i in writer for i in _each(ids)):
                        continue
                    hidden = {key, label_key} if mask_key == "attention_mask" else {key, label_key, mask_key}
                    logits = _logits(teacher, batch, input_key, hidden)
                    mask = None if mask_key is None else _mask(_entry(batch, mask_key, "mask_key"))
                    if writer is None:
                        classes = logits.shape[-1]
                        kind = "int64" if isinstance(ids, Tensor) else "string"
                        options = _core.TeacherCacheOptions(
                            classes, min(k, classes), temperature, dtype, kind, fingerprint
                        )
                        writer = _core.TeacherCacheWriter(target, options)
                    new, chosen = _unseen(writer, ids)
                    if new:
                        part = torch.tensor(new, device=logits.device)
                        rows = logits.index_select(0, part)
                        writer.append(chosen, rows, None if mask is None else mask[part.to(mask.device)])
            if writer is None:
                raise ValueError("[cache_teacher] loader must yield at least one batch, got none")
            writer.finish()
        finally:
            for module, training in flags:
                module.training = training
        cache = _core.TeacherCache(target)
    bound = cache.bound()
    if progress:
        print(bound)
    return bound


class CachedTeacher:
    """Read a teacher's outputs from a file in place of the teacher.

    Called with a batch (a dict that holds the ids under `key`) or with ids alone, it returns their TopKLogits.

    Args:
        path: of the file that `cache_teacher` wrote.
        key: the entry of a batch that holds the samples' ids.
        mask_key: the entry with the positions of a sequence that count, as it was when the file was written.
        temperature, classes, fingerprint: when given, the file must agree.
        device: where the logits are to be.

    Raises:
        ValueError: the file is not finished, is damaged, or does not agree.
        IndexError: an id is not in the file (when called).
        TypeError: ids are neither integers nor strings, or not of the file's kind (when called).
        KeyError: a batch lacks an entry (when called).
    """

    #: A `DistillationTrainer` hands over the batch as it is.
    takes_batch = True

    def __init__(
        self,
        path: str | PathLike[str],
        key: str = "sample_id",
        *,
        mask_key: str | None = None,
        temperature: float | None = None,
        classes: int | None = None,
        fingerprint: str | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.cache = _core.TeacherCache(Path(fspath(path)))
        self.path = fspath(path)
        self.key = key
        self.mask_key = mask_key
        self.device = torch.device(device)
        for name, wanted in (("temperature", temperature), ("classes", classes), ("fingerprint", fingerprint)):
            held = getattr(self.cache.options, name)
            if wanted is not None and wanted != held:
                raise ValueError(f"[CachedTeacher] {self.path} must have {name} {wanted!r}, got {held!r}")

    @property
    def options(self) -> _core.TeacherCacheOptions:
        """Return what the file holds: classes, k, temperature, dtype, kind of key, fingerprint."""
        return self.cache.options

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.cache)

    def __call__(self, batch: Mapping[str, Any] | Tensor | Sequence[Any]) -> TopKLogits:
        """Return the logits of a batch's samples."""
        mask = None
        if isinstance(batch, Mapping):
            if self.mask_key is not None:
                mask = _mask(_entry(batch, self.mask_key, "mask_key", "CachedTeacher"))
            batch = _entry(batch, self.key, "key", "CachedTeacher")
        logits = TopKLogits(*self.cache.get(_ids(batch), mask))
        return logits if self.device.type == "cpu" else logits.to(self.device)

    def bound(self, student_range: float | None = None) -> _core.TeacherCacheBound:
        """Return how far the loss may be from the one with the full teacher; see docs/dev/numerics.md."""
        return self.cache.bound(student_range)

    def __repr__(self) -> str:
        """Return path, size and options."""
        return f"CachedTeacher({self.path!r}, {len(self)} samples, {self.options!r})"


_fingerprint = fingerprint


def _entry(batch: Mapping[str, Any], name: str, option: str, function: str = "cache_teacher") -> Any:
    if not isinstance(batch, Mapping):
        raise TypeError(f"[{function}] a batch must be a dict, got {type(batch).__name__}")
    if name not in batch:
        raise KeyError(f"[{function}] a batch must hold {name!r} ({option}), got the keys {sorted(map(str, batch))}")
    return batch[name]


def _ids(values: Any) -> Tensor | list[str]:
    if isinstance(values, Tensor):
        if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
            raise TypeError(f"[TeacherCache] sample ids must be integers, or all of them strings, got {values.dtype}")
        return values.reshape(-1).cpu().to(torch.int64)
    values = list(values)
    if values and all(isinstance(value, str) for value in values):
        return values
    for value in values:
        if not hasattr(value, "__index__") or (isinstance(value, Tensor) and value.is_floating_point()):
            raise TypeError(f"[TeacherCache] sample ids must be integers, or all of them strings, got {value!r}")
    return torch.tensor([index(value) for value in values], dtype=torch.int64)


def _each(ids: Tensor | list[str]) -> list[Any]:
    return ids.tolist() if isinstance(ids, Tensor) else ids


def _mask(values: Any) -> Tensor:
    return torch.as_tensor(values).to(torch.bool)


def _unseen(writer: _core.TeacherCacheWriter, ids: Tensor | list[str]) -> tuple[list[int], Tensor | list[str]]:
    seen: set[Any] = set()
    rows = []
    for row, sample in enumerate(_each(ids)):
        if sample not in writer and sample not in seen:
            seen.add(sample)
            rows.append(row)
    return rows, ids[rows] if isinstance(ids, Tensor) else [ids[row] for row in rows]


def _logits(
    teacher: Callable[..., Any], batch: Mapping[str, Any], input_key: str | None, hidden: set[str | None]
) -> Tensor:
    if input_key is None:
        output = teacher(**{name: value for name, value in batch.items() if name not in hidden})
    else:
        output = teacher(_entry(batch, input_key, "input_key"))
    return to_logits(output)


def _require_same(path: Path, held: Any, k: int, temperature: float, dtype: str, fingerprint: str) -> None:
    wanted = {"k": min(k, held.classes), "temperature": temperature, "dtype": dtype, "fingerprint": fingerprint}
    for name, value in wanted.items():
        if getattr(held, name) != value:
            raise ValueError(
                f"[cache_teacher] {path} is there already and must have {name} {value!r}, got {getattr(held, name)!r}: "
                "delete it to write it anew"
            )
