"""What a schedule takes of memory: of a GPU's on each rank at its peak, and the activations of the first stage.

    peak         all that is this schedule's: weights and optimizer of its stages, and what a step allocates
    activations  what autograd keeps for backwards, at its most: counted as it is kept and let go, so on a CPU too;
                 without weights and the copies of weights that late backwards go by

What a layer needs for a moment beside that is in the peak alone.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from benchmarks.contestants import Contestant
from benchmarks.machine import of_all
from dnipipe import ScheduleDNI
from dnipipe.schedule.late import LateFlow

WARM_UP_STEPS = 2


def measure_memory(contestant: Contestant, of_others: int) -> tuple[list[int] | None, int]:
    """Runs its first steps. Every rank must call it.

    Args:    of_others: bytes on this rank's GPU that are not this contestant's.
    Returns: (peak bytes by rank; None on a CPU, activation bytes of the first rank).
    """
    device, steps = contestant.parts.device, _steps_until_full(contestant)
    for _ in range(WARM_UP_STEPS):
        contestant.step()
    contestant.settle()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(steps):
        contestant.step()
    contestant.settle()
    peak = torch.cuda.max_memory_allocated(device) - of_others if device.type == "cuda" else None
    kept = Kept(contestant)
    with saved_tensors_hooks(kept.pack, kept.unpack):
        for _ in range(steps):
            contestant.step()
        contestant.settle()
    peaks, activations = zip(*of_all((peak, kept.most)), strict=True)
    return (None if None in peaks else list(peaks)), activations[0]


def _steps_until_full(contestant: Contestant) -> int:
    """DNI carries microbatches from step to step: at most 2 S - 1 of them."""
    if contestant.entry.schedule != "DNI":
        return 1
    return -(-2 * contestant.parts.num_chunks // contestant.num_microbatches) + 1


class _Held:
    """In the place of a tensor in a graph, as long as the graph keeps it."""

    def __init__(self, kept: Kept, tensor: Tensor, address: int) -> None:
        self.kept, self.tensor, self.address = kept, tensor, address

    def __del__(self) -> None:
        self.kept.let_go(self.address)


class Kept:
    """Bytes of what graphs keep, each piece of memory once. most: at one time, so far."""

    def __init__(self, contestant: Contestant) -> None:
        self.most = self._now = 0
        self._contestant = contestant
        self._count: Counter[int] = Counter()
        self._bytes: dict[int, int] = {}

    def pack(self, tensor: Tensor) -> Tensor | _Held:
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        if address in self._weights():
            return tensor
        self._count[address] += 1
        if self._count[address] == 1:
            self._bytes[address] = storage.nbytes()
            self._now += storage.nbytes()
            self.most = max(self.most, self._now)
        return _Held(self, tensor, address)

    @staticmethod
    def unpack(held: Tensor | _Held) -> Tensor:
        return held.tensor if isinstance(held, _Held) else held

    def let_go(self, address: int) -> None:
        self._count[address] -= 1
        if not self._count[address]:
            del self._count[address]
            self._now -= self._bytes.pop(address)

    def _weights(self) -> set[int]:
        """Of the stage, which move to other memory now and then, and the copies that the forward under way goes by."""
        schedule = self._contestant.schedule
        flow = schedule._flow if isinstance(schedule, ScheduleDNI) else None
        used = flow._used if isinstance(flow, LateFlow) else None
        copies = [copy for _, copy in used._copies] if used is not None else []
        return {each.untyped_storage().data_ptr() for each in (*self._contestant.parts.parameters, *copies)}
