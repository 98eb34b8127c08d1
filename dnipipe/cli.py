"""The commands of a shell: dnipipe plan shows, without a model or a GPU, what each schedule would cost.

dnipipe plan --stages 4 --microbatches 8 --forward-ms 18.5 --backward-ms 18.1,9.3 --comm-ms 0.6 --out plan/
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path

from rich.console import Console
from rich.table import Table

from dnipipe.plan import Run, Times, activation_bytes
from dnipipe.plan.compare import ASSUMPTIONS, Row, compare, row_of, scale
from dnipipe.plan.dni import DEFAULT_LAG
from dnipipe.plan.draw import draw_schedules


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command. Returns the exit code: 0, or 2 with one line on stderr for a value that cannot be."""
    options = _parser().parse_args(arguments)
    try:
        _plan(options, Console())
    except (ValueError, OSError) as error:
        print(f"dnipipe {options.command}: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dnipipe", description="Pipeline-parallel training whose stages never wait.")
    commands = parser.add_subparsers(dest="command", required=True)
    plan = commands.add_parser("plan", help="bubble, step time and memory of every schedule, without a GPU")
    add = plan.add_argument
    add("--stages", type=int, required=True, metavar="S", help="stages of the pipeline")
    add("--microbatches", type=int, required=True, metavar="M", help="microbatches of a step")
    add("--forward-ms", default="1", metavar="F", help="forward of one microbatch on one stage (default: 1)")
    halves = "backward: of the input, of the weights; without a comma both in one, half each (default: F,F)"
    add("--backward-ms", metavar="B[,W]", help=halves)
    add("--comm-ms", default="0", metavar="C", help="one transfer between neighbours (default: 0)")
    add("--lag", type=int, default=DEFAULT_LAG, help=f"lag of DNI synthetic, in microbatches (default: {DEFAULT_LAG})")
    add("--scale", metavar="S,S,...", help="also for these numbers of stages, with the assumptions in words")
    add("--json", type=Path, metavar="FILE", help="writes the rows of all tables")
    add("--out", type=Path, metavar="DIR", help="draws the timelines: plan.png and plan.svg")
    return parser


def _plan(options: argparse.Namespace, console: Console) -> None:
    times = _times(options)
    more_stages = _stage_counts(options.scale)
    runs = compare(options.stages, options.microbatches, times, lag=options.lag)
    console.print(_table(runs))
    rows = [row_of(run) for run in runs]
    if more_stages:
        same, grown = _scaled(options, times, more_stages)
        console.print(_scale_table("same M", same), _scale_table("same M/S", grown))
        console.print("\n".join(f"- {assumption}" for assumption in ASSUMPTIONS), highlight=False, soft_wrap=True)
        rows += [row for batch in (same, grown) for row in batch if row not in rows]
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    if options.out is not None:
        for path in draw_schedules(runs, options.out):
            console.print(f"drawn: {path}", highlight=False, soft_wrap=True)


def _times(options: argparse.Namespace) -> Times:
    forward, transfer = options.forward_ms, options.comm_ms
    parts = options.backward_ms.split(",") if options.backward_ms is not None else [forward, forward]
    if len(parts) > 2:
        raise ValueError(f"--backward-ms is B or B,W in milliseconds, got {options.backward_ms!r}")
    if len(parts) == 2:
        return Times.ms(forward, parts[0], parts[1], transfer)
    half = Times.ms(forward, parts[0], 0, transfer).backward / 2
    return Times.ms(forward, half, half, transfer)


def _stage_counts(text: str | None) -> list[int]:
    try:
        counts = [int(part) for part in text.split(",")] if text is not None else []
    except ValueError:
        raise ValueError(f"--scale is a list of stage counts such as 16,64,512, got {text!r}") from None
    if any(count < 1 for count in counts):
        raise ValueError(f"--scale needs at least 1 stage each, got {text!r}")
    return counts


def _scaled(options: argparse.Namespace, times: Times, more_stages: Sequence[int]) -> tuple[list[Row], list[Row]]:
    """The rows with the same microbatches, and with as many per stage as now."""
    same, grown = [], []
    for stages in more_stages:
        same += scale(stages, options.microbatches, times, lag=options.lag)
        microbatches = max(round(Fraction(options.microbatches * stages, options.stages)), 1)
        grown += scale(stages, microbatches, times, lag=options.lag)
    return same, grown


def _table(runs: Sequence[Run]) -> Table:
    times, schedule = runs[0].times, runs[0].schedule
    cost = f"F {_ms(times.forward)}, B {_ms(times.backward)}, W {_ms(times.weight)}, transfer {_ms(times.transfer)} ms"
    table = Table(title=f"{schedule.num_stages} stages, {schedule.num_microbatches} microbatches; {cost}")
    table.add_column("schedule")
    table.caption = (
        "memory: activations in microbatches of one stage, on the fullest stage and on all; old weights (stale) and "
        "predictors come on top"
    )
    for heading in ("bubble", "step ms", "peak in flight", "memory", "memory, all"):
        table.add_column(heading, justify="right")
    for run in runs:
        row, memory = row_of(run), activation_bytes(run.schedule, 1)
        numbers = (f"{row.bubble:.2%}", f"{row.step_ms:.4g}", row.peak_in_flight, max(memory), sum(memory))
        table.add_row(row.schedule, *map(str, numbers))
    return table


def _scale_table(title: str, rows: Sequence[Row]) -> Table:
    """Bubble and, after it, peak in flight: schedules down, stage counts across."""
    columns = list(dict.fromkeys((row.stages, row.microbatches) for row in rows))
    table = Table(title=f"{title}: bubble, peak in flight")
    table.add_column("schedule")
    for stages, microbatches in columns:
        table.add_column(f"S {stages}, M {microbatches}", justify="right")
    for name in dict.fromkeys(row.schedule for row in rows):
        cells = {(row.stages, row.microbatches): row for row in rows if row.schedule == name}
        shown = [cells[column] for column in columns]
        table.add_row(name, *(f"{row.bubble:.1%}, {row.peak_in_flight}" for row in shown))
    return table


def _ms(time: Fraction) -> str:
    return f"{float(time):.4g}"
