"""A picture of benchmarks.policies: how far above backprop each policy is, over steps, and its loss over time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.policy_rows import PolicyRow, lines_of
from benchmarks.rows import grouped

# Okabe and Ito's palette, which every eye can tell apart
COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#999999", "#a6761d", "#444444", "#7570b3")
INK, FAINT = "#333333", "#e4e4e4"
SKIPPED = 0.15  # of the steps: where the loss is steep, all else would be squeezed
MAX_EXCESS = 12.0  # per cent: more is as good as lost, and would squeeze the rest


def draw_curves(rows: Sequence[PolicyRow], path: Path) -> None:
    """One row of two panels for each optimizer and work: left over steps, right over time. Means over the seeds.

    Time is simulated: in steps of a pipeline without any bubble, so 1F1B is at steps / (1 - its bubble).
    """
    lines = [line for line in lines_of(rows) if line.row.is_whole]
    panels = grouped(lines, lambda line: (line.row.work, line.row.optimizer))
    panels = [panel for panel in panels if any(line.row.policy == "wait" for line in panel)]
    if not panels:
        return
    figure = Figure(figsize=(13.0, 4.6 * len(panels) + 0.5), dpi=130, layout="constrained")
    for number, panel in enumerate(panels):
        left, right = (figure.add_subplot(len(panels), 2, 2 * number + side) for side in (1, 2))
        _draw(left, right, panel, rows)
    figure.savefig(path)


def _draw(left: Axes, right: Axes, panel: Sequence, rows: Sequence[PolicyRow]) -> None:  # type: ignore[type-arg]
    base_row = next(line for line in panel if line.row.policy == "wait").row
    base = _mean_curve(base_row, rows)
    others = [line for line in panel if line.row.policy != "wait"]
    stages = sorted({(line.row.stages, line.row.microbatches) for line in others})
    for number, (s, m) in enumerate(stages):
        shade = "-" if number == 0 else "--" if number == 1 else ":"
        label = f"1F1B, S = {s}, M = {m}"
        right.plot(
            [step * (m + s - 1) / m for step in base], list(base.values()), shade, color=INK, lw=1.4, label=label
        )
    for line, colour in zip(others, COLOURS * (1 + len(others) // len(COLOURS)), strict=False):
        row, curve = line.row, _mean_curve(line.row, rows)
        name = f"{row.label}, S = {row.stages}, M = {row.microbatches}"
        known = {step: 100 * (bpb / base[step] - 1) for step, bpb in curve.items() if step in base}
        left.plot(list(known), [min(each, 2 * MAX_EXCESS) for each in known.values()], color=colour, lw=1.6, label=name)
        per_step = 1 / row.mean_utilisation
        right.plot([step * per_step for step in curve], list(curve.values()), color=colour, lw=1.6, label=name)
    left.axhline(0, color=INK, lw=1.0)
    left.set(xlabel="step", ylabel="bits per byte above backprop, %", title=f"{base_row.optimizer}: at equal steps")
    worst = max((line.excess or 0.0 for line in others), default=0.0) * 100
    left.set_ylim(-0.5, min(MAX_EXCESS, max(2.0, 2.0 * worst)))
    last = min(base.values())
    right.axhline(last, color=INK, lw=0.8, ls=":")
    right.set(xlabel="time, in steps of a pipeline without a bubble (simulated)", ylabel="bits per byte")
    right.set_title("over time; dotted: where backprop ends")
    late = [bpb for step, bpb in base.items() if step >= SKIPPED * base_row.planned_steps]
    right.set_ylim(last - 0.02, max(late) + 0.05)
    for axes in (left, right):
        axes.grid(color=FAINT)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)


def _mean_curve(row: PolicyRow, rows: Sequence[PolicyRow]) -> dict[int, float]:
    """Over the seeds of one line, at the steps that all of them have."""
    alike = [
        {int(step): bpb for step, bpb in each.curve} for each in rows if each.line() == row.line() and each.is_whole
    ]
    common = set(alike[0]).intersection(*alike)
    return {step: sum(curve[step] for curve in alike) / len(alike) for step in sorted(common)}
