"""Sizes that a model's own code reads from attributes: num_heads, split_size, the fields of a configuration."""

from __future__ import annotations

import re
from collections import defaultdict

from torch import nn

from rarefy._core.pruning import Plan
from rarefy.pruning.surgery import Surgery

# What an attribute must be called to be a number of channels or heads, and what it must not.
_SIZE = re.compile(
    r"head|dim|size|channel|feature|width|hidden|embed|group|inner|planes|units|d_model|d_ff|d_kv|n_embd|nf$|^d$|^c$|^h$"
)
_OTHER = re.compile(
    r"vocab|patch|kernel|window|image|max_|position|layer|batch|stride|padding|bucket|dilation|pad_|chunk_size"
)


_HEADS = re.compile(r"heads?$|groups?$")  # how many, as against how wide
_STREAM = re.compile(r"^hidden_size$|d_model|n_embd|embed_dim|^dim$|^embed$")  # the width of what residuals add to


def _is_size(name: str) -> bool:
    return bool(_SIZE.search(name.lower())) and not _OTHER.search(name.lower())


_Sizes = dict[str, dict[int, set[int]]]


class Follower:
    """Sets the attributes of a model's modules, and of its configurations, that say a size that changed.

    An attribute follows when it is an integer named as a size is, equals a size in an operator that its module called, and
    all of those that had its value have the same new one. Where its module called none, the operators of the modules
    inside of it count, and without those the dimensions of the parameters below it; for the width that residuals add to,
    norms and embeddings first. Where some had its value and stay, as 4 heads of width 4 do, a name that says how many
    decides. A cautious plan goes by the module's own operators alone: a size may be a factor of a computation as well.
    """

    def __init__(self, model: nn.Module, surgery: Surgery, plan: Plan) -> None:
        self._surgery = surgery
        self._cautious = plan.cautious
        self._modules = dict(model.named_modules())
        # Of each module: old size to the new sizes that were seen for it.
        self._own: _Sizes = defaultdict(lambda: defaultdict(set))  # in its own operators
        self._seen: _Sizes = defaultdict(lambda: defaultdict(set))  # in those of the modules inside of it too
        self._streams: _Sizes = defaultdict(lambda: defaultdict(set))  # in norms and embeddings below it
        self._dims: _Sizes = defaultdict(lambda: defaultdict(set))  # in parameters below it
        kept = defaultdict(dict)
        for cut in plan.cuts:
            kept[cut.tensor][cut.dim] = len(cut.kept)
        for name, shape in surgery.shapes_before.items():
            path, _, last = name.rpartition(".")
            norm = len(shape) == 1 and last == "weight"
            for dim, size in enumerate(shape):
                self._see(self._dims, path, size, kept[name].get(dim, size))
                if norm or (dim == 1 and isinstance(self._modules.get(path), nn.Embedding)):
                    self._see(self._streams, path, size, kept[name].get(dim, size))
        for resize in plan.resizes:
            self._own[resize.module][resize.before].add(resize.after)
            if resize.flows:
                self._see(self._seen, resize.module, resize.before, resize.after)

    @staticmethod
    def _see(sizes: _Sizes, path: str, before: int, after: int) -> None:
        while True:
            sizes[path][before].add(after)
            if not path:
                return
            path = path.rpartition(".")[0]

    def _new(self, path: str, name: str, value: object, own: bool = True) -> int | None:
        """The size that an attribute of a module must become; None when it stays or it is not clear."""
        if not isinstance(value, int) or isinstance(value, bool) or not _is_size(name):
            return None
        seen = self._own[path][value] if own else set()
        if not self._cautious or _HEADS.search(name):
            if _STREAM.search(name):
                seen = seen or self._streams[path][value]
            seen = seen or self._seen[path][value] or self._dims[path][value]
        changed = seen - {value}
        return next(iter(changed)) if len(changed) == 1 and (value not in seen or _HEADS.search(name)) else None

    def follow(self) -> None:
        """Set them, through the surgery, which undoes it when it is rolled back."""
        done: set[int] = set()
        for path, module in self._modules.items():
            if id(module) in done:
                continue
            done.add(id(module))
            if type(module).__module__.startswith(("torch.nn.", "rarefy.")):
                self._follow_shape(path, module)
                continue
            for name, value in list(vars(module).items()):
                if (new := self._new(path, name, value)) is not None:
                    self._surgery.set_attribute(module, name, new)
        self._follow_configurations()

    def _follow_shape(self, path: str, module: nn.Module) -> None:
        """Norms without parameters, and other layers of torch that hold a shape: no tensor of theirs was cut."""
        if any(True for _ in module.parameters(recurse=False)):
            return
        for name in ("normalized_shape", "unflattened_size"):
            shape = vars(module).get(name)
            if isinstance(shape, (tuple, list)):
                new = tuple(self._sole_new(path, size) or size for size in shape)
                if new != tuple(shape):
                    self._surgery.set_attribute(module, name, new)
        for name in ("num_channels", "num_features"):
            size = vars(module).get(name)
            if isinstance(size, int) and (new := self._sole_new(path, size)) is not None:
                self._surgery.set_attribute(module, name, new)

    def _sole_new(self, path: str, size: int) -> int | None:
        seen = self._seen[path][size] or self._dims[path][size]
        return next(iter(seen)) if len(seen) == 1 and size not in seen else None

    def _follow_configurations(self) -> None:
        """A configuration that several modules share follows when it is right for the outermost of them."""
        done: set[int] = set()
        for path, module in self._modules.items():
            config = vars(module).get("config")
            if config is None or id(config) in done or not hasattr(config, "to_dict"):
                continue
            done.add(id(config))
            for name, value in list(vars(config).items()):
                if (new := self._new(path, name, value, own=False)) is not None:
                    self._surgery.set_attribute(module, f"config.{name}", new)
