r"""Does DNI reach 1F1B's loss sooner, in seconds? Real processes train the same GPT on the same bytes by each schedule.

On a CPU, two processes, a small model, about 8 minutes:

    python -m benchmarks.time_to_loss --json runs/time_to_loss/cpu.json

On one GPU, four ranks with a quarter of it each, 26 M parameters, at most 8 minutes:

    launch/one_card.sh 4 python -m benchmarks.time_to_loss --device cuda --stages 4 --blocks 2 --width 512 \
        --seq-len 256 --batch-size 64 --steps 3000 --eval-every 250 --eval-sequences 1024 \
        --data site-packages --max-mb 120 \
        --optimizer Muon --policies stale,corrected --schedules "" --best-microbatches "" --search-steps 150 \
        --limit-s 480 --json runs/time_to_loss/h100.json

1F1B's losses at 50, 75 and 100 % of its run are the marks. Each run has a cosine of its own length, so besides equal
steps there are runs of equal time and of other lengths. What --limit-s leaves no time for is named and left out; rows
are written after each run. Writes the rows and, beside them, the table and a picture.
"""

from __future__ import annotations

import argparse
import math
import shlex
import sys
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.contestants import TORCH_SCHEDULES, Entry
from benchmarks.loss_curves import draw_curves
from benchmarks.loss_race import Settings, race
from benchmarks.loss_rows import LossRow
from benchmarks.loss_simulated import simulate
from benchmarks.loss_table import markdown, print_tables
from benchmarks.loss_training import Task
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
from benchmarks.rows import read_objects, read_rows_of, write_rows
from benchmarks.workload import HEAD_WIDTH, Workload
from dnipipe.data import stdlib_sources
from dnipipe.data.sources import find_files
from dnipipe.interface import TensorMeta, check_interface
from dnipipe.plan.late_weights import foretold_distance
from dnipipe.schedule.choose import choose_late_weights
from dnipipe.schedule.policy import AUTO, LATE

NAME = "benchmarks.time_to_loss"
TIMEOUT_S = 300.0
VOCAB_SIZE = 256
POLICIES = ("synthetic", "stale", "corrected")
WITHOUT_INTERFACE = ("stale",)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 with one line on stderr for a value that cannot be."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    options, command = _parser().parse_args(given), f"python -m {NAME} {shlex.join(given)}".strip()
    try:
        if options.simulated:
            loaded = [row for path in options.simulated for row in read_objects(path)]
            write_rows(simulate(loaded, options.microbatches, command), options.json)
        else:
            settings = _settings(options, command)
    except (OSError, ValueError) as error:
        print(f"{NAME}: {error}", file=sys.stderr)
        return 2
    if not options.simulated:
        run_ranks(options.stages, options.device, TIMEOUT_S, race, settings)
    show(read_rows_of(LossRow, options.json), options.json)
    return 0


def show(rows: Sequence[LossRow], path: Path) -> None:
    """The table, and beside the rows' file the table and the picture."""
    print_tables(Console(width=None if sys.stdout.isatty() else 170), rows)
    path.with_suffix(".md").write_text(markdown(rows), encoding="utf-8")
    if any(row.curve for row in rows):
        draw_curves(rows, path.with_suffix(".png"))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m {NAME}", description="Seconds to 1F1B's loss, by schedule.")
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu", help="one process per stage; several may share a GPU")
    add("--json", type=Path, default=Path("runs/time_to_loss/time_to_loss.json"), metavar="FILE", help="the rows")
    simulated = "no run: rows of benchmarks.policies, and of benchmarks.throughput or of a race, put together"
    add("--simulated", nargs="+", type=Path, metavar="FILE", help=simulated)
    add("--schedules", default="GPipe,ZBVZeroBubble", metavar="NAME,...", help="of torch, beside 1F1B ('': none)")
    add("--policies", default=",".join(POLICIES), metavar="NAME,...", help="of DNI ('': none; default: all)")
    add("--interfaces", default="local_head", metavar="NAME,...", help="of the policies that predict")
    add("--transports", metavar="NAME,...", help="group, direct (default: direct where ranks share a GPU, else group)")
    add("--unlock-after-steps", type=int, metavar="N", help="of DNI, under wait (default: a tenth of each run)")
    add_in_flight(parser)
    late = "of stale and corrected, as of ScheduleDNI: predicted, predicted@3, ... (default: auto, by the optimizer)"
    add("--late-weights", default=AUTO, metavar="HOW,...", help=late)
    add("--optimizer", choices=("AdamW", "Muon"), default="AdamW")
    _add_sizes(parser)
    _add_runs(parser)
    return parser


def _add_sizes(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--stages", type=int, default=2, metavar="S", help="stages, one process each (default: 2)")
    add("--blocks", type=int, default=2, metavar="N", help="transformer blocks per stage (default: 2)")
    add("--width", type=int, default=128, metavar="D", help="of the model, a multiple of 64 (default: 128)")
    add("--seq-len", type=int, default=128, metavar="T", help="bytes of a sequence (default: 128)")
    add("--batch-size", type=int, default=8, metavar="B", help="sequences of a step, whatever M (default: 8)")
    add("--dtype", choices=tuple(DTYPES), help="(default: bfloat16 with float32 copies on a GPU, else float32)")
    data = "stdlib, site-packages (their Python sources), files or folders (default: stdlib)"
    add("--data", nargs="+", default=["stdlib"], metavar="WHAT", help=data)
    add("--max-mb", type=float, default=40.0, metavar="MB", help="of text (default: 40)")


def _add_runs(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--steps", type=int, default=400, metavar="N", help="of 1F1B's run, and of equal steps (default: 400)")
    add("--microbatches", type=int, default=4, metavar="M", help="(default: 4)")
    add("--best-microbatches", default="4,8", metavar="M,...", help="each also runs at its fastest of these ('': no)")
    add(
        "--learning-rates", default="5e-4,1e-3,2e-3", metavar="R,...", help="each takes its best (default: %(default)s)"
    )
    add("--search-steps", type=int, metavar="N", help="of the runs that choose it (default: a quarter of --steps)")
    add("--lengths", default="", metavar="X,...", help="times --steps: more runs of DNI, such as 0.9,1.15")
    equal_time = "as many steps as fit in 1F1B's seconds (default: yes)"
    add("--equal-time", action=argparse.BooleanOptionalAction, default=True, help=equal_time)
    add("--seeds", default="0", metavar="N,...", help="of weights and batches (default: 0)")
    add("--eval-every", type=int, metavar="N", help="steps (default: a tenth of --steps)")
    add("--eval-sequences", type=int, default=128, metavar="N", help="of the validation text (default: 128)")
    add("--limit-s", type=float, default=math.inf, metavar="S", help="seconds of all: what does not fit is left out")


def _check_sizes(options: argparse.Namespace) -> None:
    """Raises: ValueError: it names the option."""
    for name in ("stages", "blocks", "seq_len", "batch_size", "steps", "microbatches", "eval_sequences"):
        check_least(name, getattr(options, name), 1)
    for name, least in (("unlock_after_steps", 0), ("search_steps", 1), ("eval_every", 1)):
        check_least(name, getattr(options, name), least)
    if options.width < 1 or options.width % HEAD_WIDTH:
        raise ValueError(f"--width must be a multiple of {HEAD_WIDTH}, got {options.width}")
    check_device(options.device)


def _settings(options: argparse.Namespace, command: str) -> Settings:
    """Raises: ValueError, OSError: it names the option."""
    _check_sizes(options)
    own = numbers("--best-microbatches", options.best_microbatches) if options.best_microbatches else []
    for m in (options.microbatches, *own):
        if options.batch_size % m:
            raise ValueError(f"--batch-size {options.batch_size} is no multiple of {m} microbatches")
    dtype = dtype_of(options.dtype, options.device)
    sizes = (options.stages, options.blocks, options.width, options.seq_len, VOCAB_SIZE, options.batch_size)
    task = Task(
        Workload(*sizes, dtype),
        options.optimizer,
        options.unlock_after_steps,
        options.in_flight,
        options.eval_sequences,
    )
    return Settings(
        task=task,
        entries=_entries(options),
        microbatches=options.microbatches,
        own_microbatches=tuple(own),
        learning_rates=_above_0("--learning-rates", options.learning_rates),
        search_steps=_search_steps(options),
        steps=options.steps,
        lengths=tuple(each for each in _above_0("--lengths", options.lengths) if each != 1) if options.lengths else (),
        equal_time=options.equal_time,
        seeds=_seeds(options.seeds),
        eval_every=options.eval_every or max(1, options.steps // 10),
        files=_files(options.data),
        max_bytes=int(options.max_mb * 1e6),
        started_s=time.time(),
        limit_s=options.limit_s,
        rows=options.json,
        command=command,
    )


def _search_steps(options: argparse.Namespace) -> int | None:
    """None: whole runs, which then are those of equal steps."""
    steps: int = options.search_steps or max(1, options.steps // 4)
    return steps if steps != options.steps else None


def _names(option: str, text: str, known: Sequence[str]) -> list[str]:
    names = [name for name in text.split(",") if name]
    for name in names:
        if name not in known:
            raise ValueError(f"{option} {name}: choose of {', '.join(known)}")
    return names


def _above_0(option: str, text: str) -> tuple[float, ...]:
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{option} is a list of numbers such as 0.9,1.15, got {text!r}") from None
    if not all(0 < value < math.inf for value in values):
        raise ValueError(f"{option} must be above 0 each, got {text!r}")
    return values


def _seeds(text: str) -> tuple[int, ...]:
    seeds = text.split(",")
    if not all(seed.isdecimal() for seed in seeds):
        raise ValueError(f"--seeds is a list of numbers from 0 on such as 0,1, got {text!r}")
    return tuple(map(int, seeds))


def _entries(options: argparse.Namespace) -> tuple[Entry, ...]:
    """1F1B first, then DNI, whose runs say more than those of other schedules with 1F1B's gradients."""
    shared = options.device == "cuda" and torch.cuda.device_count() == 1 and options.stages > 1
    others = _names("--schedules", options.schedules, TORCH_SCHEDULES)
    policies = _names("--policies", options.policies, POLICIES)
    possible = ("group", "direct") if options.device == "cuda" and options.stages > 1 else ("group",)
    transports = _names("--transports", options.transports or ("direct" if shared else "group"), possible)
    activation = TensorMeta((options.batch_size, options.seq_len, options.width), torch.float32)
    check_in_flight(options.in_flight, options.stages)
    for name in options.interfaces.split(","):
        check_interface(name, activation, num_classes=VOCAB_SIZE)
    late_weights = _late_weights(options.late_weights, options.optimizer)
    of_dni = [
        Entry("DNI", interface, transport, policy, weights)
        for transport in transports
        for policy in policies
        for interface in ([None] if policy in WITHOUT_INTERFACE else options.interfaces.split(","))
        for weights in (late_weights if policy in LATE else [None])
    ]
    return (Entry("1F1B"), *of_dni, *(Entry(name) for name in others if name != "1F1B"))


def _late_weights(text: str, optimizer: str) -> list[str]:
    values = [choose_late_weights(each, optimizer) for each in text.split(",")]
    try:
        for value in values:
            foretold_distance(value)
    except ValueError as error:
        raise ValueError(f"--late-weights {text}: {error}") from None
    return values


def _files(data: Sequence[str]) -> tuple[Path, ...]:
    files: list[Path] = []
    for what in data:
        if what == "stdlib":
            files += stdlib_sources()
        else:
            path = sysconfig.get_paths()["purelib"] if what == "site-packages" else what
            files += find_files([path], (".py",) if what == "site-packages" else ())
    return tuple(files)


if __name__ == "__main__":
    sys.exit(main())
