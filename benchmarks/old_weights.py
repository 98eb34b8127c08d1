"""What it costs that a late backward sees old weights: time of a step and memory, of one stage alone.

python -m benchmarks.old_weights --device cuda --json old_weights.json

The first of S stages, in the order of `stale`: S - 1 microbatches go forward before the first goes backward, and an
optimizer step follows each M microbatches. Activations go down nowhere and gradients are made up, so nothing is timed
but the stage itself.

    plain           backward at once, through the parameters themselves: nothing is late
    copies          graphs are kept, and copies of the weights for each update that comes in between
    recompute       copies, but of the activations only the stage's input is kept: the forward runs twice
    new             graphs are kept and meet the weights as they are by then
    new recompute   the same, and only the stage's input is kept: all of the backward is of the new weights
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks.machine import allocated, card, commit, synchronize
from benchmarks.options import DTYPES, check_device, check_least, dtype_of, numbers
from benchmarks.ranks import run_ranks
from benchmarks.rounds import time_in_turns
from benchmarks.rows import many, read_rows_of, write_rows
from benchmarks.table import drawn, ms, print_whole, said, size
from benchmarks.throughput import TIMEOUT_S
from benchmarks.workload import Workload, make_optimizer
from dnipipe.schedule.old_weights import OldWeights
from dnipipe.schedule.policy import Policy

PLAIN, COPIES, RECOMPUTE, NEW, NEW_RECOMPUTE = METHODS = ("plain", "copies", "recompute", "new", "new recompute")


@dataclass(frozen=True)
class WeightsRow:
    """One method at one number of microbatches; in a file, a flat JSON object.

    Fields:
        method: as above. delay: microbatches that go forward before the first goes backward.
        microbatch_size: sequences. seq_len: tokens.
        step_ms, spread_ms: median and interquartile range over the rounds.
        ratio_to_plain: of step_ms.
        peak_bytes: of tensors: weights, gradients, moments, activations, old weights. None on a CPU.
    """

    device: str
    card: str
    method: str
    stages: int
    delay: int
    microbatches: int
    microbatch_size: int
    seq_len: int
    width: int
    blocks_per_stage: int
    vocab_size: int
    dtype: str
    step_ms: float
    spread_ms: float
    ratio_to_plain: float
    peak_bytes: int | None
    commit: str
    torch: str
    date: str


@dataclass(frozen=True)
class Settings:
    """rows: where they are written."""

    workload: Workload
    microbatches: tuple[int, ...]
    rounds: int
    steps: int
    rows: Path


class Loop:
    """The first stage under one method."""

    def __init__(self, method: str, workload: Workload, num_microbatches: int, device: torch.device) -> None:
        self.method, self.num_microbatches, self.device = method, num_microbatches, device
        self.delay = 0 if method == PLAIN else Policy("stale").delay(0, workload.stages)
        (self.module,) = workload.chunks([0], workload.stages, device)
        self.optimizer = make_optimizer([self.module], device)
        self.input = workload.batch(1, device)
        self.output_grad = torch.randn(*self.input.shape, workload.width, dtype=workload.dtype, device=device)
        self.weights: OldWeights | None = None
        self.graphs: deque[tuple[OldWeights | None, Tensor]] = deque()

    def step(self) -> None:
        if self.method != PLAIN and (self.weights is None or not self.weights.current):
            self.weights = OldWeights(self.module)
        for _ in range(self.num_microbatches):
            self.graphs.append((self.weights, self._forward()))
            if len(self.graphs) > self.delay:
                self._backward()
        if self.weights is not None and self.method in (COPIES, RECOMPUTE):
            self.weights.part()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _forward(self) -> Tensor:
        if self.weights is None:
            return self._output()
        with self.weights.in_place():
            return self._output()

    def _output(self) -> Tensor:
        recomputes = self.method in (RECOMPUTE, NEW_RECOMPUTE)
        output: Tensor = (
            checkpoint(self.module, self.input, use_reentrant=False) if recomputes else self.module(self.input)
        )
        return output

    def _backward(self) -> None:
        weights, output = self.graphs.popleft()
        if weights is None:
            output.backward(self.output_grad)
        else:
            weights.backward([output], [self.output_grad])

    def settle(self) -> None:
        synchronize(self.device)


def measure(rank: int, device: torch.device, settings: Settings) -> None:
    """In a process of its own. Writes the rows."""
    rows: list[WeightsRow] = []
    for num_microbatches in settings.microbatches:
        loops = {method: (settings.workload, num_microbatches, device) for method in METHODS}
        peaks = {method: _peak_bytes(method, *given) for method, given in loops.items()}
        running = {method: Loop(method, *given) for method, given in loops.items()}
        for loop in running.values():
            loop.step()
        timings = time_in_turns(dict(running), settings.rounds, settings.steps, on_round=lambda: None)
        for method, timing in timings.items():
            ratio = timing.median_ms / timings[PLAIN].median_ms
            measured = timing.median_ms, timing.spread_ms, ratio, peaks[method]
            rows.append(_row(running[method], settings.workload, measured))
    write_rows(rows, settings.rows)


def _peak_bytes(method: str, workload: Workload, num_microbatches: int, device: torch.device) -> int | None:
    """Of a loop on its own, from when its graphs are as many as they become."""
    if device.type != "cuda":
        return None
    gc.collect()  # a checkpoint leaves circles of references
    before = allocated(device)
    loop = Loop(method, workload, num_microbatches, device)
    for step in range(2 * loop.delay + 4):
        if step == loop.delay + 2:
            loop.settle()
            torch.cuda.reset_peak_memory_stats(device)
        loop.step()
    loop.settle()
    return torch.cuda.max_memory_allocated(device) - before


def _row(loop: Loop, workload: Workload, measured: tuple[float, float, float, int | None]) -> WeightsRow:
    step_ms, spread_ms, ratio, peak_bytes = measured
    return WeightsRow(
        device=loop.device.type,
        card=card(loop.device),
        method=loop.method,
        stages=workload.stages,
        delay=loop.delay,
        microbatches=loop.num_microbatches,
        microbatch_size=workload.microbatch_size,
        seq_len=workload.seq_len,
        width=workload.width,
        blocks_per_stage=workload.blocks_per_stage,
        vocab_size=workload.vocab_size,
        dtype=str(workload.dtype).removeprefix("torch."),
        step_ms=step_ms,
        spread_ms=spread_ms,
        ratio_to_plain=ratio,
        peak_bytes=peak_bytes,
        commit=commit(),
        torch=torch.__version__,
        date=date.today().isoformat(),
    )


COLUMNS: Sequence[tuple[str, Callable[[WeightsRow], str]]] = (
    ("late backwards see", lambda row: row.method),
    ("M", lambda row: f"{row.microbatches}"),
    ("step ms\n± IQR", lambda row: f"{ms(row.step_ms, row.step_ms)} ± {ms(row.spread_ms, row.step_ms)}"),
    ("x\nplain", lambda row: said(row.ratio_to_plain, ".3f")),
    ("peak", lambda row: size(row.peak_bytes)),
)


def show(console: Console, rows: Sequence[WeightsRow]) -> None:
    first = rows[0]
    work = (
        f"{first.device}, {first.card}: the first of {many(first.stages, 'stage')} of "
        f"{many(first.blocks_per_stage, 'block')}, width {first.width}, {first.dtype}, microbatches of "
        f"{first.microbatch_size} x {first.seq_len} tokens"
    )
    ends = [after.microbatches != row.microbatches for row, after in zip(rows, rows[1:], strict=False)]
    cells = [[cell(row) for _, cell in COLUMNS] for row in rows]
    print_whole(console, drawn(work, [heading for heading, _ in COLUMNS], cells, [*ends, False]))


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 with one line on stderr for a value that cannot be."""
    options = _parser().parse_args(arguments)
    try:
        settings = _settings(options)
    except ValueError as error:
        print(f"benchmarks.old_weights: {error}", file=sys.stderr)
        return 2
    run_ranks(1, options.device, TIMEOUT_S, measure, settings)
    show(Console(width=None if sys.stdout.isatty() else 170), read_rows_of(WeightsRow, settings.rows))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.old_weights", description="Time and memory of what late backwards see."
    )
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--stages", type=int, default=4, metavar="S", help="stages; the first one is run (default: 4)")
    add("--microbatches", default="1,2,4,8", metavar="M,...", help="microbatches of a step (default: 1,2,4,8)")
    add("--json", type=Path, default=Path("runs/old_weights/old_weights.json"), metavar="FILE", help="the rows")
    add("--microbatch-size", type=int, metavar="B", help="sequences (default: 8 on a GPU, else 2)")
    add("--seq-len", type=int, metavar="T", help="tokens of a sequence (default: 512 on a GPU, else 128)")
    add("--width", type=int, metavar="D", help="of the model, a multiple of 64 (default: 1536 on a GPU, else 256)")
    add("--blocks", type=int, default=4, metavar="N", help="transformer blocks of the stage (default: 4)")
    add("--vocab-size", type=int, default=256, metavar="V", help="(default: 256)")
    add("--dtype", choices=tuple(DTYPES), help="(default: bfloat16 on a GPU, else float32)")
    add("--rounds", type=int, default=5, help="turns of each method (default: 5)")
    add("--steps", type=int, default=4, help="timed steps of a turn (default: 4)")
    return parser


def _settings(options: argparse.Namespace) -> Settings:
    """Raises: ValueError, which names the option."""
    on_gpu = options.device == "cuda"
    check_device(options.device)
    for name, default in (("microbatch_size", (2, 8)), ("seq_len", (128, 512)), ("width", (256, 1536))):
        if getattr(options, name) is None:
            setattr(options, name, default[on_gpu])
    for name in ("stages", "microbatch_size", "seq_len", "width", "blocks", "vocab_size", "rounds", "steps"):
        check_least(name, getattr(options, name))
    workload = Workload(
        stages=options.stages,
        blocks_per_stage=options.blocks,
        width=options.width,
        seq_len=options.seq_len,
        vocab_size=options.vocab_size,
        microbatch_size=options.microbatch_size,
        dtype=dtype_of(options.dtype, options.device),
    )
    return Settings(
        workload=workload,
        microbatches=tuple(numbers("--microbatches", options.microbatches)),
        rounds=options.rounds,
        steps=options.steps,
        rows=options.json,
    )


if __name__ == "__main__":
    sys.exit(main())
