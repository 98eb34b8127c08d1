"""One training run on one rank: a schedule, real data, an own cosine; the loss on held-out text outside the clock.

Legend: B sequences of a batch, T bytes of a sequence.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from benchmarks.contestants import Entry, chunks_of, make_schedule
from benchmarks.machine import largest, synchronize
from benchmarks.recipe import optimizer_of, rate_of
from benchmarks.workload import Workload, token_loss
from dnipipe import ScheduleDNI
from dnipipe.data import Corpus
from dnipipe.observe.trace import Trace
from dnipipe.optim import OptimizerName, StageOptimizer
from dnipipe.schedule.policy import LATE

UNLOCK_SHARE = 0.1
Point = tuple[int, float, float]
"""Steps done, seconds of training, bits per byte of the validation text."""


@dataclass(frozen=True)
class Task:
    """What all train on.

    workload: its microbatch_size is that of one microbatch a step, so the whole batch. unlock_after_steps: of DNI,
    under `wait`; None: a tenth of each run. in_flight: as of ScheduleDNI. eval_sequences: of the validation text.
    """

    workload: Workload
    optimizer: OptimizerName
    unlock_after_steps: int | None
    in_flight: int | None
    eval_sequences: int

    def of_dni(self, plan: Plan) -> dict[str, Any]:
        """Further arguments of ScheduleDNI for a run, {} for torch's schedules."""
        if plan.entry.schedule != "DNI":
            return {}
        late = plan.entry.policy in LATE
        return {"unlock_after_steps": plan.unlock_after_steps, "in_flight": self.in_flight if late else None}

    def cut(self, num_microbatches: int) -> Workload:
        """The same batch in so many microbatches."""
        return replace(self.workload, microbatch_size=self.workload.microbatch_size // num_microbatches)

    def unlock(self, steps: int) -> int:
        """Steps under `wait` of a run of so many."""
        return round(UNLOCK_SHARE * steps) if self.unlock_after_steps is None else self.unlock_after_steps


@dataclass(frozen=True)
class Plan:
    """One run. steps: also the length of its cosine. unlock_after_steps: of DNI alone."""

    entry: Entry
    microbatches: int
    learning_rate: float
    steps: int
    seed: int
    unlock_after_steps: int


@dataclass(frozen=True)
class Outcome:
    """curve: to its end, or to where the loss was no number. peak_bytes: largest over ranks; None on a CPU."""

    curve: list[Point]
    peak_bytes: int | None

    @property
    def seconds(self) -> float:
        return self.curve[-1][1]

    @property
    def bpb(self) -> float:
        return self.curve[-1][2]


class Racer:
    """This rank's part of one run. Every rank must build it at the same time.

    Raises: ValueError: the schedule cannot be for so many microbatches, stages or blocks.
    """

    def __init__(self, plan: Plan, task: Task, corpus: Corpus, device: torch.device) -> None:
        self.plan, self.corpus, self.device = plan, corpus, device
        self.workload = task.cut(plan.microbatches)
        rank = dist.get_rank()
        self.indices, self.num_chunks = chunks_of(plan.entry.schedule, rank, dist.get_world_size())
        self.modules = self.workload.chunks(self.indices, self.num_chunks, device, plan.seed)
        stages = [
            PipelineStage(module, index, self.num_chunks, device)
            for module, index in zip(self.modules, self.indices, strict=True)
        ]
        trace = Trace(rank, rank, device, enabled=False)
        self.optimizer = self._optimizer(task.optimizer)
        of_dni = task.of_dni(plan)
        if of_dni:
            of_dni["master_weights"] = self.optimizer.masters
        self.schedule = make_schedule(plan.entry, stages, self.workload, plan.microbatches, trace, **of_dni)
        self.takes_input = any(stage.is_first for stage in stages)
        self.is_last = any(stage.is_last for stage in stages)
        self._loaded, self._loaded_step = self._load(0), 0

    def _optimizer(self, name: OptimizerName) -> StageOptimizer:
        # one for both chunks of a rank, if it has two: gradients are clipped by their norm on a rank
        heads = [m[-1] for index, m in zip(self.indices, self.modules, strict=True) if index == self.num_chunks - 1]
        rate = rate_of(self.plan.learning_rate, self.plan.steps)
        return optimizer_of(nn.ModuleList(self.modules), name, rate, heads[0] if heads else None)

    def step(self, step: int) -> None:
        input_BT, target_BT = self._loaded if self._loaded_step == step else self._load(step)
        args = (input_BT,) if self.takes_input else ()
        # the predictors of DNI are told the label
        needs_target = self.is_last or self.plan.entry.schedule == "DNI"
        kwargs = {"target": target_BT} if needs_target else {}
        self.schedule.step(*args, **kwargs, return_outputs=False)
        # while a GPU still goes backward: the host of a stage that must not wait has no other time to spare
        self._loaded, self._loaded_step = self._load(step + 1), step + 1
        self.optimizer.step(step)

    def _load(self, step: int) -> tuple[Tensor, Tensor]:
        """A step's bytes and the bytes that follow them, each (B, T) int64, on the device."""
        batch = self.corpus.batch(
            "train",
            step=step,
            batch_size=self.plan.microbatches * self.workload.microbatch_size,
            seq_len=self.workload.seq_len,
            seed=self.plan.seed,
        )
        if self.device.type == "cuda":  # from other memory the copy would hold up the host
            batch = (batch[0].pin_memory(), batch[1].pin_memory())
        input_BT, target_BT = (each.to(self.device, non_blocking=True) for each in batch)
        return input_BT, target_BT

    def seconds(self, steps: range) -> float:
        """Trains, and says how long that took on the slowest rank. Every rank must call it.

        The first step of all, in which shapes are agreed upon and kernels are loaded, counts as the mean of the others.
        """
        timed, share = (steps[1:], len(steps) / (len(steps) - 1)) if steps[0] == 0 and len(steps) > 1 else (steps, 1.0)
        for step in steps[: len(steps) - len(timed)]:
            self.step(step)
        synchronize(self.device)
        dist.barrier()
        start_s = time.perf_counter()
        for step in timed:
            self.step(step)
        synchronize(self.device)
        return float(largest(time.perf_counter() - start_s)) * share

    def settle(self) -> None:
        """Nothing of this run is left on any device or on the wire: a neighbour may read this one's memory until then.
        Every rank must call it."""
        if isinstance(self.schedule, ScheduleDNI):
            self.schedule.flush()
        synchronize(self.device)
        dist.barrier()


class Validation:
    """The loss of a model that lies in parts on all ranks. No schedule takes part: each rank puts the whole together,
    and runs its share of the batches."""

    def __init__(self, task: Task, corpus: Corpus, device: torch.device, most_at_once: int = 64) -> None:
        workload, rank, num_ranks = task.workload, dist.get_rank(), dist.get_world_size()
        self.num_tokens = task.eval_sequences * workload.seq_len
        (self.model,) = workload.chunks([0], 1, device)
        # from all over the text: its windows follow one another by their number
        windows = (len(corpus.validation) - 1) // workload.seq_len
        apart = max(1, windows // task.eval_sequences)
        pairs = [
            corpus.batch("validation", step=apart * number, batch_size=1, seq_len=workload.seq_len, seed=0)
            for number in range(rank, task.eval_sequences, num_ranks)
        ]
        self.batches = [
            tuple(torch.cat(each).to(device) for each in zip(*pairs[first : first + most_at_once], strict=True))
            for first in range(0, len(pairs), most_at_once)
        ]

    @torch.no_grad()
    def bpb(self, racer: Racer) -> float:
        """Bits per byte, the same on every rank, which must all call it after the same step."""
        self._put_together(racer)
        nats = torch.zeros((), dtype=torch.float64)
        for input_BT, target_BT in self.batches:
            nats += token_loss(self.model(input_BT), target_BT).double().cpu() * target_BT.numel()
        dist.all_reduce(nats)
        return nats.item() / self.num_tokens / math.log(2)

    def _put_together(self, racer: Racer) -> None:
        own = {
            index: parameters_to_vector(module.parameters()).cpu()
            for index, module in zip(racer.indices, racer.modules, strict=True)
        }
        ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, own)
        chunks: dict[int, Tensor] = {index: vector for rank in ranks for index, vector in rank.items()}
        whole = torch.cat([chunks[index] for index in range(racer.num_chunks)])
        parameters = list(self.model.parameters())
        vector_to_parameters(whole.to(parameters[0].device), parameters)


def train(
    racer: Racer, validation: Validation, eval_every: int, before_bytes: int, on_stretch: Callable[[int], None]
) -> Outcome:
    """Trains to the end, or until the loss is no number. Every rank must call it.

    Args: before_bytes: allocated on the device before this run was built. on_stretch: told the steps done.
    """
    device, curve, seconds, peak = racer.device, list[Point](), 0.0, 0
    for steps in stretches(racer.plan.steps, eval_every):
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        seconds += racer.seconds(steps)
        if device.type == "cuda":  # what the validation takes does not count
            peak = max(peak, torch.cuda.max_memory_allocated(device) - before_bytes)
        curve.append((steps.stop, seconds, validation.bpb(racer)))
        on_stretch(steps.stop)
        if not math.isfinite(curve[-1][2]):
            break
    racer.settle()
    return Outcome(curve, largest(peak) if device.type == "cuda" else None)


def stretches(steps: int, eval_every: int) -> list[range]:
    """The steps between one evaluation and the next; a last one that is shorter joins the one before it if it is less
    than half as long."""
    ends: Sequence[int] = range(eval_every, steps + 1, eval_every)
    ends = [end for end in ends if steps - end >= eval_every / 2] + [steps]
    return [range(first, end) for first, end in zip([0, *ends], ends, strict=False)]


def pace_ms(racer: Racer, warm_ups: int, rounds: int, steps: int) -> float:
    """Milliseconds of a step, a median over rounds. Every rank must call it."""
    racer.seconds(range(warm_ups))
    first = range(warm_ups, warm_ups + rounds * steps, steps)
    seconds = statistics.median(racer.seconds(range(start, start + steps)) for start in first)
    racer.settle()
    return seconds / steps * 1e3
