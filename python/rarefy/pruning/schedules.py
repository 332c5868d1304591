"""A look at schedules."""

from __future__ import annotations

from typing import Any

from rarefy.pruning.pruner import Schedule


def plot_schedule(schedule: Schedule, final: float, steps: int | None = None) -> Any:
    """Return a matplotlib figure of the sparsity that the masks have at each step, with the updates marked.

    Args:
        schedule: any of them.
        final: the sparsity that it ends at, in [0, 1).
        steps: how many to show; default: an eighth more than up to the last update.

    Raises:
        ImportError: without matplotlib, which ``rarefy[plot]`` has.
        ValueError: ``final`` outside [0, 1), or steps that are not positive.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("[plot_schedule] needs matplotlib: pip install rarefy[plot]") from error
    if not 0.0 <= final < 1.0:
        raise ValueError(f"[plot_schedule] final must be in [0, 1), got {final}")
    if steps is None:
        last = max(schedule.last_update(), 1)
        steps = last + max(1, last // 8)
    if steps <= 0:
        raise ValueError(f"[plot_schedule] steps must be positive, got {steps}")
    updates = [step for step in range(steps + 1) if schedule.updates_at(step)]
    sparsities = [schedule.sparsity_at(step, final) for step in updates]
    figure = Figure(figsize=(5.0, 3.2), layout="constrained")
    axis = figure.subplots()
    axis.step([0, *updates, steps], [0.0, *sparsities, sparsities[-1] if sparsities else final], where="post")
    axis.plot(updates, sparsities, ".", markersize=4 if len(updates) < 100 else 2)
    axis.axhline(final, linewidth=0.8, linestyle=":", color="grey")
    axis.set(xlabel="step", ylabel="sparsity", ylim=(-0.02, 1.0), title=type(schedule).__name__)
    return figure
