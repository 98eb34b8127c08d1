"""One picture of what each policy costs and saves: loss above backprop against the time of 1F1B's run.

python -m benchmarks.policy_map benchmarks/results/policies_25m.json docs/policies.png
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from benchmarks.policy_curves import COLOURS, FAINT, INK, name_of
from benchmarks.policy_rows import Line, PolicyRow, lines_of
from benchmarks.rows import grouped, read_rows_of
from dnipipe.plan.theory import flushing_bubble

MARKS = "osD^vPX"  # one for each number of microbatches
MAX_EXCESS = 14.0  # per cent; what is above stands at the edge, with its number


def draw_map(rows: Sequence[PolicyRow], path: Path, num_stages: int = 4) -> None:
    """One panel for each optimizer: right of 1 is slower than 1F1B at as many microbatches, above 0 learns worse.

    Time is the planner's, for the run's steps, with the synchronous part, predictors and second backwards; without
    transfers. Backprop is the same for all M, and stands at (1, 0).
    """
    lines = [line for line in lines_of(rows) if line.row.stages == num_stages and line.excess is not None]
    lines = [line for line in lines if line.row.policy != "wait"]
    panels = grouped(lines, lambda line: line.row.optimizer)
    names = dict.fromkeys(name_of(line.row) for line in lines)
    colours = dict(zip(names, itertools.cycle(COLOURS), strict=False))
    counts = sorted({line.row.microbatches for line in lines}, reverse=True)
    marks = dict(zip(counts, itertools.cycle(MARKS), strict=False))
    figure = Figure(figsize=(6.0 * len(panels) + 2.8, 4.6), dpi=130, layout="constrained")
    all_axes = [figure.add_subplot(1, len(panels), number + 1) for number in range(len(panels))]
    for axes, panel in zip(all_axes, panels, strict=True):
        _draw(axes, panel, colours, marks)
        axes.set_title(f"{panel[0].row.optimizer}, {num_stages} stages")
        axes.set_xlabel("time of the same steps, in runs of 1F1B")
    all_axes[0].set_ylabel("bits per byte above backprop, %")
    handles = [Line2D([], [], color=colour, lw=0, marker="o", ms=8, label=name) for name, colour in colours.items()]
    handles += [Line2D([], [], color="#777777", lw=0, marker=mark, ms=7, label=f"M = {m}") for m, mark in marks.items()]
    figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=9)
    figure.savefig(path)


def _draw(axes: Axes, panel: Sequence[Line], colours: dict[str, str], marks: dict[int, str]) -> None:
    axes.axhline(0, color=INK, lw=0.8)
    axes.axvline(1, color=INK, lw=0.8)
    axes.plot([1], [0], marker="*", ms=13, color=INK)
    axes.annotate("1F1B", (1, 0), xytext=(6, 6), textcoords="offset points", color=INK, fontsize=9)
    beyond: dict[float, list[str]] = {}
    for line in panel:
        row, excess = line.row, 100 * (line.excess or 0.0)
        bubble = float(flushing_bubble(row.stages, row.microbatches))
        x, y = (1 - bubble) / row.mean_utilisation, min(excess, MAX_EXCESS)
        axes.plot([x], [y], marker=marks[row.microbatches], ms=8, color=colours[name_of(row)], alpha=0.85, ls="none")
        if excess > MAX_EXCESS:
            beyond.setdefault(round(x, 2), []).append(f"+{excess:.0f} %")
    for x, texts in beyond.items():
        where = {"xytext": (0, 7), "textcoords": "offset points", "ha": "center", "fontsize": 8}
        axes.annotate(", ".join(texts), (x, MAX_EXCESS), color=INK, **where)  # type: ignore[arg-type]
    axes.set_xlim(left=0)
    axes.set_ylim(-0.6, MAX_EXCESS * 1.1)
    axes.grid(color=FAINT)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.policy_map", description="Loss against time saved.")
    parser.add_argument("rows", type=Path, help="JSON of benchmarks.policies")
    parser.add_argument("picture", type=Path, help="PNG to write")
    options = parser.parse_args(arguments)
    draw_map(read_rows_of(PolicyRow, options.rows), options.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
