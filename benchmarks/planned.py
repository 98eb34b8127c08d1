"""What was measured beside what `dnipipe plan --scale` says of the same stages, microbatches and times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.rows import Row, grouped, same_microbatches
from benchmarks.table import marked, said
from dnipipe.plan import Times, scale
from dnipipe.plan.compare import STALE_TIGHT
from dnipipe.plan.dni import SYNTHETIC

DIGITS = 4  # of a millisecond: more only make the planner's fractions long
NAMES = {
    ("GPipe", None): "GPipe",
    ("1F1B", None): "1F1B",
    ("DNI", "synthetic"): SYNTHETIC,
    ("DNI", "stale"): STALE_TIGHT,
}


@dataclass(frozen=True)
class Point:
    """A measured row and the plan of it. utilisation, ratio: of the plan, its step and the optimizer's time together;
    ratio to 1F1B."""

    row: Row
    utilisation: float
    ratio: float


def points(rows: Sequence[Row]) -> list[Point]:
    """Of each measured row that the planner knows and whose parts were timed."""
    found = []
    for alike in grouped(rows, same_microbatches):
        for row in alike:
            step_ms = planned_ms(row)
            if step_ms is None:
                continue
            rival = next((each for each in alike if each.schedule == "1F1B" and each.transfer_ms is not None), row)
            found.append(Point(row, _work_ms(row) / step_ms, _step_ms(rival, "1F1B") / step_ms))
    return found


def planned_ms(row: Row) -> float | None:
    """The planner's step, made of the row's measured parts; None for a row without them, or a schedule that the
    planner does not know."""
    name = NAMES.get((row.schedule, row.policy))
    if name is None or row.refused is not None or row.forward_ms is None or row.transfer_ms is None:
        return None
    return _step_ms(row, name)


def _work_ms(row: Row) -> float:
    assert row.forward_ms is not None and row.backward_ms is not None
    return row.microbatches * (row.forward_ms + row.backward_ms) + (row.optimizer_ms or 0.0)


def _step_ms(row: Row, name: str) -> float:
    assert row.forward_ms is not None and row.backward_ms is not None and row.transfer_ms is not None
    interface_ms = (row.interface_cost_share or 0.0) * (row.forward_ms + row.backward_ms)
    half_ms = round(row.backward_ms / 2, DIGITS)
    forward_ms, transfer_ms = round(row.forward_ms, DIGITS), round(row.transfer_ms, DIGITS)
    times = Times.ms(forward_ms, half_ms, half_ms, transfer_ms, round(interface_ms, DIGITS))
    planned = {each.schedule: each.step_ms for each in scale(row.stages, row.microbatches, times)}
    return planned[name] + (row.optimizer_ms or 0.0)


def markdown(rows: Sequence[Row]) -> str:
    """GitHub's markdown, below a heading of the third level."""
    headings = ["schedule", "M", "utilisation", "planned", "x 1F1B", "planned", "step ms", "planned"]
    lines = [
        [
            point.row.label,
            str(point.row.microbatches),
            said(point.row.utilisation, ".2f"),
            said(point.utilisation, ".2f"),
            said(point.row.ratio_to_1f1b, ".2f"),
            said(point.ratio, ".2f"),
            said(point.row.step_ms, ",.1f"),
            said(_work_ms(point.row) / point.utilisation, ",.1f"),
        ]
        for point in sorted(points(rows), key=lambda point: point.row.microbatches)
    ]
    return marked("Measured, and as `dnipipe plan --scale` says from the parts' times", headings, lines)


def draw_points(rows: Sequence[Row], path: Path) -> None:
    """Draws utilisation over the number of microbatches as a PNG: dots as measured, circles on lines as planned."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    found = sorted(points(rows), key=lambda point: point.row.microbatches)
    counts = sorted({point.row.microbatches for point in found})
    for number, alike in enumerate(grouped(found, lambda point: point.row.label)):
        # side by side, for many of them are as high
        at = [counts.index(point.row.microbatches) + 0.07 * number for point in alike]
        measured = [point.row.utilisation or 0.0 for point in alike]
        planned = [point.utilisation for point in alike]
        color = f"C{number}"
        axes.plot(at, planned, "o-", color=color, markerfacecolor="white", linewidth=0.8, markersize=5)
        axes.plot(at, measured, "o", color=color, markersize=6, label=alike[0].row.label)
    axes.set_xticks(range(len(counts)), [f"M = {count}" for count in counts])
    axes.set_ylabel("utilisation: measured \u25cf, planned \u25cb")
    axes.set_ylim(0, 1.05)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, format="png", dpi=150)
