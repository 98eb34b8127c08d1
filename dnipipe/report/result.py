"""What a run says at its end: a table of the schedules, one sentence on which did better, and where the files are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .folder import FILES

EVEN_BITS = 0.01
"""Bits per byte or token: closer results than this are called even, for two runs of one schedule differ by as much."""


@dataclass(frozen=True)
class Result:
    """How one schedule did.

    Args: steps: optimizer steps. seconds: of training alone. val_bits: validation bits per unit at the end.
          unit: "byte" or "token".
    """

    schedule: str
    steps: int
    seconds: float
    val_bits: float
    unit: str = "byte"

    @property
    def steps_per_s(self) -> float:
        return self.steps / self.seconds if self.seconds else 0.0


def table(results: Sequence[Result]) -> Table:
    """One row per schedule, in the order in which they ran."""
    drawn = Table(title="the same model, data and optimizer under each schedule", title_justify="left")
    drawn.add_column("schedule")
    for name in ("steps", "seconds", "steps / s", f"validation bits per {results[0].unit}"):
        drawn.add_column(name, justify="right")
    for each in results:
        numbers = (f"{each.steps}", f"{each.seconds:.1f}", f"{each.steps_per_s:.2f}", f"{each.val_bits:.3f}")
        drawn.add_row(each.schedule, *numbers)
    return drawn


def verdict(first: Result, other: Result) -> str:
    """Which of two did better in this run, whichever it is, and how many steps each made of its time."""
    speed = first.steps_per_s / other.steps_per_s
    pace = f"{first.schedule} made {speed:.2f} times the steps of {other.schedule} per second"
    gap = abs(first.val_bits - other.val_bits)
    if not gap >= EVEN_BITS:  # a nan is no victory either
        even = f"{first.schedule} and {other.schedule} came out even, {gap:.3f} bits per {first.unit} apart"
        return f"In this run {even}; {pace}."
    winner, loser = (first, other) if first.val_bits < other.val_bits else (other, first)
    score = f"{winner.val_bits:.3f} against {loser.val_bits:.3f} bits per {winner.unit}"
    as_many = "steps" if first.steps == other.steps else "seconds of training"
    return f"In this run {winner.schedule} won, with {score} after as many {as_many}; {pace}."


def show(console: Console, folder: Path, results: Sequence[Result]) -> None:
    """Prints the table, the sentences and the files."""
    console.print()
    console.print(table(results))
    for other in results[1:]:
        console.print(verdict(results[0], other), soft_wrap=True)
    console.print()
    for path in sorted(folder.iterdir()):
        kind = next((text for name, text in FILES.items() if path.name.startswith(name)), None)
        if kind is not None:
            console.print(f"  {escape(str(path))}  [dim]{kind}[/dim]", soft_wrap=True)
