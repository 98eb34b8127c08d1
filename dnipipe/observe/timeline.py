"""A picture of where the time went: one row per rank, one bar per span, the busy share at the right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from ..plan.panels import Panels
from .trace import Span

# In the legend's order. Okabe and Ito's palette, which every eye can tell apart; waiting is pale: it is no work.
COLOURS: Mapping[str, str] = MappingProxyType(
    {
        "forward": "#56b4e9",
        "early forward": "#f0e442",
        "backward": "#0072b2",
        "predict": "#e69f00",
        "learn": "#d55e00",
        "optimizer": "#009e73",
        "eval": "#cc79a7",
        "wait": "#d4d4d4",
    }
)
OTHER = "#666666"
DARK = frozenset({"backward", "optimizer", "learn"})  # bars whose numbers are white
INK = "#333333"

PANELS = Panels(width=12.0, left=0.85, right=0.75, legend=0.36, title=0.42, row=0.45, axis=0.3, bottom=0.3)
BAR_HEIGHT = 0.74
NUMBER_PT = 8.0


def draw_timeline(
    spans: Sequence[Span], path: str | Path, title: str, *, window_s: tuple[float, float] | None = None
) -> None:
    """Draws the spans of any number of ranks as a PNG.

    Args:
        spans: in any order. A name that the engine does not use gets one colour for all such names.
        path: the file, replaced if it exists; its folder is made.
        title: stands above the rows.
        window_s: (start, end) in seconds after the earliest span; only this is drawn, and its start is the picture's 0.

    Raises: ValueError: no spans, or none in the window.
    """
    _draw([_panel(spans, title, window_s)], path)


def draw_timelines(runs: Mapping[str, Sequence[Span]], path: str | Path) -> None:
    """Draws several runs one above the other as a PNG, each from its own 0, on one scale: what ends later is slower.

    Args:
        runs: the title and the spans of each, from top to bottom. path: as for draw_timeline().

    Raises: ValueError: no runs, or one without spans.
    """
    if not runs:
        raise ValueError("draw_timelines() got no runs: give the spans of at least one")
    _draw([_panel(spans, title, None) for title, spans in runs.items()], path)


@dataclass(frozen=True)
class _Panel:
    title: str
    spans: Sequence[Span]
    ranks: Sequence[int]
    start_s: float
    end_s: float


def _panel(spans: Sequence[Span], title: str, window_s: tuple[float, float] | None) -> _Panel:
    if not spans:
        raise ValueError("draw_timeline() got no spans: was the trace enabled during the steps meant to be seen?")
    first_s = min(span.start_s for span in spans)
    last_s = max(span.end_s for span in spans)
    start_s, end_s = (first_s, last_s) if window_s is None else (first_s + window_s[0], first_s + window_s[1])
    seen = [span for span in spans if span.end_s > start_s and span.start_s < end_s]
    if not seen:
        raise ValueError(f"window_s = {window_s} holds no span; the spans cover (0, {last_s - first_s:.6g}) seconds")
    return _Panel(title, seen, sorted({span.rank for span in spans}), start_s, end_s)


def _draw(panels: Sequence[_Panel], path: str | Path) -> None:
    figure, all_axes = PANELS.canvas([len(panel.ranks) for panel in panels])
    span_ms = max(panel.end_s - panel.start_s for panel in panels) * 1e3
    for panel, axes in zip(panels, all_axes, strict=True):
        _dress(axes, panel.ranks, span_ms)
        axes.set_title(panel.title, fontsize=12, fontweight="bold", color=INK, loc="left")
        for row, rank in enumerate(panel.ranks):
            row_spans = sorted((span for span in panel.spans if span.rank == rank), key=lambda span: span.start_s)
            _draw_row(axes, row, row_spans, panel.start_s, span_ms)
            share = busy_share(row_spans, panel.start_s, panel.end_s)
            axes.text(1.008, row, f"{share:.0%}", transform=axes.get_yaxis_transform(), va="center", color=INK)
        axes.text(1.008, -0.72, "busy", transform=axes.get_yaxis_transform(), va="center", color=INK, fontsize=9)
    all_axes[-1].set_xlabel("time (ms)", color=INK)
    _legend(figure, {span.name for panel in panels for span in panel.spans})
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")


def busy_share(spans: Sequence[Span], start_s: float, end_s: float) -> float:
    """The part of [start_s, end_s] in which some span of one rank is open and none named "wait" is, from 0 to 1."""
    edges: list[tuple[float, int, int]] = []
    for span in spans:
        work, wait = (0, 1) if span.name == "wait" else (1, 0)
        edges.append((min(max(span.start_s, start_s), end_s), work, wait))
        edges.append((min(max(span.end_s, start_s), end_s), -work, -wait))
    busy_s, before_s, working, waiting = 0.0, start_s, 0, 0
    for at_s, work, wait in sorted(edges):
        if working and not waiting:
            busy_s += at_s - before_s
        before_s, working, waiting = at_s, working + work, waiting + wait
    return busy_s / (end_s - start_s)


def _draw_row(axes: Axes, row: int, spans: Sequence[Span], zero_s: float, span_ms: float) -> None:
    """Draws spans in order of their start, so that one inside another lies on top of it."""
    point_ms = span_ms / ((PANELS.width - PANELS.left - PANELS.right) * 72)
    bars = []
    for span in spans:
        left, right = max((span.start_s - zero_s) * 1e3, 0.0), min((span.end_s - zero_s) * 1e3, span_ms)
        width_pt = (right - left) / point_ms
        # a bar wide enough to be seen as one gives up a hair, so that neighbours of one colour stay two
        bars.append((left, right - left - (0.4 * point_ms if width_pt > 2.5 else 0.0)))
        if span.microbatch is not None and _fits(str(span.microbatch), width_pt):
            ink = "white" if span.name in DARK else INK
            place = ((left + right) / 2, row)
            axes.text(*place, str(span.microbatch), ha="center", va="center", color=ink, size=NUMBER_PT)
    colours = [COLOURS.get(span.name, OTHER) for span in spans]
    # snap=False: a bar narrower than a pixel tints it, where snapping would drop it or give it the whole pixel
    axes.broken_barh(bars, (row - BAR_HEIGHT / 2, BAR_HEIGHT), facecolors=colours, linewidth=0, snap=False)


def _fits(text: str, width_pt: float) -> bool:
    digit_pt = 0.64 * NUMBER_PT
    return len(text) * digit_pt + 2.0 <= width_pt


def _dress(axes: Axes, ranks: Sequence[int], span_ms: float) -> None:
    axes.set_xlim(0, span_ms)
    axes.set_ylim(len(ranks) - 0.5, -0.5)
    axes.set_yticks(range(len(ranks)), [f"rank {rank}" for rank in ranks])
    axes.tick_params(colors=INK, length=3)
    axes.tick_params(axis="y", length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#bbbbbb")


def _legend(figure: Figure, names: set[str]) -> None:
    left, height_in = PANELS.left / PANELS.width, figure.get_figheight()
    labels = [name for name in COLOURS if name in names] + sorted(names - set(COLOURS))
    figure.legend(
        handles=[Patch(facecolor=COLOURS.get(name, OTHER), label=name) for name in labels],
        loc="center left", bbox_to_anchor=(left, 1 - 0.22 / height_in), ncols=len(labels), frameon=False,
        borderaxespad=0, borderpad=0, handlelength=1.0, handleheight=1.0, handletextpad=0.5, columnspacing=1.4,
        labelcolor=INK, fontsize=9.5,
    )  # fmt: skip
