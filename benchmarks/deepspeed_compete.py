"""One rank's part of the benchmark of DeepSpeed: builds both engines, lets them run in turns, writes the rows."""

from __future__ import annotations

import gc
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from rich.progress import Progress

from benchmarks.contestants import Parts
from benchmarks.deepspeed_rows import OURS, PLAIN, DeepSpeedRow
from benchmarks.machine import allocated, card, commit, largest
from benchmarks.reference import Alone
from benchmarks.rounds import Runner, Timing, time_in_turns
from benchmarks.rows import write_rows
from benchmarks.workload import Workload

if TYPE_CHECKING:
    from benchmarks.deepspeed_job import Contestant

WARM_UP_STEPS = 3
ALONE_STEPS = 10
BACKENDS = {"cpu": "gloo", "cuda": "nccl"}


@dataclass(frozen=True)
class Job:
    """The same for both engines. zero: stage of ZeRO. lag, interface, transport: of our block."""

    workload: Workload
    num_microbatches: int
    zero: int
    lag: int
    interface: str
    transport: str

    def config(self, engine: str) -> dict[str, Any]:
        """The ds_config; both engines' are equal but for our block."""
        workload = self.workload
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": workload.microbatch_size,
            "gradient_accumulation_steps": self.num_microbatches,
            "optimizer": {"type": "Adam", "params": {"lr": 1e-4, "torch_adam": True}},
            "gradient_clipping": 1.0,
            "zero_optimization": {"stage": self.zero},
            "steps_per_print": None,
        }
        if workload.dtype == torch.bfloat16:
            config["bf16"] = {"enabled": True}
        block = {
            "policy": "synthetic",
            "interface": self.interface,
            "lag": self.lag,
            "transport": self.transport,
            "num_classes": workload.vocab_size,
        }
        return {**config, "dnipipe": block} if engine == OURS else config


@dataclass(frozen=True)
class Settings:
    """jobs: one for each number of microbatches. rows: where rank 0 writes what is done."""

    jobs: tuple[Job, ...]
    rounds: int
    steps: int
    rows: Path


def compete(rank: int, device: torch.device, settings: Settings) -> None:
    """Every rank must call it, in a process of its own: DeepSpeed's accelerator is chosen once for all.

    Raises: RuntimeError: our engine fell back to true gradients, so that its time would not be what it is called.
    """
    _set_environment(rank, device)
    from benchmarks import deepspeed_job  # not before the environment is set

    if rank == 0 and device.type == "cpu":
        print("DeepSpeed's extension for the CPU: compiled at the first time (minutes), else loaded", file=sys.stderr)
    deepspeed_job.join(BACKENDS[device.type])
    microbatch_ms = _microbatch_ms(settings.jobs[0].workload, device)
    rows: list[DeepSpeedRow] = []
    with Progress(transient=True, disable=rank != 0) as progress:
        task = progress.add_task("", total=len(settings.jobs) * settings.rounds * 2)
        for job in settings.jobs:
            progress.update(task, description=f"M = {job.num_microbatches}")
            rows += _compete(job, device, settings, microbatch_ms, lambda: progress.advance(task))
            if rank == 0:
                write_rows(rows, settings.rows)


def _compete(
    job: Job, device: torch.device, settings: Settings, microbatch_ms: float, on_round: Callable[[], None]
) -> list[DeepSpeedRow]:
    from benchmarks.deepspeed_job import Contestant

    runners: dict[str, Contestant] = {}
    peaks: dict[str, int | None] = {}
    for engine in (PLAIN, OURS):
        gc.collect()  # the engines of the last job are no longer there
        before = allocated(device)
        runners[engine] = Contestant(engine, job, device)
        peaks[engine] = largest(_peak_bytes(runners[engine], device, before))
    turns: dict[str, Runner] = dict(runners)
    timings = time_in_turns(turns, settings.rounds, settings.steps, on_round)
    if runners[OURS].policy != "synthetic":
        raise RuntimeError(
            f"dnipipe.deepspeed fell back to policy {runners[OURS].policy!r} while it was timed: the loss grew. Choose "
            f"another --interface, or fewer --rounds"
        )
    rows = _rows(job, device, microbatch_ms, timings, peaks, runners)
    for runner in runners.values():
        runner.close()
    return rows


def _set_environment(rank: int, device: torch.device) -> None:
    """What DeepSpeed's launcher would set."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(dist.get_world_size()), LOCAL_RANK=str(device.index or 0))
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # on a machine with GPUs too


def _microbatch_ms(workload: Workload, device: torch.device) -> float:
    """Forward and backward of the dearest stage, while all stages run without a pipeline: a median."""
    alone = Alone(workload, Parts(workload, [dist.get_rank()], workload.stages, device), 1)
    for _ in range(WARM_UP_STEPS):
        alone.step()
    alone.settle()
    dist.barrier()
    alone.trace.enabled = True
    for _ in range(ALONE_STEPS):
        alone.step()
    alone.trace.enabled = False
    seconds: dict[str, list[float]] = {"forward": [], "backward": []}
    for span in alone.trace.export():
        if span.name in seconds:
            seconds[span.name].append(span.end_s - span.start_s)
    return float(largest(sum(map(statistics.median, seconds.values())))) * 1e3


def _peak_bytes(contestant: Contestant, device: torch.device, before: int) -> int | None:
    """Runs its first steps. The peak of the last, less what was there before the engine was built."""
    for _ in range(WARM_UP_STEPS):
        contestant.step()
    contestant.settle()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    contestant.step()
    contestant.settle()
    return torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else None


def _rows(
    job: Job,
    device: torch.device,
    microbatch_ms: float,
    timings: dict[str, Timing],
    peaks: dict[str, int | None],
    runners: dict[str, Contestant],
) -> list[DeepSpeedRow]:
    from benchmarks.deepspeed_job import VERSION

    workload = job.workload
    return [
        DeepSpeedRow(
            engine=engine,
            policy=runners[engine].policy,
            interface=job.interface if engine == OURS else None,
            lag=job.lag if engine == OURS else None,
            transport=runners[engine].transport,
            device=device.type,
            card=card(device),
            zero=job.zero,
            dtype=str(workload.dtype).removeprefix("torch."),
            stages=workload.stages,
            microbatches=job.num_microbatches,
            microbatch_size=workload.microbatch_size,
            seq_len=workload.seq_len,
            width=workload.width,
            blocks_per_stage=workload.blocks_per_stage,
            vocab_size=workload.vocab_size,
            microbatch_ms=microbatch_ms,
            step_ms=timing.median_ms,
            spread_ms=timing.spread_ms,
            tokens_per_s=workload.tokens(job.num_microbatches) / timing.median_ms * 1e3,
            speedup=timings[PLAIN].median_ms / timing.median_ms,
            peak_bytes=peaks[engine],
            commit=commit(),
            torch=torch.__version__,
            deepspeed=VERSION,
            date=date.today().isoformat(),
        )
        for engine, timing in timings.items()
    ]
