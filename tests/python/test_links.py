"""convert(model, example_inputs): bytes between converted layers, and the compilers of torch on such models."""

import copy
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import rarefy as rf
from rarefy.quantization import QConfig, calibrate, convert, prepare, report


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride) if stride > 1 else nn.Identity()
        self.add, self.relu = rf.nn.Add(), nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(self.add(y, self.shortcut(x)))


def resnet() -> nn.Sequential:
    torch.manual_seed(0)
    stem = (nn.Conv2d(3, 8, 7, 2, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1))
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))
    return nn.Sequential(*stem, Block(8, 8, 1), Block(8, 16, 2), Block(16, 16, 1), *head).eval()


IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def prepared(model: nn.Module, x: torch.Tensor, **options: object) -> nn.Module:
    return calibrate(prepare(model, QConfig.int8(**options), x), [x, x + 0.1])


class Sizes(TorchDispatchMode):
    """The results of operators: (elements, dtype)."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int, torch.dtype]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.seen.append((str(func), out.numel(), out.dtype))
        return out


@torch.no_grad()
def test_bytes_flow_through_a_residual_network():
    model = prepared(resnet(), IMAGES)
    plain, linked = convert(model), convert(model, IMAGES)
    assert torch.equal(linked(IMAGES), plain(IMAGES))
    given = {}
    hooks = [
        m.register_forward_hook(lambda m, args, out, name=n: given.update({name: (args[0].dtype, out.dtype)}))
        for n, m in linked.named_modules()
        if isinstance(m, rf.nn.IntegerLayer)
    ]
    with Sizes() as sizes:
        linked(IMAGES)
    for hook in hooks:
        hook.remove()
    floats = {name for name, (_, out) in given.items() if out == torch.float32}
    assert floats == {"6.add", "9"}  # what the pooling reads, and the result
    assert {name for name, (first, _) in given.items() if first == torch.float32} == {"0", "9"}
    # No float tensor of the size of an activation but the image and what the average is taken of.
    smallest = 16 * 8 * 8 * 2
    made = [op for op, n, dtype in sizes.seen if dtype.is_floating_point and n >= smallest]
    assert made == ["rarefy.quantized_add.default", "rarefy.fake_quantize.default", "aten.relu_.default"]
    notes = {layer.name: layer.note for layer in report(linked).layers}
    assert "gives bytes" in notes["0"]
    assert "gives floats: the model returns its result" in notes["9"]


def test_links_are_in_the_state_dict_and_load():
    model = prepared(resnet(), IMAGES)
    linked, other = convert(model, IMAGES), convert(prepared(resnet(), IMAGES * 3), IMAGES)
    assert {"0.quant.next.scale", "4.conv1.quant.next.zero_point"} <= linked.state_dict().keys()
    assert not torch.equal(other(IMAGES), linked(IMAGES))
    other.load_state_dict(linked.state_dict())
    assert torch.equal(other(IMAGES), linked(IMAGES))
    assert torch.equal(copy.deepcopy(linked)(IMAGES), linked(IMAGES))


class Reads(nn.Module):
    """Two linear layers, and something that reads the first one's result beside the second, or in between."""

    def __init__(self, read) -> None:
        super().__init__()
        self.first, self.second, self.third, self.read = nn.Linear(6, 8), nn.Linear(8, 5), nn.Linear(8, 5), read

    def forward(self, x):
        return self.read(self, self.first(x))


BYTES = {
    "chain": lambda m, y: m.second(y),
    "relu": lambda m, y: m.second(F.relu(y)),
    "relu_": lambda m, y: m.second(F.relu_(y)),
    "views": lambda m, y: m.second(y.view(2, -1, 8).transpose(0, 1).contiguous().flatten(0, 1).reshape(-1, 8)),
    "dropout": lambda m, y: m.second(F.dropout(y, 0.5, m.training)),
    "two readers": lambda m, y: m.second(y) + m.third(y),
    "chunks": lambda m, y: torch.cat([m.second(part) for part in y.chunk(2)]),
    "size": lambda m, y: m.second(y).view(y.size(0), -1),
}
FLOATS = {
    "returned": (lambda m, y: (m.second(y), y), "the model returns its result"),
    "returned view": (lambda m, y: (m.second(y), y.view(-1)), "the model returns its result"),
    "softmax": (lambda m, y: m.second(y.softmax(-1)), "softmax reads its result"),
    "beside": (lambda m, y: m.second(y) + y.mean(), "mean reads its result"),
    "dtype": (lambda m, y: m.second(y).to(y.dtype), "the model asks for the dtype of its result"),
    "in place": (lambda m, y: m.second(y.mul_(2)), "mul_ reads its result"),
    "relu of one reader": (lambda m, y: m.second(F.relu(y)) + m.third(y), "relu reads its result"),
    "twice": (lambda m, y: m.second(y) + m.third(m.first(y[:, :6])), "the example inputs call it not once"),
}


@pytest.mark.parametrize("name", BYTES)
def test_what_keeps_bytes(name):
    torch.manual_seed(0)
    x = torch.randn(4, 6)
    model = prepared(Reads(BYTES[name]), x)
    plain, linked = convert(model), convert(model, x)
    assert linked.first.quant.next is not None
    assert torch.equal(linked(x), plain(x))
    assert torch.equal(linked(2 * x), plain(2 * x))


@pytest.mark.parametrize("name", FLOATS)
def test_what_needs_floats(name):
    torch.manual_seed(0)
    x = torch.randn(4, 6)
    read, reason = FLOATS[name]
    model = prepared(Reads(read), x)
    plain, linked = convert(model), convert(model, x)
    assert linked.first.quant.next is None
    note = next(layer.note for layer in report(linked).layers if layer.name == "first")
    assert reason in note
    for a, b in zip(linked(x), plain(x), strict=True):
        assert torch.equal(a, b)


def test_readers_with_different_grids_take_floats():
    torch.manual_seed(0)
    x = torch.randn(4, 6)
    model = prepared(Reads(BYTES["two readers"]), x)
    with torch.no_grad():
        model.third.quant.input.scale.mul_(2)
    linked = convert(model, x)
    assert linked.first.quant.next is None
    assert "its readers have different grids" in repr(report(linked))


class Joins(nn.Module):
    """A concatenation of two linear layers and a float, and its reader; signed activations."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.cat, self.c = nn.Linear(6, 8), nn.Linear(6, 4), rf.nn.Cat(-1), nn.Linear(18, 3)

    def forward(self, x):
        return self.c(self.cat(self.a(x), F.relu(self.b(x)), x))


@pytest.mark.parametrize("symmetric", [False, True])
def test_concatenation_moves_bytes(symmetric):
    torch.manual_seed(0)
    x = torch.randn(4, 6)
    activation = rf.quantization.Scheme(symmetric=symmetric)
    model = prepared(Joins(), x, activation=activation)
    plain, linked = convert(model), convert(model, x)
    assert isinstance(linked.cat, rf.nn.QuantizedCat)
    assert all(layer.quant.next is not None for layer in (linked.a, linked.b, linked.cat))
    assert torch.equal(linked(x), plain(x))
    torch.testing.assert_close(plain(x), model(x), rtol=0, atol=1e-5)


def test_padding_and_channels_last_of_an_image_network():
    torch.manual_seed(0)
    layers = (
        nn.Conv2d(3, 8, 4, padding="same"),
        nn.ReLU(),
        nn.Conv2d(8, 8, 2, padding="same"),
        nn.Conv2d(8, 6, 3, padding=1),
    )
    model = nn.Sequential(*layers, nn.Conv2d(6, 4, 3, padding=1, padding_mode="reflect"))
    x = torch.randn(2, 3, 12, 12)
    model = prepared(model, x, activation=rf.quantization.Scheme())
    plain, linked = convert(model), convert(model, x)
    assert [linked[i].quant.next is not None for i in (0, 2, 3, 4)] == [True, True, False, False]
    assert "4 pads its input with values" in repr(report(linked))
    assert torch.equal(linked(x), plain(x))
    assert linked(x).is_contiguous(memory_format=torch.channels_last)


def test_a_model_that_needs_contiguous_images_keeps_them():
    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(256, 3)

        def forward(self, x):
            return self.c(self.b(self.a(x)).view(len(x), -1))

    x = torch.randn(2, 3, 12, 12)
    model = prepared(Views(), x)
    plain, linked = convert(model), convert(model, x)
    assert linked.a.quant.next is not None
    assert linked.b.quant.next is not None
    assert torch.equal(linked(x), plain(x))


def test_failing_example_inputs_leave_the_model():
    x = torch.randn(4, 6)
    model = prepared(Reads(BYTES["chain"]), x)
    types = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match="input must have 6 features"):
        convert(model, torch.randn(4, 7), inplace=True)
    assert [type(module) for module in model.modules()] == types


def test_a_product_stays_simulated_and_says_why():
    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.mul = nn.Linear(6, 6), nn.Linear(6, 6), rf.nn.Mul()

        def forward(self, x):
            return self.b(self.mul(self.a(x), x))

    x = torch.randn(4, 6)
    linked = convert(prepared(Gate(), x), x)
    notes = {layer.name: layer.note for layer in report(linked).layers}
    assert "there is no integer product of two activations" in notes["mul"]
    assert linked.a.quant.next is None


def test_sixteen_bits_stay_simulated():
    x = torch.randn(4, 6)
    model = prepared(Reads(BYTES["chain"]), x, activation=rf.quantization.Scheme(bits=16))
    linked = convert(model, x)
    assert type(linked.first) is rf.nn.Linear
    assert torch.equal(linked(x), model(x))


# --- Compilers ------------------------------------------------------------------------------------------------------
@torch.no_grad()
def test_exported_program_runs():
    model = convert(prepared(resnet(), IMAGES), IMAGES)
    batch = torch.export.Dim("batch", min=1, max=32)
    program = torch.export.export(model, (IMAGES,), dynamic_shapes=({0: batch},))
    more = torch.cat([IMAGES, -IMAGES, IMAGES[:1]])
    assert torch.equal(program.module()(more), model(more))
    operators = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert {"rarefy.quantized_conv.default", "rarefy.quantized_add.default"} <= operators


@torch.no_grad()
def test_compiles_as_one_graph():
    x = torch.randn(4, 6)
    model = convert(prepared(Joins(), x), x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), model(x))


@pytest.mark.slow
@torch.no_grad()
def test_inductor_and_ahead_of_time(tmp_path):
    model = convert(prepared(resnet(), IMAGES), IMAGES)
    y = model(IMAGES)
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(IMAGES), y, rtol=0, atol=1e-6)
    program = torch.export.export(model, (IMAGES,))
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    torch.testing.assert_close(torch._inductor.aoti_load_package(path)(IMAGES), y, rtol=0, atol=1e-6)


@torch.jit.script
def doubled(x: torch.Tensor):
    return x * 2.0


@dataclass
class Pair:
    logits: torch.Tensor
    hidden: torch.Tensor


class Watched(nn.Module):
    """Two layers, and something that reads the result between them in a way that is easily overlooked."""

    def __init__(self, reads) -> None:
        super().__init__()
        self.a, self.b, self.reads = nn.Linear(16, 16), nn.Linear(16, 16), reads

    def forward(self, x):
        return self.reads(self, self.a(x))


def kept(model, h):
    model.state = h
    return model.b(h)


READERS = {
    "transposed": lambda model, h: (model.b(h), h.mT),
    "its data": lambda model, h: model.b(h) + h.data * 2,
    "a dataclass": lambda model, h: Pair(model.b(h), h),
    "an attribute": kept,
    "a scripted function": lambda model, h: model.b(h) + doubled(h),
    "vmap": lambda model, h: model.b(h) + torch.vmap(lambda row: row * 2)(h),
    "dropout at work": lambda model, h: model.b(F.dropout(h, 0.5, training=True)),
}


@pytest.mark.parametrize("reads", READERS.values(), ids=READERS)
def test_hidden_readers_get_floats(reads):
    torch.manual_seed(0)
    x = torch.randn(16, 16)
    prepared = rf.quantization.prepare(Watched(reads), rf.quantization.QConfig.int8(), x)
    rf.quantization.calibrate(prepared, [x])
    plain, linked = rf.quantization.convert(prepared), rf.quantization.convert(prepared, x)
    results = []
    for model in (plain, linked):
        torch.manual_seed(1)
        out = model(x)
        results.append([*tree_leaves(vars(out) if isinstance(out, Pair) else out), getattr(model, "state", x)])
    for got, expected in zip(*results, strict=True):
        assert got.dtype == expected.dtype == torch.float32
        assert torch.equal(got, expected)


@pytest.mark.parametrize("reads", ["transposed", "a dataclass", "an attribute"])
def test_prepare_fuses_no_relu_that_is_not_the_only_reader(reads):
    torch.manual_seed(0)
    x = torch.randn(16, 16)

    def forward(model, h):
        other = READERS[reads](model, h)
        return model.b(F.relu(h)), other

    prepared = rf.quantization.prepare(Watched(forward), rf.quantization.QConfig.int8(), x)
    assert not prepared.a.relu


@torch.inference_mode()
def test_links_in_inference_mode():
    x = torch.randn(16, 16)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    prepared = rf.quantization.prepare(model, rf.quantization.QConfig.int8(), x)
    rf.quantization.calibrate(prepared, [x])
    assert torch.equal(rf.quantization.convert(prepared, x)(x), rf.quantization.convert(prepared)(x))
