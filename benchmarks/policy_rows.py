"""One run under one policy is one row; what backprop with the same optimizer and seed reached stands beside it."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console

from benchmarks.rows import grouped
from benchmarks.table import drawn, marked, print_whole, said
from dnipipe.schedule.policy import LATE


@dataclass(frozen=True)
class PolicyRow:
    """In a file, a flat JSON object.

    Fields:
        policy, interface, late_weights, in_flight: as benchmarks.policies takes them, before included.
        unlock_after_steps: of `wait` at the beginning; for `wait` itself all of them.
        steps: that were run. curve: [step, bits per byte of a quarter of the validation sequences].
        val_bpb: at the end, of all of them; None if it was not a number.
        mean_utilisation: 0 to 1, simulated by the planner, synchronous part, predictor and second backward included.
        interface_cost_share: predict and learn by forward and backward of a middle stage, measured before the runs.
        cosines: of prediction and true gradient at each boundary, at the end.
        run_s: of the run; several run side by side, so this says nothing of a pipeline.
    """

    policy: str
    interface: str | None
    optimizer: str
    stages: int
    microbatches: int
    unlock_after_steps: int
    in_flight: int | None
    late_weights: str
    seed: int
    learning_rate: float
    planned_steps: int
    steps: int
    val_bpb: float | None
    curve: list[tuple[int, float]]
    cosines: list[float]
    mean_utilisation: float
    interface_cost_share: float | None
    run_s: float
    blocks: int
    width: int
    seq_len: int
    batch_size: int
    parameters: int
    dtype: str
    device: str
    card: str
    commit: str
    torch: str
    date: str
    command: str

    @property
    def label(self) -> str:
        """As a reader tells it from others, without M."""
        parts = [self.policy, self.interface or ""]
        parts += [f"{self.late_weights} weights"] if self.policy.endswith(LATE) else []
        parts += [f"{self.in_flight} in flight"] if self.in_flight else []
        return " ".join(part for part in parts if part)

    def line(self) -> tuple[object, ...]:
        """Equal for rows that differ in their seed alone."""
        return (
            self.work,
            self.optimizer,
            self.label,
            None if self.policy == "wait" else (self.stages, self.microbatches),  # backprop depends on neither
            self.unlock_after_steps,
            self.learning_rate,
        )

    @property
    def is_whole(self) -> bool:
        return self.steps == self.planned_steps

    @property
    def work(self) -> str:
        """What all runs that may be compared had to do: on whichever card, for a loss is hardly another there."""
        return (
            f"GPT of {self.parameters / 1e6:.1f} M parameters ({self.blocks} blocks, width "
            f"{self.width}), {self.batch_size} x {self.seq_len} bytes a step, {self.planned_steps} steps, {self.dtype}"
        )


@dataclass(frozen=True)
class Line:
    """Rows that differ in their seed alone. excess: of the mean, relative to backprop's on the same seeds."""

    row: PolicyRow
    bpb: list[float]
    seeds: int
    backprop: float | None

    @property
    def mean(self) -> float | None:
        return statistics.mean(self.bpb) if len(self.bpb) == self.seeds and self.bpb else None

    @property
    def spread(self) -> float:
        return max(self.bpb) - min(self.bpb) if len(self.bpb) > 1 else 0.0

    @property
    def excess(self) -> float | None:
        mean = self.mean
        return None if mean is None or self.backprop is None else mean / self.backprop - 1


def write_part(row: PolicyRow, path: Path) -> None:
    """Replaces the file at once, so that whoever reads it finds a whole one."""
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps([asdict(row)]), encoding="utf-8")
    fresh.replace(path)


def lines_of(rows: Sequence[PolicyRow]) -> list[Line]:
    """The whole runs, seeds taken together, in the order of optimizer, policy and M."""
    whole = [row for row in rows if row.is_whole or row.val_bpb is None]
    found = []
    for alike in grouped(whole, PolicyRow.line):
        known = [backprop_of(row, whole) for row in alike]
        backprop = statistics.mean([each for each in known if each is not None]) if None not in known else None
        found.append(Line(alike[0], [r.val_bpb for r in alike if r.val_bpb is not None], len(alike), backprop))
    order = ("wait", "stale", "corrected")

    def place(line: Line) -> tuple[str, str, int, int, str, int, int]:
        row = line.row
        rank = order.index(row.policy) if row.policy in order else len(order)
        stages = 0 if row.policy == "wait" else row.stages
        return row.work, row.optimizer, stages, rank, row.label, row.unlock_after_steps, -row.microbatches

    return sorted(found, key=place)


def backprop_of(row: PolicyRow, rows: Sequence[PolicyRow]) -> float | None:
    """Where backprop with the same optimizer and seed ended, at the best learning rate that was tried for it."""
    ends = [
        each.val_bpb
        for each in rows
        if each.policy == "wait" and (each.work, each.optimizer, each.seed) == (row.work, row.optimizer, row.seed)
    ]
    return min((end for end in ends if end is not None), default=None)


HEADINGS = (
    "optimizer", "S", "policy", "M", "unlock", "rate", "val bpb", "from seed\nto seed", "over\nbackprop",
    "mean\nutilisation", "interface\nshare",
)  # fmt: skip


def cells(line: Line) -> list[str]:
    row, mean = line.row, line.mean
    waits = row.policy == "wait"
    return [
        row.optimizer,
        "any" if waits else str(row.stages),
        "wait (backprop)" if waits else row.label,
        "any" if waits else str(row.microbatches),
        "" if waits else str(row.unlock_after_steps),
        f"{row.learning_rate:g}",
        "diverged" if mean is None else f"{mean:.4f}",
        "one seed" if line.seeds == 1 else f"{line.spread:.4f} ({line.seeds})",
        "" if waits else said(line.excess, "+.2%"),
        "" if waits else said(row.mean_utilisation, ".2f"),
        said(row.interface_cost_share, ".0%"),
    ]


def show(console: Console, rows: Sequence[PolicyRow]) -> None:
    for alike in grouped(lines_of(rows), lambda line: line.row.work):
        ends = [a.row.optimizer != b.row.optimizer for a, b in zip(alike, alike[1:], strict=False)]
        title = _title(alike[0].row.work, rows)
        print_whole(console, drawn(title, HEADINGS, [cells(line) for line in alike], [*ends, False]))


def markdown(rows: Sequence[PolicyRow]) -> str:
    return "\n".join(
        marked(_title(alike[0].row.work, rows), HEADINGS, map(cells, alike))
        for alike in grouped(lines_of(rows), lambda line: line.row.work)
    )


def _title(work: str, rows: Sequence[PolicyRow]) -> str:
    cards = dict.fromkeys(f"{row.device}, {row.card}" for row in rows if row.work == work)
    return f"{'; '.join(cards)}: {work}"
