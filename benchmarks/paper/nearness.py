"""How near an interface comes to the true gradient while all learns, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .rows import PaperRow

MEASURES = ("L2 distance", "cosine", "wrong signs, %")
STYLES = {"dni": ":", "cdni": "-"}


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
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=8)
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
            colour = colormaps["viridis"](0.9 * (position - 1) / max(1, len(positions) - 1))
            label = f"{'cDNI' if method == 'cdni' else 'DNI'}, after layer {position}"
            axes.plot(steps, means, style, color=colour, lw=1.3, label=label)


def _dress(axes: Axes, measure: str, scale: str) -> None:
    axes.set(ylabel=measure, yscale=scale)
    axes.grid(color="#e4e4e4")
    axes.spines[["top", "right"]].set_visible(False)
