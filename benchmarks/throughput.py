"""Training steps per second of the pipeline schedules, side by side: torch's own and DNI.

python -m benchmarks.throughput --device cpu --stages 2 --microbatches 1,2,4,8 --json throughput.json

The same model, batch and optimizer for all, in turns. Utilisation = time of the same work with no pipeline and all
ranks busy / step time. Writes the rows and, beside them, the tables, a bar picture, and the timelines.

On two CPU cores that is a quarter of an hour; with --microbatches 4 --rounds 2 it is two minutes.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

from rich.console import Console
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

from benchmarks.bars import draw_bars
from benchmarks.compete import compete
from benchmarks.contestants import Entry, entries, late_entries
from benchmarks.failures import Failure, is_memory, take_failure
from benchmarks.measured import Settings
from benchmarks.options import (
    DTYPES,
    add_in_flight,
    check_device,
    check_in_flight,
    check_least,
    dtype_of,
    numbers,
)
from benchmarks.ranks import run_ranks
from benchmarks.rows import Row, read_rows
from benchmarks.sizes import sizes_of
from benchmarks.table import markdown, show
from benchmarks.workload import Workload
from dnipipe.schedule.policy import LATE

TIMEOUT_S = 120.0
Body: TypeAlias = Callable[..., None]


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 with one line on stderr for a value that cannot be."""
    try:
        options = _options(arguments)
        settings = _settings(options)
    except (OSError, ValueError) as error:
        print(f"benchmarks.throughput: {error}", file=sys.stderr)
        return 2
    rows = measure(settings, options.device, options.json, options.limit_s)
    if not rows:
        print("benchmarks.throughput: nothing was measured", file=sys.stderr)
        return 1
    show(Console(width=None if sys.stdout.isatty() else 200), rows)
    draw_bars(rows, options.json.with_suffix(".png"))
    options.json.with_suffix(".md").write_text(markdown(rows), encoding="utf-8")
    return 0


def measure(
    settings: Sequence[Settings], device: str, path: Path, limit_s: float = math.inf, body: Body = compete
) -> list[Row]:
    """All rows, written to `path` as they come. Who fails is refused, and the others run again without it.

    Args: settings: each with `path` for its rows. limit_s: seconds; what is not begun by then is left out. body: what
          each rank runs: compete(), but for tests.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    until_s, pending = time.time() + limit_s, list(settings)
    path.unlink(missing_ok=True)  # of a run before, as is what failed then
    take_failure(path.parent)
    while pending and time.time() < until_s:
        model = pending[0].workload.blocks_per_stage
        at_once = [each for each in pending if each.workload.blocks_per_stage == model]
        failure = None
        try:
            run_ranks(at_once[0].workload.stages, device, TIMEOUT_S, body, at_once, until_s)
        except (ProcessRaisedException, ProcessExitedException):
            failure = take_failure(path.parent)
            if failure is None:
                raise
            print(f"{failure.title}, M = {failure.microbatches}: {failure.reason}", file=sys.stderr, flush=True)
        if failure is None:
            pending = [each for each in pending if each not in at_once]
        else:
            done = {(row.blocks_per_stage, row.microbatches) for row in _rows(path)}
            left = [each for each in pending if (each.workload.blocks_per_stage, each.num_microbatches) not in done]
            failed = next(each for each in at_once if each.num_microbatches == failure.microbatches)
            pending = [_without(each, failure, failed) if each in at_once else each for each in left]
    return _rows(path)


def _rows(path: Path) -> list[Row]:
    return read_rows(path) if path.exists() else []


def _without(settings: Settings, failure: Failure, failed: Settings) -> Settings:
    """At as many microbatches it failed; where memory was short, it is so with more of at least that size, too."""
    more = settings.num_microbatches > failed.num_microbatches
    larger = more and settings.workload.microbatch_size >= failed.workload.microbatch_size
    if settings.num_microbatches != failed.num_microbatches and not (larger and is_memory(failure.reason)):
        return settings
    return replace(settings, failed=(*settings.failed, (failure.title, failure.reason)))


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Sizes of --config are defaults: what is given beside it wins. Raises: ValueError, OSError."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.config is not None:
        check_least("stages", options.stages)
        parser.set_defaults(**sizes_of(options.config, options.stages))
        options = parser.parse_args(arguments)
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.throughput", description="Training throughput of the pipeline schedules."
    )
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu", help="one process per stage; several may share a GPU")
    add("--stages", type=int, default=2, metavar="S", help="stages, one process each (default: 2)")
    add("--microbatches", default="1,2,4,8", metavar="M,...", help="microbatches of a step (default: 1,2,4,8)")
    add("--json", type=Path, default=Path("runs/throughput/throughput.json"), metavar="FILE", help="the rows")
    add(
        "--config",
        type=Path,
        metavar="FILE",
        help="settings of launch/train.py, such as launch/configs/gpt_1b.yaml: its sizes",
    )
    size = "sequences of a step, cut into M microbatches (default: 8)"
    add("--batch-size", type=int, default=8, metavar="N", help=size)
    add("--microbatch-size", type=int, metavar="B", help="instead: sequences of a microbatch, so that the batch grows")
    add("--seq-len", type=int, default=256, metavar="T", help="tokens of a sequence (default: 256)")
    add("--width", type=int, default=256, metavar="D", help="of the model, a multiple of 64 (default: 256)")
    add("--blocks", default="4", metavar="N,...", help="transformer blocks per stage (default: 4)")
    add("--vocab-size", type=int, default=256, metavar="V", help="(default: 256)")
    add("--dtype", choices=tuple(DTYPES), help="(default: bfloat16 on a GPU, else float32)")
    names, late = (", ".join(map(_name, of(("group", "direct")))) for of in (entries, late_entries))
    add("--only", metavar="NAME,...", help=f"some of: {names} (default: all that the device can), or of: {late}")
    add("--rounds", type=int, default=5, help="turns of each schedule (default: 5)")
    add("--steps", type=int, default=4, help="timed steps of a turn (default: 4)")
    ahead = "of ScheduleDNI: on a GPU too, a step's first receive is posted before the step (see there)"
    add("--limit-s", type=float, default=math.inf, metavar="S", help="seconds of all: what does not fit is left out")
    trace = "folder for a Perfetto trace of each schedule, at 4 microbatches or at the first number"
    add("--traces", type=Path, metavar="FOLDER", help=trace)
    add("--post-ahead", action="store_true", help=ahead)
    add_in_flight(parser)
    return parser


def _settings(options: argparse.Namespace) -> list[Settings]:
    """One for each number of blocks and of microbatches. Raises: ValueError, which names the option."""
    dtype = dtype_of(options.dtype, options.device)
    for name in ("stages", "seq_len", "width", "vocab_size", "rounds", "steps"):
        check_least(name, getattr(options, name))
    check_device(options.device)
    _check_in_flight(options)
    settings, counts = [], numbers("--microbatches", options.microbatches)
    traced = 4 if 4 in counts else counts[0]
    for blocks in numbers("--blocks", options.blocks):
        for m in counts:
            if options.microbatch_size is None and options.batch_size % m:
                raise ValueError(f"--batch-size {options.batch_size} is no multiple of {m} microbatches")
            size = options.microbatch_size or options.batch_size // m
            workload = Workload(options.stages, blocks, options.width, options.seq_len, options.vocab_size, size, dtype)
            stem = f"{options.json.stem}-m{m}" + (f"-b{blocks}" if "," in options.blocks else "")
            settings.append(
                Settings(
                    workload=workload,
                    num_microbatches=m,
                    entries=_entries(options),
                    rounds=options.rounds,
                    steps=options.steps,
                    post_ahead=options.post_ahead,
                    in_flight=options.in_flight,
                    rows=options.json,
                    timeline=options.json.with_name(f"{stem}.png"),
                    traces=options.traces if m == traced else None,
                )
            )
    return settings


def _check_in_flight(options: argparse.Namespace) -> None:
    if options.in_flight is not None and all(entry.policy not in LATE for entry in _entries(options)):
        raise ValueError(
            f"--in-flight {options.in_flight} is for late policies, and --only names none: add one, such as DNI:stale"
        )
    check_in_flight(options.in_flight, options.stages)


def _entries(options: argparse.Namespace) -> tuple[Entry, ...]:
    # all ranks are on this host: whether its GPUs reach each other's memory is seen when a boundary opens
    transports = ("group", "direct") if options.device == "cuda" and options.stages > 1 else ("group",)
    by_default = entries(transports)
    known = {_name(entry): entry for entry in (*by_default, *late_entries(transports))}
    names = options.only.split(",") if options.only is not None else list(map(_name, by_default))
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"--only {unknown[0]}: choose of {', '.join(known)}")
    return tuple(known[name] for name in names)


def _name(entry: Entry) -> str:
    """As --only takes it."""
    return entry.title.replace(" ", ":")


if __name__ == "__main__":
    sys.exit(main())
