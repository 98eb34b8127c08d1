"""A picture of a race: the loss over seconds, the loss over steps, and as a level line what 1F1B ends at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from dnipipe.plan.panels import Panels

from .bars import BOUND_INK, INK, TORCH, frame, head
from .loss_rows import EQUAL_STEPS, EQUAL_TIME, LossRow, best_run, loss_at, soonest, work
from .loss_table import contenders, races

# Okabe and Ito's palette, as in bars.py: torch's schedules cool, DNI's policies warm.
POLICIES: Mapping[str, str] = MappingProxyType({"synthetic": "#e69f00", "stale": "#d55e00", "corrected": "#cc79a7"})
OTHER = "#f0e442"
DASHES = ("-", "--", ":", "-.")
WIDTH, LEFT, RIGHT, HEIGHT = 10.0, 0.75, 0.25, 3.4  # inches: of the picture, its margins, of a panel
LEGEND_COLUMNS, LEGEND_LINE = 2, 0.25
SHOWN_FROM = 0.15  # of 1F1B's run: its loss there is the top of the picture


def draw_curves(rows: Sequence[LossRow], path: str | Path) -> None:
    """Draws the rows as a PNG: of each race a panel over seconds, and below it one over steps.

    Over seconds each contender is shown by the run that is first at 1F1B's final loss, and a dot there; without one, by
    its run of equal time, else of equal steps. Over steps all are shown by their run of equal steps.

    Args:   path: the file, replaced if it exists; its folder is made.
    Raises: ValueError: no run.
    """
    of_all = [race for race in races(rows) if any(row.curve for row in race)]
    if not of_all:
        raise ValueError("draw_curves() got no run with a curve: train at least one schedule")
    entries = 1 + len({row.contender for race in of_all for row in race if row.curve})
    legend = 0.1 + LEGEND_LINE * -(-entries // LEGEND_COLUMNS)
    panels = Panels(width=WIDTH, left=LEFT, right=RIGHT, legend=legend, title=0.62, row=HEIGHT, axis=0.5, bottom=0.1)
    figure, all_axes = panels.canvas([1, 1] * len(of_all))
    handles: dict[str, Line2D] = {}
    for race, over_s, over_steps in zip(of_all, all_axes[::2], all_axes[1::2], strict=True):
        handles |= _draw(race, over_s, over_steps)
    _legend(figure, list(handles.values()))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")


def _draw(race: Sequence[LossRow], over_s: Axes, over_steps: Axes) -> dict[str, Line2D]:
    """The handles of its legend, by their text."""
    runs_of, handles = contenders(race), dict[str, Line2D]()
    baseline = best_run(next((runs for runs in runs_of if runs[0].schedule == "1F1B"), []), EQUAL_STEPS)
    for runs, style in zip(runs_of, _styles(runs_of), strict=True):
        equal = best_run(runs, EQUAL_STEPS)
        if equal is None:
            continue
        first = soonest(runs)
        over_s.plot(*_points(first or best_run(runs, EQUAL_TIME) or equal, 1), **style)
        over_steps.plot(*_points(equal, 0), **style)
        if first is not None and baseline is not None and first.seconds_to_100 is not None:
            over_s.plot(
                [first.seconds_to_100], [loss_at(baseline.curve, 1)], "o", color=style["color"], markersize=6, zorder=4
            )
        name = f"{equal.label}, M = {equal.microbatches}"
        if first is not None and first.time_to_1f1b_ratio is not None and first is not baseline:
            name += f": {first.time_to_1f1b_ratio:.2f} of its time"
        handles[name] = Line2D([], [], label=name, **style)
    head(over_s, f"{race[0].device}, {race[0].card}, seed {race[0].seed}", work(race))
    head(over_steps, "As many steps for all", "")
    for axes, below in ((over_s, "seconds of training"), (over_steps, "steps")):
        _dress(axes, below, race, baseline)
    if baseline is not None:
        level = "1F1B's final loss; dots: first there"
        handles[level] = Line2D([], [], label=level, color=BOUND_INK, linewidth=1.0, marker="o", markersize=5)
    return handles


def _styles(runs_of: Sequence[Sequence[LossRow]]) -> list[dict[str, Any]]:
    """A colour by schedule or policy; dashes tell those apart that share one."""
    styles, used = [], dict[str, int]()
    for runs in runs_of:
        colour = {**TORCH, **POLICIES}.get(runs[0].policy or runs[0].schedule, OTHER)
        number = used[colour] = used.get(colour, -1) + 1
        styles.append({"color": colour, "linestyle": DASHES[number % len(DASHES)], "linewidth": 1.8})
    return styles


def _points(run: LossRow, column: int) -> tuple[list[float], list[float]]:
    return [point[column] for point in run.curve], [point[2] for point in run.curve]


def _dress(axes: Axes, below: str, race: Sequence[LossRow], baseline: LossRow | None) -> None:
    frame(axes, "bits per byte, validation")
    axes.set_xlabel(below, color=INK, fontsize=10)
    axes.set_xlim(left=0)
    if baseline is None or baseline.final_bpb is None:
        return
    axes.axhline(baseline.final_bpb, color=BOUND_INK, linewidth=1.0, zorder=1)
    top = next(bpb for step, _, bpb in baseline.curve if step >= SHOWN_FROM * baseline.curve[-1][0])
    low = min(point[2] for row in race for point in row.curve)
    axes.set_ylim(low - 0.06 * (top - low), top + 0.06 * (top - low))


def _legend(figure: Figure, handles: Sequence[Line2D]) -> None:
    height = figure.get_figheight()
    figure.legend(
        handles=list(handles), loc="upper left", bbox_to_anchor=(LEFT / WIDTH, 1 - 0.1 / height), ncols=LEGEND_COLUMNS,
        frameon=False, borderaxespad=0, borderpad=0, handlelength=2.2, handletextpad=0.5, columnspacing=1.4,
        labelcolor=INK, fontsize=9.5,
    )  # fmt: skip
