"""What a runtime would make of an ONNX file, whoever wrote it: the operators that become integer, and the rules it breaks."""

from __future__ import annotations

import html
import importlib.util
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from rarefy._core.quantization import target_names
from rarefy.export.lint_graph import LintGraph
from rarefy.export.report import Operator

_SHOWN, _NAMED = 20, 3  # rules in a printed report, and places for each


@dataclass(frozen=True)
class Finding:
    """One place in a file where a rule of the target is broken, or not used to advantage."""

    severity: str  #: "error": the runtime refuses the file or computes something else; "warning": it is slower
    node: str  #: name of the node
    rule: str  #: what the target wants
    value: str  #: what the file has
    advice: str  #: what to do

    def __str__(self) -> str:
        return f"{self.severity}: {self.node}: {self.rule}, got {self.value} ({self.advice})"


@dataclass(frozen=True)
class LintReport:
    """What `lint` found.

    Attributes:
        path: the file.
        target: the runtime.
        findings: errors first.
        operators: what the runtime runs in integers and in float; empty for runtimes that do not run here.
        notes: what was not looked at, and why.
    """

    path: Path
    target: str
    findings: tuple[Finding, ...]
    operators: tuple[Operator, ...] = field(default=(), repr=False)
    notes: tuple[str, ...] = ()

    @property
    def errors(self) -> tuple[Finding, ...]:
        """Findings for which the runtime refuses the file or computes something else."""
        return tuple(f for f in self.findings if f.severity == "error")

    @property
    def warnings(self) -> tuple[Finding, ...]:
        """Findings for which it is slower."""
        return tuple(f for f in self.findings if f.severity == "warning")

    @property
    def ok(self) -> bool:
        """Whether there is no error."""
        return not self.errors

    def _head(self) -> str:
        text = f"{self.path} for {self.target}: {len(self.errors)} errors, {len(self.warnings)} warnings"
        if self.operators:
            text += f", {sum(op.integer for op in self.operators)} of {len(self.operators)} operators in integers"
        return text

    def __repr__(self) -> str:
        groups: dict[tuple[str, str, str], list[Finding]] = {}
        for finding in self.findings:
            groups.setdefault((finding.severity, finding.rule, finding.advice), []).append(finding)
        lines = []
        for (severity, rule, advice), found in list(groups.items())[:_SHOWN]:
            values = ", ".join(list(dict.fromkeys(f.value for f in found))[:_NAMED])
            nodes = ", ".join(list(dict.fromkeys(f.node for f in found))[:_NAMED])
            more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
            lines.append(f"  {severity}: {rule}, got {values} in {nodes}{more} ({advice})")
        if len(groups) > _SHOWN:
            lines.append(f"  and {len(groups) - _SHOWN} more rules (report.findings)")
        return "\n".join([f"LintReport {self._head()}", *lines, *(f"  note: {note}" for note in self.notes)])

    def _repr_html_(self) -> str:
        columns = ("severity", "node", "rule", "value", "advice")
        head = "".join(f"<th style='text-align:left'>{name}</th>" for name in columns)
        rows = "".join(
            "<tr>"
            + "".join(f"<td style='text-align:left'>{html.escape(getattr(finding, name))}</td>" for name in columns)
            + "</tr>"
            for finding in self.findings
        )
        notes = "".join(f"<p>{html.escape(note)}</p>" for note in self.notes)
        return f"<table><caption>{html.escape(self._head())}</caption><tr>{head}</tr>{rows}</table>{notes}"


def lint(path: str | os.PathLike[str], target: str = "onnxruntime") -> LintReport:
    """Says what a runtime would make of an ONNX file, by whichever library it was written.

    For "onnxruntime" and "openvino" the file is loaded, and the graph that would be executed is read back: which operators
    became integer, and why others did not. For "tensorrt" and "qnn" the published rules are checked without the runtime;
    TensorRT's own parser and builder check the file too where the package `tensorrt` is installed.

    Args:
        path: the file; external data beside it is read where a rule needs values.
        target: "onnxruntime", "openvino", "tensorrt" or "qnn".

    Raises:
        ImportError: the packages of `rarefy[onnx]`, or for "openvino" those of `rarefy[openvino]`, are missing.
        OSError, ValueError: the file cannot be read, or the target is not known.
        RuntimeError: the runtime cannot load the file.
    """
    if target not in target_names():
        raise ValueError(f"[lint] target must be one of {', '.join(target_names())}, got {target!r}")
    needed = ["onnx", *(["onnxruntime"] if target == "onnxruntime" else [])]
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"[lint] needs {', '.join(missing)}: pip install rarefy[onnx]")
    from rarefy.export import qnn_rules, runtime_rules, tensorrt_rules

    graph = LintGraph("lint", path)
    operators: tuple[Operator, ...] = ()
    notes: tuple[str, ...] = ()
    if target == "tensorrt":
        findings = tensorrt_rules.findings(graph)
        built, notes = tensorrt_rules.build(graph.path)
        findings += built
    elif target == "qnn":
        findings = qnn_rules.findings(graph)
    else:
        operators, findings = runtime_rules.findings(graph, target)
    return LintReport(graph.path, target, _errors_first(findings), operators, notes)


def lint_tensorrt(path: str | os.PathLike[str]) -> LintReport:
    """`lint(path, target="tensorrt")`: TensorRT's rules of explicit quantization, which need no GPU to be checked."""
    return lint(path, target="tensorrt")


def _errors_first(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    return tuple(sorted(dict.fromkeys(findings), key=lambda finding: finding.severity))
