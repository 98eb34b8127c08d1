"""What a run says at its end: a table of the schedules, one sentence on which did better, and where the files are."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import MappingProxyType

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .checkpoint import newest_step
from .config import SECTIONS, Config, load_config
from .observe.perfetto import write_perfetto
from .observe.timeline import draw_timelines
from .observe.trace import Span

EVEN_BITS = 0.01
"""Bits per byte or token: closer results than this are called even, for two runs of one schedule differ by as much."""

CHECKPOINTS, METRICS, CONFIG = "checkpoint", "metrics.jsonl", "config.yaml"
RUN_SETTINGS_THAT_COUNT = ("seed", "batch_size")
"""The others of the section run say how long it is and how it reports, and may change when it goes on."""

FILES: Mapping[str, str] = MappingProxyType(
    {
        "timeline.png": "what each rank did when, one schedule above the other",
        "trace": "the same to zoom in, at https://ui.perfetto.dev",
        METRICS: "loss, speed and validation, a line each",
        CONFIG: "every setting of this run",
        CHECKPOINTS: "weights, optimizer and predictors of every stage",
    }
)


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
    for path in [*folder.glob("trace*.json"), folder / "timeline.png", folder / METRICS]:
        path.unlink(missing_ok=True)
    if (folder / CHECKPOINTS).exists():
        shutil.rmtree(folder / CHECKPOINTS)


def refuse_another_run(config: Config) -> None:
    """Raises: ValueError: the folder holds checkpoints to go on from, but of other settings; it names the first."""
    folder = Path(config.run.output_dir)
    found = (newest_step(each) for each in (folder / CHECKPOINTS).glob("*"))
    if config.run.resume == "never" or all(step is None for step in found):
        return
    cure = "choose another run.output_dir, or begin anew by run.resume=never"
    try:
        before = load_config(folder / CONFIG)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"run.output_dir = {str(folder)!r} holds checkpoints of nobody knows which settings ({error}): {cure}"
        ) from error
    for section, name in ((kind.section, each.name) for kind in SECTIONS for each in fields(kind)):
        old, new = (getattr(getattr(settings, section), name) for settings in (before, config))
        if old != new and (section != "run" or name in RUN_SETTINGS_THAT_COUNT):
            raise ValueError(
                f"{section}.{name} = {new!r}: the checkpoints in run.output_dir = {str(folder)!r} were made with "
                f"{old!r}; set it so, {cure}"
            )


def cut_back(metrics: Path, schedule: str, step: int) -> None:
    """Removes the lines that a schedule wrote after `step` steps, or at a validation then: it will write them again."""
    if not metrics.exists():
        return
    kept = [line for line in metrics.read_text(encoding="utf-8").splitlines() if not _repeated(line, schedule, step)]
    write_whole(metrics, "".join(f"{line}\n" for line in kept))


def write_whole(path: Path, text: str) -> None:
    """The file has its old content or all of the new one, whenever the process is killed."""
    beside = path.with_name(f"{path.name}.new")
    with beside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def _repeated(line: str, schedule: str, step: int) -> bool:
    try:
        record = json.loads(line)
    except ValueError:  # a kill cut it short
        return True
    # a line of steps is written before the checkpoint after them, one of a validation after it
    return record["schedule"] == schedule and (record["step"], "val_bits" in record) > (step, False)


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
