"""dnipipe plan: what each schedule would cost, from times that are given or measured.

dnipipe plan --stages 4 --microbatches 8 --forward-ms 18.5 --backward-ms 18.1,9.3 --comm-ms 0.6 --out plan/
dnipipe plan --stages 2 --config launch/configs/quickstart.yaml
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from dnipipe.config import load_config
from dnipipe.dry_run import show_measurement
from dnipipe.plan import ASSUMPTIONS, Row, Run, Times, activation_bytes, compare, row_of, scale
from dnipipe.plan.dni import DEFAULT_LAG
from dnipipe.plan.draw import draw_schedules
from dnipipe.trainer.measure import measure
from dnipipe.trainer.model import make_model

from .model_path import look_where_training_does

MEASURED = ("forward_ms", "backward_ms", "interface_ms")


@dataclass(frozen=True)
class Premises:
    """What is planned with. microbatch_bytes: what one microbatch keeps on a stage; None where nothing was measured."""

    num_stages: int
    num_microbatches: int
    lag: int
    times: Times
    microbatch_bytes: int | None = None


def add_arguments(plan: argparse.ArgumentParser) -> None:
    add = plan.add_argument
    add("--stages", type=int, required=True, metavar="S", help="stages of the pipeline")
    add("--microbatches", type=int, metavar="M", help="microbatches of a step (default: those of --config)")
    measured = "the settings of launch/train.py: F, B, W and P are measured here on their model"
    add("--config", nargs="+", metavar=("CONFIG.yaml", "section.field=value"), help=measured)
    add("--forward-ms", metavar="F", help="forward of one microbatch on one stage (default: 1)")
    halves = "backward: of the input, of the weights; without a comma both in one, half each (default: F,F)"
    add("--backward-ms", metavar="B[,W]", help=halves)
    add("--comm-ms", default="0", metavar="C", help="one transfer between neighbours (default: 0)")
    add("--interface-ms", metavar="P", help="predicting and learning, of DNI synthetic (default: 0)")
    add("--lag", type=int, help=f"lag of DNI synthetic, in microbatches (default: {DEFAULT_LAG}, or that of --config)")
    add("--scale", metavar="S,S,...", help="also for these numbers of stages, with the assumptions in words")
    add("--json", type=Path, metavar="FILE", help="writes the rows of all tables")
    add("--out", type=Path, metavar="DIR", help="draws the timelines: plan.png and plan.svg")


def run(options: argparse.Namespace, console: Console) -> None:
    more_stages = _stage_counts(options.scale)
    premises = _given(options) if options.config is None else _measured(options, console)
    runs = compare(premises.num_stages, premises.num_microbatches, premises.times, lag=premises.lag)
    console.print(_table(runs, premises.microbatch_bytes))
    rows = [row_of(run) for run in runs]
    if more_stages:
        same, grown = _scaled(premises, more_stages)
        console.print(_scale_table("same M", same), _scale_table("same M/S", grown))
        console.print("\n".join(f"- {assumption}" for assumption in ASSUMPTIONS), highlight=False, soft_wrap=True)
        rows += [row for batch in (same, grown) for row in batch if row not in rows]
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    if options.out is not None:
        for path in draw_schedules(runs, options.out):
            console.print(f"drawn: {path}", highlight=False, soft_wrap=True)


def _given(options: argparse.Namespace) -> Premises:
    """From the times on the command line."""
    if options.microbatches is None:
        raise ValueError("--microbatches is missing: give it, or a --config that says how many there are")
    forward = "1" if options.forward_ms is None else options.forward_ms
    backward = f"{forward},{forward}" if options.backward_ms is None else options.backward_ms
    interface = "0" if options.interface_ms is None else options.interface_ms
    times = _times(forward, backward, options.comm_ms, interface)
    lag = DEFAULT_LAG if options.lag is None else options.lag
    return Premises(options.stages, options.microbatches, lag, times)


def _measured(options: argparse.Namespace, console: Console) -> Premises:
    """From the model of a config, measured here; shows what was measured."""
    for name in MEASURED:
        if getattr(options, name) is not None:
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(f"{flag} and --config: a config's model is measured instead; leave one of the two out")
    look_where_training_does()
    config = load_config(options.config[0], options.config[1:])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    measurement = measure(config, make_model(config.model), options.stages, device, console, to_compare=True)
    show_measurement(measurement, console)
    console.print(
        f"Planned as if every stage took as long as the slowest, {measurement.slowest.name}, with B and W half of its "
        "backward each, and kept as much as the fullest.",
        highlight=False,
        soft_wrap=True,
    )
    pipeline = config.pipeline
    return Premises(
        num_stages=options.stages,
        num_microbatches=pipeline.num_microbatches if options.microbatches is None else options.microbatches,
        lag=pipeline.lag if options.lag is None else options.lag,
        times=measurement.times(options.comm_ms),
        microbatch_bytes=max(stage.saved_bytes for stage in measurement.stages),
    )


def _times(forward: str, backward: str, transfer: str, interface: str) -> Times:
    parts = backward.split(",")
    if len(parts) > 2:
        raise ValueError(f"--backward-ms is B or B,W in milliseconds, got {backward!r}")
    if len(parts) == 2:
        return Times.ms(forward, parts[0], parts[1], transfer, interface)
    half = Times.ms(forward, parts[0], 0, transfer).backward / 2
    return Times.ms(forward, half, half, transfer, interface)


def _stage_counts(text: str | None) -> list[int]:
    try:
        counts = [int(part) for part in text.split(",")] if text is not None else []
    except ValueError:
        raise ValueError(f"--scale is a list of stage counts such as 16,64,512, got {text!r}") from None
    if any(count < 1 for count in counts):
        raise ValueError(f"--scale needs at least 1 stage each, got {text!r}")
    return counts


def _scaled(premises: Premises, more_stages: Sequence[int]) -> tuple[list[Row], list[Row]]:
    """The rows with the same microbatches, and with as many per stage as now."""
    same, grown = [], []
    for stages in more_stages:
        same += scale(stages, premises.num_microbatches, premises.times, lag=premises.lag)
        microbatches = max(round(Fraction(premises.num_microbatches * stages, premises.num_stages)), 1)
        grown += scale(stages, microbatches, premises.times, lag=premises.lag)
    return same, grown


def _table(runs: Sequence[Run], microbatch_bytes: int | None) -> Table:
    times, schedule = runs[0].times, runs[0].schedule
    compute = f"F {_ms(times.forward)}, B {_ms(times.backward)}, W {_ms(times.weight)}"
    cost = f"{compute}, transfer {_ms(times.transfer)}, P {_ms(times.interface)} ms"
    table = Table(title=f"{schedule.num_stages} stages, {schedule.num_microbatches} microbatches; {cost}")
    table.add_column("schedule")
    unit = "microbatches of one stage" if microbatch_bytes is None else "MB"
    table.caption = (
        f"memory: activations in {unit}, on the fullest stage and on all; old weights (stale) and predictors come on "
        f"top. tight: as many in flight as 1F1B, ScheduleDNI's default; else in_flight={2 * schedule.num_stages - 1}"
    )
    for heading in ("bubble", "step ms", "peak in flight", "memory", "memory, all"):
        table.add_column(heading, justify="right")
    for run in runs:
        row, memory = row_of(run), activation_bytes(run.schedule, microbatch_bytes or 1)
        sizes = (max(memory), sum(memory))
        shown = map(str, sizes) if microbatch_bytes is None else (f"{size / 1e6:.1f}" for size in sizes)
        table.add_row(row.schedule, f"{row.bubble:.2%}", f"{row.step_ms:.4g}", str(row.peak_in_flight), *shown)
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
