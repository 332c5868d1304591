"""Terms of an objective over captured layers: one loss between layers, and maps of many."""

import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

Select = int | str | Callable[[Any], Tensor]


class FeatureLoss(nn.Module):
    """A loss between captured layers of student and teacher, as a term of a training objective.

    Calling it with (student, teacher, batch), where student.features and teacher.features map paths of modules to what they
    returned, computes ``loss(student feature, teacher feature)``, with ``mask=`` and ``index=`` from the batch if their keys
    are given.

    Args:
        student_layer, teacher_layer: paths as of `named_modules`. A sequence of paths gives the loss a list of features, as
            `MiniLMRelations` (query, key, value) and `AffinityMimicking` (image, text) take them.
        loss: a loss of this package, or any callable of the two features that returns a scalar. A module's parameters
            (adapters) are this term's, to be trained with the student.
        select: which tensor of a layer's output to take where it is not one tensor: an index of a tuple, a key or attribute,
            or a function of the output.
        teacher_select: the same for the teacher; None: as `select`.
        mask_key: where a batch that is a dict (or, with an integer, a tuple) holds the padding mask, such as
            "attention_mask"; values other than 0 count.
        index_key: where the batch holds the samples' places in the data set, for `ContrastiveRepresentation`.

    >>> term = FeatureLoss("layer2", "layer3", Hint(128, 256))
    >>> term(student_outputs, teacher_outputs, batch)

    Attributes:
        student_layers, teacher_layers: the paths to capture, as tuples.
    """

    def __init__(
        self,
        student_layer: str | Sequence[str],
        teacher_layer: str | Sequence[str],
        loss: Callable[..., Tensor],
        *,
        select: Select | None = None,
        teacher_select: Select | None = None,
        mask_key: str | int | None = None,
        index_key: str | int | None = None,
    ) -> None:
        super().__init__()
        if not callable(loss):
            raise TypeError(f"[FeatureLoss] loss must be callable, got {type(loss).__name__}")
        self.student_layers = _paths("student_layer", student_layer)
        self.teacher_layers = _paths("teacher_layer", teacher_layer)
        self._single = isinstance(student_layer, str), isinstance(teacher_layer, str)
        self.loss = loss
        self.select = select
        self.teacher_select = select if teacher_select is None else teacher_select
        self.mask_key = mask_key
        self.index_key = index_key

    def forward(self, student: Any, teacher: Any, batch: Any = None) -> Tensor:
        """Return the loss of what the layers returned.

        Raises:
            KeyError: a layer was not captured.
            TypeError: a layer returned no tensor and `select` does not say which, or the batch has no such keys.
        """
        features = [
            self._features("student", student, self.student_layers, self._single[0], self.select),
            self._features("teacher", teacher, self.teacher_layers, self._single[1], self.teacher_select),
        ]
        options = {}
        if self.mask_key is not None:
            options["mask"] = entry(batch, "FeatureLoss", "mask_key", self.mask_key) != 0
        if self.index_key is not None:
            options["index"] = entry(batch, "FeatureLoss", "index_key", self.index_key)
        return self.loss(*features, **options)

    @staticmethod
    def _features(side: str, outputs: Any, paths: tuple[str, ...], single: bool, select: Select | None) -> Any:
        found = []
        for path in paths:
            if path not in outputs.features:
                captured = ", ".join(sorted(outputs.features)) or "none"
                raise KeyError(f"[FeatureLoss] {side} layer '{path}' must be captured, got {captured}")
            found.append(_selected(outputs.features[path], select, f"{side} layer '{path}'"))
        return found[0] if single else found

    def extra_repr(self) -> str:
        """Return the layers for the module's repr."""
        return f"{' + '.join(self.student_layers)} <- {' + '.join(self.teacher_layers)}"


def layer_map(
    student: str | Iterable[str],
    teacher: str | Iterable[str],
    make_loss: Callable[[], Callable[..., Tensor]],
    **options: Any,
) -> dict[str, FeatureLoss]:
    """Return one `FeatureLoss` per pair of layers, by names made of the student's paths ("." becomes "_").

    Paths are given as a pattern or as an iterable of paths and patterns. In a pattern {a..b} stands for the numbers from a
    to b, both included, {a..b..step} for every step-th of them, and {x,y} for each of the words. As many teacher as student
    layers are paired in order. Of k times as many, each student layer gets the last of k teacher layers (the uniform map
    g(m) = k m of TinyBERT, arXiv:1909.10351).

    Args:
        student, teacher: the layers.
        make_loss: makes the loss of one pair, so that each has an adapter of its own: `Hint`, or a `functools.partial`.
        options: of every `FeatureLoss`.

    >>> layer_map("encoder.layer.{0..2}", "encoder.layer.{0..5}", Hint, select=0, mask_key="attention_mask")
    {'encoder_layer_0': FeatureLoss(encoder.layer.0 <- encoder.layer.1 ...), ... <- encoder.layer.3, ... <- encoder.layer.5}

    Raises:
        ValueError: a pattern is malformed, a student path comes twice, or the numbers of layers do not fit.
        TypeError: make_loss is a module; one loss would be shared by all pairs.
    """
    if isinstance(make_loss, nn.Module):
        raise TypeError(
            "[layer_map] make_loss must make a loss for each pair (a class or a function), got a module "
            f"{type(make_loss).__name__}"
        )
    students, teachers = expand_paths(student), expand_paths(teacher)
    if not students or not teachers or len(teachers) % len(students):
        raise ValueError(
            "[layer_map] teacher layers must be as many as student layers or a multiple, "
            f"got {len(teachers)} for {len(students)}"
        )
    repeated = sorted({path for path in students if students.count(path) > 1})
    if repeated:
        raise ValueError(f"[layer_map] student layers must be distinct, got {repeated[0]} more than once")
    every = len(teachers) // len(students)
    return {
        own.replace(".", "_"): FeatureLoss(own, other, make_loss(), **options)
        for own, other in zip(students, teachers[every - 1 :: every], strict=True)
    }


def expand_paths(paths: str | Iterable[str]) -> list[str]:
    """Return the paths that a pattern, or several, stands for, in order; see `layer_map`."""
    if not isinstance(paths, str):
        return [path for pattern in paths for path in expand_paths(pattern)]
    pieces = re.split(r"\{([^{}]*)\}", paths)
    if any("{" in piece or "}" in piece for piece in pieces):
        raise ValueError(f"[layer_map] braces must be paired, got {paths!r}")
    choices = [[piece] if i % 2 == 0 else _alternatives(piece, paths) for i, piece in enumerate(pieces)]
    return ["".join(chosen) for chosen in itertools.product(*choices)]


def _alternatives(inside: str, pattern: str) -> list[str]:
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)(?:\.\.(\d+))?", inside)
    if numbers:
        first, last, step = int(numbers[1]), int(numbers[2]), int(numbers[3] or 1)
        if step == 0 or last < first:
            raise ValueError(f"[layer_map] a range must go up by a step of 1 or more, got {{{inside}}} in {pattern!r}")
        return [str(i) for i in range(first, last + 1, step)]
    words = inside.split(",")
    if len(words) < 2 or not all(words):
        raise ValueError(f"[layer_map] braces must hold a..b, a..b..step or words x,y, got {{{inside}}} in {pattern!r}")
    return words


def _paths(name: str, paths: str | Sequence[str]) -> tuple[str, ...]:
    found = (paths,) if isinstance(paths, str) else tuple(paths)
    if not found or not all(isinstance(path, str) for path in found):
        raise TypeError(f"[FeatureLoss] {name} must be a path or a sequence of paths, got {paths!r}")
    return found


def _selected(output: Any, select: Select | None, name: str) -> Tensor:
    if isinstance(output, Tensor):
        return output
    if select is None:
        size = f" of {len(output)}" if isinstance(output, tuple | list) else ""
        raise TypeError(
            f"[FeatureLoss] {name} must return one tensor where select is not given, got a {type(output).__name__}{size}"
        )
    if callable(select):
        chosen = select(output)
    elif isinstance(select, str) and not isinstance(output, Mapping):
        chosen = getattr(output, select)
    else:
        chosen = output[select]
    if not isinstance(chosen, Tensor):
        raise TypeError(f"[FeatureLoss] select must give a tensor for {name}, got {type(chosen).__name__}")
    return chosen


def entry(batch: Any, owner: str, name: str, key: str | int) -> Tensor:
    """Return the tensor that a batch holds under a key: a name in a dict, a place in a tuple."""
    if isinstance(batch, Mapping):
        if key not in batch:
            raise KeyError(f"[{owner}] {name} {key!r} must be in the batch, got {sorted(map(str, batch))}")
    elif not (isinstance(key, int) and isinstance(batch, tuple | list) and -len(batch) <= key < len(batch)):
        raise TypeError(f"[{owner}] {name} {key!r} needs a batch that has it, got a {type(batch).__name__}")
    found = batch[key]
    if not isinstance(found, Tensor):
        raise TypeError(f"[{owner}] {name} {key!r} must name a tensor of the batch, got {type(found).__name__}")
    return found
