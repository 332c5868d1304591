"""Outputs of layers by path, captured while a model runs."""

import difflib
import fnmatch
import weakref
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from rarefy.distillation.unwrap import unwrap

_INPUT = ":input"


class LayerCapture:
    """Capture what layers return, or receive, in each forward of a model.

    Args:
        model: the model that will be called. One in `DistributedDataParallel` or from `torch.compile` is given as it is
            called, and its layers are named as in the model inside.
        paths: layers by their names in ``model.named_modules()``; ``""`` is the model. ``*`` stands for any part of a
            name, as in ``"encoder.layers.*"`` (which includes ``"encoder.layers.0.linear1"``;
            ``"encoder.layers.[0-9]"`` does not). With ``":input"`` at the end the layer's input is captured.
        clone: copy what is captured, where a later operator writes into it in place (an in-place ReLU say).

    What is captured, and where:

    ============================  ====================================================================================
    the layer runs once           what it returned, unchanged: a tensor, a tuple, a dict
    ... several times             the list of these, in order
    ``":input"``                  its positional argument; the tuple of several; the dict of keywords without any
    ============================  ====================================================================================

    Hooks are there from ``__enter__`` to ``__exit__``. Features have their gradient history; every forward of the model
    starts anew, and ``__exit__`` lets go of them. Only calls inside of a forward of the model count: what gradient
    checkpointing runs again in the backward pass does not. A copy of the model made meanwhile has no part in it.

    Compiled models break their graph at each captured layer (so ``fullgraph=True`` raises torch's error). The first
    capture of a compiled model sets ``torch._dynamo.config.skip_nnmodule_hook_guards = False`` and drops what had been
    compiled: without that, compiled code would pass over the hooks.

    Raises:
        ValueError: a path names no layer; the message lists near ones. On entering: the capture is entered already.

    >>> with LayerCapture(model, ["encoder.layers.0", "head:input"]) as capture:
    ...     logits = model(x)
    ...     hidden = capture.features["encoder.layers.0"]
    """

    def __init__(self, model: nn.Module, paths: str | Iterable[str], *, clone: bool = False) -> None:
        self.model = model
        self.paths = (paths,) if isinstance(paths, str) else tuple(paths)
        self.clone = clone
        self._store = _Store(clone)
        self._handles: list[Any] = []
        _resolve(model, self.paths)

    def __enter__(self) -> "LayerCapture":
        if self._handles:
            raise ValueError("[LayerCapture] a capture is entered once at a time, got a second time")
        layers = _resolve(self.model, self.paths)
        compiled = any(_is_compiled(module) for module in self.model.modules())
        if compiled:
            _guard_hooks()
        self._store.expected = tuple(path for paths in layers.values() for path in paths)

        def add(register: Callable[..., Any], hook: Callable[..., None], **options: bool) -> None:
            self._handles.append(register(torch.compiler.disable(hook) if compiled else hook, **options))

        add(self.model.register_forward_pre_hook, self._store.starter(self.model))
        for module, paths in layers.items():
            inputs = tuple(path for path in paths if path.endswith(_INPUT))
            outputs = tuple(path for path in paths if not path.endswith(_INPUT))
            if inputs:
                add(module.register_forward_pre_hook, self._store.input_hook(module, inputs), with_kwargs=True)
            if outputs:
                add(module.register_forward_hook, self._store.output_hook(module, outputs))
        add(self.model.register_forward_hook, self._store.stopper(self.model), always_call=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._store.start(False)
        self._store.active = False

    @property
    def features(self) -> dict[str, Any]:
        """What the last forward gave, by path.

        The dict is that forward's own: the next one makes another.

        Raises:
            ValueError: no forward has run, a layer did not run in it, or what was captured has been written into since.
        """
        return self._store.checked()

    def __repr__(self) -> str:
        state = "entered" if self._handles else "not entered"
        return f"LayerCapture({type(unwrap(self.model)).__name__}, {list(self.paths)}, {state})"


class _Store:
    """The state that hooks write into. It knows no module, so that hooks make no cycle."""

    def __init__(self, clone: bool) -> None:
        self.active = False
        self.expected: tuple[str, ...] = ()
        self._clone = clone
        self._grad = False
        self._ran = False
        self.start(False)

    def start(self, ran: bool) -> None:
        self._ran = ran
        self._features: dict[str, Any] = {}
        self._calls: dict[str, int] = {}
        self._versions: list[tuple[str, Tensor, int]] = []

    def starter(self, model: nn.Module) -> Callable[..., None]:
        owner = weakref.ref(model)

        def hook(module: nn.Module, _: Any) -> None:
            if owner() is module:  # a deep copy of the model has the same hooks
                self.start(True)
                self.active = True
                self._grad = torch.is_grad_enabled()

        return hook

    def stopper(self, model: nn.Module) -> Callable[..., None]:
        owner = weakref.ref(model)

        def hook(module: nn.Module, *_: Any) -> None:
            if owner() is module:
                self.active = False

        return hook

    def output_hook(self, layer: nn.Module, paths: tuple[str, ...]) -> Callable[..., None]:
        owner = weakref.ref(layer)

        def hook(module: nn.Module, arguments: tuple, output: Any) -> None:
            if self.active and owner() is module:
                self._check_history(module, arguments, paths)
                self._add(paths, output)

        return hook

    def input_hook(self, layer: nn.Module, paths: tuple[str, ...]) -> Callable[..., None]:
        owner = weakref.ref(layer)

        def hook(module: nn.Module, arguments: tuple, keywords: dict[str, Any]) -> None:
            if self.active and owner() is module:
                self._check_history(module, arguments, paths)
                self._add(paths, arguments[0] if len(arguments) == 1 else arguments or dict(keywords))

        return hook

    def _check_history(self, module: nn.Module, arguments: tuple, paths: tuple[str, ...]) -> None:
        if not self._grad or torch.is_grad_enabled():
            return
        inputs = (value for value in arguments if isinstance(value, Tensor))
        if any(value.requires_grad for value in (*inputs, *module.parameters())):
            raise ValueError(
                f"[LayerCapture] a captured layer must run with gradients where its model does, got {paths[0]!r} without: "
                "reentrant checkpointing (use_reentrant=False keeps them) or torch.no_grad()"
            )

    def _add(self, paths: tuple[str, ...], value: Any) -> None:
        if self._clone:
            value = pytree.tree_map_only(Tensor, torch.clone, value)
        for path in paths:
            calls = self._calls[path] = self._calls.get(path, 0) + 1
            if calls == 1:
                self._features[path] = value
            elif calls == 2:
                self._features[path] = [self._features[path], value]
            else:
                self._features[path].append(value)
        self._versions += [
            (paths[0], leaf, leaf._version)
            for leaf in pytree.tree_leaves(value)
            if isinstance(leaf, Tensor) and not leaf.is_inference()
        ]

    def checked(self) -> dict[str, Any]:
        if not self._ran:
            raise ValueError("[LayerCapture] features are those of the model's last forward, got none since entering")
        missing = [path for path in self.expected if path not in self._features]
        if missing:
            raise ValueError(
                f"[LayerCapture] every layer must run in the model's forward, got none of {missing} "
                "(a layer whose forward is not called, or replicas of DataParallel)"
            )
        for path, tensor, version in self._versions:
            if tensor._version != version:
                raise ValueError(
                    f"[LayerCapture] what a layer gave must stay as it was, got {path!r}, which a later operator wrote into "
                    "in place: capture the layer after it, or use clone=True"
                )
        return self._features


def _resolve(model: nn.Module, paths: tuple[str, ...]) -> dict[nn.Module, list[str]]:
    """Return the paths of each module; those with a * become the names that match."""
    if not paths:
        raise ValueError("[LayerCapture] paths must name a layer, got none")
    modules: dict[str, nn.Module] = {}
    for name, module in unwrap(model).named_modules(remove_duplicate=False):
        parts = [part for part in name.split(".") if part != "_orig_mod"]
        modules.setdefault(".".join(parts), module)
    modules[""] = model
    layers: dict[nn.Module, list[str]] = {}
    for path in paths:
        if not isinstance(path, str):
            raise TypeError(f"[LayerCapture] paths must be strings, got {type(path).__name__}")
        name = path.removesuffix(_INPUT)
        suffix = path[len(name) :]
        names = [name] if name in modules else [n for n in modules if n and fnmatch.fnmatchcase(n, name)]
        if not names:
            near = difflib.get_close_matches(name, modules, n=5, cutoff=0.5) or [n for n in modules if n][:5]
            raise ValueError(
                f"[LayerCapture] a path must name a layer of {type(unwrap(model)).__name__}, got {path!r}; "
                f"near: {', '.join(map(repr, near)) or 'none, the model has no layers'}"
            )
        for match in names:
            known = layers.setdefault(modules[match], [])
            if match + suffix not in known:
                known.append(match + suffix)
    return layers


def _is_compiled(module: nn.Module) -> bool:
    return isinstance(getattr(module, "_orig_mod", None), nn.Module) or module._compiled_call_impl is not None


def _guard_hooks() -> None:
    """Let compiled code look at hooks: by default it runs as if hooks were those of its first call."""
    if torch._dynamo.config.skip_nnmodule_hook_guards:
        torch._dynamo.config.skip_nnmodule_hook_guards = False
        torch._dynamo.reset()
