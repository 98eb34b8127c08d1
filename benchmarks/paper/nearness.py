"""How near an interface comes to the true gradient while all learns, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from .results import NAMES
from .rows import PaperRow
from .ticks import plain_log_ticks

MEASURES = ("L2 distance", "cosine", "wrong signs, %")
STYLES = {"cdni": "-", "dni": ":"}


def nearness_picture(rows: Sequence[PaperRow], path: Path) -> None:
    """Rows: a measure each; columns: hidden layers of the interface; a line for each position, solid with the label.

    Args:    rows: those whose curves have the measures are drawn, as the mean over their seeds.
    """
    measured = [row for row in rows if row.curve and len(row.curve[-1]) == 2 + len(MEASURES)]
    depths = sorted({row.predictor or 0 for row in measured})
    if not depths:
        return
    figure = Figure(figsize=(3 + 3 * len(depths), 8), dpi=120, layout="constrained")
    panels = figure.subplots(len(MEASURES), len(depths), sharex=True, sharey="row", squeeze=False)
    for column, depth in enumerate(depths):
        alike = [row for row in measured if row.predictor == depth]
        for number, measure in enumerate(MEASURES):
            axes = panels[number][column]
            _lines(axes, alike, 2 + number, scale=100 if number == 2 else 1)
            _dress(axes, measure if column == 0 else "", "log" if number == 0 else "linear")
        panels[0][column].set_title("linear" if depth == 0 else f"{depth} hidden", fontsize=10)
        panels[-1][column].set_xlabel("step")
    figure.legend(handles=_key(measured), loc="outside right upper", frameon=False, fontsize=8)
    figure.savefig(path)


def _lines(axes: Axes, rows: Sequence[PaperRow], index: int, scale: float) -> None:
    positions = sorted({row.position or 0 for row in rows})
    for position in positions:
        for method, style in STYLES.items():
            curves = [row.curve for row in rows if row.position == position and row.method == method]
            if not curves:
                continue
            steps = [point[0] for point in curves[0]]
            means = [scale * mean(point[index] for point in points) for points in zip(*curves, strict=True)]
            axes.plot(steps, means, style, color=_colour(position, len(positions)), lw=1.3)


def _key(rows: Sequence[PaperRow]) -> list[Line2D]:
    positions = sorted({row.position or 0 for row in rows})
    colours = [
        Line2D([], [], color=_colour(position, len(positions)), label=f"after layer {position}")
        for position in positions
    ]
    return colours + [
        Line2D([], [], color="#555555", ls=style, label=NAMES[method]) for method, style in STYLES.items()
    ]


def _colour(position: int, count: int) -> tuple[float, float, float, float]:
    return colormaps["viridis"](0.9 * (position - 1) / max(1, count - 1))


def _dress(axes: Axes, measure: str, scale: str) -> None:
    axes.set(ylabel=measure, yscale=scale)
    if scale == "log":
        plain_log_ticks(axes.yaxis)
    axes.grid(color="#e4e4e4")
    axes.spines[["top", "right"]].set_visible(False)
