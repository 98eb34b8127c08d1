"""A stage stalls while the others go on: forward-unlocked stages, by how far they may run ahead of their input.

python -m benchmarks.stall --json runs/stall/stall.json

Three stages on a CPU, whose work is sleeping, so that nothing depends on what else the machine does. Once the middle
one sleeps --stall-s seconds more. The first goes on because a gradient may come `lag` microbatches late, the last one
because it starts from synthetic inputs. Window 0 is the pipeline without them.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage

from benchmarks.machine import commit
from benchmarks.options import check_least, numbers
from benchmarks.ranks import run_ranks
from benchmarks.rows import write_rows
from dnipipe import ScheduleDNI
from dnipipe.observe.timeline import draw_timelines
from dnipipe.observe.trace import Span, Trace
from dnipipe.schedule import ForwardUnlocked

STAGES, STALLING = 3, 1
WIDTH, CLASSES, ROWS = 32, 10, 8
FORWARD_SHARE = 1 / 3  # of a microbatch's time
TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Settings:
    """One run. window: 0: inputs are waited for."""

    window: int
    microbatches: int
    microbatch_ms: float
    stall_s: float
    steps: int
    patience_s: float

    @property
    def needed(self) -> int:
        """The window that bridges the stall."""
        return math.ceil(self.stall_s * 1e3 / self.microbatch_ms)

    @property
    def stalls_at(self) -> int:
        """Microbatch, of all steps."""
        return self.steps * self.microbatches // 4


@dataclass(frozen=True)
class StallRow:
    """One run; in a file, a flat JSON object but for the lists, which are by stage.

    Fields:
        needed: the stall over the time of a microbatch. longest_step_s, seconds: the longest step() from the second on,
            and all of these together. early_starts: microbatches that began from synthetic inputs.
            starts: which, as (stage, step, microbatch).
    """

    window: int
    needed: int
    stall_s: float
    microbatch_ms: float
    microbatches: int
    steps: int
    longest_step_s: list[float]
    seconds: list[float]
    early_starts: list[int]
    starts: list[list[int]]
    commit: str


class Sleeping(nn.Module):
    """A stage whose forward and backward take as long as they are told to; `stall_s` more at forward `stalls_at`."""

    def __init__(self, module: nn.Module, settings: Settings, stalls: bool) -> None:
        super().__init__()
        self.module, self.settings, self.stalls = module, settings, stalls
        self.calls = -1  # torch's sweep for the shapes calls once

    def forward(self, x: Tensor) -> Tensor:
        seconds = self.settings.microbatch_ms / 1e3
        stall_s = self.settings.stall_s if self.stalls and self.calls == self.settings.stalls_at else 0.0
        self.calls += 1
        time.sleep(FORWARD_SHARE * seconds + stall_s)
        output: Tensor = self.module(x)
        if output.requires_grad:  # torch 2.11 finds shapes without gradients
            output.register_hook(lambda grad: time.sleep((1 - FORWARD_SHARE) * seconds))
        return output


def run(settings: Settings) -> tuple[StallRow, list[Span]]:
    """Trains on STAGES processes of this machine."""
    with tempfile.TemporaryDirectory(prefix="dnipipe-") as folder:
        path = Path(folder) / "told.pt"
        run_ranks(STAGES, "cpu", TIMEOUT_S, train, settings, path)
        return read(settings, path)


def read(settings: Settings, path: Path) -> tuple[StallRow, list[Span]]:
    """What train() has left."""
    steps, starts, spans = zip(*torch.load(path, weights_only=False), strict=True)
    row = StallRow(
        window=settings.window,
        needed=settings.needed,
        stall_s=settings.stall_s,
        microbatch_ms=settings.microbatch_ms,
        microbatches=settings.microbatches,
        steps=settings.steps,
        longest_step_s=[max(each) for each in steps],
        seconds=[sum(each) for each in steps],
        early_starts=[len(each) for each in starts],
        starts=[list(start) for each in starts for start in each],
        commit=commit(),
    )
    return row, [span for each in spans for span in each]


def train(rank: int, device: torch.device, settings: Settings, path: Path) -> None:
    """One rank; the first one writes what all have to tell to `path`."""
    torch.manual_seed(rank)
    last = rank == STAGES - 1
    module = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, CLASSES if last else WIDTH))
    trace = Trace(rank, rank, device)
    schedule = ScheduleDNI(
        PipelineStage(Sleeping(module, settings, rank == STALLING), rank, STAGES, device),
        settings.microbatches,
        F.cross_entropy,
        policy="synthetic",
        lag=settings.needed + 2,
        forward_unlocked=ForwardUnlocked(settings.window, settings.patience_s) if settings.window else None,
        check_every_steps=0,  # that agreement is a wait, too
        timeout_s=TIMEOUT_S,
        trace=trace,
    )
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
    seconds = []
    for step in range(settings.steps):
        start = time.perf_counter()
        x, y = _batch(step, settings.microbatches)
        schedule.step(*((x,) if settings.window or rank == 0 else ()), target=y)
        optimizer.step()
        optimizer.zero_grad()
        if step == 0:
            trace.export()  # the first step finds shapes together
        else:
            seconds.append(time.perf_counter() - start)
    spans = trace.export()
    schedule.flush()  # who is done long before its neighbours stays until they have what they need
    told: list[Any] = [None] * STAGES
    dist.all_gather_object(told, (seconds, schedule.early_starts, spans))
    if rank == 0:
        torch.save(told, path)


def _batch(step: int, microbatches: int) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(step)
    rows = ROWS * microbatches
    return torch.randn(rows, WIDTH, generator=random), torch.randint(CLASSES, (rows,), generator=random)


def table(rows: Sequence[StallRow]) -> str:
    first = rows[0]
    lines = [
        f"Stage {STALLING} of {STAGES} stalls {first.stall_s:g} s; a microbatch takes {first.microbatch_ms:g} ms, a "
        f"step has {first.microbatches}. To bridge the stall takes a window of {first.needed}.",
        "",
        "| window | longest step of stage 0, 1, 2, s | all steps, s | started from synthetic inputs |",
        "|---|---|---|---|",
    ]
    for row in rows:
        longest, seconds = (", ".join(f"{each:.2f}" for each in of) for of in (row.longest_step_s, row.seconds))
        starts = ", ".join(map(str, row.early_starts))
        lines.append(f"| {row.window} | {longest} | {seconds} | {starts} of {row.steps * row.microbatches} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    settings, path = _read(argv)
    rows, runs = [], {}
    for each in settings:
        row, spans = run(each)
        rows.append(row)
        name = f"window {each.window}" if each.window else "waits for its input"
        runs[name] = spans
    write_rows(rows, path)
    path.with_suffix(".md").write_text(table(rows))
    draw_timelines(runs, path.with_suffix(".png"))
    print(table(rows))


def _read(argv: Sequence[str] | None) -> tuple[list[Settings], Path]:
    """What to run, and the file of the rows."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stall", description=__doc__)
    parser.add_argument("--windows", help="default: none, a third of what the stall needs, and a tenth more than it")
    parser.add_argument("--microbatches", type=int, default=2)
    parser.add_argument("--microbatch-ms", type=float, default=50.0)
    parser.add_argument("--stall-s", type=float, default=2.0)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--patience-s", type=float, default=0.005, help="as of ForwardUnlocked")
    parser.add_argument("--json", type=Path, default=Path("runs/stall/stall.json"), help="rows; table, picture beside")
    given = parser.parse_args(argv)
    try:
        check_least("microbatches", given.microbatches)
        check_least("steps", given.steps, 4)  # so that the stall falls behind the first, which no time is taken of
        if not given.microbatch_ms > 0:
            raise ValueError(f"--microbatch-ms must be above 0, got {given.microbatch_ms}")
        parts = (given.microbatches, given.microbatch_ms, given.stall_s, given.steps, given.patience_s)
        needed = Settings(0, *parts).needed
        windows = numbers("--windows", given.windows) if given.windows else [needed // 3, needed + needed // 10 + 1]
    except ValueError as error:
        parser.error(str(error))
    return [Settings(window, *parts) for window in (0, *windows)], given.json


if __name__ == "__main__":
    main()
