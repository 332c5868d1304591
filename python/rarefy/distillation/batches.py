"""Batches as loaders give them, and how a model is called with one."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from rarefy.distillation.inputs import accepted_names, named_inputs
from rarefy.distillation.random_state import parts_of


class BatchReader:
    """Find inputs and labels in a batch, and call models with it.

    ==============================  =====================================================================================
    a batch                         is called as
    ==============================  =====================================================================================
    a tensor                        ``model(batch)``
    (inputs,), (inputs, labels)     ``model(inputs)``; inputs may be a tuple or a dict: ``model(*inputs)``, ``model(**inputs)``
    (x1, x2, ..., labels)           ``model(x1, x2, ...)``
    a dict with `input_key`         ``model(batch[input_key])``, labels under `label_key`
    any other dict                  ``model(**batch)``, without the labels and what the model's forward does not name
    ==============================  =====================================================================================
    """

    def __init__(self, input_key: str, label_key: str, device: torch.device | None) -> None:
        self.input_key = input_key
        self.label_key = label_key
        self.device = device

    def read(self, batch: Any) -> tuple[Any, Tensor | None, Tensor | None]:
        """Return the batch on the device, its first tensor, and its labels."""
        batch = self._moved(batch)
        if isinstance(batch, Tensor):
            return batch, batch, None
        if isinstance(batch, Mapping):
            if self.labels(batch) is not None and not isinstance(self.labels(batch), Tensor):
                raise TypeError(
                    f"[DistillationTrainer] labels must be a tensor, got {type(self.labels(batch)).__name__} under "
                    f"{self.label_key!r}"
                )
            others = [value for key, value in batch.items() if key != self.label_key]
            return batch, _first_tensor(others), self.labels(batch)
        if isinstance(batch, Sequence) and batch and not isinstance(batch, str) and _is_input(batch[0]):
            labels = self.labels(batch)
            if labels is None or isinstance(labels, Tensor):
                return batch, _first_tensor(batch), labels
        length = f" of length {len(batch)}" if isinstance(batch, Sequence) else ""
        raise TypeError(
            "[DistillationTrainer] a batch must be a tensor, a tuple or list (inputs, labels) of tensors, or a dict, "
            f"got {type(batch).__name__}{length}"
        )

    def labels(self, batch: Any) -> Tensor | None:
        """Return the labels of a batch that `read` returned."""
        if isinstance(batch, Mapping):
            return batch.get(self.label_key)
        return batch[-1] if not isinstance(batch, Tensor) and len(batch) > 1 else None

    def caller(self, model: Callable[..., Any]) -> Callable[[Any], Any]:
        """Return a function that calls `model` with a batch; a model with ``takes_batch`` gets the batch as it is."""
        if getattr(model, "takes_batch", False):
            return model
        accepted = accepted_names(model)

        def call(batch: Any) -> Any:
            if isinstance(batch, Tensor):
                return model(batch)
            if isinstance(batch, Mapping):
                if self.input_key in batch:
                    return model(batch[self.input_key])
                inputs = named_inputs(model, batch, self.label_key)
                if accepted is not None:
                    inputs = {name: value for name, value in inputs.items() if name in accepted}
                if not inputs:
                    raise KeyError(
                        f"[DistillationTrainer] a batch must hold the inputs under {self.input_key!r} (input_key) or "
                        f"under names that the model's forward has, got the keys {sorted(map(str, batch))}"
                    )
                return model(**inputs)
            first = batch[0]
            if len(batch) > 2:
                return model(*batch[:-1])
            if isinstance(first, Mapping):
                return model(**{k: v for k, v in first.items() if accepted is None or k in accepted})
            return model(first) if isinstance(first, Tensor) else model(*first)

        return call

    def _moved(self, value: Any) -> Any:
        if self.device is None:
            return value
        if isinstance(value, Tensor):
            return value if value.device == self.device else value.to(self.device, non_blocking=True)
        if isinstance(value, Mapping):
            return {key: self._moved(item) for key, item in value.items()}
        if isinstance(value, tuple | list):
            items = [self._moved(item) for item in value]
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        return value


class Batches:
    """A callable that yields batches epoch after epoch, read, and None between two of them."""

    def __init__(
        self, loader: Iterable, reader: BatchReader, epoch: int = 0, epochs: int = 0, progress: bool = False
    ) -> None:
        self._loader = loader
        self._reader = reader
        self._epoch = epoch
        self._epochs = epochs
        self._progress = progress
        self._bar: tqdm | None = None
        self._shown = 0.0
        self._iterator: Iterator | None = None

    def __call__(self) -> tuple[Any, Tensor | None, Tensor | None] | None:
        """Return the next batch as `BatchReader.read` does; None at the end of an epoch."""
        if self._iterator is None:
            self._epoch += 1
            for part in parts_of(self._loader):  # samplers of several processes shuffle by it
                if hasattr(part, "set_epoch"):
                    part.set_epoch(self._epoch - 1)
            if self._progress:
                self._bar = tqdm(self._loader, desc=f"epoch {self._epoch}/{self._epochs}", unit="batch")
            self._iterator = iter(self._loader if self._bar is None else self._bar)
        try:
            batch = next(self._iterator)
        except StopIteration:
            self._iterator = None
            return None
        return self._reader.read(batch)

    def show(self, numbers: Mapping[str, float]) -> None:
        """Put numbers beside the bar."""
        if self._bar is not None and time.monotonic() - self._shown >= self._bar.mininterval:
            self._shown = time.monotonic()
            self._bar.set_postfix({name: f"{value:.4f}" for name, value in numbers.items()}, refresh=False)

    def close(self) -> None:
        """End the bar."""
        if self._bar is not None:
            self._bar.close()


def _is_input(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(isinstance(item, Tensor) for item in value.values())
    if isinstance(value, tuple | list):
        return any(isinstance(item, Tensor) for item in value)
    return isinstance(value, Tensor)


def _first_tensor(values: Iterable[Any]) -> Tensor | None:
    for value in values:
        if isinstance(value, Tensor) and value.dim() > 0:
            return value
        if isinstance(value, Mapping | tuple | list):
            found = _first_tensor(value.values() if isinstance(value, Mapping) else value)
            if found is not None:
                return found
    return None
