"""Tied layers of a PipelineModule: under wait as DeepSpeed reduces them, under synthetic without a lock."""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.runtime.pipe.module import TiedLayerSpec
from torch import nn

from ..schedule.tied import TiedWeights
from .block import NAME, Block


def tied_stages(module: Any) -> dict[str, set[int]]:
    """The stages that hold each tied layer, of those that are on several; the same on every rank."""
    stages: dict[str, set[int]] = {}
    for index, spec in enumerate(module._layer_specs):
        if isinstance(spec, TiedLayerSpec):
            stages.setdefault(spec.key, set()).add(module.stage_owner(index))
    return {key: those for key, those in stages.items() if len(those) > 1}


def check_ties(block: Block, module: Any, *, bf16_without_zero: bool) -> None:
    """Raises: ValueError on every rank, where a tied layer cannot be reduced asynchronously."""
    if block.tied == "sync" or block.policy == "wait":
        return
    cure = f'set "{NAME}.tied": "sync", which locks those stages together'
    for key, stages in tied_stages(module).items():
        if len(stages) > 2:
            raise ValueError(
                f'"{NAME}.tied" is "async", which exchanges between two ends, and layer {key!r} is on stages '
                f"{sorted(stages)}: {cure}"
            )
        if bf16_without_zero:
            raise ValueError(
                f'"{NAME}.tied" is "async", and DeepSpeed\'s bf16 optimizer without ZeRO keeps the gradient of layer '
                f'{key!r} elsewhere than in .grad: set "zero_optimization.stage" 1, or {cure}'
            )


class Ties:
    """The tied weights of one stage. Every rank makes it, also without any."""

    def __init__(self, engine: Any, block: Block) -> None:
        self._ends: list[TiedWeights] = []
        if block.tied == "sync" or block.policy == "wait":
            return
        module, grid = engine.module, engine.grid
        for key, comm in module.tied_comms.items():
            if len(comm["ranks"]) < 2:
                continue
            (peer,) = (rank for rank in comm["ranks"] if rank != engine.global_rank)
            (peer_stage,) = tied_stages(module)[key] - {engine.stage_id}
            names = {"stage": engine.stage_id, "peer": peer, "peer_stage": peer_stage, "timeout_s": block.timeout_s}
            for attribute in comm["weight_attr"]:
                weight: nn.Parameter = module._recursive_getattr(module.tied_modules[key], attribute)
                self._ends.append(TiedWeights(weight, comm["group"], **names))
        assert len(self._ends) == 0 or grid.get_slice_parallel_world_size() == 1, "tensor parallelism is refused"

    def after_backward(self, *, synthetic: bool) -> bool:
        """Sets the tied gradients: the sum of both ends, one batch late. False: DeepSpeed is to reduce them now."""
        if not self._ends or (not synthetic and self._ends[0].step == 0):
            return False
        for end in self._ends:
            memory = end.weight.grad
            end.after_backward()
            if memory is None:
                continue
            # into the same memory, which an optimizer of DeepSpeed's may know by its address
            summed = end.weight.grad
            with torch.no_grad():
                memory.zero_() if summed is None else memory.copy_(summed)
            end.weight.grad = memory
        return True

    def state_dict(self) -> list[dict[str, Any]]:
        """Both ends must call it after the same batch."""
        return [end.state_dict() for end in self._ends]

    def load_state_dict(self, state: list[dict[str, Any]]) -> None:
        for end, of_end in zip(self._ends, state, strict=False):
            end.load_state_dict(of_end)
