"""Recordings of forward passes, and what is read off them."""

from __future__ import annotations

import copy
import re
import threading
from xml.etree import ElementTree

import pytest
import torch
import torch.nn.functional as F
from structures import STRUCTURES
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import rarefy as rf
from rarefy._core.pruning import count, find_structure
from rarefy.graph import Graph, constant_nodes, conv_bn_pairs, count_costs, fold_constants, record
from rarefy.graph.record import evaluation


def from_function(function, *inputs: Tensor, **tensors: Tensor | nn.Parameter) -> Graph:
    """A recording of a model whose forward is this function of the model and its inputs."""

    class Model(nn.Module):
        def forward(self, *args):
            return function(self, *args)

    model = Model()
    for name, value in tensors.items():
        if isinstance(value, nn.Module):
            model.add_module(name, value)
        elif isinstance(value, nn.Parameter):
            model.register_parameter(name, value)
        else:
            model.register_buffer(name, value)
    return record(model, inputs)


def ops(graph: Graph) -> list[str]:
    return [graph.nodes[i].op.removeprefix("aten::") for i in graph.schedule]


def node(graph: Graph, op: str):
    return next(graph.nodes[i] for i in graph.schedule if graph.nodes[i].op.endswith(f"::{op}"))


class Residual(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=1, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn(self.conv(x)) + x)


def network(blocks: int = 3) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2),
        nn.BatchNorm2d(4),
        *(Residual() for _ in range(blocks)),
        nn.Flatten(),
        nn.Linear(36, 5),
    )


IMAGE = torch.randn(2, 3, 7, 7)


# Recording


def test_in_place_operators_keep_the_value():
    def forward(model, x):
        y = x * 2
        y.add_(1)
        y.relu_()
        y.unsqueeze_(0)
        return y

    graph = from_function(forward, torch.randn(2, 3))
    made = node(graph, "mul").outputs[0]
    assert node(graph, "add_").outputs == [made] == node(graph, "relu_").outputs
    reshaped = node(graph, "unsqueeze_").outputs[0]
    assert reshaped != made
    assert graph.values[reshaped].shape == (1, 2, 3)
    assert graph.outputs == [reshaped]
    assert graph.values[made].producer == next(i for i in graph.schedule if graph.nodes[i].op == "aten::mul")


def test_views_share_the_memory_of_what_they_view():
    graph = from_function(lambda model, x: ((y := x + 1)[:, 1:].t().reshape(-1), y.t() * 2), torch.randn(2, 3))
    memory = {graph.nodes[i].op: graph.values[graph.nodes[i].outputs[0]].memory for i in graph.schedule}
    base = node(graph, "add").outputs[0]
    assert memory["aten::slice"] == memory["aten::t"] == base
    assert memory["aten::mul"] != base


def test_tensors_that_are_the_same_without_an_operator():
    graph = from_function(lambda model, x: (x + 1).data * model.w.data, torch.randn(3), w=nn.Parameter(torch.randn(3)))
    product = node(graph, "mul")
    assert product.input_values[:2] == [node(graph, "add").outputs, [graph.find("w")]]
    assert all(value.shape != (3,) for value in graph.values if value.origin == "constant")


def test_lists_of_tensors_and_optional_tensors():
    graph = from_function(
        lambda model, x: torch.cat([x, x.flip(0)])[:, model.index], torch.randn(2, 5), index=torch.tensor([3, 1])
    )
    assert node(graph, "cat").input_values[0] == [graph.inputs[0], *node(graph, "flip").outputs]
    assert node(graph, "index").input_values[1] == [-1, graph.find("index")]
    graph = from_function(
        lambda model, x: x.split(2, 1)[1] + F.linear(x, torch.ones(2, 5), None), torch.randn(2, 4 + 1)[:, :5]
    )
    assert len(node(graph, "split").outputs) == 3
    assert node(graph, "linear").input_values[2] == []


def test_composite_operators():
    graph = from_function(
        lambda model, x, y: torch.einsum("bik,bkj->bij", x, y), torch.randn(2, 3, 4), torch.randn(2, 4, 5)
    )
    assert "einsum" not in ops(graph)
    assert "bmm" in ops(graph)
    assert any(item.op == "aten::einsum" for item in graph.nodes)
    assert "linear" in ops(from_function(lambda model, x: F.linear(x, x), torch.randn(2, 2)))
    # Known to nobody, made of known ones.
    inner = ops(from_function(lambda model, x: torch.cosine_similarity(x, x + 1), torch.randn(2, 3)))
    assert "cosine_similarity" not in inner
    assert len(inner) > 2


def test_frozen_and_shared_parameters_and_modules():
    linear = nn.Linear(3, 3).requires_grad_(False)
    model = nn.Sequential(linear, nn.ReLU(), linear)
    graph = record(model, torch.randn(2, 3))
    first, _, second = (graph.nodes[i] for i in graph.schedule)
    assert first.input_values[1:] == second.input_values[1:] == [[graph.find("0.weight")], [graph.find("0.bias")]]
    assert [first.module, second.module] == ["0", "0"]
    assert graph.find("2.weight") == -1
    assert graph.values[graph.find("0.weight")].origin == "parameter"
    assert count_costs(graph).total.parameters == 12


def test_module_paths_and_source_lines():
    graph = record(network(1), IMAGE)
    modules = {graph.nodes[i].op: graph.nodes[i].module for i in graph.schedule}
    assert modules["aten::linear"] == "4"
    assert modules["aten::relu_"] == "2.relu"
    assert modules["aten::add"] == "2"
    line = Residual.forward.__code__.co_firstlineno + 1
    assert node(graph, "add").source == f"test_graph.py:{line}" == node(graph, "relu_").source


class Raises(nn.Module):
    def __init__(self, rule: str) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
        self.rule = rule

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        if self.rule == "python":
            raise RuntimeError("by the model")
        if self.rule == "operator":
            return y @ torch.ones(5, 5)
        try:
            return y.view(5, 7)
        except RuntimeError:
            return y.reshape(-1)


@pytest.mark.parametrize("rule", ["python", "operator"])
def test_exception_leaves_a_partial_recording_and_nothing_attached(rule):
    model, partial = Raises(rule).train(), Graph()
    with pytest.raises(RuntimeError, match="by the model" if rule == "python" else "mat1 and mat2"):
        record(model, torch.randn(2, 3), partial=partial)
    assert ops(partial)[:2] == ["linear", "relu"]
    failed = [item for item in partial.nodes if item.failed]
    assert [item.op for item in failed][:1] == ([] if rule == "python" else ["aten::matmul"])
    assert str(partial).count("\n") >= 4
    assert all(module.training for module in model.modules())
    model.rule = ""
    again = record(model, torch.randn(2, 3))
    assert ops(again) == ["linear", "relu", "reshape"]  # the view that failed was not needed
    assert [item.op for item in again.nodes if item.failed] == ["aten::view"]
    assert again.nodes[again.schedule[0]].module == "inner.0"


def test_recording_inside_of_a_recording_is_refused():
    def forward(model, x):
        record(nn.ReLU(), x)
        return x

    with pytest.raises(ValueError, match=r"\[record\] must not be called while another recording runs on this thread"):
        from_function(forward, torch.randn(3))
    assert ops(record(nn.ReLU(), torch.randn(3))) == ["relu"]


def test_floating_point_intermediates_are_not_kept():
    """Not even while the model runs: a large model needs no more memory than without a recording."""
    memories, freed_early = [], []

    def forward(model, x):
        for _ in range(4):
            x = x.sin()
            memories.append(x.untyped_storage()._weak_ref())
        freed_early.extend(torch.UntypedStorage._expired(memory) for memory in memories)
        return x

    graph = from_function(forward, torch.randn(100))
    assert freed_early == [True, True, True, False]
    freed = [torch.UntypedStorage._expired(memory) for memory in memories]
    assert freed == [True, True, True, False]  # the last one is returned
    assert torch.equal(
        graph.values[graph.outputs[0]].tensor, graph.values[graph.inputs[0]].tensor.sin().sin().sin().sin()
    )
    for memory in memories:
        torch.UntypedStorage._free_weak_ref(memory)


def test_bool_and_integer_intermediates_are_kept():
    graph = from_function(lambda model, x: x[(x > 0).nonzero()[:, 0]], torch.tensor([1.0, -1.0, 2.0]))
    compared = graph.values[node(graph, "gt").outputs[0]]
    assert compared.tensor.tolist() == [True, False, True]
    assert graph.values[node(graph, "nonzero").outputs[0]].tensor.tolist() == [[0], [2]]


def test_another_thread_is_not_recorded():
    go, done = threading.Event(), threading.Event()
    other = nn.Sequential(nn.Tanh())

    def work():
        go.wait(20)
        other(torch.randn(3))
        done.set()

    thread = threading.Thread(target=work)
    thread.start()

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.relu = nn.ReLU()
            self.relu.register_forward_pre_hook(self.wait)

        def wait(self, module, args):
            go.set()
            assert done.wait(20)

        def forward(self, x):
            return self.relu(x)

    graph = record(Model(), torch.randn(3))
    thread.join()
    assert ops(graph) == ["relu"]
    assert graph.nodes[graph.schedule[0]].module == "relu"


def test_autocast():
    """The operators that the model calls have its own tensors; conversions run inside of them."""
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    with torch.autocast("cpu", torch.bfloat16):
        graph = record(model, torch.randn(2, 3))
    assert ops(graph) == ["linear", "relu"]
    linear = node(graph, "linear")
    assert linear.input_values[1] == [graph.find("0.weight")]
    assert graph.values[linear.outputs[0]].dtype == torch.bfloat16
    assert count_costs(graph).total.macs == 24


def test_compiled_modules_run_as_they_are_written():
    calls = []

    def backend(module, inputs):
        calls.append(module)
        return module.forward

    model = nn.Sequential(nn.Linear(3, 4), torch.compile(nn.Sequential(nn.Linear(4, 5), nn.ReLU()), backend=backend))
    graph = record(model, torch.randn(2, 3))
    assert ops(graph) == ["linear", "linear", "relu"]
    assert not calls
    assert graph.nodes[graph.schedule[1]].module.endswith("1._orig_mod.0")
    with torch.no_grad():
        model(torch.randn(2, 3))
    assert len(calls) == 1


def test_scripted_modules():
    model = nn.Sequential(nn.Linear(3, 4), torch.jit.script(nn.Sequential(nn.Linear(4, 5), nn.ReLU())))
    graph = record(model, torch.randn(2, 3))
    assert ops(graph) == ["linear", "linear", "relu"]
    assert node(graph, "relu").input_values == [graph.nodes[graph.schedule[1]].outputs]
    assert graph.nodes[graph.schedule[1]].input_values[1] == [graph.find("1.0.weight")]


def test_own_operators():
    model = rf.quantization.prepare_qat(
        nn.Sequential(nn.Linear(3, 4), nn.ReLU()), rf.quantization.QConfig.int8(), torch.randn(2, 3)
    )
    model.train()(torch.randn(2, 3))
    graph = record(model, torch.randn(2, 3))
    assert "rarefy::fake_quantize" in {graph.nodes[i].op for i in graph.schedule}
    assert all(
        value.origin != "constant" or not value.consumers or not value.dtype.is_floating_point for value in graph.values
    )
    int8 = rf.quantization.convert(model)
    assert count_costs(record(int8, torch.randn(2, 3))).total.macs == 24


# Printing and drawing


def test_table_of_operators():
    text = str(record(network(1), IMAGE))
    lines = text.splitlines()
    assert lines[0] == "Graph(8 operators, 9 parameters of 457 elements, [2, 3, 7, 7] -> [2, 5])"
    conv = next(line for line in lines if "0.weight" in line or " .weight" in line)
    assert "aten::conv2d" in conv
    assert "stride=[2, 2]" in conv
    assert "padding" not in conv
    assert "dilation" not in conv
    columns = [line.index("aten::") for line in lines[2:-1]]
    assert set(columns) == {lines[1].index("operator")}
    assert re.search(r"relu_ .* 2\.relu +test_graph\.py:\d+$", text, re.M)
    assert lines[-1].startswith("returns %")
    assert repr(record(network(1), IMAGE)) == lines[0]


def test_constants_are_named():
    text = str(from_function(lambda model, x: x.to(torch.float64).softmax(-1), torch.randn(2, 3)))
    assert "dtype=Double" in text
    assert "dim=-1" in text
    assert "[2, 3] Double" in text


def test_summary_adds_up():
    costs = count_costs(record(network(2), IMAGE))
    table = {item.module: item for item in costs.modules}
    assert list(table)[:4] == ["", "0", "1", "2"]
    assert table[""].cost.macs == costs.total.macs == sum(item.cost.macs for item in costs.operators)
    assert table[""].cost.activation_bytes == costs.total.activation_bytes
    assert table["2"].cost.macs == table["2.conv"].cost.macs == 2 * 4 * 3 * 3 * 4 * 9
    assert table["2"].operators == 4
    assert table["2"].cost.parameters == 4 * 4 * 9 + 8
    assert table["5"].output_shape == (2, 5) if "5" in table else table["6"].output_shape
    text = str(costs)
    assert re.search(r"^\(model\) .*\d", text, re.M)
    assert re.search(r"^ +2\.conv ", text, re.M)
    by_operator = costs.to_string(by_operator=True)
    assert by_operator.splitlines()[-1].startswith("total")
    assert "<td" in costs.to_html()
    assert ElementTree.fromstring(f"<div>{costs.to_html(True)}</div>").findall(".//tr")


SVG = "{http://www.w3.org/2000/svg}"


def boxes_and_edges(svg: str):
    tree = ElementTree.fromstring(svg)
    boxes = [
        tuple(float(rect.get(key)) for key in ("x", "y", "width", "height"))
        for rect in tree.iter(SVG + "rect")
        if rect.get("class") == "box"
    ]
    return boxes, [path.get("d") for path in tree.iter(SVG + "path") if "edge" in (path.get("class") or "")]


def points(path: str) -> list[tuple[float, float]]:
    """Points along a path of M, V and C, closely."""
    out: list[tuple[float, float]] = []
    for command, text in re.findall(r"([MVC])([^MVC]*)", path):
        numbers = [float(number) for number in text.split()]
        if command == "M":
            out.append((numbers[0], numbers[1]))
            continue
        a = out[-1]
        b = (a[0], numbers[0]) if command == "V" else (numbers[4], numbers[5])
        c, d = (a, b) if command == "V" else ((numbers[0], numbers[1]), (numbers[2], numbers[3]))
        for i in range(1, 21):
            t = i / 20
            weights = ((1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t * t * (1 - t), t**3)
            out.append(tuple(sum(w * p[k] for w, p in zip(weights, (a, c, d, b), strict=True)) for k in (0, 1)))
    return out


class Dense(nn.Module):
    """Every layer reads all before it."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(2 * i + 2, 2, 1) for i in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        all_of_them = [x]
        for layer in self.layers:
            all_of_them.append(layer(torch.cat(all_of_them, 1)).relu())
        return torch.cat(all_of_them, 1)


@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (network(8), IMAGE),
        (Dense(7), torch.randn(1, 2, 3, 3)),
        (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), torch.randn(1, 4, 8)),
        (nn.Identity(), torch.randn(2)),
    ],
)
def test_drawing_has_no_edge_through_a_box_and_no_box_on_another(model, inputs):
    graph = record(model, inputs)
    svg = graph.to_svg(constants=True)
    boxes, edges = boxes_and_edges(svg)
    made = {i for i in graph.schedule if graph.nodes[i].outputs and graph.nodes[i].op != "aten::dropout"}
    assert len(boxes) == len(made) + 2
    for i, (x, y, w, h) in enumerate(boxes):
        for x2, y2, w2, h2 in boxes[:i]:
            assert x + w < x2 or x2 + w2 < x or y + h < y2 or y2 + h2 < y
    assert edges
    for path in edges:
        for px, py in points(path):
            assert not any(x + 0.2 < px < x + w - 0.2 and y + 0.2 < py < y + h - 0.2 for x, y, w, h in boxes)


def test_drawing_of_a_residual_block():
    graph = record(network(1), IMAGE)
    svg = graph.to_svg()
    assert svg.count('class="edge far"') == 1
    assert svg.count('class="edge"') == 9
    assert ">conv2d<" in svg
    assert ">[2, 4, 3, 3]<" in svg
    assert f">{2 * 4 * 9 * 27:,} MACs<" in svg
    assert ">2.conv<" in svg


def test_drawing_leaves_out_what_depends_on_no_input():
    graph = from_function(lambda model, x: (x + torch.arange(3).float()).view(3, 1).t().reshape(-1) * 2, torch.randn(3))
    assert "arange" not in graph.to_svg().replace("arange()", "")
    assert ">arange<" in graph.to_svg(constants=True)
    assert len(boxes_and_edges(graph.to_svg())[0]) == 2 + 5
    joined = graph.to_svg(movement=False)
    assert len(boxes_and_edges(joined)[0]) == 2 + 3
    assert ">view · t · reshape<" in joined


def test_text_is_escaped():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.add_module('<b>&"\x01', nn.ReLU())

        def forward(self, x):
            return next(self.children())(x)

    graph = record(Odd(), torch.randn(2))
    ElementTree.fromstring(graph.to_svg())
    ElementTree.fromstring(f"<div>{graph._repr_html_()}</div>")
    assert "<b>" not in graph._repr_html_().replace("<b></b>", "")


# Costs


def macs(graph: Graph) -> int:
    return count_costs(graph).total.macs


def test_macs_are_those_of_the_formulas():
    x = torch.randn(2, 6, 9, 8)
    assert macs(record(nn.Conv2d(6, 4, (3, 2), stride=2, padding=1, groups=2), x)) == 2 * 4 * 5 * 5 * 3 * 6
    assert macs(record(nn.ConvTranspose2d(6, 4, 3, stride=2, groups=2), x)) == 2 * 6 * 9 * 8 * 2 * 9
    assert macs(record(nn.Conv1d(3, 5, 3), torch.randn(3, 10))) == 5 * 8 * 9
    assert macs(record(nn.Linear(4, 7), torch.randn(3, 5, 4))) == 3 * 5 * 7 * 4
    a, b = torch.randn(2, 3, 4), torch.randn(2, 4, 5)
    assert macs(from_function(lambda model, x, y: torch.bmm(x, y), a, b)) == 2 * 3 * 4 * 5
    assert macs(from_function(lambda model, x, y: x @ y[0], a, b)) == 2 * 3 * 4 * 5
    assert macs(from_function(lambda model, x, y: torch.baddbmm(torch.zeros(1), x, y), a, b)) == 2 * 3 * 4 * 5
    assert macs(from_function(lambda model, x, y: torch.addmm(torch.zeros(5), x[0], y[0]), a, b)) == 3 * 4 * 5
    assert macs(from_function(lambda model, x, y: torch.einsum("bij,bjk->bik", x, y), a, b)) == 2 * 3 * 4 * 5
    assert macs(from_function(lambda model, x: x @ x, torch.randn(6))) == 6
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 4, 7, 8), torch.randn(2, 4, 7, 6)
    graph = from_function(lambda model, q, k, v: F.scaled_dot_product_attention(q, k, v), q, k, v)
    assert macs(graph) == 2 * 4 * 5 * 7 * (8 + 6)
    assert count_costs(graph).total.flops == 2 * macs(graph) + 5 * 2 * 4 * 5 * 7
    assert macs(record(nn.Embedding(9, 4), torch.tensor([1, 2]))) == 0


@pytest.mark.parametrize(("kind", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
def test_macs_of_recurrent_layers(kind, gates):
    steps, batch, width, hidden = 5, 2, 3, 4
    graph = record(kind(width, hidden, num_layers=2, bidirectional=True), torch.randn(steps, batch, width))
    first = 2 * gates * hidden * (width + hidden)
    second = 2 * gates * hidden * (2 * hidden + hidden)
    assert macs(graph) == steps * batch * (first + second)
    cell = {nn.LSTM: nn.LSTMCell, nn.GRU: nn.GRUCell, nn.RNN: nn.RNNCell}[kind]
    assert macs(record(cell(width, hidden), torch.randn(batch, width))) == batch * gates * hidden * (width + hidden)


def test_flops_of_what_is_no_product():
    x = torch.randn(2, 4, 6, 6)

    def flops(model):
        return count_costs(record(model, x)).total.flops

    assert flops(nn.ReLU()) == x.numel()
    assert flops(nn.BatchNorm2d(4)) == 2 * x.numel()
    assert flops(nn.GroupNorm(2, 4)) == flops(nn.LayerNorm(6)) == flops(nn.InstanceNorm2d(4)) == 7 * x.numel()
    assert flops(nn.RMSNorm(6)) == 4 * x.numel()
    assert flops(nn.Softmax(1)) == 5 * x.numel()
    assert flops(nn.MaxPool2d(2)) == x.numel()
    assert flops(nn.AvgPool2d(3, 1)) == 2 * 4 * 4 * 4 * 9
    assert flops(nn.AdaptiveAvgPool2d(1)) == x.numel()
    assert flops(nn.Upsample(scale_factor=2)) == 0
    assert flops(nn.Upsample(scale_factor=2, mode="bilinear")) == 8 * 4 * x.numel()
    assert flops(nn.GLU(1)) == x.numel()
    assert flops(nn.Sequential(nn.Flatten(), nn.Unflatten(1, (4, 36)), nn.Dropout())) == 0


def test_bytes():
    graph = record(
        nn.Sequential(nn.Linear(4, 8), nn.ReLU(inplace=True), nn.Unflatten(1, (2, 4)), nn.Tanh()), torch.randn(3, 4)
    )
    total = count_costs(graph).total
    assert total.parameter_bytes == 4 * (4 * 8 + 8)
    assert total.activation_bytes == 4 * 2 * 3 * 8  # of linear and tanh
    half = record(nn.Linear(4, 8).to(torch.bfloat16), torch.randn(3, 4, dtype=torch.bfloat16))
    assert count_costs(half).total.activation_bytes == 2 * 3 * 8


def test_what_is_not_counted_is_named():
    costs = count_costs(from_function(lambda model, x: torch.linalg.svd(x)[0] * 2, torch.randn(3, 3)))
    assert costs.total.flops == 9
    assert len(costs.uncounted) == 1
    assert "not counted: aten::" in str(costs)
    assert "svd" in str(costs)


MODELS = {
    "convolutions": (network, lambda: IMAGE),
    "transformer": (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), lambda: torch.randn(2, 5, 8)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2), lambda: torch.randn(1, 4, 5, 5)),
    "attention": (lambda: nn.MultiheadAttention(8, 2), lambda: (torch.randn(5, 2, 8),) * 3),
    "bilinear": (lambda: nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 2)), lambda: torch.randn(7, 4)),
}


@pytest.mark.parametrize("name", MODELS)
def test_macs_are_half_of_torchs_flops(name):
    make, make_inputs = MODELS[name]
    model, inputs = make().eval(), make_inputs()
    graph = record(model, inputs)
    # torch counts attention only where its kernel is written as products.
    with FlopCounterMode(display=False) as counter, torch.no_grad(), evaluation(model), sdpa_kernel(SDPBackend.MATH):
        model(*inputs) if isinstance(inputs, tuple) else model(inputs)
    assert 2 * macs(graph) == counter.get_total_flops()


@pytest.mark.parametrize("name", STRUCTURES)
def test_macs_are_those_that_pruning_counts(name):
    structure = STRUCTURES[name]
    graph = record(structure.build(), structure.make_inputs())
    found = find_structure(graph)
    assert count(found, {}).macs == pytest.approx(macs(graph), rel=1e-12)


# Pairs and constants


def fold(model: nn.Module, pair) -> None:
    """Puts a normalization into the layer before it."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    weight = tensors[pair.weight]
    factor = (tensors[pair.variance] + pair.eps).rsqrt() * (tensors[pair.scale] if pair.scale else 1)
    shift = (tensors[pair.shift] if pair.shift else 0) - tensors[pair.mean] * factor
    shape = [1] * weight.dim()
    shape[pair.output_dim] = -1
    weight.data = weight * factor.view(shape)
    layer = model.get_submodule(pair.weight.rpartition(".")[0])
    layer.bias = nn.Parameter(shift + (layer.bias * factor if pair.bias else 0))
    parent, _, name = pair.mean.rpartition(".")[0].rpartition(".")
    setattr(model.get_submodule(parent), name, nn.Identity())


@pytest.mark.parametrize(
    ("layer", "norm", "x"),
    [
        (nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), torch.randn(2, 3, 5, 5)),
        (nn.Conv1d(4, 4, 3, groups=2), nn.BatchNorm1d(4, affine=False), torch.randn(2, 4, 5)),
        (nn.ConvTranspose2d(3, 4, 2), nn.BatchNorm2d(4), torch.randn(2, 3, 4, 4)),
        (nn.Linear(3, 4), nn.BatchNorm1d(4), torch.randn(5, 3)),
    ],
)
def test_pairs_can_be_folded(layer, norm, x):
    model = nn.Sequential(copy.deepcopy(layer), copy.deepcopy(norm), nn.ReLU()).double().eval()
    for tensor in (*model.parameters(), model[1].running_mean, model[1].running_var):
        tensor.data.uniform_(0.5, 2)
    (pair,) = conv_bn_pairs(record(model, x.double()))
    assert pair.weight == "0.weight"
    assert pair.mean == "1.running_mean"
    assert pair.bias == ("0.bias" if layer.bias is not None else "")
    expected = model(x.double())
    fold(model, pair)
    assert isinstance(model[1], nn.Identity)
    torch.testing.assert_close(model(x.double()), expected)


def test_what_is_no_pair():
    x = torch.randn(2, 4, 5, 5)
    conv, norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
    assert len(conv_bn_pairs(from_function(lambda m, x: m.norm(m.conv(x)), x, conv=conv, norm=norm))) == 1
    functions = {
        "read twice": lambda m, x: m.norm(y := m.conv(x)) + y,
        "shared weight": lambda m, x: m.norm(m.conv(m.conv(x))),
        "changed between": lambda m, x: m.norm(m.conv(x).mul_(2)),
        "returned": lambda m, x: ((y := m.conv(x)), m.norm(y)),
        "view read": lambda m, x: m.norm(y := m.conv(x)) + y.flip(0),
        "computed weight": lambda m, x: m.norm(F.conv2d(x, m.conv.weight * 2)),
    }
    for name, function in functions.items():
        assert conv_bn_pairs(from_function(function, x, conv=conv, norm=norm)) == [], name
    statistics = nn.BatchNorm2d(4, track_running_stats=False)
    assert conv_bn_pairs(record(nn.Sequential(conv, statistics), x)) == []
    # Along dimension 1 of three: the positions, not the layer's channels.
    assert conv_bn_pairs(record(nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(4)), torch.randn(2, 4, 3))) == []


def test_constants_are_folded():
    def forward(model, x):
        positions = torch.arange(x.shape[1])
        mask = torch.full((3, 3), float("-inf")).triu(1)
        angles = model.frequencies[None] * positions[:, None]
        return (x @ model.weight + angles.sin()) + mask.exp().sum() + torch.rand(1) * 0

    weight, frequencies = nn.Parameter(torch.randn(2, 2)), torch.tensor([1.0, 0.1])
    graph = from_function(forward, torch.randn(1, 3, 2), weight=weight, frequencies=frequencies)
    folded = fold_constants(graph)
    assert ops(folded) == ["matmul", "add", "add", "rand", "mul", "add"]
    assert len(constant_nodes(graph)) == len(graph.schedule) - len(folded.schedule)
    constant = folded.values[node(folded, "add").input_values[1][0]]
    assert constant.origin == "constant"
    assert constant.producer == -1
    torch.testing.assert_close(constant.tensor, (frequencies[None] * torch.arange(3)[:, None]).sin())
    assert graph.values[node(graph, "add").input_values[1][0]].origin == "intermediate"  # the recording stays
    assert count_costs(folded).total.macs == macs(graph)


def test_views_of_buffers_are_copied():
    positions = torch.arange(6.0)
    folded = fold_constants(from_function(lambda m, x: x + m.positions[:3], torch.randn(3), positions=positions))
    positions.zero_()
    assert folded.values[node(folded, "add").input_values[1][0]].tensor.tolist() == [0, 1, 2]


def test_changed_in_place_by_an_input_is_no_constant():
    def filled(model, x):
        table = torch.zeros(2, 3)
        table[0] = 7
        table[1] = x
        return table * 2

    folded = fold_constants(from_function(filled, torch.randn(3)))
    assert {"mul", "copy_"} <= set(ops(folded))
    read = node(folded, "mul").input_values[0][0]
    assert folded.values[read].origin == "intermediate"

    def finished(model, x):
        table = torch.zeros(2, 3)
        table[0] = 7
        return x * table

    folded = fold_constants(from_function(finished, torch.randn(3)))
    assert ops(folded) == ["mul"]
    table = folded.values[node(folded, "mul").input_values[1][0]].tensor
    assert table.tolist() == [[7, 7, 7], [0, 0, 0]]

    def changed_later(model, x):
        step = torch.ones(3)
        y = x + step
        step.add_(1)
        return y * step

    folded = fold_constants(from_function(changed_later, torch.randn(3)))
    assert ops(folded) == ["ones", "add", "add_", "mul"]

    def counts(model, x):
        model.count.add_(1)
        return x * model.count

    count = torch.zeros(1)
    folded = fold_constants(from_function(counts, torch.randn(3), count=count))
    assert ops(folded) == ["add_", "mul"]
    assert count.item() == 1
