"""A picture of benchmarks.policies: how far above backprop each policy is, over steps, and its loss over time."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from benchmarks.policy_rows import Line, PolicyRow, lines_of
from benchmarks.rows import grouped

# Okabe and Ito's palette, which every eye can tell apart, and a few more: one colour for each policy and interface
COLOURS = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#999999", "#7570b3", "#8c510a", "#b8b800",
    "#d01c8b", "#4d9221", "#f29e9e", "#111111",
)  # fmt: skip
DASHES = ("-", "--", ":", "-.", (0, (1, 4)), (0, (6, 1)))  # one for each (S, M)
INK, FAINT = "#222222", "#e4e4e4"
SKIPPED = 0.15  # of the steps: where the loss is steep, all else would be squeezed
USUAL_UNLOCK = 300  # the default of benchmarks.policies
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
    drawn = [line for panel in panels for line in panel if line.row.policy != "wait"]
    names = dict.fromkeys(name_of(line.row) for line in drawn)
    colours = dict(zip(names, itertools.cycle(COLOURS), strict=False))
    cuts = sorted({(line.row.stages, line.row.microbatches) for line in drawn}, key=lambda cut: (cut[0], -cut[1]))
    dashes = {cut: DASHES[n % len(DASHES)] for n, cut in enumerate(cuts)}
    figure = Figure(figsize=(14.5, 4.3 * len(panels)), dpi=120, layout="constrained")
    for number, panel in enumerate(panels):
        left, right = (figure.add_subplot(len(panels), 2, 2 * number + side) for side in (1, 2))
        base = next(line for line in panel if line.row.policy == "wait")
        others = [line for line in panel if line.row.policy != "wait"]
        styles = [(colours[name_of(line.row)], dashes[line.row.stages, line.row.microbatches]) for line in others]
        _draw_excess(left, base, others, styles, rows)
        _draw_time(right, base, others, styles, rows)
        for axes in (left, right):
            axes.grid(color=FAINT)
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
    handles = [Line2D([], [], color=INK, lw=1.0, label="1F1B (backprop)")]
    handles += [Line2D([], [], color=colour, lw=2.5, label=name) for name, colour in colours.items()]
    for (s, m), dash in dashes.items():
        handles.append(Line2D([], [], color="#777777", ls=dash, lw=1.6, label=f"S = {s}, M = {m}"))
    figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=9)
    figure.savefig(path)


def name_of(row: PolicyRow) -> str:
    """What has a colour of its own."""
    unlock = f" from step {row.unlock_after_steps}" if row.unlock_after_steps != USUAL_UNLOCK else ""
    return f"{row.label}{unlock}" + (f", rate {row.learning_rate:g}" if row.learning_rate != 1e-3 else "")


Style = tuple[str, object]  # colour, dashes


def _draw_excess(
    axes: Axes, base: Line, others: Sequence[Line], styles: Sequence[Style], rows: Sequence[PolicyRow]
) -> None:
    against = _mean_curve(base.row, rows)
    for line, (colour, dash) in zip(others, styles, strict=True):
        curve = _mean_curve(line.row, rows)
        known = {step: 100 * (bpb / against[step] - 1) for step, bpb in curve.items() if step in against}
        axes.plot(list(known), list(known.values()), color=colour, ls=dash, lw=1.5)
    axes.axhline(0, color=INK, lw=1.0)
    worst = max((line.excess or 0.0 for line in others), default=0.0) * 100
    axes.set_ylim(-0.5, min(MAX_EXCESS, max(2.0, 2.0 * worst)))
    axes.set(xlabel="step", ylabel="bits per byte above backprop, %", title=f"{base.row.optimizer}: at equal steps")


def _draw_time(
    axes: Axes, base: Line, others: Sequence[Line], styles: Sequence[Style], rows: Sequence[PolicyRow]
) -> None:
    against = _mean_curve(base.row, rows)
    flushing = {(line.row.stages, line.row.microbatches): dash for line, (_, dash) in zip(others, styles, strict=True)}
    for (s, m), dash in flushing.items():
        times = [step * (m + s - 1) / m for step in against]
        axes.plot(times, list(against.values()), color=INK, ls=dash, lw=1.0)
    for line, (colour, dash) in zip(others, styles, strict=True):
        curve = _mean_curve(line.row, rows)
        times = [step / line.row.mean_utilisation for step in curve]
        axes.plot(times, list(curve.values()), color=colour, ls=dash, lw=1.5)
    last = against[max(against)]
    axes.axhline(last, color="#777777", lw=0.8)
    late = [bpb for step, bpb in against.items() if step >= SKIPPED * base.row.planned_steps]
    axes.set_ylim(last - 0.02, max(late) + 0.02)
    axes.set_xlim(0, 3.0 * base.row.planned_steps)
    axes.set(xlabel="time, in steps of a pipeline without a bubble (simulated)", ylabel="bits per byte")
    axes.set_title("over time; level line: where backprop ends")


def _mean_curve(row: PolicyRow, rows: Sequence[PolicyRow]) -> dict[int, float]:
    """Over the seeds of one line, at the steps that all of them have."""
    of_line = [each for each in rows if each.line() == row.line() and each.is_whole]
    alike = [{int(step): bpb for step, bpb in each.curve} for each in of_line]
    common = set(alike[0]).intersection(*alike)
    return {step: sum(curve[step] for curve in alike) / len(alike) for step in sorted(common)}
