"""A picture of utilisation: a group of bars per number of microbatches, on each bar a line where theory ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from dnipipe.plan.panels import Panels

from .rows import Row, place, side_by_side, work

# In the order of the bars. Okabe and Ito's palette, which every eye can tell apart: torch's schedules cool, DNI warm.
TORCH: Mapping[str, str] = MappingProxyType(
    {
        "GPipe": "#bbbbbb",
        "1F1B": "#777777",
        "Interleaved1F1B": "#56b4e9",
        "InterleavedZeroBubble": "#0072b2",
        "ZBVZeroBubble": "#009e73",
    }
)
DNI: Mapping[str, str] = MappingProxyType(
    {"DNI linear": "#e69f00", "DNI local_head": "#d55e00", "DNI transformer": "#cc79a7"}
)
LATE: Mapping[str, str] = MappingProxyType(
    {"DNI stale": "#8b4513", "DNI local_head corrected": "#f4a582", "DNI transformer corrected": "#882255"}
)
OTHER = "#f0e442"
DIRECT = " direct"  # ends the label of a row whose transport is direct
INK, BOUND_INK, FAINT = "#333333", "#000000", "#e4e4e4"

SLOT, MAX_SLOT = 0.36, 0.8  # inches from bar to bar: no less than the number above one takes
BAR_WIDTH = 0.86  # of a slot
GAP = 1.2  # slots between two groups
MIN_WIDTH, HEIGHT = 10.0, 2.7  # inches: of the picture, of a panel
TOP = 1.12  # of the axis: leaves room for a number above a full bar
NUMBER_PT = 9.0
NUMBER_HEIGHT = NUMBER_PT * 0.73 / (HEIGHT * 72) * TOP  # of a digit, on the axis
PAD = 0.015


def draw_bars(rows: Sequence[Row], path: str | Path) -> None:
    """Draws the rows as a PNG: one panel per workload, one above the other, bars of one width in all.

    Args:   path: the file, replaced if it exists; its folder is made.
    Raises: ValueError: no rows.
    """
    if not rows:
        raise ValueError("draw_bars() got no rows: measure at least one schedule")
    labels = _labels(rows)
    workloads = side_by_side(rows)
    num_groups = max(len({row.microbatches for row in workload}) for workload in workloads)
    num_slots = num_groups * (len(labels) + GAP)
    left, right = 0.75, 0.25
    inner = max(num_slots * SLOT, MIN_WIDTH - left - right)
    width = left + inner + right
    panels = Panels(width=width, left=left, right=right, legend=0.65, title=0.62, row=HEIGHT, axis=0.4, bottom=0.1)
    figure, all_axes = panels.canvas([1] * len(workloads))
    for workload, axes in zip(workloads, all_axes, strict=True):
        _dress(axes)
        _title(axes, workload)
        axes.set_xlim(0, max(num_slots, inner / MAX_SLOT))
        axes.set_ylim(0, max(TOP, *(PAD + NUMBER_HEIGHT + (row.utilisation or 0.0) for row in workload)))
        _draw_workload(axes, workload, labels)
    _legends(figure, labels, left / width)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")


def _labels(rows: Sequence[Row]) -> list[str]:
    """All schedules, in the order of their bars."""
    measured = dict.fromkeys(row.label for row in rows)
    known = [*TORCH, *(label + suffix for suffix in ("", DIRECT) for label in (*DNI, *LATE))]
    return [label for label in known if label in measured] + [label for label in measured if label not in known]


def _style(label: str) -> dict[str, Any]:
    """Direct copies look like what carries them out, hatched."""
    colour = {**TORCH, **DNI, **LATE}.get(label.removesuffix(DIRECT), OTHER)
    return {"facecolor": colour, "edgecolor": "#ffffff", "hatch": "///" if label.endswith(DIRECT) else ""}


def _draw_workload(axes: Axes, workload: Sequence[Row], labels: Sequence[str]) -> None:
    counts = sorted({row.microbatches for row in workload})
    lefts = {count: GAP / 2 + number * (len(labels) + GAP) for number, count in enumerate(counts)}
    for row in workload:
        _draw_bar(axes, row, lefts[row.microbatches] + labels.index(row.label) + 0.5)
    sizes = {row.microbatches: row.microbatch_size for row in workload}
    cut = {count: f" of {sizes[count]} sequences" if len(set(sizes.values())) > 1 else "" for count in counts}
    middles = [left + len(labels) / 2 for left in lefts.values()]
    axes.set_xticks(middles, [f"M = {count}{cut[count]}" for count in counts], fontsize=10)


def _draw_bar(axes: Axes, row: Row, middle: float) -> None:
    """middle: in slots."""
    if row.refused is not None:
        axes.text(middle, 0.02, "refused", rotation=90, ha="center", va="bottom", color=INK, size=NUMBER_PT)
        return
    if row.bound is not None:
        edges = (middle - BAR_WIDTH / 2, middle + BAR_WIDTH / 2)
        axes.hlines(row.bound, *edges, color=BOUND_INK, linewidth=1.2, zorder=3)
    if row.utilisation is None:
        axes.text(middle, 0.02, "–", ha="center", va="bottom", color=INK, size=NUMBER_PT)
        return
    axes.bar(middle, row.utilisation, BAR_WIDTH, linewidth=0, zorder=2, **_style(row.label))
    base = _number_base(row.utilisation, row.bound)
    axes.text(middle, base, f"{row.utilisation:.2f}", ha="center", va="baseline", color=INK, size=NUMBER_PT)


def _number_base(value: float, bound: float | None) -> float:
    """Where a number stands: right above its bar, or above the bound where that would strike it through."""
    return bound + PAD if bound is not None and value - PAD < bound < value + NUMBER_HEIGHT + 2 * PAD else value + PAD


def _dress(axes: Axes) -> None:
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "0.25", "0.5", "0.75", "1"], fontsize=9)
    frame(axes, "utilisation")


def frame(axes: Axes, quantity: str) -> None:
    """What stands around bars: the name of their height, lines behind them, and only the foot of a box."""
    axes.set_ylabel(quantity, color=INK, fontsize=10)
    axes.grid(axis="y", color=FAINT, linewidth=0.8, zorder=0)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#bbbbbb")


def _title(axes: Axes, workload: Sequence[Row]) -> None:
    head(axes, place(workload[0]), work(workload))


def head(axes: Axes, where: str, what: str) -> None:
    """Two lines above a panel: what it ran on, and the work."""
    axes.set_title(where, fontsize=12, fontweight="bold", color=INK, loc="left", pad=20)
    axes.annotate(what, (0, 1), (0, 6), xycoords="axes fraction", textcoords="offset points", color=INK, size=9.5)


def _legends(figure: Figure, labels: Sequence[str], left: float) -> None:
    """Two lines: torch's schedules, and below them the others with the bound."""
    height = figure.get_figheight()
    bound = Line2D([], [], color=BOUND_INK, linewidth=1.2, label="what theory allows")
    first: list[Patch | Line2D] = [_patch(label) for label in labels if label in TORCH]
    second: list[Patch | Line2D] = [_patch(label) for label in labels if label not in TORCH]
    for handles, inches in ((first, 0.22), ([*second, bound], 0.47)):
        figure.legend(
            handles=handles, loc="center left", bbox_to_anchor=(left, 1 - inches / height), ncols=max(len(handles), 1),
            frameon=False, borderaxespad=0, borderpad=0, handlelength=1.0, handleheight=1.0, handletextpad=0.5,
            columnspacing=1.4, labelcolor=INK, fontsize=9.5,
        )  # fmt: skip


def _patch(label: str) -> Patch:
    return Patch(linewidth=0, label=label, **_style(label))
