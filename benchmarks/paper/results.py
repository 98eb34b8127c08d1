"""Rows as a Markdown table beside the paper's figures, and as a picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, stdev

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .figures import GIVEN, REMEMBERED
from .rows import HONEST_RULE, PAPER_RULE, PaperRow, chosen_by
from .ticks import plain_log_ticks

NAMES = {"no_bprop": "no backprop", "bprop": "backprop", "stale": "stale gradient", "dni": "DNI", "cdni": "cDNI"}
COLOURS = {"no_bprop": "#999999", "bprop": "#222222", "stale": "#e69f00", "dni": "#0072b2", "cdni": "#d55e00"}


def table(rows: Sequence[PaperRow]) -> str:
    """A line for each cell: both selections, the mean over the seeds with its spread, and the paper's figure."""
    lines = [
        "Test error, %: mean over the seeds, ± their standard deviation. Best test: predictor depth (or decay of the",
        "stale gradient) of the lowest test error, the paper's rule. Held out: that of the lowest error on training",
        "images that no model learned from.",
        "",
        "| dataset | layers | method | after layer | best test | held out | chosen by it | seeds | steps | paper "
        "| from memory, unverified |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for cell in sorted({row.cell for row in rows}):
        alike = [row for row in rows if row.cell == cell]
        row = alike[0]
        place = (row.dataset, row.layers, row.method, row.position)
        best, honest = (chosen_by(alike, rule) for rule in (PAPER_RULE, HONEST_RULE))
        parts = [
            row.dataset,
            f"{row.layers}",
            NAMES[row.method],
            "every" if row.position is None else f"{row.position}",
            _figure(best),
            _figure(honest),
            _choice(honest),
            f"{len(best)}",
            f"{row.steps}",
            _known(GIVEN.get(place)),
            _known(REMEMBERED.get(place)),
        ]
        lines.append("| " + " | ".join(parts) + " |")
    return "\n".join(lines) + "\n"


def picture(rows: Sequence[PaperRow], path: Path, x: str, of: Callable[[PaperRow], float]) -> None:
    """Test error by held-out choice over whatever `of` reads off a row; a line a method, level if it has one place."""
    figure, axes = _axes(x)
    levels = len({of(row) for row in rows}) > 1
    for method in (method for method in NAMES if any(row.method == method for row in rows)):
        chosen = [row for row in chosen_by(rows, HONEST_RULE) if row.method == method]
        places = sorted({of(row) for row in chosen})
        errors = [mean(row.test_error_percent for row in chosen if of(row) == place) for place in places]
        if levels and len(places) == 1:
            axes.axhline(errors[0], ls="--", color=COLOURS[method], label=NAMES[method], lw=1.2)
        else:
            axes.plot(places, errors, "o-", color=COLOURS[method], label=NAMES[method], lw=1.5, ms=4)
    if all(float(of(row)).is_integer() for row in rows):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False)
    figure.savefig(path)


def curves(rows: Sequence[PaperRow], path: Path) -> None:
    """Test error over steps by held-out choice; one line for each model."""
    figure, axes = _axes("step")
    for row in chosen_by(rows, HONEST_RULE):
        steps, errors = zip(*(point[:2] for point in row.curve), strict=True)
        label = f"{NAMES[row.method]}, {row.layers} layers, seed {row.seed}"
        axes.plot(steps, errors, color=COLOURS[row.method], label=label, lw=1.2)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path)


def _axes(x: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    axes.set(xlabel=x, ylabel="test error, %", yscale="log")
    plain_log_ticks(axes.yaxis)
    axes.grid(color="#e4e4e4", which="both")
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _figure(rows: Sequence[PaperRow]) -> str:
    errors = [row.test_error_percent for row in rows]
    return f"{mean(errors):.2f}" + (f" ± {stdev(errors):.2f}" if len(errors) > 1 else "")


def _choice(rows: Sequence[PaperRow]) -> str:
    row = rows[0]
    if row.method == "stale":
        return f"decay {row.decay:g}"
    return "" if row.predictor is None else f"{row.predictor} hidden"


def _known(error: float | None) -> str:
    return "" if error is None else f"{error:g}"
