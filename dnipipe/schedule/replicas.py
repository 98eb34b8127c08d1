"""Which ranks hold the same stage, so that their predictors learn the same.

Data parallelism is the business of DDP or FSDP2, which wrap the stage's module; the predictors are outside that
wrapper. Their gradients are averaged over the same ranks, once per step, as one flat tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel


def replica_groups(module: nn.Module) -> list[dist.ProcessGroup]:
    """The data-parallel groups of a module wrapped by DDP or FSDP2; empty for a bare module."""
    for part in module.modules():
        if isinstance(part, DistributedDataParallel):
            return [part.process_group]
    for parameter in module.parameters():
        if isinstance(parameter, DTensor):
            return list(parameter.device_mesh.get_all_groups())
    return []


def start_alike(module: nn.Module, groups: Sequence[dist.ProcessGroup]) -> None:
    """Gives all replicas the parameters and buffers of the first: each may have drawn its own."""
    for group in groups:
        for tensor in module.state_dict().values():
            dist.broadcast(tensor, group_src=0, group=group)


def averager(groups: Sequence[dist.ProcessGroup]) -> Callable[[Tensor], None] | None:
    """A function that averages a tensor in place over all ranks of the groups; None without any."""
    if not groups:
        return None

    def average(flat: Tensor) -> None:
        for group in groups:
            dist.all_reduce(flat, group=group)
            flat.div_(dist.get_world_size(group))

    return average
