"""The schedules that compete, each as one rank sees it: its stages, its optimizer, one training step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, get_schedule_class

from benchmarks.failures import work_of
from benchmarks.machine import synchronize
from benchmarks.workload import Workload, make_optimizer, token_loss
from dnipipe import ScheduleDNI
from dnipipe.observe.chunks import Held, watch_chunks
from dnipipe.observe.trace import Trace
from dnipipe.schedule.policy import LATE, Policy

TORCH_SCHEDULES = ("GPipe", "1F1B", "Interleaved1F1B", "InterleavedZeroBubble", "ZBVZeroBubble")
TIMEOUT_S = 60.0  # for a neighbour
INTERFACES = ("linear", "local_head", "transformer")


@dataclass(frozen=True)
class Entry:
    """Who competes. interface, transport, policy: of DNI; None for torch's own schedules. late_weights: as of
    ScheduleDNI, of late policies alone; None: its default."""

    schedule: str
    interface: str | None = None
    transport: str | None = None
    policy: str | None = None
    late_weights: str | None = None

    @property
    def title(self) -> str:
        policy = self.policy if self.policy != "synthetic" else None
        transport = self.transport if self.transport == "direct" else None
        parts = (self.schedule, self.interface, policy, unusual_weights(self.late_weights), transport)
        return " ".join(part for part in parts if part)


def unusual_weights(late_weights: str | None) -> str | None:
    """As a reader is told of them: None for the default."""
    return None if late_weights == Policy.late_weights else late_weights


def entries(transports: tuple[str, ...]) -> tuple[Entry, ...]:
    """All of them; DNI synthetic with each of its interfaces and each transport."""
    of_dni = [Entry("DNI", interface, transport, "synthetic") for transport in transports for interface in INTERFACES]
    return (*map(Entry, TORCH_SCHEDULES), *of_dni)


def late_entries(transports: tuple[str, ...]) -> tuple[Entry, ...]:
    """DNI under the policies that hold graphs until the true gradient is here: stale needs no predictor."""
    policies = ((None, "stale"), ("local_head", "corrected"), ("transformer", "corrected"))
    return tuple(Entry("DNI", interface, each, policy) for each in transports for interface, policy in policies)


class Parts:
    """This rank's stages of the model, cut in one way, and their optimizer: shared by the schedules that cut alike.

    Args: indices: which of num_chunks parts this rank has.
    """

    def __init__(self, workload: Workload, indices: list[int], num_chunks: int, device: torch.device) -> None:
        self.indices, self.num_chunks, self.device = indices, num_chunks, device
        self.modules: list[nn.Sequential] = workload.chunks(indices, num_chunks, device)
        self.optimizer = make_optimizer(self.modules, device)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Of all its stages."""
        return [each for module in self.modules for each in module.parameters()]

    @property
    def num_bytes(self) -> int:
        """Of parameters and optimizer states."""
        states = [each for state in self.optimizer.state.values() for each in state.values()]
        return sum(each.nbytes for each in [*self.parameters, *states] if isinstance(each, Tensor))

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def chunks_of(schedule: str, rank: int, num_ranks: int) -> tuple[list[int], int]:
    """Which parts of the model a schedule wants on a rank, and how many there are."""
    if schedule == "DNI" or not issubclass(get_schedule_class(schedule), PipelineScheduleMulti):
        return [rank], num_ranks
    if schedule == "ZBVZeroBubble":  # down one side of the V, up the other
        return [rank, 2 * num_ranks - 1 - rank], 2 * num_ranks
    return [rank, num_ranks + rank], 2 * num_ranks


class Contestant:
    """One schedule on this rank.

    Args:   post_ahead, in_flight: as of ScheduleDNI; in_flight is for late policies alone.
    Fields: trace: what it does when, if enabled. held: the microbatches whose graphs it holds.
    Raises: ValueError: torch refuses the schedule for so many microbatches or stages.
    """

    def __init__(
        self,
        entry: Entry,
        workload: Workload,
        parts: Parts,
        num_microbatches: int,
        *,
        post_ahead: bool = False,
        in_flight: int | None = None,
    ) -> None:
        self.entry, self.parts, self.num_microbatches, device = entry, parts, num_microbatches, parts.device
        rank = dist.get_rank()
        stages = [
            PipelineStage(module, index, parts.num_chunks, device)
            for module, index in zip(parts.modules, parts.indices, strict=True)
        ]
        self.trace = Trace(rank, rank, device, enabled=False)
        of_dni: dict[str, Any] = {
            "post_ahead": True if post_ahead else None,
            "in_flight": in_flight if entry.policy in LATE else None,
            "timeout_s": TIMEOUT_S,
        }
        self.schedule = make_schedule(entry, stages, workload, num_microbatches, self.trace, **of_dni)
        # our own schedule records its spans itself
        quiet = Trace(rank, rank, device, enabled=False)
        self.held: Held = watch_chunks(stages, quiet if entry.schedule == "DNI" else self.trace)
        tokens = workload.batch(num_microbatches, device)
        self._args = (tokens,) if any(stage.is_first for stage in stages) else ()
        # the predictors of DNI are told the label
        needs_target = entry.schedule == "DNI" or any(stage.is_last for stage in stages)
        self._kwargs: dict[str, Any] = {"target": tokens} if needs_target else {}

    def step(self) -> None:
        """Raises: ContestantError: it failed."""
        with work_of(self.entry.title):
            self.schedule.step(*self._args, **self._kwargs, return_outputs=False)
            with self.trace.span("optimizer"):
                self.parts.update()

    def settle(self) -> None:
        """Nothing of this schedule is left on the device or on the wire. Raises: ContestantError: it failed."""
        with work_of(self.entry.title):
            if isinstance(self.schedule, ScheduleDNI):
                self.schedule.flush()
            self.parts.optimizer.zero_grad(set_to_none=True)  # which flush() may have completed
            synchronize(self.parts.device)


def make_schedule(
    entry: Entry, stages: list[PipelineStage], workload: Workload, num_microbatches: int, trace: Trace, **of_dni: Any
) -> Any:
    """A schedule on this rank. Every rank must call it.

    Args:   stages: this rank's. of_dni: further arguments of ScheduleDNI; nothing to torch's schedules.
    Raises: ValueError: the schedule cannot be for so many microbatches or stages.
    """
    if entry.schedule == "DNI":
        assert entry.transport is not None and entry.policy is not None
        if entry.late_weights is not None:
            of_dni["late_weights"] = entry.late_weights
        return ScheduleDNI(
            stages[0],
            num_microbatches,
            loss_fn=token_loss,
            interface=entry.interface,
            interface_optimizer=_interface_optimizer(trace.device),
            policy=entry.policy,
            check_every_steps=0,
            trace=trace,
            num_classes=workload.vocab_size,
            transport=entry.transport,
            **of_dni,
        )
    schedule_class = get_schedule_class(entry.schedule)
    several = issubclass(schedule_class, PipelineScheduleMulti)
    return schedule_class(stages if several else stages[0], num_microbatches, loss_fn=token_loss)


def _interface_optimizer(device: torch.device) -> Callable[[Any], torch.optim.Optimizer]:
    """Fused on a GPU, as the stages' own. At the rate of heads, which race; how long a step takes no rate changes."""

    def make(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, lr=1e-3, fused=device.type == "cuda")

    return make


def activation_like(workload: Workload, device: torch.device) -> Tensor:
    """What crosses a boundary for one microbatch: (B, T, D)."""
    size = (workload.microbatch_size, workload.seq_len, workload.width)
    return torch.randn(size, device=device).to(workload.dtype)
