"""A picture of schedules: one panel each, one row per stage, all on one time scale.

What runs on from step to step is drawn as far as the slowest of the others takes, so the eye can count its steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from .action import Op
from .memory import peak_in_flight
from .panels import Panels
from .simulate import Run, Span

# Okabe and Ito's palette. The colours of forward and backward are those of the measured timelines.
COLOURS: Mapping[Op, str] = MappingProxyType({Op.FORWARD: "#56b4e9", Op.BACKWARD: "#0072b2", Op.WEIGHT: "#f0e442"})
LABELS: Mapping[Op, str] = MappingProxyType(
    {Op.FORWARD: "forward", Op.BACKWARD: "backward (where split: of the input)", Op.WEIGHT: "backward of the weights"}
)
INK, STEP_INK, IDLE = "#333333", "#d55e00", "#f1f1f1"
PANELS = Panels(width=12.0, left=0.85, right=0.75, legend=0.45, title=0.34, row=0.26, axis=0.2, bottom=0.45)
BAR_HEIGHT = 0.8
NUMBER_PT = 7.0


def draw_schedules(runs: Sequence[Run], folder: str | Path, name: str = "plan") -> tuple[Path, Path]:
    """Draws simulated schedules one above the other as NAME.png and NAME.svg; returns both paths.

    Args:   folder: made if it is not there; files in it are replaced.
    Raises: ValueError: no runs.
    """
    if not runs:
        raise ValueError("draw_schedules() got no runs: simulate at least one schedule")
    figure, all_axes = PANELS.canvas([run.schedule.num_stages for run in runs])
    end_ms = _end_ms(runs)
    for run, axes in zip(runs, all_axes, strict=True):
        _draw_run(axes, run, end_ms)
    all_axes[-1].set_xlabel("time (ms)", color=INK)
    all_axes[-1].tick_params(labelbottom=True)
    _legend(figure, runs)
    Path(folder).mkdir(parents=True, exist_ok=True)
    png, svg = Path(folder) / f"{name}.png", Path(folder) / f"{name}.svg"
    figure.savefig(png, format="png")
    # no date and no random names: the same plan gives the same file
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(svg, format="svg", metadata={"Date": None})
    return png, svg


def _end_ms(runs: Sequence[Run]) -> float:
    """Where the picture ends: with the last flush; if nothing flushes, after two steps."""
    flushes = [max(ends[-1] for ends in run.ends) * run.times.tick_ms for run in runs if run.schedule.num_steps == 1]
    return float(max(flushes) if flushes else 2 * max(run.step_ms for run in runs))


def _draw_run(axes: Axes, run: Run, end_ms: float) -> None:
    _dress(axes, run.schedule.num_stages, end_ms)
    runs_on = " in the steady state" if run.schedule.num_steps > 1 else ""
    step = f"bubble {float(run.bubble):.1%}, step {float(run.step_ms):.4g} ms{runs_on}"
    title = f"{run.schedule.name}   {step}, at most {max(peak_in_flight(run.schedule))} in flight"
    axes.set_title(title, fontsize=10, color=INK, loc="left", pad=4)
    for stage in range(run.schedule.num_stages):
        spans = [span for span in run.spans(stage) if span.start_ms < end_ms]
        _draw_stage(axes, stage, spans, run.schedule.num_microbatches, end_ms)


def _draw_stage(axes: Axes, stage: int, spans: Sequence[Span], per_step: int, end_ms: float) -> None:
    point_ms = end_ms / ((PANELS.width - PANELS.left - PANELS.right) * 72)
    bottom = stage - BAR_HEIGHT / 2
    bars = []
    for span in spans:
        left, right = float(span.start_ms), min(float(span.end_ms), end_ms)
        width_pt = (right - left) / point_ms
        # a bar wide enough to be seen as one gives up a hair, so that neighbours of one colour stay two
        bars.append((left, right - left - (0.4 * point_ms if width_pt > 2.5 else 0.0)))
        number = str(span.action.microbatch % per_step)
        if len(number) * 0.64 * NUMBER_PT + 1.5 <= width_pt:
            ink = "white" if span.action.op is Op.BACKWARD else INK
            axes.text((left + right) / 2, stage, number, ha="center", va="center_baseline", color=ink, size=NUMBER_PT)
        if span.action.op is Op.FORWARD and span.action.microbatch and span.action.microbatch % per_step == 0:
            axes.plot([left, left], [bottom - 0.08, bottom + BAR_HEIGHT + 0.08], color=STEP_INK, linewidth=1.6)
    axes.broken_barh(
        bars, (bottom, BAR_HEIGHT), facecolors=[COLOURS[span.action.op] for span in spans], linewidth=0, snap=False
    )


def _dress(axes: Axes, num_stages: int, end_ms: float) -> None:
    axes.set_xlim(0, end_ms)
    axes.set_ylim(num_stages - 0.5, -0.5)
    axes.set_yticks(range(num_stages), [f"stage {stage}" for stage in range(num_stages)], fontsize=8)
    axes.set_facecolor(IDLE)
    axes.tick_params(colors=INK, length=3, labelbottom=False, labelsize=8)
    axes.tick_params(axis="y", length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#bbbbbb")


def _legend(figure: Figure, runs: Sequence[Run]) -> None:
    used = {action.op for run in runs for actions in run.schedule.stages for action in actions}
    handles: list[Patch | Line2D] = [Patch(facecolor=COLOURS[op], label=LABELS[op]) for op in Op if op in used]
    handles.append(Patch(facecolor=IDLE, label="idle"))
    if any(run.schedule.num_steps > 1 for run in runs):
        handles.append(Line2D([], [], color=STEP_INK, linewidth=1.6, label="a new step begins, with no flush"))
    corner = (PANELS.left / PANELS.width, 1 - 0.24 / figure.get_figheight())
    figure.legend(
        handles=handles, loc="center left", bbox_to_anchor=corner,
        ncols=len(handles), frameon=False, borderaxespad=0, borderpad=0, handlelength=1.0, handletextpad=0.5,
        columnspacing=1.4, labelcolor=INK, fontsize=9,
    )  # fmt: skip
