"""The distillation loss of two linear heads against the loss on their logits, which these tests do make."""

import pytest
import torch
import torch.autograd.forward_ad as fwAD
import torch.nn.functional as F

import rarefy as rf

loss_op = torch.ops.rarefy.linear_distillation_loss
dense_op = torch.ops.rarefy.distillation_loss

# Of a gradient's largest element. A 16-bit hidden state has logits and their gradients rounded to 16 bits.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 3e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}
OPTIONS = [
    {},
    {"alpha": 1.0},
    {"alpha": 0.0},
    {"reduction": "sum"},
    {"label_smoothing": 0.2},
    {"divergence": "reverse_kl"},
    {"divergence": "jensen_shannon", "skew": 0.3},
    {"divergence": "total_variation"},
    {"divergence": "skewed_kl", "skew": 0.1},
    {"divergence": "skewed_reverse_kl", "skew": 0.1},
]


def make(rows=(37,), classes=50, size=24, teacher_size=16, dtype=torch.float64, bias=True, seed=0):
    """Return the arguments of the operator without its settings, with labels to ignore and rows of weight 0."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        return (torch.randn(*shape, generator=g) * scale).to(dtype)

    student = [normal(*rows, size).requires_grad_(), normal(classes, size, scale=0.3).requires_grad_()]
    student.append(normal(classes).requires_grad_() if bias else None)
    teacher = [normal(*rows, teacher_size), normal(classes, teacher_size, scale=0.3), normal(classes) if bias else None]
    labels = torch.randint(0, classes, rows, generator=g)
    weights = torch.rand(*rows, generator=g) + 0.1
    labels.view(-1)[1] = -100
    weights.view(-1)[2] = 0.0
    return [*student, *teacher, labels, weights]


def dense(arguments, **settings):
    """Return the loss on logits in float64, and the gradients in its three leaves."""
    doubles = [x.detach().double() if x is not None and x.is_floating_point() else x for x in arguments]
    leaves = [x.requires_grad_() for x in doubles[:3] if x is not None]
    bias = leaves[2] if len(leaves) == 3 else None
    loss = dense_op(F.linear(leaves[0], leaves[1], bias), F.linear(*doubles[3:6]), doubles[6], doubles[7], **settings)
    return loss, torch.autograd.grad(loss * 1.5, leaves)


def assert_matches(arguments, **given):
    settings = {"temperature": 2.0, "alpha": 0.6} | given
    leaves = [x for x in arguments[:3] if x is not None]
    loss = loss_op(*arguments, **settings)
    grads = torch.autograd.grad(loss * 1.5, leaves)
    expected, expected_grads = dense(arguments, **settings)
    dtype = arguments[0].dtype
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert loss.item() == pytest.approx(expected.item(), rel=TOLERANCE[dtype])
    for leaf, grad, wanted in zip(leaves, grads, expected_grads, strict=True):
        assert grad.dtype == dtype
        assert grad.shape == leaf.shape
        tolerance = TOLERANCE[dtype] * wanted.abs().max().item()
        torch.testing.assert_close(grad.double(), wanted, rtol=0, atol=tolerance)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_matches_the_loss_on_logits(options):
    assert_matches(make(), **options)
    assert_matches(make(rows=(3, 5), bias=False), **options)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_dtypes(dtype):
    assert_matches(make(dtype=dtype))
    assert_matches(make(rows=(2, 9), classes=217, dtype=dtype, bias=False), reduction="sum")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_boundaries_of_chunks(dtype):
    # Chunks are of 64 MiB in two blocks of logits: 64 and 128 rows of 131072 classes.
    classes = 131072
    for rows in (63, 64, 65, 129):
        assert_matches(make(rows=(rows,), classes=classes, size=4, teacher_size=3, dtype=dtype, bias=False))


def test_non_contiguous_arguments():
    arguments = make()
    arguments[0] = arguments[0].detach().t().contiguous().t().requires_grad_()
    arguments[1] = arguments[1].detach().t().contiguous().t().requires_grad_()
    arguments[3] = arguments[3].repeat(1, 2)[:, ::2]
    assert_matches(arguments)


def test_gradcheck_in_float64():
    *arguments, labels, weights = make(rows=(5,), classes=7, size=4, teacher_size=3)
    for options in OPTIONS:
        if options.get("divergence") == "total_variation":  # not smooth
            continue
        settings = {"temperature": 2.0, "alpha": 0.6} | options

        def loss(hidden, weight, bias, settings=settings):
            return loss_op(hidden, weight, bias, *arguments[3:], labels, weights, **settings)

        assert torch.autograd.gradcheck(loss, arguments[:3])


def test_only_gradients_that_are_needed():
    arguments = make()
    expected = dense(arguments, temperature=2.0, alpha=0.6)[1]
    for i in range(3):
        leaves = [x.detach().requires_grad_(j == i) for j, x in enumerate(arguments[:3])]
        (loss_op(*leaves, *arguments[3:], temperature=2.0, alpha=0.6) * 1.5).backward()
        torch.testing.assert_close(leaves[i].grad, expected[i])
        assert all(x.grad is None for j, x in enumerate(leaves) if j != i)
    forward = torch.ops.rarefy.linear_distillation_loss_forward
    _, hidden, weight, bias, _ = forward(
        *arguments, temperature=2.0, alpha=0.6, hidden_gradient=False, weight_gradient=True, bias_gradient=False
    )
    assert (hidden.numel(), weight.shape, bias.numel()) == (0, arguments[1].shape, 0)


def test_equal_heads_have_no_loss_and_no_gradient():
    hidden, weight, bias, *_ = make(dtype=torch.float32)
    loss = loss_op(hidden, weight, bias, hidden.detach(), weight.detach(), bias.detach(), temperature=4.0, alpha=1.0)
    loss.backward()
    assert loss.item() < 1e-9
    assert hidden.grad.abs().max().item() == 0.0


def test_backward_twice_and_no_second_derivative():
    arguments = make()
    loss = loss_op(*arguments, temperature=2.0, alpha=0.6)
    first = torch.autograd.grad(loss, arguments[0], retain_graph=True)[0].clone()
    assert torch.equal(torch.autograd.grad(loss, arguments[0], retain_graph=True)[0], first)
    grad = torch.autograd.grad(loss, arguments[0], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="is differentiable once"):
        grad.sum().backward()


def test_float16_gradients_survive_the_mean_over_many_rows():
    arguments = make(rows=(65536,), classes=4, size=3, teacher_size=3, dtype=torch.float16)
    loss = loss_op(*arguments, temperature=4.0, alpha=0.5)
    grads = torch.autograd.grad(loss * 65536.0, arguments[:3])
    _, expected = dense(arguments, temperature=4.0, alpha=0.5)
    for grad, wanted in zip(grads, expected, strict=True):
        wanted = wanted * (65536.0 / 1.5)
        torch.testing.assert_close(grad.double(), wanted, rtol=0, atol=3e-3 * wanted.abs().max().item())


def to_device(arguments, device):
    """The arguments on a device, with the student's three as leaves there."""
    moved = [None if x is None else x.detach().to(device) for x in arguments]
    return [x.requires_grad_() for x in moved[:3]] + moved[3:]


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_float16_mean_of_many_rows_with_a_large_feature(size, device):
    # The sum over rows that the mean divides is above 65504 in one column of the weight's gradient.
    arguments = make(rows=(4096,), classes=50, size=64, dtype=torch.float16)
    arguments[0].data[:, 7] = 300.0
    arguments[1].data[:, 7] *= 0.01
    arguments[7] = arguments[7].double() * size
    settings = {"temperature": 4.0, "alpha": 0.5}
    moved = to_device(arguments, device)
    loss = loss_op(*moved, **settings)
    grads = torch.autograd.grad(loss * 1.5, moved[:3])
    expected, expected_grads = dense(arguments, **settings)
    assert loss.item() == pytest.approx(expected.item(), rel=3e-3)
    for grad, wanted in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad.cpu().double(), wanted, rtol=0, atol=3e-3 * wanted.abs().max().item())
    wanted = expected_grads[1][:, :7]  # what is beside the large feature keeps its precision
    torch.testing.assert_close(grads[1].cpu()[:, :7].double(), wanted, rtol=0, atol=1e-2 * wanted.abs().max().item())


@pytest.mark.cuda
def test_weights_that_are_not_valid_show_on_cuda(cuda):
    for dtype in (torch.float32, torch.float16):
        for weight in (-1.0, float("inf")):
            arguments = to_device(make(dtype=dtype), cuda)
            arguments[7].fill_(weight)
            assert loss_op(*arguments, temperature=4.0, alpha=0.5).isnan()


def test_the_teacher_may_be_of_another_dtype():
    arguments = make(dtype=torch.float32)
    expected = loss_op(*arguments, temperature=2.0, alpha=0.6)
    arguments[3:6] = [x.double() for x in arguments[3:6]]
    torch.testing.assert_close(loss_op(*arguments, temperature=2.0, alpha=0.6), expected)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_logits_that_float16_does_not_hold(reduction):
    settings = {"temperature": 2.0, "alpha": 0.6, "reduction": reduction}
    arguments = make(dtype=torch.float16)
    arguments[3:6] = [x.float() for x in arguments[3:6]]
    arguments[5] += 1e5
    loss = loss_op(*arguments, **settings)
    expected, expected_grads = dense(arguments, **settings)
    assert loss.item() == pytest.approx(expected.item(), rel=3e-3)
    for grad, wanted in zip(torch.autograd.grad(loss * 1.5, arguments[:3]), expected_grads, strict=True):
        assert grad.dtype == torch.float16
        torch.testing.assert_close(grad.double(), wanted, rtol=0, atol=5e-3 * wanted.abs().max().item())


def test_derivatives_that_do_not_exist_are_errors():
    settings = {"temperature": 2.0, "alpha": 0.6}
    arguments = [None if x is None else x.detach() for x in make()]
    for leaf in (False, True):
        weighted = [*arguments[:7], arguments[7].clone().requires_grad_()]
        weighted[0] = arguments[0].clone().requires_grad_(leaf)
        with pytest.raises(ValueError, match="row_weights must not require a gradient"):
            loss_op(*weighted, **settings)
        with torch.no_grad():
            loss_op(*weighted, **settings)
    for index in range(6):
        with fwAD.dual_level():
            dual = list(arguments)
            dual[index] = fwAD.make_dual(dual[index], torch.ones_like(dual[index]))
            with pytest.raises(NotImplementedError, match="has no derivative in forward mode"):
                loss_op(*dual, **settings)


def test_logits_never_exist_whole():
    # 2048 x 32000 logits are 250 MiB; two chunks are at most 64 MiB.
    arguments = make(rows=(2048,), classes=32000, size=8, teacher_size=8, dtype=torch.float32, bias=False)
    with torch.profiler.profile(profile_memory=True, record_shapes=True) as profile:
        loss_op(*arguments, temperature=2.0, alpha=0.6)
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert 0 < largest <= 64 << 20


def test_opcheck_compile_and_meta():
    arguments = make(rows=(2, 5), dtype=torch.float32)
    settings = {"temperature": 2.0, "alpha": 0.6}
    torch.library.opcheck(loss_op.default, tuple(arguments), settings)
    with torch.no_grad():
        torch.library.opcheck(
            torch.ops.rarefy.linear_distillation_loss_forward.default,
            tuple(x if x is None else x.detach() for x in arguments),
            settings,
        )
    grad, one = torch.randn(4, 3), torch.tensor(1.0)
    torch.library.opcheck(
        torch.ops.rarefy.linear_distillation_loss_backward.default, (grad, one, one * 2, torch.bfloat16)
    )
    compiled = torch.compile(loss_op, fullgraph=True, backend="aot_eager")
    loss = compiled(*arguments, **settings)
    expected = loss_op(*arguments, **settings)
    torch.testing.assert_close(loss, expected)
    for a, b in zip(
        torch.autograd.grad(loss, arguments[:3]), torch.autograd.grad(expected, arguments[:3]), strict=True
    ):
        torch.testing.assert_close(a, b)
    assert loss_op(*(x.detach().to("meta") for x in arguments), **settings).shape == ()


def test_autocast_is_that_of_a_linear_layer():
    arguments = make(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_op(*arguments, temperature=2.0, alpha=0.6)
    grads = torch.autograd.grad(loss, arguments[:3])
    low = [x.detach().to(torch.bfloat16).requires_grad_() for x in arguments[:3]]
    teacher = [x.to(torch.bfloat16) for x in arguments[3:6]]
    expected = loss_op(*low, *teacher, *arguments[6:], temperature=2.0, alpha=0.6)
    assert loss.item() == expected.item()
    for grad, wanted in zip(grads, torch.autograd.grad(expected, low), strict=True):
        assert grad.dtype == torch.float32
        torch.testing.assert_close(grad, wanted.float())


def test_bad_input():
    good = make()

    def refuse(error, message, index=None, value=None, **settings):
        arguments = list(good)
        if index is not None:
            arguments[index] = value
        with pytest.raises(error, match=message):
            loss_op(*arguments, **({"temperature": 2.0, "alpha": 0.6} | settings))

    refuse(ValueError, r"reduction must be 'mean' or 'sum', got 'none'", reduction="none")
    refuse(ValueError, r"temperature must be positive and finite, got 0", temperature=0.0)
    refuse(ValueError, r"student_weight must have shape \[50, 24\]", 1, torch.zeros(50, 23, dtype=torch.float64))
    refuse(ValueError, r"teacher_weight must have shape \[50, 16\]", 4, torch.zeros(49, 16, dtype=torch.float64))
    refuse(ValueError, r"teacher_hidden must have the student's rows \[37\]", 3, torch.zeros(36, 16).double())
    refuse(ValueError, r"student_bias must have shape \[50\]", 2, torch.zeros(49, dtype=torch.float64))
    refuse(TypeError, r"student_weight must have the dtype of student_hidden", 1, torch.zeros(50, 24))
    refuse(TypeError, r"labels must be int64", 6, good[6].int())
    refuse(ValueError, r"labels must be given when alpha is below 1", 6, None)
    refuse(IndexError, r"labels must be in \[0, 50\) or ignore_index \(-100\), got 50 at row 36", 6,
           torch.full((37,), 1).index_fill(0, torch.tensor(36), 50))  # fmt: skip
    refuse(ValueError, r"row_weights must be finite and >= 0, got -1 at row 0", 7, -torch.ones(37))
    refuse(ValueError, r"at least one row must be valid .* got 37 rows, all ignored", 7, torch.zeros(37))


def test_module():
    module = rf.distillation.LinearDistillationLoss(temperature=3.0, alpha=0.4, divergence="reverse_kl")
    hidden, weight, bias, t_hidden, t_weight, t_bias, labels, weights = make(rows=(4, 6))
    mask = torch.rand(4, 6) > 0.4
    loss = module(
        hidden, weight, t_hidden, t_weight, labels, student_bias=bias, teacher_bias=t_bias, row_weights=weights, mask=mask
    )  # fmt: skip
    logits = rf.distillation.DistillationLoss(temperature=3.0, alpha=0.4, divergence="reverse_kl")
    expected = logits(
        F.linear(hidden, weight, bias), F.linear(t_hidden, t_weight, t_bias), labels, row_weights=weights * mask
    )
    torch.testing.assert_close(loss, expected)
    assert "divergence='reverse_kl'" in repr(module)
    with pytest.raises(ValueError, match="reduction must be 'mean' or 'sum'"):
        rf.distillation.LinearDistillationLoss(reduction="none")
    with pytest.raises(TypeError, match="mask must be bool"):
        module(hidden, weight, t_hidden, t_weight, labels, mask=mask.float())


def test_masks_and_weights_have_the_shape_of_rows():
    module = rf.distillation.LinearDistillationLoss()
    hidden, weight, _, t_hidden, t_weight, _, labels, weights = make(rows=(2, 3))
    mask = torch.tensor([True, False, True])
    message = r"must have the shape of student_hidden without its last dimension, \[2, 3\], got \[3\]"
    for options, name in [
        ({"mask": mask}, "mask"),
        ({"mask": mask, "row_weights": weights}, "mask"),
        ({"mask": mask.expand(2, 3), "row_weights": weights[0]}, "row_weights"),
    ]:
        with pytest.raises(ValueError, match=rf"\[LinearDistillationLoss\] {name} {message}"):
            module(hidden, weight, t_hidden, t_weight, labels, **options)
    assert module(hidden, weight, t_hidden, t_weight, labels, mask=mask.expand(2, 3)).isfinite()
