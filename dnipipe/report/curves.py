"""The lines of metrics.jsonl as columns of numbers, by schedule; what a line does not say is nan.

Legend: L lines of a schedule, P parts of a list: boundaries, ranks or stages.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[np.float64]
Curve: TypeAlias = tuple[Floats, Floats]  # x and y, equally long, both finite


@dataclass(frozen=True)
class Track:
    """What one schedule wrote, in order."""

    schedule: str
    lines: Sequence[Mapping[str, Any]]

    def numbers(self, key: str, otherwise: str = "") -> Floats:
        """(L,): the value of each line; nan for null, for another kind of value, and where the key is missing.

        Args: otherwise: the key to take in lines that lack the first.
        """
        return np.array([number(line.get(key, line.get(otherwise))) for line in self.lines])

    def lists(self, key: str) -> Floats:
        """(P, L): the same for a key whose values are lists, P the longest of them; P = 0 if nothing is known."""
        rows = [line[key] if isinstance(line.get(key), list) else [] for line in self.lines]
        parts = max(map(len, rows), default=0)
        column = np.full((parts, len(rows)), math.nan)
        for index, row in enumerate(rows):
            column[: len(row), index] = [number(value) for value in row]
        return column[: _last_known(column) + 1]

    def newest(self, key: str) -> list[float]:
        """The last known value of each part of a list."""
        return [float(part[~np.isnan(part)][-1]) if not np.isnan(part).all() else math.nan for part in self.lists(key)]

    def peaks(self, key: str) -> list[float]:
        """The largest known value of each part of a list."""
        return [float(np.nanmax(part)) if not np.isnan(part).all() else math.nan for part in self.lists(key)]

    def newest_number(self, key: str) -> float:
        """The last known value of a key; nan if there is none."""
        values = self.numbers(key)
        values = values[~np.isnan(values)]
        return float(values[-1]) if len(values) else math.nan

    def middle(self, key: str) -> float:
        """The median of the known values above 0; nan if there is none."""
        values = self.numbers(key)
        values = values[values > 0]
        return float(np.median(values)) if len(values) else math.nan

    def losses(self) -> tuple[Floats, Floats, Floats]:
        """(steps, seconds, nats) of the true losses, each at the step that it belongs to, however late it came home."""
        step, seconds, loss = (self.numbers(key) for key in ("step", "elapsed_s", "loss"))
        at = self.numbers("loss_step")
        at = np.where(np.isnan(at), step, at)
        at, loss = known(at, loss)
        # a line of a validation repeats the loss of the line before it
        at, first = np.unique(at, return_index=True)
        steps, times = known(step, seconds)
        return at, np.interp(at, [0.0, *steps], [0.0, *times]), loss[first]


def read_tracks(path: Path) -> list[Track]:
    """One for each schedule, in the order in which they ran; none if there is no file. A line cut short is left out."""
    if not path.exists():
        return []
    lines: dict[str, list[Mapping[str, Any]]] = {}
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("schedule"), str):
            lines.setdefault(line["schedule"], []).append(line)
    return [Track(schedule, of_one) for schedule, of_one in lines.items()]


def number(value: object) -> float:
    """A finite number as it is, nan for anything else."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else math.nan  # type: ignore[arg-type]


def known(x: Floats, y: Floats) -> Curve:
    """The points of which both numbers are known."""
    both = ~np.isnan(x) & ~np.isnan(y)
    return x[both], y[both]


def smooth(y: Floats, share: float = 0.02) -> Floats:
    """A mean over neighbours, weighted by a bell whose half width is `share` of the curve; as long as y."""
    width = int(len(y) * share)
    if width < 1:
        return y
    bell = np.exp(-0.5 * (np.arange(-3 * width, 3 * width + 1) / width) ** 2)
    reach = slice(3 * width, 3 * width + len(y))
    # divided by the part of the bell that lies within the curve, so that its ends do not sink
    return np.convolve(y, bell)[reach] / np.convolve(np.ones(len(y)), bell)[reach]


def thin(x: Floats, y: Floats, most: int = 1200) -> Curve:
    """At most so many points, the lowest and the highest of each stretch: every outlier stays."""
    if len(y) <= most:
        return x, y
    stretches = np.array_split(np.arange(len(y)), most // 2)
    kept = sorted({int(pick) for part in stretches for pick in (part[y[part].argmin()], part[y[part].argmax()])})
    return x[kept], y[kept]


def growth(seconds: Floats, total: Floats) -> Curve:
    """How fast a running total grows, per second, between one line and the next; none where it began anew.

    Args: seconds, total: (L,) each, nan where unknown.
    """
    x, y = known(seconds, total)
    passed, grown = np.diff(x), np.diff(y)
    goes_on = (passed > 0) & (grown >= 0)
    return x[1:][goes_on], grown[goes_on] / passed[goes_on]


def _last_known(column: Floats) -> int:
    parts = np.flatnonzero(~np.isnan(column).all(axis=1))
    return int(parts[-1]) if len(parts) else -1
