"""A picture of both engines' throughput: two bars per number of microbatches, and a line for the bubble alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from dnipipe.plan.panels import Panels

from .bars import BOUND_INK, DNI, INK, TORCH, frame, head
from .deepspeed_rows import NAMES, OURS, PLAIN, DeepSpeedRow, title, work, workloads

COLOURS = {PLAIN: TORCH["1F1B"], OURS: DNI["DNI linear"]}
NUMBERS = {PLAIN: "#ffffff", OURS: INK}
WIDTH, LEFT, RIGHT, HEIGHT = 10.0, 0.85, 0.25, 3.0  # inches: of the picture, of its margins, of a panel
MAX_SLOT = 1.1  # inches from bar to bar
BAR_WIDTH, GAP = 0.86, 0.8  # of the place of a bar, which is 1 wide; between two groups


def draw_bars(rows: Sequence[DeepSpeedRow], path: str | Path) -> None:
    """Draws the rows as a PNG, one panel per workload.

    Args:   path: the file, replaced if it exists; its folder is made.
    Raises: ValueError: no rows.
    """
    if not rows:
        raise ValueError("draw_bars() got no rows: measure at least one engine")
    panels = Panels(width=WIDTH, left=LEFT, right=RIGHT, legend=0.45, title=0.62, row=HEIGHT, axis=0.4, bottom=0.1)
    figure, all_axes = panels.canvas([1] * len(workloads(rows)))
    for alike, axes in zip(workloads(rows), all_axes, strict=True):
        _dress(axes, alike[0])
        _draw(axes, alike)
    handles: list[Patch | Line2D] = [Patch(linewidth=0, facecolor=COLOURS[key], label=NAMES[key]) for key in COLOURS]
    handles.append(Line2D([], [], color=BOUND_INK, linewidth=1.2, label="plain without its bubble: x (M + S - 1) / M"))
    figure.legend(
        handles=handles, loc="center left", bbox_to_anchor=(LEFT / WIDTH, 1 - 0.25 / figure.get_figheight()), ncols=3,
        frameon=False, borderaxespad=0, borderpad=0, handlelength=1.0, handleheight=1.0, handletextpad=0.5,
        columnspacing=1.4, labelcolor=INK, fontsize=9.5,
    )  # fmt: skip
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")


def _draw(axes: Axes, rows: Sequence[DeepSpeedRow]) -> None:
    counts = sorted({row.microbatches for row in rows})
    plain = {row.microbatches: row.tokens_per_s for row in rows if row.engine == PLAIN}
    places = {count: number * (len(COLOURS) + GAP) for number, count in enumerate(counts)}
    reaches = [plain[row.microbatches] * row.bound for row in rows if row.microbatches in plain]
    top = max([*(row.tokens_per_s for row in rows), *reaches]) * 1.12
    for row in rows:
        middle = places[row.microbatches] + list(COLOURS).index(row.engine)
        axes.bar(middle, row.tokens_per_s, BAR_WIDTH, linewidth=0, zorder=2, color=COLOURS[row.engine])
        # at the foot, where no line strikes it through
        number = f"{row.tokens_per_s:,.0f}"
        axes.annotate(
            number, (middle, 0), (0, 5), textcoords="offset points", ha="center", color=NUMBERS[row.engine], size=9
        )
        if row.engine == OURS and row.microbatches in plain:
            reach, base = plain[row.microbatches] * row.bound, row.tokens_per_s
            axes.hlines(reach, middle - BAR_WIDTH / 2, middle + BAR_WIDTH / 2, color=BOUND_INK, linewidth=1.2, zorder=3)
            if base - 0.02 * top < reach < base + 0.07 * top:  # the line would touch what stands on the bar
                base = reach
            axes.annotate(
                f"x {row.speedup:.2f}", (middle, base), (0, 4), textcoords="offset points", ha="center", color=INK,
                size=10, weight="bold",
            )  # fmt: skip
    used = max(places.values()) + len(COLOURS) + GAP
    axes.set_ylim(0, top)
    axes.set_xlim(-0.5 - GAP / 2, -0.5 - GAP / 2 + max(used, (WIDTH - LEFT - RIGHT) / MAX_SLOT))
    axes.set_xticks([place + 0.5 for place in places.values()], [f"M = {count}" for count in counts], fontsize=10)


def _dress(axes: Axes, row: DeepSpeedRow) -> None:
    head(axes, title(row), work(row))
    frame(axes, "tokens per second")
    axes.yaxis.set_major_formatter("{x:,.0f}")
