"""What an export says about the file that it wrote."""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

_SHOWN = 8  # lines about float operators in a printed report


@dataclass(frozen=True)
class Operator:
    """One convolution, product, addition or pooling of the file, and what the runtime made of it."""

    name: str  #: in the file: the path of the module that it comes from, and the operator
    op_type: str  #: Conv, Gemm, ...
    runtime: str  #: what the runtime executes in its place, e.g. QLinearConv; "fused" where nothing has its name
    integer: bool  #: whether those compute on integers


@dataclass(frozen=True)
class NodeCheck:
    """One quantized tensor of the file against what the model computes from the file's own tensors before it."""

    name: str  #: the operator that computed it
    op_type: str  #: Conv, Gemm, ...
    quantizer: str  #: the DequantizeLinear that reads it
    runtime: str  #: what ran the file
    steps: int  #: largest difference in steps of its scale
    differing: float  #: fraction of values that differ
    values: int  #: number of values


@dataclass(frozen=True)
class Difference:
    """One output of the file against the output of the eager model in evaluation mode."""

    output: str
    runtime: str  #: what ran the file
    optimized: bool  #: whether its graph optimizations were on
    sizes: tuple[tuple[str, int], ...]  #: of the axes whose size is free, by name
    max_abs: float  #: largest absolute difference
    rms: float  #: root of the mean squared difference
    allowed: float  #: the rms above which the export fails
    steps: float | None  #: max_abs in steps of the output's scale, where the output is quantized
    differing: float  #: fraction of values that differ by more than float rounding (half a step, where quantized)

    @property
    def batch(self) -> int | None:
        """Size of the batch, where the file takes any."""
        return dict(self.sizes).get("batch")


@dataclass(frozen=True)
class Overflow:
    """A layer whose sums may overflow on processors that add products of bytes in 16 bits (x86 without VNNI)."""

    layer: str  #: path of the module
    pairs: int  #: of weights whose products with the largest activations exceed 16 bits together
    total: int  #: pairs that the kernels add


@dataclass(frozen=True)
class ExportReport:
    """A file that was written, what is in it, and how far it is from the model.

    Attributes:
        path: the file.
        bytes: its size.
        target: the runtime that it was written for.
        opset: version of the ONNX operator set.
        nodes: number of nodes by operator.
        operators: what the runtime runs in integers and what it leaves in float; empty without verification, and for
            targets that do not run here.
        nodes_checked: every quantized tensor against the model, by each means that ran the file; empty without verification.
        differences: outputs against the eager model's; empty without verification.
        skipped: checks that were left out, each with its reason.
        seconds: time that the export took, verification included.
        overflow: layers whose sums saturate on x86 processors without VNNI instructions.
    """

    path: Path
    bytes: int
    target: str
    opset: int
    nodes: Mapping[str, int]
    operators: tuple[Operator, ...] = field(default=(), repr=False)
    differences: tuple[Difference, ...] = field(default=(), repr=False)
    nodes_checked: tuple[NodeCheck, ...] = field(default=(), repr=False)
    skipped: tuple[str, ...] = field(default=(), repr=False)
    seconds: float = 0.0
    overflow: tuple[Overflow, ...] = field(default=(), repr=False)

    @property
    def in_integers(self) -> tuple[Operator, ...]:
        """The operators that the runtime runs in integers."""
        return tuple(op for op in self.operators if op.integer)

    @property
    def in_float(self) -> tuple[Operator, ...]:
        """The operators that the runtime runs in float."""
        return tuple(op for op in self.operators if not op.integer)

    @property
    def max_abs(self) -> float | None:
        """Largest absolute difference over all outputs, batches and optimization levels; None without verification."""
        return max((d.max_abs for d in self.differences), default=None)

    def _rows(self) -> list[tuple[str, str]]:
        size = f"{self.bytes / 1024:.1f} KiB" if self.bytes < 1 << 20 else f"{self.bytes / (1 << 20):.1f} MiB"
        rows = [
            ("file", f"{self.path} ({size})"),
            ("target", f"{self.target}, opset {self.opset}, {self.seconds:.1f} s"),
            ("nodes", ", ".join(f"{count} {name}" for name, count in self.nodes.items())),
        ]
        if self.overflow:
            pairs = sum(layer.pairs for layer in self.overflow)
            rows.append(
                (
                    "16-bit sums",
                    f"saturate without VNNI in {len(self.overflow)} layers ({pairs} pairs of weights; 7 bits do not: "
                    f"QConfig.int8(reduce_range=True))",
                )
            )
        if not self.differences:
            return [*rows, ("verified", "no")]
        if self.operators:
            rows.append(("in integers", f"{len(self.in_integers)} of {len(self.operators)} operators"))
        if self.in_integers:
            rows += [("in float", f"{op.name} ({op.runtime})") for op in self.in_float[:_SHOWN]]
            if len(self.in_float) > _SHOWN:
                rows.append(("", f"and {len(self.in_float) - _SHOWN} more (report.in_float)"))
        rows += self._node_rows()
        for d in self.differences:
            where = f"{d.output}, {d.runtime}" + "".join(f", {axis} {size}" for axis, size in d.sizes)
            steps = "" if d.steps is None else f" ({d.steps:.2g} steps)"
            rows.append((where, f"max difference {d.max_abs:.2g}{steps}, {d.differing:.2%} of values differ"))
        return rows

    def _node_rows(self) -> list[tuple[str, str]]:
        rows = []
        for runtime in dict.fromkeys(check.runtime for check in self.nodes_checked):
            checks = [check for check in self.nodes_checked if check.runtime == runtime]
            worst = max(checks, key=lambda check: (check.steps, check.differing))
            text = "all values equal"
            if worst.steps:
                text = f"up to {worst.steps} step{'s' * (worst.steps > 1)} in {worst.differing:.2g} of {worst.name}"
                text += f", {sum(c.differing == 0 for c in checks)} tensors equal"
            rows.append((f"{len(checks)} tensors, {runtime}", text))
        return rows + [("skipped", text) for text in self.skipped]

    def __repr__(self) -> str:
        rows = self._rows()
        width = max(len(name) for name, _ in rows)
        return "ExportReport\n" + "\n".join(f"  {name:<{width}}  {text}" for name, text in rows)

    def _repr_html_(self) -> str:
        cells = "".join(
            f"<tr><th style='text-align:left'>{html.escape(name)}</th>"
            f"<td style='text-align:left'>{html.escape(text)}</td></tr>"
            for name, text in self._rows()
        )
        table = f"<table><caption>ExportReport</caption>{cells}</table>"
        if not self.nodes_checked:
            return table
        lines = "".join(
            f"<tr><td style='text-align:left'>{html.escape(c.name)}</td><td>{html.escape(c.op_type)}</td>"
            f"<td style='text-align:left'>{html.escape(c.runtime)}</td><td>{c.steps}</td><td>{c.differing:.3%}</td></tr>"
            for c in self.nodes_checked
        )
        head = "<tr><th>computed by</th><th>operator</th><th>run by</th><th>steps</th><th>differing</th></tr>"
        summary = f"<summary>{len(self.nodes_checked)} comparisons of quantized tensors</summary>"
        return f"{table}<details>{summary}<table>{head}{lines}</table></details>"
