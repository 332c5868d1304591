"""A training run to look at: a table for notebooks, a figure."""

from collections.abc import Sequence
from html import escape
from typing import Any

from rarefy._core.distillation import EpochMetrics, StepResult


def history_html(title: str, history: Sequence[EpochMetrics], best: int | None) -> str:
    """Return the history as an HTML table, the best epoch in bold."""
    names = sorted({name for entry in history if entry.evaluation for name in entry.evaluation.metrics})
    head = ["epoch", "step", "loss", "held-out loss", "accuracy", *names]
    rows = []
    for entry in history:
        evaluation = entry.evaluation
        cells = [str(entry.epoch), f"{entry.step:,}", f"{entry.loss:.4f}"]
        if evaluation is None:
            cells += [""] * (2 + len(names))
        else:
            cells.append("" if evaluation.loss != evaluation.loss else f"{evaluation.loss:.4f}")
            cells.append("" if evaluation.accuracy is None else f"{evaluation.accuracy:.2%}")
            cells += [f"{evaluation.metrics[name]:.4g}" if name in evaluation.metrics else "" for name in names]
        style = ' style="font-weight:bold"' if entry.epoch == best else ""
        rows.append(f"<tr{style}>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    header = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join(rows) or f'<tr><td colspan="{len(head)}">no epoch done</td></tr>'
    return (
        f"<div><b>DistillationTrainer</b>: {escape(title)}"
        f"<table><thead><tr>{header}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def plot_history(history: Sequence[EpochMetrics], log: Sequence[StepResult]) -> Any:
    """Return a figure: loss in training and held out, accuracy, and with a log its terms and gradient shares."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("[DistillationTrainer.plot] needs matplotlib: pip install rarefy[plot]") from error
    evaluated = [(entry.epoch, entry.evaluation) for entry in history if entry.evaluation is not None]
    accuracy = [(epoch, evaluation.accuracy) for epoch, evaluation in evaluated if evaluation.accuracy is not None]
    shares = [entry for entry in log if entry.shares]
    panels = 1 + bool(accuracy) + bool(len(log) > 0) + bool(shares)
    figure = Figure(figsize=(4.2 * panels, 3.2), layout="constrained")
    axes = iter(figure.subplots(1, panels, squeeze=False)[0])

    axis = next(axes)
    axis.plot([entry.epoch for entry in history], [entry.loss for entry in history], "o-", label="training")
    if evaluated:
        axis.plot([epoch for epoch, _ in evaluated], [e.loss for _, e in evaluated], "s--", label="held out")
    axis.set(title="loss", xlabel="epoch")
    axis.legend()
    if accuracy:
        axis = next(axes)
        axis.plot([epoch for epoch, _ in accuracy], [100 * value for _, value in accuracy], "o-")
        axis.set(title="accuracy, %", xlabel="epoch")
    if log:
        axis = next(axes)
        for name in log[0].terms:
            axis.plot([entry.step for entry in log], [entry.terms.get(name, 0.0) for entry in log], label=name)
        axis.set(title="terms before their weights", xlabel="step")
        if len(log[0].terms) > 1 and all(value > 0 for entry in log for value in entry.terms.values()):
            axis.set_yscale("log")  # terms of different sizes
        axis.legend()
    if shares:
        axis = next(axes)
        names = list(shares[0].shares)
        values = [[entry.shares.get(name, 0.0) for entry in shares] for name in names]
        axis.stackplot([entry.step for entry in shares], values, labels=names, alpha=0.8)
        axis.set(title="share of the gradient", xlabel="step", ylim=(0, 1))
        axis.legend(loc="lower left")
    return figure
