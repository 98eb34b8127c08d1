"""What a schedule takes of a GPU's memory: on each rank at its peak, and of it the activations of the first stage.

    peak         all that is this schedule's: weights and optimizer of its stages, and what a step allocates
    activations  peak - what stays between two steps - gradients - copies of weights

What stays between two steps: weights, optimizer, predictors, buffers of messages. Gradients are there from the
beginning of the measured step, so they do not count; where graphs live on from step to step (`stale`, `corrected`) they
cannot be, and are subtracted, as are the copies of weights that those graphs use. What is left is what autograd keeps,
and what a backward needs beside it for moments.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.contestants import Contestant
from benchmarks.machine import allocated, of_all
from dnipipe import ScheduleDNI
from dnipipe.schedule.late import LateFlow
from dnipipe.schedule.policy import LATE

WARM_UP_STEPS = 2


def measure_memory(contestant: Contestant, of_others: int) -> tuple[list[int] | None, int | None]:
    """Runs its first steps. Every rank must call it.

    Args:    of_others: bytes on this rank's GPU that are not this contestant's.
    Returns: (peak bytes by rank, activation bytes of the first rank); None, None on a CPU.
    """
    for _ in range(WARM_UP_STEPS):
        contestant.step()
    contestant.settle()
    if contestant.parts.device.type != "cuda":
        contestant.step()  # nevertheless: microbatches in flight are counted in it
        contestant.settle()
        return None, None
    ranks = of_all(_on_gpu(contestant, of_others))
    return [peak for peak, _ in ranks], ranks[0][1]


def _on_gpu(contestant: Contestant, of_others: int) -> tuple[int, int]:
    parts, device = contestant.parts, contestant.parts.device
    late = contestant.entry.policy in LATE
    parts.update()  # takes what settle() may have completed
    between = allocated(device)
    if not late:
        for parameter in parts.parameters:
            parameter.grad = torch.zeros_like(parameter)
    torch.cuda.reset_peak_memory_stats(device)
    for _ in range(_steps_until_full(contestant)):
        contestant.step()
    copies = copies_bytes(contestant)
    contestant.settle()
    most = torch.cuda.max_memory_allocated(device)
    gradients = sum(parameter.nbytes for parameter in parts.parameters)
    return most - of_others, most - between - gradients - copies


def _steps_until_full(contestant: Contestant) -> int:
    """DNI carries microbatches from step to step: at most 2 S - 1 of them."""
    if contestant.entry.schedule != "DNI":
        return 1
    return -(-2 * contestant.parts.num_chunks // contestant.num_microbatches) + 1


def copies_bytes(contestant: Contestant) -> int:
    """Of the weights that graphs under way on this rank keep for their backwards, beside the present ones."""
    schedule = contestant.schedule
    flow = schedule._flow if isinstance(schedule, ScheduleDNI) else None
    if not isinstance(flow, LateFlow):
        return 0
    present = {parameter.data_ptr() for parameter in contestant.parts.parameters}
    kept: dict[int, Tensor] = {
        copy.data_ptr(): copy for graph in flow._graphs for _, copy in graph.weights._copies
    }  # fmt: skip
    return sum(copy.nbytes for address, copy in kept.items() if address not in present)
