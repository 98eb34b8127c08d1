"""The plots of the page. Each is a picture as a data URI, or None where nothing is known to draw."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from .canvas import as_svg, colours, dress, from_zero, labelled, legend, panels, percent, ramp, style
from .curves import Curve, Floats, Track, growth, known, smooth, thin

SECONDS, STEPS = "seconds of training", "steps"
MOST_PALE = 4
"""Curves in a panel that are drawn as measured, too; more would hide each other."""


def loss(tracks: Sequence[Track], unit: str) -> str | None:
    """The true loss against seconds and against steps, as it came and smoothed; a dot for each validation.

    In bits per byte or token, so that both kinds of loss stand on one axis.
    """
    tracks = [track for track in tracks if len(track.losses()[2]) or _has(track.numbers("val_bits"))]
    if not tracks:
        return None
    with style():
        figure, (over_time, over_steps) = panels(2, height_in=4.0)
        tops = []
        for track, colour in _coloured(tracks):
            step, seconds, nats = track.losses()
            bits, validated = nats / math.log(2), track.numbers("val_bits")
            for axes, x, key in ((over_time, seconds, "elapsed_s"), (over_steps, step, "step")):
                _draw(axes, x, bits, colour, track.schedule, share=0.01)
                dots = known(track.numbers(key), validated)
                axes.plot(*dots, "o", color=colour, markeredgecolor="white", markersize=6, zorder=4)
            tops += [*smooth(bits), *known(validated, validated)[0]]
        for axes, label in ((over_time, SECONDS), (over_steps, STEPS)):
            dress(axes, f"loss (bits per {unit})", label)
            axes.set_ylim(top=min(axes.get_ylim()[1], 1.08 * max(tops)))  # one outlier does not flatten the rest
        return _finish(figure)


def speed(tracks: Sequence[Track], unit: str) -> str | None:
    """Bytes or tokens per second and, where the peak of the device is known, the share of it that was used."""
    kinds = (("tokens_per_s", f"{unit}s trained per second"), ("mfu", "MFU (share of the devices' peak)"))
    shown = [(key, title) for key, title in kinds if any(_has(track.numbers(key)) for track in tracks)]
    if not shown:
        return None
    with style():
        figure, all_axes = panels(len(shown), across=len(shown))
        for axes, (key, title) in zip(all_axes, shown, strict=True):
            for track, colour in _coloured(tracks):
                x, y = known(track.numbers("elapsed_s"), track.numbers(key))
                trained = y > 0  # a validation right after a start follows no step
                _draw(axes, x[trained], y[trained], colour, track.schedule)
            dress(axes, title, SECONDS)
            from_zero(axes)
            axes.yaxis.set_major_formatter(percent if key == "mfu" else "{x:,.0f}")
        return _finish(figure)


def predictors(tracks: Sequence[Track]) -> str | None:
    """How like the true gradient the predicted one is, for each boundary: its direction, and its share explained."""
    wanted = [
        *_parts(tracks, "cosine_by_boundary", "cosine to the true gradient", "cosine"),
        *_parts(tracks, "r2_by_boundary", "R² of the predicted gradient"),
    ]

    def limit(axes: Axes, lowest: float) -> None:
        # R² has no lower bound: what is worse than guessing zero is off the picture
        axes.set_ylim(min(-0.05, max(lowest, -1.0)), 1.02)
        axes.axhline(0, color="#999999", linewidth=0.8)

    return _by_part(wanted, "boundary", limit)


def waits(tracks: Sequence[Track]) -> str | None:
    """The share of the time that each rank waited for its neighbours, between one line of metrics and the next."""
    wanted = [
        (title, [growth(track.numbers("told_s", "elapsed_s"), part) for part in track.lists("wait_s_by_rank")])
        for track in tracks
        for title in [_titled(tracks, track, "waiting for neighbours (share of the time)")]
    ]

    def limit(axes: Axes, _: float) -> None:
        axes.set_ylim(0, min(1.0, axes.get_ylim()[1]))  # clocks of host and device may make it a hair more
        axes.yaxis.set_major_formatter(percent)

    return _by_part([each for each in wanted if any(len(y) for _, y in each[1])], "rank", limit, one_scale=True)


def gradients(tracks: Sequence[Track]) -> str | None:
    """The norm of each stage's gradient, before it is clipped."""
    return _by_part(_parts(tracks, "grad_norm_by_stage", "gradient norm"), "stage", _logarithmic, one_scale=True)


def learning_rate(tracks: Sequence[Track]) -> str | None:
    """Against steps; schedules of one config lie on each other."""
    tracks = [track for track in tracks if _has(track.numbers("learning_rate"))]
    if not tracks:
        return None
    with style():
        figure, (axes,) = panels(1, across=1, height_in=2.4)
        for index, (track, colour) in enumerate(_coloured(tracks)):
            points = thin(*known(track.numbers("step"), track.numbers("learning_rate")))
            # the first is drawn widest, so that it shows beneath the next
            axes.plot(*points, color=colour, linewidth=1.6 + 2.0 * (len(tracks) - 1 - index), label=track.schedule)
        dress(axes, "learning rate", STEPS)
        from_zero(axes)
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
        return _finish(figure)


def ranks(tracks: Sequence[Track]) -> str | None:
    """Bars for each rank: the idle share of the newest traced step, and the most memory that it held."""
    kinds = [
        ("idle in the newest traced step (bubble)", [track.newest("bubble_by_rank") for track in tracks]),
        ("peak memory (MB)", [track.peaks("peak_memory_mb_by_rank") for track in tracks]),
    ]
    kinds = [(title, bars) for title, bars in kinds if any(bars)]
    if not kinds:
        return None
    with style():
        figure, all_axes = panels(len(kinds))
        for axes, (title, bars) in zip(all_axes, kinds, strict=True):
            width = 0.8 / len(tracks)
            for index, ((track, colour), of_one) in enumerate(zip(_coloured(tracks), bars, strict=True)):
                at = np.arange(len(of_one)) + (index - (len(tracks) - 1) / 2) * width
                drawn = axes.bar(at, of_one, 0.92 * width, color=colour, label=track.schedule)
                if len(of_one) * len(tracks) <= 16:
                    form = "{:.0%}" if "bubble" in title else "{:,.0f}"
                    labels = ["" if math.isnan(value) else form.format(value) for value in of_one]
                    axes.bar_label(drawn, labels, padding=2, fontsize=8.5)
            axes.set_title(title)
            axes.set_xlabel("rank")
            axes.grid(axis="x", visible=False)
            num_ranks = max(map(len, bars))
            axes.set_xticks(range(0, num_ranks, -(-num_ranks // 16)))
            axes.yaxis.set_major_formatter(percent if "bubble" in title else "{x:,.0f}")
            axes.margins(y=0.1)
        return _finish(figure)


def _draw(axes: Axes, x: Floats, y: Floats, colour: str, label: str, share: float = 0.02) -> None:
    """As measured, pale, and smoothed over it."""
    if len(y):
        axes.plot(*thin(x, y), color=colour, alpha=0.28, linewidth=0.9)
        axes.plot(*thin(x, smooth(y, share)), color=colour, label=label)


def _parts(tracks: Sequence[Track], key: str, title: str, instead: str | None = None) -> list[tuple[str, list[Curve]]]:
    """A panel for each schedule that knows this list; an old run may know only its first part, by another key."""
    wanted = []
    for track in tracks:
        parts = track.lists(key)
        if not len(parts) and instead is not None and _has(track.numbers(instead)):
            parts = track.numbers(instead)[None]
        if len(parts):
            curves = [known(track.numbers("elapsed_s"), part) for part in parts]
            wanted.append((_titled(tracks, track, title), curves))
    return wanted


def _by_part(
    wanted: Sequence[tuple[str, Sequence[Curve]]],
    kind: str,
    limit: Callable[[Axes, float], None],
    *,
    one_scale: bool = False,
) -> str | None:
    """Panels with a curve for each boundary, rank or stage.

    Args: wanted: a title and its curves for each panel. limit: sets the axis right, given the lowest smoothed value.
          one_scale: all panels show the same quantity, to be compared.
    """
    if not wanted:
        return None
    with style():
        figure, all_axes = panels(len(wanted))
        for axes, (title, curves) in zip(all_axes, wanted, strict=True):
            named, lowest = labelled(len(curves)), 0.0
            for index, ((x, y), colour) in enumerate(zip(curves, ramp(len(curves)), strict=True)):
                calm = smooth(y)
                lowest = min([lowest, *calm])
                if len(curves) <= MOST_PALE:
                    axes.plot(*thin(x, y), color=colour, alpha=0.22, linewidth=0.8)
                axes.plot(*thin(x, calm, most=500), color=colour, label=f"{kind} {index}" if index in named else None)
            dress(axes, title, SECONDS)
            limit(axes, lowest)
        if one_scale:
            ends = [end for axes in all_axes for end in axes.get_ylim()]
            for axes in all_axes:
                axes.set_ylim(min(ends), max(ends))
        return _finish(figure)


def _logarithmic(axes: Axes, _: float) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    low, high = axes.get_ylim()
    axes.yaxis.set_minor_formatter("{x:g}" if high < 10 * low else NullFormatter())


def _titled(tracks: Sequence[Track], track: Track, title: str) -> str:
    return title if len(tracks) == 1 else f"{track.schedule}: {title}"


def _coloured(tracks: Sequence[Track]) -> list[tuple[Track, str]]:
    chosen = colours([track.schedule for track in tracks])
    return [(track, chosen[track.schedule]) for track in tracks]


def _has(values: Floats) -> bool:
    return not bool(np.isnan(values).all())


def _finish(figure: Figure) -> Any:
    legend(figure)
    return as_svg(figure)
