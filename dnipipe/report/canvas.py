"""What all plots of the page share: fonts, colours, axes, and how they become pictures that need no other file."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import matplotlib
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

INK, GRID = "#333333", "#e6e6e6"
# Okabe and Ito's palette, which every eye can tell apart
SCHEDULES: Mapping[str, str] = MappingProxyType({"DNI": "#d55e00", "1F1B": "#0072b2", "GPipe": "#009e73"})
OTHERS = ("#cc79a7", "#e69f00", "#56b4e9", "#666666")
WIDTH_IN, HEIGHT_IN = 11.0, 3.3
MOST_LABELS = 8

STYLE: Mapping[str, Any] = MappingProxyType(
    {
        "font.family": "DejaVu Sans",  # comes with matplotlib: the same picture on every machine
        "font.size": 9.5,
        "axes.titlesize": 10.5,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.titlecolor": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": "#bbbbbb",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": GRID,
        "grid.linewidth": 0.8,
        "xtick.color": INK,
        "ytick.color": INK,
        "text.color": INK,
        "legend.frameon": False,
        "lines.linewidth": 1.6,
        "lines.solid_capstyle": "round",
        "svg.fonttype": "path",  # letters as shapes: a browser with other fonts shows the same
        "svg.hashsalt": "dnipipe",
    }
)


@contextmanager
def style() -> Iterator[None]:
    """Draws in the page's style, whatever the caller's own is, and leaves that as it was."""
    settings: Any = {**matplotlib.rcParamsDefault, "backend": "agg", **STYLE}
    with matplotlib.rc_context(settings):
        yield


def panels(count: int, *, across: int = 2, height_in: float = HEIGHT_IN) -> tuple[Figure, list[Axes]]:
    """So many axes, `across` in a row; a row that is not full leaves its rest empty."""
    rows = -(-count // across)
    figure = Figure(figsize=(WIDTH_IN, height_in * rows), layout=ConstrainedLayoutEngine(wspace=0.06, hspace=0.08))
    return figure, [figure.add_subplot(rows, across, index + 1) for index in range(count)]


def percent(share: float, _: object = None) -> str:
    """0.125 -> "12.5%", as a tick label."""
    return f"{100 * share:g}%"


def dress(axes: Axes, title: str, x_label: str) -> None:
    """The title says what is drawn and its unit; x begins at 0."""
    axes.set_title(title)
    axes.set_xlabel(x_label)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(7))
    axes.xaxis.set_major_formatter("{x:,g}")


def from_zero(axes: Axes) -> None:
    """y begins at 0, and what is nearly level has room above it."""
    axes.set_ylim(0, 1.06 * axes.get_ylim()[1])


def colours(schedules: Sequence[str]) -> dict[str, str]:
    """One colour for each schedule: its own, or the next of those that nobody has."""
    left = iter(OTHERS * len(schedules))
    return {name: SCHEDULES[name] if name in SCHEDULES else next(left) for name in schedules}


def ramp(parts: int) -> list[Any]:
    """Colours from dark to light for ranks, stages or boundaries, which have an order."""
    return [colormaps["viridis"](0.85 * index / max(parts - 1, 1)) for index in range(parts)]


def labelled(parts: int) -> set[int]:
    """Which of many parts a legend names: all, or a few that stand for those between them."""
    if parts <= MOST_LABELS:
        return set(range(parts))
    return {round(index * (parts - 1) / (MOST_LABELS - 1)) for index in range(MOST_LABELS)}


def legend(figure: Figure) -> None:
    """One for all panels, above them: what has the same name and colour is named once."""
    named: dict[str, Any] = {}
    for axes in figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        named |= {label: handle for label, handle in zip(labels, handles, strict=True) if label not in named}
    if named:
        # room at the left for no title: the legend begins where the axes begin
        figure.legend(
            list(named.values()), list(named), loc="outside upper left", ncols=len(named), borderaxespad=0.2,
            handlelength=1.4, handletextpad=0.5, columnspacing=1.6,
        )  # fmt: skip


def as_svg(figure: Figure) -> str:
    """The figure as a data URI, which any browser shows without asking anybody."""
    text = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(text, format="svg", metadata=nothing)
    return data_uri("image/svg+xml", text.getvalue().encode())


def data_uri(kind: str, content: bytes) -> str:
    """Args: kind: a media type, as "image/png"."""
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"
