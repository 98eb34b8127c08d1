"""Which ranks hold the same stage, so that their predictors learn the same.

Data parallelism is the business of DDP or FSDP2, which wrap the stage's module; the predictors are outside that
wrapper. Their gradients are averaged over the same ranks, once per step, as one flat tensor. So are those of the module
itself where late backwards go past the hooks of DDP, there as flat tensors of a bounded size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

BUCKET_BYTES = 25 * 2**20  # as DDP's: enough to fill a wire, little beside the weights


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


def average_grads(module: nn.Module, average: Callable[[Tensor], None]) -> None:
    """Averages the gradients of a module's parameters. Every replica must call it.

    What is already averaged stays as it is. Where a parameter has no gradient here it counts as 0 and gets the average;
    where none has any, nothing is done: replicas agree on that, as they run the same steps.
    """
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if all(parameter.grad is None for parameter in parameters):
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    for grads in _buckets([parameter.grad for parameter in parameters if parameter.grad is not None]):
        flat = torch.cat([grad.reshape(-1) for grad in grads])
        average(flat)
        for grad, averaged in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(averaged.view_as(grad))


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """In order, neighbours of one dtype together up to BUCKET_BYTES."""
    bucket: list[Tensor] = []
    room = 0
    for tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if bucket and (size > room or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket = []
        room = (room if bucket else BUCKET_BYTES) - size
        bucket.append(tensor)
    if bucket:
        yield bucket
