"""What a run says at its end: a table of the schedules, one sentence on which did better, and where the files are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .observe.perfetto import write_perfetto
from .observe.timeline import draw_timelines
from .observe.trace import Span

EVEN_BPB = 0.01
"""Bits per byte: closer results than this are called even, for two runs of one schedule differ by as much."""

FILES: Mapping[str, str] = MappingProxyType(
    {
        "timeline.png": "what each rank did when, one schedule above the other",
        "trace": "the same to zoom in, at https://ui.perfetto.dev",
        "metrics.jsonl": "loss, speed and validation, a line each",
        "config.yaml": "every setting of this run",
        "checkpoint": "weights, optimizer and predictors of every stage",
    }
)


@dataclass(frozen=True)
class Result:
    """How one schedule did.

    Args: steps: optimizer steps. seconds: of training alone. val_bpb: validation bits per byte at the end.
    """

    schedule: str
    steps: int
    seconds: float
    val_bpb: float

    @property
    def steps_per_s(self) -> float:
        return self.steps / self.seconds if self.seconds else 0.0


def table(results: Sequence[Result]) -> Table:
    """One row per schedule, in the order in which they ran."""
    drawn = Table(title="the same model, data and optimizer under each schedule", title_justify="left")
    drawn.add_column("schedule")
    for name in ("steps", "seconds", "steps / s", "validation bits per byte"):
        drawn.add_column(name, justify="right")
    for each in results:
        numbers = (f"{each.steps}", f"{each.seconds:.1f}", f"{each.steps_per_s:.2f}", f"{each.val_bpb:.3f}")
        drawn.add_row(each.schedule, *numbers)
    return drawn


def verdict(first: Result, other: Result) -> str:
    """Which of two did better in this run, whichever it is, and how many steps each made of its time."""
    speed = first.steps_per_s / other.steps_per_s
    pace = f"{first.schedule} made {speed:.2f} times the steps of {other.schedule} per second"
    gap = abs(first.val_bpb - other.val_bpb)
    if not gap >= EVEN_BPB:  # a nan is no victory either
        return (
            f"In this run {first.schedule} and {other.schedule} came out even, {gap:.3f} bits per byte apart; {pace}."
        )
    winner, loser = (first, other) if first.val_bpb < other.val_bpb else (other, first)
    score = f"{winner.val_bpb:.3f} against {loser.val_bpb:.3f} bits per byte"
    return f"In this run {winner.schedule} won, with {score} after as many seconds of training; {pace}."


def write_traces(folder: Path, traces: Mapping[str, Sequence[Span]], num_steps: int) -> None:
    """timeline.png of all schedules together, and a Perfetto file for each: trace.json for the first.

    Args: traces: by schedule, the spans of the same num_steps steps of all ranks; without spans a schedule is left out.
    """
    traced = {name: spans for name, spans in traces.items() if spans}
    if not traced:
        return
    steps = "1 step" if num_steps == 1 else f"{num_steps} steps"
    titled = {f"{name}: {steps} in {_length(spans)}": spans for name, spans in traced.items()}
    draw_timelines(titled, folder / "timeline.png")
    for index, (name, spans) in enumerate(traced.items()):
        write_perfetto(spans, folder / (f"trace-{name}.json" if index else "trace.json"))


def clear(folder: Path) -> None:
    """Makes the folder, and removes what an earlier run reported there, so that nobody takes it for this one's."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in [*folder.glob("trace*.json"), folder / "timeline.png", folder / "metrics.jsonl"]:
        path.unlink(missing_ok=True)


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


def _length(spans: Sequence[Span]) -> str:
    length_s = max(span.end_s for span in spans) - min(span.start_s for span in spans)
    return f"{length_s * 1e3:.0f} ms"
