"""Gradient norms and overflow checks that end at the edge of a stage.

DeepSpeed takes the stages of a pipeline for slices of one model: every optimizer of its own sums a norm or an overflow
over all of them in each batch, mostly also without clipping. One such sum is enough to lock the stages together.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch.distributed as dist
from torch import nn

from ..optim.clip import Clip, StageClip, TravellingClip
from .block import NAME, Block


class StageGrid:
    """DeepSpeed's grid, but "model parallel" means the tensor slices of one stage. For optimizers only: the engine's
    own grid also names the files of a checkpoint."""

    def __init__(self, grid: Any) -> None:
        self._grid = grid

    def __getattr__(self, name: str) -> Any:
        return getattr(self._grid, name)

    def get_model_parallel_group(self) -> Any:
        return self._grid.get_slice_parallel_group()

    def get_model_parallel_rank(self) -> int:
        return self._grid.get_slice_parallel_rank()

    def get_model_parallel_world_size(self) -> int:
        return self._grid.get_slice_parallel_world_size()


def keep_in_stage(optimizer: Any, grid: Any) -> None:
    """No norm and no overflow check of `optimizer` leaves its stage from now on."""
    of_stage = StageGrid(grid)
    if hasattr(optimizer, "model_parallel_group"):  # ZeRO 1
        optimizer.model_parallel_group = of_stage.get_model_parallel_group()
        optimizer.model_parallel_world_size = of_stage.get_model_parallel_world_size()
    if hasattr(optimizer, "mpu"):  # BF16_Optimizer, FP16_Optimizer
        optimizer.mpu = of_stage
    if hasattr(optimizer, "overflow_checker"):
        optimizer.overflow_checker.mpu = of_stage


def check_clip(block: Block, max_norm: float, *, plain_fp32: bool, is_tied: bool) -> None:
    """plain_fp32: no ZeRO, fp32. is_tied: some layer is. Raises: ValueError for a clip that would do wrong."""
    if not max_norm:
        return
    if block.clip == "travelling" and not plain_fp32:
        raise ValueError(
            f'"{NAME}.clip" is "travelling", which needs fp32 and "zero_optimization.stage" 0: other optimizers of '
            f'DeepSpeed take their norm inside step(). Choose "stage"'
        )
    if block.clip == "stage" and is_tied and not plain_fp32:
        raise ValueError(
            f'"{NAME}.clip" is "stage" with tied layers and gradient_clipping {max_norm}: each stage would scale its '
            f'copy of the tied weight by its own norm, and the copies would part. Choose "{NAME}.clip": "global", or '
            f"gradient_clipping 0, or fp32 with ZeRO 0"
        )
    if block.clip == "global" and plain_fp32:
        warnings.warn(
            f'"{NAME}.clip" is "global", as plain DeepSpeed clips: in fp32 with ZeRO 0 its norm counts the weights of '
            f"stage 0 only (deepspeed/runtime/utils.py, clip_grad_norm_, in 0.19)",
            RuntimeWarning,
            stacklevel=2,
        )


def build_clip(block: Block, max_norm: float, grid: Any) -> Clip | None:
    """How fp32 gradients without ZeRO are clipped; None: as DeepSpeed does. Every rank must call it at once."""
    if block.clip == "global" or not max_norm:
        return None
    if block.clip == "stage":
        return StageClip(max_norm)
    own: dist.ProcessGroup | None = None
    for ranks in grid.pipe_groups:  # every rank makes every group
        group = dist.new_group(ranks, backend="gloo")
        own = group if dist.get_rank() in ranks else own
    assert own is not None, "each rank is in one pipeline"
    return TravellingClip(max_norm, own, timeout_s=block.timeout_s)


def split_tied(module: Any) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The weights of a stage that have a gradient: (those of its own, tied ones, which are clipped each by itself, so
    that both copies are scaled alike)."""
    tied = [weight for weight, _ in module.get_tied_weights_and_groups()]
    weights = [weight for weight in module.parameters() if weight.grad is not None]
    return [w for w in weights if all(w is not t for t in tied)], [w for w in weights if any(w is t for t in tied)]
