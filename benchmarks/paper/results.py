"""Rows as a Markdown table beside the paper's figures, and as a picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .convolutional_figures import REMEMBERED_CONVOLUTIONAL
from .figures import GIVEN, REMEMBERED
from .rows import HONEST_RULE, PAPER_RULE, PaperRow, chosen_by
from .ticks import plain_log_ticks

NAMES = {"no_bprop": "no backprop", "bprop": "backprop", "stale": "stale gradient", "dni": "DNI", "cdni": "cDNI"}
NARROW = 4
"""Errors whose ratio is less are drawn on a linear scale: a logarithmic one would have too few numbers along it."""
COLOURS = {"no_bprop": "#999999", "bprop": "#222222", "stale": "#e69f00", "dni": "#0072b2", "cdni": "#d55e00"}


def table(rows: Sequence[PaperRow]) -> str:
    """A line for each cell: both selections, the mean over the seeds with its spread, and the paper's figure."""
    lines = [
        "Test error, %: mean over the seeds, ± their standard deviation. Best test: predictor depth (or decay of the",
        "stale gradient) of the lowest test error, the paper's rule. Held out: that of the lowest error on training",
        "images that no model learned from.",
        "",
        "| network | dataset | layers | method | after layer | best test | chosen by it | held out | chosen by it "
        "| seeds | steps | paper | from memory, unverified |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    recipes = {row.recipe for row in rows}
    for cell in sorted({row.cell for row in rows}):
        alike = [row for row in rows if row.cell == cell]
        row = alike[0]
        given, remembered = _known(row)
        best, honest = (chosen_by(alike, rule) for rule in (PAPER_RULE, HONEST_RULE))
        parts = [
            row.model + ("" if len(recipes) == 1 else f", {row.recipe}"),
            row.dataset,
            f"{row.layers}",
            NAMES[row.method],
            "every" if row.position is None else f"{row.position}",
            _figure(best),
            _choice(best),
            _figure(honest),
            _choice(honest),
            f"{len(best)}",
            f"{row.steps}",
            given,
            remembered,
        ]
        lines.append("| " + " | ".join(parts) + " |")
    return "\n".join([*lines, "", *_speed(rows)]) + "\n"


def picture(rows: Sequence[PaperRow], path: Path, x: str, of: Callable[[PaperRow], float | None]) -> None:
    """Test error by held-out choice over whatever `of` reads off a row, with its spread over the seeds.

    A panel for each dataset, network, recipe and number of steps; in it a line for each method, a level one where `of`
    reads None: the method has no such thing.
    """
    panels = sorted({(row.dataset, row.model, row.recipe, row.steps) for row in rows})
    figure, all_axes = _panels(x, len(panels))
    for axes, panel in zip(all_axes, panels, strict=True):
        axes.set_title(f"{panel[0]}, {panel[1]}, {panel[3]} steps", fontsize=10)
        chosen = chosen_by(rows, HONEST_RULE)
        here = [row for row in chosen if (row.dataset, row.model, row.recipe, row.steps) == panel]
        _lines(axes, here, of)
        errors = [row.test_error_percent for row in here]
        if max(errors) < NARROW * min(errors):
            axes.set_yscale("linear")
    handles = {
        label: handle for axes in all_axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    labels = [name for name in NAMES.values() if name in handles]
    used = [handles[label] for label in labels]
    figure.legend(used, labels, loc="outside right upper", frameon=False, fontsize=9)
    figure.savefig(path)


def curves(rows: Sequence[PaperRow], path: Path) -> None:
    """Test error over steps by held-out choice; one line for each model."""
    figure, (axes,) = _panels("step", 1)
    for row in chosen_by(rows, HONEST_RULE):
        steps, errors = zip(*(point[:2] for point in row.curve), strict=True)
        label = f"{NAMES[row.method]}, {row.layers} layers, seed {row.seed}"
        axes.plot(steps, errors, color=COLOURS[row.method], label=label, lw=1.2)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path)


def _lines(axes: Axes, rows: Sequence[PaperRow], of: Callable[[PaperRow], float | None]) -> None:
    placed = [(place, row) for row in rows if (place := of(row)) is not None]
    if all(float(place).is_integer() for place, _ in placed):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for method in (method for method in NAMES if any(row.method == method for row in rows)):
        look: dict[str, Any] = {"color": COLOURS[method], "label": NAMES[method]}
        by_place: dict[float, list[float]] = {}
        for place, row in sorted(placed, key=lambda pair: pair[0]):
            if row.method == method:
                by_place.setdefault(place, []).append(row.test_error_percent)
        if by_place:
            means, spread = zip(*((mean(e), stdev(e) if len(e) > 1 else 0.0) for e in by_place.values()), strict=True)
            axes.errorbar(list(by_place), means, spread, fmt="o-", lw=1.5, ms=4, capsize=2, **look)
        else:
            level = mean(row.test_error_percent for row in rows if row.method == method)
            axes.axhline(level, ls="--", lw=1.2, **look)


def _panels(x: str, count: int) -> tuple[Figure, list[Axes]]:
    columns = min(2, count)
    lines = -(-count // columns)
    figure = Figure(figsize=(2 + 5 * columns, 0.5 + 4 * lines), dpi=120, layout="constrained")
    panels = [figure.add_subplot(lines, columns, number + 1) for number in range(count)]
    for number, axes in enumerate(panels):
        axes.set(xlabel=x, yscale="log", ylabel="" if number % columns else "test error, %")
        plain_log_ticks(axes.yaxis)
        axes.grid(color="#e4e4e4", which="both")
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels


def _figure(rows: Sequence[PaperRow]) -> str:
    errors = [row.test_error_percent for row in rows]
    return f"{mean(errors):.2f}" + (f" ± {stdev(errors):.2f}" if len(errors) > 1 else "")


def _choice(rows: Sequence[PaperRow]) -> str:
    row = rows[0]
    if row.method == "stale":
        return f"decay {row.decay:g}"
    return "" if row.predictor is None else f"{row.predictor} hidden"


def _known(row: PaperRow) -> tuple[str, str]:
    """What the paper's text gives, and what is remembered of its tables."""
    place = row.dataset, row.layers, row.method, row.position
    tables = (GIVEN, REMEMBERED) if row.model == "fcn" else ({}, REMEMBERED_CONVOLUTIONAL)
    given, remembered = (table.get(place) for table in tables)
    return "" if given is None else f"{given:g}", "" if remembered is None else f"{remembered:g}"


def _speed(rows: Sequence[PaperRow]) -> list[str]:
    """How fast the models of each network and card were trained, evaluations included."""
    lines = []
    for network, device in sorted({(row.model, row.device) for row in rows}):
        alike = [row for row in rows if (row.model, row.device) == (network, device)]
        seconds = sum(row.seconds_of_stack / row.models_of_stack for row in alike)
        steps = sum(row.steps for row in alike)
        rate = f"{steps / seconds:.0f} steps of a model a second, {3600 * len(alike) / seconds:.0f} models an hour"
        lines.append(f"{network} on {device}: {len(alike)} models in {seconds:.0f} s: {rate}.")
    return lines
