"""Training steps per second of the pipeline schedules, side by side: torch's own and DNI.

python -m benchmarks.throughput --device cpu --stages 2 --microbatches 1,2,4,8 --json throughput.json

The same model, batch and optimizer for all, in turns. Utilisation = time of the same work with no pipeline and all
ranks busy / step time. Writes the rows and, beside them, the tables, a bar picture, and the timelines.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.bars import draw_bars
from benchmarks.compete import Settings, compete
from benchmarks.contestants import Entry, entries, late_entries
from benchmarks.options import DTYPES, check_device, check_least, dtype_of, numbers
from benchmarks.ranks import run_ranks
from benchmarks.rows import Row, read_rows, write_rows
from benchmarks.table import markdown, show
from benchmarks.workload import Workload

TIMEOUT_S = 120.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 with one line on stderr for a value that cannot be."""
    options = _parser().parse_args(arguments)
    try:
        settings = _settings(options)
    except ValueError as error:
        print(f"benchmarks.throughput: {error}", file=sys.stderr)
        return 2
    options.json.parent.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    for each in settings:
        run_ranks(options.stages, options.device, TIMEOUT_S, compete, each)
        rows += read_rows(each.rows)
        each.rows.unlink()
        write_rows(rows, options.json)  # what is done stays if a later one fails
    show(Console(width=None if sys.stdout.isatty() else 170), rows)
    draw_bars(rows, options.json.with_suffix(".png"))
    options.json.with_suffix(".md").write_text(markdown(rows), encoding="utf-8")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.throughput", description="Training throughput of the pipeline schedules."
    )
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu", help="one process per stage; several may share a GPU")
    add("--stages", type=int, default=2, metavar="S", help="stages, one process each (default: 2)")
    add("--microbatches", default="1,2,4,8", metavar="M,...", help="microbatches of a step (default: 1,2,4,8)")
    add("--json", type=Path, default=Path("runs/throughput/throughput.json"), metavar="FILE", help="the rows")
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
    add("--post-ahead", action="store_true", help=ahead)
    return parser


def _settings(options: argparse.Namespace) -> list[Settings]:
    """One for each number of blocks and of microbatches. Raises: ValueError, which names the option."""
    dtype = dtype_of(options.dtype, options.device)
    for name in ("stages", "seq_len", "width", "vocab_size", "rounds", "steps"):
        check_least(name, getattr(options, name))
    check_device(options.device)
    settings = []
    for blocks in numbers("--blocks", options.blocks):
        for m in numbers("--microbatches", options.microbatches):
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
                    rows=options.json.with_name(f"{stem}.part.json"),
                    timeline=options.json.with_name(f"{stem}.png"),
                )
            )
    return settings


def _entries(options: argparse.Namespace) -> tuple[Entry, ...]:
    shared = options.device == "cuda" and torch.cuda.device_count() == 1 and options.stages > 1
    transports = ("group", "direct") if shared else ("group",)
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
