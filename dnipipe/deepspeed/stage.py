"""A stage of DeepSpeed's pipeline, in the terms in which dnipipe.schedule puts a stage's parts together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..interface import TensorMeta
from ..schedule.announce import Metas


def tensors_of(values: Any) -> tuple[Tensor, ...]:
    """What a stage takes or gives, one tensor or a tuple of them, as a tuple; None: ()."""
    if values is None:
        return ()
    return (values,) if isinstance(values, Tensor) else tuple(values)


def metas_of(tensors: Sequence[Tensor]) -> Metas:
    return tuple((tensor.shape, tensor.dtype) for tensor in tensors)


class PipeStage:
    """What schedule.assembly asks of a torch PipelineStage, from DeepSpeed's grid.

    Fields: inputs_meta: of the tensors that the previous stage sends; () before the first batch, and on the first
            stage. outputs: of those that this stage sends, or on the last stage returns.
    """

    def __init__(self, grid: Any, device: torch.device) -> None:
        self.stage_index: int = grid.get_stage_id()
        self.num_stages: int = grid.pipe_parallel_size
        self.device = device
        self.group: dist.ProcessGroup = grid.get_pipe_parallel_group()
        ranks = dist.get_process_group_ranks(self.group)
        self.stage_index_to_group_rank = {
            stage: ranks.index(grid.stage_to_global(stage)) for stage in range(self.num_stages)
        }
        self.inputs_meta: tuple[TensorMeta, ...] = ()
        self.outputs: tuple[TensorMeta, ...] = ()

    @property
    def is_first(self) -> bool:
        return self.stage_index == 0

    @property
    def is_last(self) -> bool:
        return self.stage_index == self.num_stages - 1

    def get_outputs_meta(self) -> tuple[TensorMeta, ...]:
        return self.outputs

    def remember(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        """The shapes of one microbatch, as the first batch found them."""
        self.inputs_meta, self.outputs = (
            tuple(TensorMeta(tuple(tensor.shape), tensor.dtype) for tensor in tensors) for tensors in (inputs, outputs)
        )
