"""observe, observe_fake_quantize and choose_qparams: statistics, parameters, extreme ranges and errors."""

import re

import numpy as np
import pytest
import reference
import strategies
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import new_state

ops = torch.ops.rarefy
INFINITY = float("inf")
State = list[torch.Tensor]  # min_val, max_val, scale, zero_point, skipped


def assert_parameters(state: State, qmin: int, qmax: int, symmetric: bool) -> None:
    """scale and zero_point are those of the range by the float64 reference; of many channels, some 100."""
    low, high, scale, zero_point, _ = (t.cpu() for t in state)
    for i in range(0, low.numel(), 1 + low.numel() // 100):
        expected = reference.choose_qparams(low[i].item(), high[i].item(), qmin, qmax, symmetric)
        assert (np.float32(scale[i].item()), zero_point[i].item()) == expected


@pytest.mark.parametrize("dtype", strategies.FLOAT_TYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [s for s in strategies.ODD_SHAPES if 0 not in s] + [(3, 70_001), (70_001, 3)], ids=str
)
def test_range_of_every_shape_axis_layout_and_type(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    x = (torch.randn(shape) * 5 + torch.randn(shape[-1:] or ())).to(dtype).to(device)
    for axis in (None, *range(-len(shape), len(shape))):
        channels_first = x.reshape(1, -1) if axis is None else x.movedim(axis, 0).reshape(x.shape[axis], -1)
        for view in strategies.layouts(x).values():
            state = new_state(len(channels_first), device)
            ops.observe(view, *state, axis, None, 0, 255, False)
            assert torch.equal(state[0], channels_first.amin(1).float())
            assert torch.equal(state[1], channels_first.amax(1).float())
            assert_parameters(state, 0, 255, False)


@pytest.mark.parametrize("axis", [None, 1])
def test_running_averaging_and_latest(axis: int | None, device: torch.device) -> None:
    batches = [torch.randn(4, 3, 50, device=device) * (i + 1) + i for i in range(5)]
    for constant in (None, 0.01, 0.5, 1.0):
        state = new_state(1 if axis is None else 3, device)
        low = high = None
        for batch in batches:
            ops.observe(batch, *state, axis, constant, -128, 127, True)
            rows = batch.reshape(1, -1) if axis is None else batch.movedim(axis, 0).reshape(3, -1)
            batch_low, batch_high = rows.amin(1).cpu().double().numpy(), rows.amax(1).cpu().double().numpy()
            if low is None:
                low, high = batch_low, batch_high
            elif constant is None:
                low, high = np.minimum(low, batch_low), np.maximum(high, batch_high)
            else:
                low = ((1 - constant) * low + constant * batch_low).astype(np.float32).astype(np.float64)
                high = ((1 - constant) * high + constant * batch_high).astype(np.float32).astype(np.float64)
            assert np.array_equal(state[0].cpu().double().numpy(), low)
            assert np.array_equal(state[1].cpu().double().numpy(), high)
            assert_parameters(state, -128, 127, True)


def test_observe_fake_quantize_is_observe_then_fake_quantize(device: torch.device) -> None:
    for axis, dtype in ((None, torch.float32), (0, torch.float32), (2, torch.bfloat16), (-1, torch.float64)):
        x = torch.randn(3, 17, 5, device=device).to(dtype)
        apart, fused = (new_state(1 if axis is None else x.shape[axis], device) for _ in range(2))
        for scale in (1.0, 3.0, 0.5):
            ops.observe(x * scale, *apart, axis, 0.1, 0, 255, False)
            expected = ops.fake_quantize(x * scale, apart[2], apart[3], axis, 0, 255)
            leaf = (x * scale).requires_grad_()
            y = ops.observe_fake_quantize(leaf, *fused, axis, 0.1, 0, 255, False)
            assert torch.equal(y, expected)
            assert all(map(torch.equal, apart, fused))
            _, inside = reference.fake_quantize(x * scale, apart[2], apart[3], axis, 0, 255)
            upstream = torch.randn_like(y) + 3
            (grad,) = torch.autograd.grad(y, leaf, upstream)
            assert torch.equal(
                grad, torch.where(inside.to(device), upstream, torch.zeros((), dtype=dtype, device=device))
            )


def test_state_changes_are_seen_by_autograd() -> None:
    state = new_state()
    ops.observe(torch.ones(3), *state, None, None, 0, 255, False)
    x = torch.randn(3, requires_grad=True)
    y = x * state[2]  # saves the scale for its backward
    versions = [t._version for t in state]
    ops.observe_fake_quantize(x, *state, None, None, 0, 255, False)
    assert [t._version for t in state] == [v + 1 for v in versions]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_observe_does_not_record_a_graph() -> None:
    state = new_state()
    ops.observe(torch.randn(3, requires_grad=True), *state, None, None, 0, 255, False)
    assert not any(t.requires_grad for t in state)


# --- choose_qparams ---------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=300)
@given(
    limits=strategies.integer_ranges(),
    symmetric=st.booleans(),
    ends=st.tuples(*[st.floats(allow_nan=False, allow_infinity=False, width=32)] * 2),
)
def test_choose_qparams(limits: tuple[int, int], symmetric: bool, ends: tuple[float, float]) -> None:
    low, high = min(ends), max(ends)
    qmin, qmax = limits
    scale, zero_point = ops.choose_qparams(torch.tensor([low]), torch.tensor([high]), qmin, qmax, symmetric)
    assert (np.float32(scale.item()), zero_point.item()) == reference.choose_qparams(low, high, qmin, qmax, symmetric)
    assert scale.dtype == torch.float32
    assert zero_point.dtype == torch.int32
    assert scale.isfinite().all()
    assert scale.item() >= 2.0**-60
    assert qmin <= zero_point.item() <= qmax
    # Finite values stay finite, and the range is covered to half a step unless the scale was limited.
    x = torch.tensor([low, high, 0.0, (low / 2 + high / 2)])
    x_hat = ops.fake_quantize(x, scale, zero_point, None, qmin, qmax)
    assert x_hat.isfinite().all()
    assert x_hat[2] == 0
    if max(abs(low), abs(high)) < 1e38:
        assert ((x.double() - x_hat.double()).abs() <= scale.double() * (0.5 + 1e-4)).all()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("limits", [(-128, 127), (0, 255), (-2, 1), (0, 3), (-127, 127), (-32768, 32767), (0, 65535)])
@pytest.mark.parametrize(
    ("low", "high"),
    [(-3e38, 3e38), (-3.4028234e38, 3.4028234e38), (0, 3.4028234e38), (-3e38, -1e38), (1e-38, 2e-38), (-1e-38, 1e-38),
     (-1e-45, 0), (0, 1e-45), (1e-40, 1e-39), (0, 0), (-0.0, 0.0), (5, 5), (-5, -5), (1e-38, 3e38)],
)  # fmt: skip
def test_extreme_ranges(
    low: float, high: float, limits: tuple[int, int], symmetric: bool, device: torch.device
) -> None:
    x = torch.tensor([low, high], dtype=torch.float32, device=device)
    state = new_state(1, device)
    ops.observe(x, *state, None, None, *limits, symmetric)
    scale, zero_point = ops.choose_qparams(*state[:2], *limits, symmetric)
    assert torch.equal(scale, state[2])
    assert torch.equal(zero_point, state[3])
    assert_parameters(state, *limits, symmetric)
    assert state[2].isfinite().all()
    assert (state[2] >= 2.0**-60).all()
    everywhere = torch.tensor([low, high, 0.0, 3.4e38, -3.4e38, 1e-45], device=device)
    assert ops.fake_quantize(everywhere, state[2], state[3], None, *limits).isfinite().all()
    # A moving average between the two ends of float32 does not overflow either.
    for batch in (-x, x, torch.full_like(x, -3.4e38), torch.full_like(x, 3.4e38)):
        ops.observe(batch, *state, None, 0.3, *limits, symmetric)
        assert all(t.isfinite().all() for t in state)
        assert state[0] <= state[1]


def test_latest_keeps_exactly_the_latest(device: torch.device) -> None:
    state = new_state(1, device)
    for batch in (torch.tensor([-3e38, 3e38]), torch.tensor([1e-10, 2e-10]), torch.tensor([-0.1, 0.3])):
        ops.observe(batch.to(device), *state, None, 1.0, 0, 255, False)
        assert state[0].item() == batch[0]
        assert state[1].item() == batch[1]


def test_zero_has_no_sign_in_the_state(device: torch.device) -> None:
    for values in ([0.0, -0.0], [-0.0, 0.0], [-0.0]):
        state = new_state(1, device)
        ops.observe(torch.tensor(values * 20, device=device), *state, None, None, 0, 255, False)
        assert not torch.signbit(torch.cat(state[:2])).any()


def test_choose_qparams_shapes_and_types(device: torch.device) -> None:
    low, high = -torch.rand(3, 4, device=device).double(), torch.rand(3, 4, device=device).half()
    scale, zero_point = ops.choose_qparams(low, high, 0, 255, False)
    assert scale.shape == zero_point.shape == (3, 4)
    assert scale.dtype == torch.float32
    empty = ops.choose_qparams(low[:0], high[:0], 0, 255, False)
    assert empty[0].shape == empty[1].shape == (0, 4)


# --- Batches that are not finite --------------------------------------------------------------------------------------


@pytest.mark.parametrize("position", [0, 15, 16, 63, 64, 65, 127, 128, 255, 256, 300])
@pytest.mark.parametrize(("shape", "axis"), [((301,), None), ((7, 43), 0), ((7, 43), 1), ((43, 7), 1), ((301, 1), 1)])
def test_one_bad_value_anywhere_leaves_the_batch_out(
    position: int, shape: tuple[int, ...], axis: int | None, device: torch.device
) -> None:
    state = new_state(1 if axis is None else shape[axis], device)
    ops.observe(torch.randn(shape, device=device), *state, axis, 0.1, 0, 255, False)
    before = [t.clone() for t in state]
    skipped = 0
    for value in (float("nan"), INFINITY, -INFINITY):
        for dtype in strategies.FLOAT_TYPES:
            x = torch.randn(shape).to(dtype)
            x.view(-1)[position] = value
            ops.observe(x.to(device), *state, axis, 0.1, 0, 255, False)
            skipped += 1
            assert all(map(torch.equal, state[:4], before))
            assert state[4].item() == skipped


def test_a_float64_beyond_float32_is_infinite(device: torch.device) -> None:
    state = new_state(1, device)
    ops.observe(torch.tensor([1.0, 1e300], dtype=torch.float64, device=device), *state, None, None, 0, 255, False)
    assert state[4].item() == 1
    assert state[0].item() == INFINITY


@pytest.mark.parametrize("constant", [None, 0.1, 1.0])
def test_bad_values_come_out_visibly_on_the_grid_so_far(constant: float | None, device: torch.device) -> None:
    state = new_state(1, device)
    ops.observe(torch.tensor([-1.0, 3.0], device=device), *state, None, constant, 0, 255, False)
    x = torch.tensor([0.3, float("nan"), INFINITY, -INFINITY, 2.0], device=device, requires_grad=True)
    y = ops.observe_fake_quantize(x, *state, None, constant, 0, 255, False)
    expected = ops.fake_quantize(x.detach(), state[2], state[3], None, 0, 255)
    assert torch.equal(y.nan_to_num(77.0), expected.nan_to_num(77.0))
    assert y[1].isnan()
    assert state[4].item() == 1
    y.backward(torch.full_like(y, 2.0))
    assert x.grad.tolist() == [2.0, 0.0, 0.0, 0.0, 2.0]


@pytest.mark.parametrize(
    ("limits", "symmetric", "zero_point"),
    [
        ((0, 255), False, 0),
        ((0, 255), True, 128),
        ((-128, 127), True, 0),
        ((-128, 127), False, -128),
        ((1, 9), False, 1),
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_without_any_finite_batch_the_parameters_are_those_of_zero(
    limits: tuple[int, int], symmetric: bool, zero_point: int, channels: int, device: torch.device
) -> None:
    state = new_state(channels, device)
    state[2].fill_(float("nan"))
    x = torch.full((3, 5), float("nan"), device=device)
    axis = None if channels == 1 else 0
    y = ops.observe_fake_quantize(x, *state, axis, None, *limits, symmetric)
    assert y.isnan().all()
    assert state[2].tolist() == [1.0] * channels
    assert state[3].tolist() == [zero_point] * channels
    assert reference.choose_qparams(0.0, 0.0, *limits, symmetric) == (1.0, zero_point)
    assert (state[0] > state[1]).all()  # still nothing seen: the next finite batch is taken whole
    ops.observe(torch.tensor([[1.0, 2.0]] * 3, device=device), *state, axis, 0.01, *limits, symmetric)
    assert state[0].tolist() == [1.0] * channels
    assert state[4].item() == 1


# --- Errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", ["observe", "observe_fake_quantize"])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.empty(0, 3)}, ValueError, "input must not be empty, got shape [0, 3]"),
        (
            {"x": torch.ones(3, dtype=torch.int32)},
            TypeError,
            "input must be float32, float64, bfloat16 or float16, got Int",
        ),
        ({"axis": 2}, IndexError, "axis must be in [-2, 2) for an input of 2 dimensions, got 2"),
        ({"axis": 0}, ValueError, "scale must have shape [4] (one per index of axis 0), got [1]"),
        ({"min_val": torch.zeros(2)}, ValueError, "min_val must have 1 element (one for the tensor), got 2"),
        ({"max_val": torch.zeros(1).double()}, TypeError, "max_val must be float32, got Double"),
        ({"scale": torch.ones(1).double()}, TypeError, "scale must be float32, got Double"),
        ({"zero_point": torch.zeros(1)}, TypeError, "zero_point must be int32, got Float"),
        ({"skipped": torch.zeros(1)}, TypeError, "skipped must be int64, got Float"),
        ({"skipped": torch.zeros(3, dtype=torch.int64)}, ValueError, "skipped must have 1 element, got 3"),
        (
            {"min_val": torch.tensor([1.0]), "max_val": torch.tensor([-1.0])},
            ValueError,
            "must be a finite range or (inf, -inf)",
        ),
        (
            {"min_val": torch.tensor([float("nan")])},
            ValueError,
            "must be a finite range or (inf, -inf) for none, got (nan, -inf)",
        ),
        (
            {"max_val": torch.tensor([INFINITY])},
            ValueError,
            "must be a finite range or (inf, -inf) for none, got (inf, inf)",
        ),
        ({"averaging_constant": 0.0}, ValueError, "averaging_constant must be in (0, 1], got 0"),
        ({"averaging_constant": 1.5}, ValueError, "averaging_constant must be in (0, 1], got 1.5"),
        ({"averaging_constant": float("nan")}, ValueError, "averaging_constant must be in (0, 1], got nan"),
        ({"qmin": 3, "qmax": 3}, ValueError, "must have -32768 <= qmin < qmax <= 65535, got qmin 3 and qmax 3"),
        (
            {"qmin": 0, "qmax": 1, "symmetric": True},
            ValueError,
            "a symmetric range must have at least 3 integers, got [0, 1]",
        ),
    ],
)
def test_errors_leave_the_state_alone(
    function: str, change: dict[str, object], error: type[Exception], message: str
) -> None:
    names = ["min_val", "max_val", "scale", "zero_point", "skipped"]
    arguments = {"x": torch.ones(4, 3), **dict(zip(names, new_state(), strict=True)), "axis": None}
    arguments |= {"averaging_constant": None, "qmin": 0, "qmax": 255, "symmetric": False}
    arguments |= {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in change.items()}
    before = {name: arguments[name].clone() for name in names}
    with pytest.raises(error, match=re.escape(f"[{function}] ") + ".*" + re.escape(message)):
        getattr(ops, function)(**arguments)
    for name in names:
        assert torch.equal(arguments[name].nan_to_num(7.0), before[name].nan_to_num(7.0)), name


@pytest.mark.parametrize("name", ["min_val", "max_val", "scale"])
def test_state_must_not_require_a_gradient(name: str) -> None:
    state = new_state()
    state[["min_val", "max_val", "scale"].index(name)].requires_grad_()
    for function in ("observe", "observe_fake_quantize"):
        message = f"[{function}] {name} is written in place and must not require a gradient"
        with pytest.raises(ValueError, match=re.escape(message)):
            getattr(ops, function)(torch.ones(3), *state, None, None, 0, 255, False)


def test_state_must_be_contiguous() -> None:
    for index, name in enumerate(["min_val", "max_val", "scale", "zero_point"]):
        state = new_state(3)
        state[index] = torch.stack([state[index]] * 2, dim=1)[:, 0]
        with pytest.raises(ValueError, match=re.escape(f"[observe] {name} must be contiguous, got strides [2]")):
            ops.observe(torch.ones(3, 5), *state, 0, None, 0, 255, False)


@pytest.mark.parametrize(
    ("low", "high", "qmin", "qmax", "symmetric", "error", "message"),
    [
        (1.0, 0.5, 0, 255, False, ValueError, "the range must be finite with min <= max, got [1, 0.5] at index 0"),
        (INFINITY, -INFINITY, 0, 255, False, ValueError, "the range must be finite with min <= max, got [inf, -inf]"),
        (
            float("nan"),
            1.0,
            0,
            255,
            False,
            ValueError,
            "the range must be finite with min <= max, got [nan, 1] at index 0",
        ),
        (0.0, 1.0, 255, 0, False, ValueError, "must have -32768 <= qmin < qmax <= 65535, got qmin 255 and qmax 0"),
        (0.0, 1.0, -1, 0, True, ValueError, "a symmetric range must have at least 3 integers, got [-1, 0]"),
    ],
)
def test_choose_qparams_errors(
    low: float, high: float, qmin: int, qmax: int, symmetric: bool, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=re.escape("[choose_qparams] ") + ".*" + re.escape(message)):
        ops.choose_qparams(torch.tensor([low]), torch.tensor([high]), qmin, qmax, symmetric)


def test_choose_qparams_argument_errors() -> None:
    with pytest.raises(ValueError, match=re.escape("min_val and max_val must have one shape, got [2] and [3]")):
        ops.choose_qparams(torch.zeros(2), torch.zeros(3), 0, 255, False)
    with pytest.raises(
        TypeError, match=re.escape("[choose_qparams] max_val must be float32, float64, bfloat16 or float16")
    ):
        ops.choose_qparams(torch.zeros(2), torch.zeros(2, dtype=torch.int32), 0, 255, False)
