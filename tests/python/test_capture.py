"""Outputs of layers by path, wherever the model runs; and what a model returned."""

import copy
import dataclasses
import gc
import weakref
from collections import namedtuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from rarefy.distillation import LayerCapture, Outputs, to_logits
from rarefy.quantization import QConfig, prepare_qat


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.act = nn.Tanh()

    def forward(self, x, scale=1.0):
        return self.act(self.linear(x)) * scale, x.sum()


class Net(nn.Module):
    """Blocks that return tuples, one layer that runs twice, and one that has two names."""

    def __init__(self, mode: str = "plain") -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.twice = nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)
        self.alias = self.head
        self.unused = nn.Linear(1, 1)
        self.mode = mode

    def forward(self, x):
        for block in self.blocks:
            if self.mode == "plain":
                x, _ = block(x, scale=0.5)
            else:
                x, _ = checkpoint(block, x, 0.5, use_reentrant=self.mode == "reentrant")
        return self.head(self.twice(self.twice(x)))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(1))


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_what_a_layer_returned(net, x):
    with LayerCapture(net, ["blocks.0", "blocks.0.linear", "head", ""]) as capture:
        y = net(x)
        features = capture.features
    assert list(features) == ["blocks.0.linear", "blocks.0", "head", ""]
    assert torch.equal(features["blocks.0.linear"], net.blocks[0].linear(x))
    assert isinstance(features["blocks.0"], tuple)
    assert torch.equal(features["blocks.0"][0], net.blocks[0](x, scale=0.5)[0])
    assert features[""] is features["head"] is y
    assert hooks(net) == 0


def test_patterns_and_inputs(net, x):
    with LayerCapture(net, ["blocks.[0-9]", "*.linear:input", "blocks.1:input", "alias"]) as capture:
        net(x)
        features = capture.features
    assert {p for p in features if not p.endswith(":input")} == {"blocks.0", "blocks.1", "blocks.2", "alias"}
    assert features["blocks.0.linear:input"] is x
    assert features["blocks.1.linear:input"] is features["blocks.1:input"] is features["blocks.0"][0]


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda m, a, b: m(a, b), lambda a, b: (a, b)),
        (lambda m, a, b: m(a, other=b), lambda a, b: a),
        (lambda m, a, b: m(x=a, other=b), lambda a, b: {"x": a, "other": b}),
    ],
)
def test_forms_of_an_input(x, call, expected):
    class Add(nn.Module):
        def forward(self, x, other):
            return x + other

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add = Add()

        def forward(self, a, b):
            return call(self.add, a, b)

    model, other = Outer(), torch.ones(3, 4)
    with LayerCapture(model, "add:input") as capture:
        model(x, other)
        assert repr(capture.features["add:input"]) == repr(expected(x, other))


def test_a_layer_that_runs_several_times_gives_a_list(net, x):
    with LayerCapture(net, ["twice", "twice:input"]) as capture:
        for _ in range(2):  # every forward starts anew
            net(x)
            outputs, inputs = capture.features["twice"], capture.features["twice:input"]
            assert isinstance(outputs, list)
            assert len(outputs) == len(inputs) == 2
            assert inputs[1] is outputs[0]
            assert torch.equal(net.head(outputs[1]), net(x))


def test_features_are_those_of_one_forward(net, x):
    with LayerCapture(net, "head") as capture:
        with pytest.raises(ValueError, match="got none since entering"):
            _ = capture.features
        net(x)
        first = capture.features
        net(2 * x)
        assert capture.features is not first
        assert torch.equal(first["head"], net(x))
        net.head(torch.zeros(1, 4))  # outside of a forward of the model
        assert capture.features["head"].shape == (3, 2)
    with pytest.raises(ValueError, match="got none since entering"):
        _ = capture.features
    with capture:  # may be entered again
        net(x)
        assert torch.equal(capture.features["head"], first["head"])


def test_gradients_flow_through_features(net, x):
    with LayerCapture(net, ["blocks.1", "head"]) as capture:
        net(x)
        capture.features["blocks.1"][0].square().sum().backward()
    assert net.blocks[0].linear.weight.grad.abs().sum() > 0
    assert net.blocks[2].linear.weight.grad is None


def test_unknown_paths_name_near_ones(net):
    with pytest.raises(
        ValueError, match=r"\[LayerCapture\] a path must name a layer of Net, got 'blocks.7'; near: 'blocks.2'"
    ):
        LayerCapture(net, ["head", "blocks.7"])
    with pytest.raises(ValueError, match=r"got 'layers.\*'; near: "):
        LayerCapture(net, "layers.*")
    with pytest.raises(ValueError, match="got 'x'; near: none, the model has no layers"):
        LayerCapture(nn.Linear(1, 1), "x")
    with pytest.raises(ValueError, match="paths must name a layer, got none"):
        LayerCapture(net, [])
    with pytest.raises(TypeError, match="paths must be strings, got int"):
        LayerCapture(net, [3])


def test_layers_that_did_not_run_are_named(net, x):
    with LayerCapture(net, ["head", "unused"]) as capture:
        net(x)
        with pytest.raises(ValueError, match=r"every layer must run in the model's forward, got none of \['unused'\]"):
            _ = capture.features


def test_entering_twice(net):
    capture = LayerCapture(net, "head")
    assert repr(capture) == "LayerCapture(Net, ['head'], not entered)"
    with capture, pytest.raises(ValueError, match="entered once at a time"):
        capture.__enter__()
    assert hooks(net) == 0


def test_writes_in_place_are_found(x):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Flatten())
    with LayerCapture(model, "0") as capture:
        model(x)
        with pytest.raises(ValueError, match="got '0', which a later operator wrote into in place"):
            _ = capture.features
    with LayerCapture(model, ["0", "1"], clone=True) as capture:
        y = model(x)
        assert torch.equal(capture.features["0"], model[0](x))
        assert torch.equal(capture.features["1"], y)
        capture.features["0"].sum().backward()
        assert model[0].weight.grad is not None
    with torch.inference_mode(), LayerCapture(model, "1") as capture:
        assert torch.equal(model(x), capture.features["1"])


def test_hooks_go_and_graphs_too(net, x):
    class Stop(Exception):
        pass

    def run():
        with LayerCapture(net, ["blocks.[0-9]", "head:input"]) as capture:
            net(x)
            hidden = capture.features["blocks.2"][0]
            raise Stop(weakref.ref(hidden), weakref.ref(capture), weakref.ref(capture._store))

    gc.collect()
    gc.disable()  # reference counts alone must do
    try:
        try:
            run()
        except Stop as stop:
            held = stop.args
        assert hooks(net) == 0
        assert [reference() for reference in held] == [None, None, None]
    finally:
        gc.enable()


def test_a_forward_that_raises(net, x):
    with LayerCapture(net, "head") as capture:
        with pytest.raises(RuntimeError):
            net(torch.zeros(1, 5))
        net.head(torch.zeros(1, 4))
        with pytest.raises(ValueError, match=r"got none of \['head'\]"):
            _ = capture.features
        net(x)
        assert capture.features["head"].shape == (3, 2)


def test_a_copy_of_the_model_has_no_part(net, x):
    with LayerCapture(net, "head") as capture:
        twin = copy.deepcopy(net)
        y = net(x)
        twin(2 * x)
        assert capture.features["head"] is y
    assert hooks(net) == 0


def test_gradient_checkpointing(x):
    torch.manual_seed(0)
    plain, saving = Net(), Net("not reentrant")
    saving.load_state_dict(plain.state_dict())
    for model in (plain, saving):
        with LayerCapture(model, ["blocks.1.linear", "blocks.2"]) as capture:
            loss = model(x).sum()
            features = capture.features
            assert torch.is_tensor(features["blocks.1.linear"])
            (loss + features["blocks.1.linear"].square().sum() + features["blocks.2"][0].sum()).backward()
            assert torch.is_tensor(capture.features["blocks.1.linear"])  # run again in the backward pass
    for (name, p), q in zip(plain.named_parameters(), saving.parameters(), strict=True):
        if p.grad is not None:
            assert torch.equal(p.grad, q.grad), name


def test_reentrant_checkpointing_is_refused(x):
    model = Net("reentrant")
    with LayerCapture(model, "blocks.1.linear") as capture:
        with pytest.raises(ValueError, match=r"got 'blocks.1.linear' without: reentrant checkpointing"):
            model(x.requires_grad_())
        with torch.no_grad():
            model(x)
        assert capture.features["blocks.1.linear"].shape == (3, 4)


def test_a_model_prepared_for_qat(net, x):
    model = prepare_qat(net, QConfig.int8(), x)
    with LayerCapture(model, ["blocks.0", "twice"]) as capture:
        y = model(x)
        assert torch.equal(model.head(capture.features["twice"][1]), y)
        capture.features["blocks.0"][0].sum().backward()
    assert model.blocks[0].linear.weight.grad.abs().sum() > 0


def test_distributed_data_parallel(net, x, tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(net, find_unused_parameters=True)
        with LayerCapture(model, ["blocks.0.linear", ""]) as capture:
            y = model(x)
            assert capture.features[""] is y
            assert torch.equal(capture.features["blocks.0.linear"], net.blocks[0].linear(x))
        assert repr(capture).startswith("LayerCapture(Net, ")
        assert hooks(model) == 0
    finally:
        torch.distributed.destroy_process_group()


@pytest.fixture
def fresh_dynamo():
    before = torch._dynamo.config.skip_nnmodule_hook_guards
    torch._dynamo.reset()
    yield
    torch._dynamo.config.skip_nnmodule_hook_guards = before
    torch._dynamo.reset()


@pytest.mark.parametrize("form", ["torch.compile", "model.compile", "part", "in DistributedDataParallel"])
@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_models(net, x, form, tmp_path):
    model = net
    if form == "model.compile":
        net.compile(backend="eager")
    elif form == "part":
        net.blocks[0] = torch.compile(net.blocks[0], backend="eager")
    else:
        model = torch.compile(net, backend="eager")
    if form == "in DistributedDataParallel":
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
        model = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    try:
        expected = model(x)  # compiled before any hook
        linear = F.linear(x, net.get_parameter(_weight(net)))
        for scale in (1.0, 2.0):
            with LayerCapture(model, ["blocks.0.linear", "twice"]) as capture:
                model(x)
                y = model(scale * x)
                captured = capture.features["blocks.0.linear"]
                bias = net.get_parameter(_weight(net).replace("weight", "bias"))
                torch.testing.assert_close(captured, scale * linear + bias)
                assert len(capture.features["twice"]) == 2
                (captured.sum() + y.sum()).backward()
            if scale == 1.0:
                torch.testing.assert_close(y, expected)
            torch.testing.assert_close(model(x), expected)  # without hooks
    finally:
        if form == "in DistributedDataParallel":
            torch.distributed.destroy_process_group()


def _weight(net: nn.Module) -> str:
    return next(name for name, _ in net.named_parameters() if name.endswith("linear.weight"))


# ---- outputs --------------------------------------------------------------------------------------------------------


def test_to_logits_of_every_form():
    logits, loss = torch.zeros(2, 3), torch.tensor(1.0)
    Named = namedtuple("Named", ["hidden", "logits"])
    for raw in (
        logits,
        {"loss": loss, "logits": logits},
        (logits, loss),
        (loss, logits),
        [logits],
        (logits, logits + 1),
        Named(torch.ones(1), logits),
    ):
        assert to_logits(raw) is logits
    assert to_logits({"out": logits}, lambda raw: raw["out"]) is logits


def test_to_logits_of_transformers():
    transformers = pytest.importorskip("transformers")
    logits = torch.zeros(2, 3)
    output = transformers.modeling_outputs.SequenceClassifierOutput(loss=torch.tensor(1.0), logits=logits)
    assert to_logits(output) is logits
    assert to_logits(output.to_tuple()) is logits


@pytest.mark.parametrize(
    ("raw", "got"),
    [
        ({"out": torch.zeros(1), "last": 2}, r"dict with the keys \['last', 'out'\]"),
        ({"logits": None}, "dict with the keys"),
        ((None, torch.zeros(1)), r"tuple of \(NoneType, Tensor\)"),
        ((), r"tuple of \(\)"),
        (None, "got None"),
        (3, "got int"),
    ],
)
def test_to_logits_says_what_it_got(raw, got):
    with pytest.raises(TypeError, match=r"\[to_logits\] a model must return logits as a tensor.*" + got):
        to_logits(raw)


def test_extract_must_return_a_tensor():
    with pytest.raises(TypeError, match=r"\[to_logits\] extract must return a tensor, got int"):
        to_logits(torch.zeros(1), lambda raw: 3)


def test_outputs_are_frozen_and_print_shapes():
    outputs = Outputs(torch.zeros(2, 3), {"a": torch.zeros(4)}, (torch.zeros(1),))
    assert repr(outputs) == "Outputs(logits=Tensor[2, 3], features={'a': Tensor[4]}, raw=tuple of (Tensor))"
    assert repr(Outputs()) == "Outputs(logits=None, features={}, raw=None)"
    with pytest.raises(dataclasses.FrozenInstanceError):
        outputs.logits = None
