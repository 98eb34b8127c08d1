"""What the same work takes without a pipeline: every rank runs its own stage on its own, all at the same time.

The planner's prediction is made of the same parts: forward, backward, optimizer, and one transfer.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.contestants import Parts, activation_like
from benchmarks.machine import of_all, synchronize
from benchmarks.workload import Workload, token_loss
from dnipipe.boundary import Boundary, DirectBoundary, PairedBoundary, boundary_groups, in_meeting_order
from dnipipe.observe.trace import Trace

TIMEOUT_S = 60.0


class Alone:
    """One rank's stage with made-up neighbours. step() does what a training step does, but for what crosses."""

    def __init__(self, workload: Workload, parts: Parts, num_microbatches: int) -> None:
        self.parts, self.num_microbatches = parts, num_microbatches
        rank = dist.get_rank()
        self.trace = Trace(rank, rank, parts.device, enabled=False)
        (self.module,), (index,) = parts.modules, parts.indices
        self.is_last = index == parts.num_chunks - 1
        self.tokens = workload.batch(1, parts.device)
        made_up = activation_like(workload, parts.device)
        self.input = self.tokens if index == 0 else made_up.requires_grad_()
        self.output_grad = torch.randn_like(activation_like(workload, parts.device))

    def step(self) -> None:
        for microbatch in range(self.num_microbatches):
            with self.trace.span("forward", microbatch=microbatch):
                output = self.module(self.input)
                loss = token_loss(output, self.tokens) if self.is_last else None
            with self.trace.span("backward", microbatch=microbatch):
                torch.autograd.backward(output if loss is None else loss, self.output_grad if loss is None else None)
            self.input.grad = None
        with self.trace.span("optimizer"):
            self.parts.update()

    def settle(self) -> None:
        synchronize(self.parts.device)


@dataclass(frozen=True)
class Costs:
    """Milliseconds of the dearest stage per microbatch, and of the optimizer per step."""

    forward_ms: float
    backward_ms: float
    optimizer_ms: float


def measure_costs(alone: Alone, steps: int) -> Costs:
    """Every rank must call it. The dearest stage: the one whose forward and backward together take longest."""
    alone.trace.enabled = True
    for _ in range(steps):
        alone.step()
    alone.trace.enabled = False
    spans = alone.trace.export()
    own = {
        name: sum((span.end_s - span.start_s) * 1e3 for span in spans if span.name == name) / steps
        for name in ("forward", "backward", "optimizer")
    }
    dearest = max(of_all(own), key=lambda rank: rank["forward"] + rank["backward"])
    m = alone.num_microbatches
    return Costs(dearest["forward"] / m, dearest["backward"] / m, dearest["optimizer"])


def measure_transfer(activation: Tensor, transport: str | None, *, repeats: int = 20) -> float:
    """Milliseconds that an activation takes to the next stage, over all boundaries at once, with nothing beside it.

    Args: transport: of DNI, "direct" or "group"; None: as torch's schedules send.
    """
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    if num_ranks == 1:
        return 0.0
    if transport is None:
        return _torch_transfer(activation, repeats)
    sides = [(boundary, boundary.peer > rank) for boundary in neighbours(activation.device, transport, repeats + 1)]
    received = [torch.empty_like(activation) for _ in sides]
    dist.barrier()
    start_s = 0.0
    for repeat in range(repeats + 1):
        if repeat == 1:  # the first opens connections; from then on the neighbours hold each other in step
            start_s = time.perf_counter()
        exchanges = []
        for (boundary, is_upper), buffer in zip(sides, received, strict=True):
            send = [activation] if is_upper else []
            receive = [] if is_upper else [buffer]
            exchanges.append(boundary.exchange(send, receive, microbatch=repeat))
        for exchange in exchanges:
            exchange.wait()
        for boundary, _ in sides:
            boundary.confirm()
    return float(max(of_all((time.perf_counter() - start_s) / repeats))) * 1e3


def _torch_transfer(activation: Tensor, repeats: int) -> float:
    rank, last, received = dist.get_rank(), dist.get_world_size() - 1, torch.empty_like(activation)
    operations = [dist.P2POp(dist.isend, activation, rank + 1)] if rank < last else []
    operations += [dist.P2POp(dist.irecv, received, rank - 1)] if rank > 0 else []
    dist.barrier()
    start_s = 0.0
    for repeat in range(repeats + 1):
        if repeat == 1:
            synchronize(activation.device)
            start_s = time.perf_counter()
        for work in dist.batch_isend_irecv(operations):
            work.wait()
    synchronize(activation.device)
    return float(max(of_all((time.perf_counter() - start_s) / repeats))) * 1e3


def neighbours(device: torch.device, transport: str, depth: int) -> list[Boundary]:
    """This rank's boundaries to the rank before and to the one after, as a pipeline of all ranks has them.

    Every rank must call it. Args: depth: exchanges that may be under way, of direct copies.
    """
    rank, direct = dist.get_rank(), transport == "direct"
    carrier = torch.device("cpu") if direct else device
    groups = boundary_groups(range(dist.get_world_size()), rank, None, TIMEOUT_S, carrier)
    sides = in_meeting_order(rank, *groups)
    return [boundary_to(peer, group, device, transport, depth) for peer, group in sides]


def boundary_to(peer: int, group: dist.ProcessGroup, device: torch.device, transport: str, depth: int) -> Boundary:
    """One side of a boundary. group: of this rank and the peer; of gloo, for direct copies."""
    rank = dist.get_rank()
    names: dict[str, Any] = {"rank": rank, "stage": rank, "peer": peer, "peer_stage": peer, "timeout_s": TIMEOUT_S}
    return DirectBoundary(group, device, depth, **names) if transport == "direct" else PairedBoundary(group, **names)
