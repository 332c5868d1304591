"""The float numbers of an integer weight, computed when somebody computes with them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

# What a tensor knows without its numbers. Everything else computes them, so that nothing here can be forgotten.
_FACTS: frozenset[object] = frozenset(
    {getattr(Tensor, name).__get__ for name in ("device", "dtype", "is_cuda", "layout", "ndim", "requires_grad", "shape")}
    | {Tensor.__len__, Tensor.dim, Tensor.is_floating_point, Tensor.ndimension, Tensor.numel, Tensor.size}
)
_WRITES = {"__set__", "__setitem__", "__iadd__", "__isub__", "__imul__", "__idiv__", "__itruediv__", "__ipow__"}


def _writes(name: str) -> bool:
    return name in _WRITES or (name.endswith("_") and not name.endswith("__"))


class DequantizedWeight(Tensor):
    """``integers * scale``, of the shape of the integers, in float32: to be read, not written.

    Models ask a layer's weight for its dtype or device at every forward; with numbers at hand that would cost more than
    the layer itself. Type, device and shape are free here. Any operation computes the numbers and is applied to them; its
    result is an ordinary tensor.

    Args:
        integers: int8.
        scale: float32, of a shape that broadcasts against ``integers``.

    Raises:
        RuntimeError: for an operation in place, which the integers would know nothing of.
    """

    _integers: Tensor
    _scale: Tensor

    @staticmethod
    def __new__(cls, integers: Tensor, scale: Tensor) -> DequantizedWeight:
        weight = Tensor._make_wrapper_subclass(
            cls, integers.shape, strides=integers.stride(), dtype=torch.float32, device=integers.device
        )
        weight._integers, weight._scale = integers, scale
        return weight

    @staticmethod
    def _numbers(weight: DequantizedWeight) -> Tensor:
        return weight._integers.float() * weight._scale

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., object], types: object, args: tuple[object, ...] = (), kwargs: object = None
    ) -> object:
        """Facts as they are; everything else on the numbers."""
        if func in _FACTS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if _writes(name) and isinstance(args[0], cls):
            raise RuntimeError(
                f"[DequantizedWeight] the weight of a converted layer must only be read, got a call of {name}"
            )
        return cls.__torch_dispatch__(func, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(
        cls, func: Callable[..., object], types: object, args: tuple[object, ...] = (), kwargs: object = None
    ) -> object:
        """The operation on the numbers."""
        args, kwargs = tree_map_only(cls, cls._numbers, (args, kwargs or {}))
        return func(*args, **kwargs)
