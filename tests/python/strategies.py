"""Inputs for quantization: Hypothesis strategies, layouts, values around bin centres and edges, observer states."""

import itertools

import torch
from hypothesis import strategies as st

#: Shapes that break kernels: not a multiple of any vector width, one row, more dimensions than usual, nothing at all.
ODD_SHAPES = [(217, 256), (5, 4, 3, 160), (1, 1296), (7,), (0, 3), (3, 0, 2), (), (2, 3, 5, 7), (33, 1, 9)]

FLOAT_TYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def integer_range(bits: int, signed: bool, narrow: bool = False) -> tuple[int, int]:
    """(qmin, qmax) of an integer type; narrow leaves out the lowest value of a signed range."""
    if signed:
        return -(2 ** (bits - 1)) + int(narrow), 2 ** (bits - 1) - 1
    return 0, 2**bits - 1


def integer_ranges() -> st.SearchStrategy[tuple[int, int]]:
    """Ranges of 2 to 8 bits, signed, unsigned and narrow."""
    return st.builds(integer_range, st.integers(2, 8), st.booleans(), st.booleans())


def scales(smallest: float = 2.0**-60, largest: float = 2.0**60) -> st.SearchStrategy[float]:
    """Positive float32 values, spread evenly over their exponents."""
    exponents = st.floats(torch.tensor(smallest).log2().item(), torch.tensor(largest).log2().item())
    return exponents.map(lambda e: torch.tensor(2.0, dtype=torch.float64).pow(e).float().item())


def shapes(max_dims: int = 4, max_side: int = 9) -> st.SearchStrategy[tuple[int, ...]]:
    return st.one_of(st.sampled_from(ODD_SHAPES), st.lists(st.integers(0, max_side), max_size=max_dims).map(tuple))


def around_bins(
    shape: tuple[int, ...],
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    axis: int | None,
    qmin: int,
    qmax: int,
    seed: int,
) -> torch.Tensor:
    """float32 values at bin centres, at bin edges, one ulp beside them, in between, and beyond both ends."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(qmin - 3, qmax + 4, shape, generator=generator).float()
    offsets = torch.tensor([0.0, 0.5, -0.5, 0.25, -0.49, 0.4999, 0.5001])
    offset = offsets[torch.randint(0, len(offsets), shape, generator=generator)]
    view = [-1 if axis is not None and i == axis % len(shape) else 1 for i in range(len(shape))]
    x = (q - zero_point.reshape(view) + offset) * scale.float().reshape(view)
    nudge = torch.randint(-1, 2, shape, generator=generator)  # towards -infinity, nowhere, towards infinity
    return torch.nextafter(x, torch.where(nudge == 0, x, nudge * float("inf")))


def layouts(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same values as x behind every kind of strides that x's shape allows."""
    views = {"contiguous": x.contiguous()}
    for order in itertools.islice(itertools.permutations(range(x.dim())), 1, 4):
        inverse = [order.index(i) for i in range(x.dim())]
        views[f"permuted{order}"] = x.permute(order).contiguous().permute(inverse)
    if x.dim() == 4:
        views["channels_last"] = x.contiguous(memory_format=torch.channels_last)
    if x.dim() >= 1:
        views["sliced"] = torch.stack([x, x], dim=-1)[..., 0]
        padded = torch.empty((*x.shape[:-1], x.shape[-1] + 3), dtype=x.dtype, device=x.device)
        padded[..., 3:] = x
        views["padded"] = padded[..., 3:]
        views["unaligned"] = torch.cat([x.new_zeros(1), x.reshape(-1)])[1:].view(x.shape)
    return views


def new_state(count: int = 1, device: torch.device | str = "cpu") -> list[torch.Tensor]:
    """min_val, max_val, scale, zero_point, skipped of an observer that has seen nothing."""
    return [
        torch.full((count,), torch.inf, device=device),
        torch.full((count,), -torch.inf, device=device),
        torch.ones(count, device=device),
        torch.zeros(count, dtype=torch.int32, device=device),
        torch.zeros(1, dtype=torch.int64, device=device),
    ]
