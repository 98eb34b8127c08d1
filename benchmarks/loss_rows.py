"""One training run is one row; 1F1B's run sets the marks, and how soon the others reach them is read off their curves.

A run with a cosine of its own is best at its end. So the fair time to 1F1B's final loss is that of the shortest run,
among those of several lengths, that gets there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from .contestants import TORCH_SCHEDULES, Entry, unusual_weights
from .rows import grouped, many

SEARCH, EQUAL_STEPS, EQUAL_TIME, LENGTH = "search", "equal steps", "equal time", "length"
SHARES = (0.5, 0.75, 1.0)
"""Of 1F1B's run: its losses there are the marks."""


@dataclass(frozen=True)
class LossRow:
    """In a file, a flat JSON object but for the curve.

    Fields:
        schedule, interface, policy, transport: as in rows.Row. optimizer: "AdamW" or "Muon".
        own_microbatches: the M at which this schedule is fastest, of those tried; None: only one was.
        purpose: why this run was: "search" (of a learning rate), "equal steps" (as many as 1F1B), "equal time" (as many
            as fit in 1F1B's seconds) or "length" (another number of steps).
        refused: what torch said when it refused this schedule; then all that would have been measured is None.
        unlock_after_steps: of DNI alone: steps under `wait`, part of `steps`. in_flight, late_weights: of stale and
            corrected, as of ScheduleDNI; None: its default.
        seconds: of training, no evaluation counted. step_ms: seconds by steps.
        before_ms, after_ms: of an unlocked step, timed before and after all runs: how steady the machine was. None: not
            timed.
        final_bpb: bits per byte of the validation text. None: no number, so it diverged.
        seconds_to_50, seconds_to_75, seconds_to_100: to 1F1B's loss at so many percent of its run, for good. None:
            never.
        time_to_1f1b_ratio: seconds_to_100 by the seconds of 1F1B at the given M.
        time_to_best_ratio: the same by those of torch's fastest schedule at its own best M.
        peak_bytes: of tensors, largest over ranks. None on a CPU.
        measured: false where loss and seconds are of two different runs.
        curve: [steps done, seconds, bits per byte] of each evaluation.
    """

    device: str
    card: str
    schedule: str
    interface: str | None
    policy: str | None
    transport: str
    optimizer: str
    stages: int
    microbatches: int
    microbatch_size: int
    seq_len: int
    width: int
    blocks_per_stage: int
    num_parameters: int
    dtype: str
    seed: int
    commit: str
    torch: str
    date: str
    command: str
    own_microbatches: int | None = None
    purpose: str = EQUAL_STEPS
    refused: str | None = None
    learning_rate: float | None = None
    unlock_after_steps: int | None = None
    in_flight: int | None = None
    late_weights: str | None = None
    steps: int | None = None
    seconds: float | None = None
    step_ms: float | None = None
    before_ms: float | None = None
    after_ms: float | None = None
    final_bpb: float | None = None
    seconds_to_50: float | None = None
    seconds_to_75: float | None = None
    seconds_to_100: float | None = None
    time_to_1f1b_ratio: float | None = None
    time_to_best_ratio: float | None = None
    peak_bytes: int | None = None
    measured: bool = True
    curve: list[list[Any]] = field(default_factory=list)

    @property
    def label(self) -> str:
        """The schedule as a reader tells it from others: "1F1B", "DNI corrected local_head"."""
        return label(self)

    @property
    def contender(self) -> tuple[str, int]:
        return self.label, self.microbatches


def label(of: Entry | LossRow) -> str:
    """Policies are what is compared here, so each is named; of the transports only direct copies are, and of late
    weights those that are not the default."""
    transport = of.transport if of.transport == "direct" else None
    parts = (of.schedule, of.policy, of.interface, unusual_weights(of.late_weights), transport)
    return " ".join(part for part in parts if part)


def work(rows: Sequence[LossRow]) -> str:
    """What all had to do, in words."""
    row = rows[0]
    batch = row.microbatches * row.microbatch_size
    return (
        f"{many(row.stages, 'stage')} of {many(row.blocks_per_stage, 'block')}, width {row.width}, "
        f"{row.num_parameters / 1e6:.1f} M parameters, {row.dtype}, {row.optimizer}, "
        f"batches of {batch} x {row.seq_len} bytes"
    )


def baseline_of(rows: Sequence[LossRow], microbatches: int) -> LossRow | None:
    """1F1B's run: the best of its equal steps at so many microbatches."""
    runs = [
        row
        for row in _finished(rows, EQUAL_STEPS)
        if row.schedule == "1F1B" and row.microbatches == microbatches and row.final_bpb is not None
    ]
    return min(runs, key=_bpb, default=None)


def with_marks(rows: Sequence[LossRow], microbatches: int) -> list[LossRow]:
    """The rows with all that follows from 1F1B's run of the same seed at the given number of microbatches."""
    filled = {id(row): row for row in rows}
    for alike in grouped(rows, lambda row: (row.optimizer, row.seed)):
        baseline = baseline_of(alike, microbatches)
        if baseline is None or baseline.seconds is None:
            continue
        marks = [loss_at(baseline.curve, share) for share in SHARES]
        best_s = _best_of_torch(alike)
        for row in alike:
            reached = [seconds_to(row.curve, mark) if row.final_bpb is not None else None for mark in marks]
            filled[id(row)] = replace(
                row,
                seconds_to_50=reached[0],
                seconds_to_75=reached[1],
                seconds_to_100=reached[2],
                time_to_1f1b_ratio=_ratio(reached[2], baseline.seconds),
                time_to_best_ratio=_ratio(reached[2], best_s),
            )
    return [filled[id(row)] for row in rows]


def loss_at(curve: Sequence[Sequence[float]], share: float) -> float:
    """Bits per byte after a share of the steps of a run, linear between two evaluations."""
    steps, _, bpb = zip(*curve, strict=True)
    return float(np.interp(share * steps[-1], steps, bpb))


def seconds_to(curve: Sequence[Sequence[float]], mark: float) -> float | None:
    """The seconds from which on a run is at this loss or below, to its end; None if it is above at its end.

    Linear between two evaluations; what is below from the first on got there at the first.
    """
    above = [number for number, point in enumerate(curve) if point[2] > mark]
    if not above:
        return curve[0][1]
    if above[-1] == len(curve) - 1:
        return None
    (_, from_s, high), (_, to_s, low) = curve[above[-1]], curve[above[-1] + 1]
    return from_s + (to_s - from_s) * (high - mark) / (high - low)


def soonest(rows: Sequence[LossRow]) -> LossRow | None:
    """Of a contender's runs the one that is first at 1F1B's final loss."""
    runs = [row for row in rows if row.seconds_to_100 is not None and row.purpose != SEARCH]
    return min(runs, key=lambda row: row.seconds_to_100 or 0.0, default=None)


def best_run(rows: Sequence[LossRow], purpose: str) -> LossRow | None:
    """Of a contender's runs for one purpose the one of the lowest final loss."""
    runs = [row for row in _finished(rows, purpose) if row.final_bpb is not None]
    return min(runs, key=_bpb, default=None)


def _finished(rows: Sequence[LossRow], purpose: str) -> list[LossRow]:
    return [row for row in rows if row.purpose == purpose and row.refused is None]


def _best_of_torch(rows: Sequence[LossRow]) -> float | None:
    """Seconds of the fastest of torch's schedules for 1F1B's steps, each at its own best M, if that has run."""
    seconds = [
        row.seconds
        for row in _finished(rows, EQUAL_STEPS)
        if row.schedule in TORCH_SCHEDULES and row.own_microbatches in (None, row.microbatches)
    ]
    return min((each for each in seconds if each is not None), default=None)


def _ratio(seconds: float | None, of_s: float | None) -> float | None:
    return None if seconds is None or not of_s else seconds / of_s


def _bpb(row: LossRow) -> float:
    return float("inf") if row.final_bpb is None else row.final_bpb
