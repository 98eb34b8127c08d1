"""Batch normalisation, ReLU and pooling of pictures, for E models: by our own kernels on a GPU, else by torch's.

Shapes:  x (B, E, C, H, W), norm (E, 2, C), scale and shift of each channel -> (B, E, C, H / size, W / size).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .fused import EPS, MOMENTUM, built


def norm_relu_max_pool(x: Tensor, norm: Tensor, running: Sequence[Tensor], size: int) -> Tensor:
    """Normalised over the batch, scaled, shifted, what is negative taken away, and of each cell the largest.

    Args:    running: mean and variance, (E, C), which those of the batch enter, as in nn.BatchNorm2d; or nothing.
             size: of a cell, which is size x size; what makes no whole cell at the lower and right end counts in the
             statistics only.
    """
    return _pooled(x, norm, running, size, F.max_pool2d, "max")


def norm_relu_mean_pool(x: Tensor, norm: Tensor, running: Sequence[Tensor] = (), size: int = 1) -> Tensor:
    """As norm_relu_max_pool, but of each cell the mean."""
    return _pooled(x, norm, running, size, F.avg_pool2d, "mean")


def batch_norm(x: Tensor, norm: Tensor, running: Sequence[Tensor], *, training: bool) -> Tensor:
    """Normalised, scaled and shifted, like x; if not training by the running statistics."""
    mean, variance = (each.view(-1) for each in running) if running else (None, None)
    scale, shift = (each.flatten() for each in norm.unbind(1))
    flat = F.batch_norm(x.flatten(1, 2), mean, variance, scale, shift, training, MOMENTUM, EPS)
    return flat.unflatten(1, x.shape[1:3])


def _pooled(
    x: Tensor, norm: Tensor, running: Sequence[Tensor], size: int, pool: Callable[[Tensor, int], Tensor], kind: str
) -> Tensor:
    if x.is_cuda and x.dtype == torch.float32 and (kernels := _kernels()) is not None:
        flat = _NormReluPool.apply(x.flatten(1, 2), norm, running, size, kernels[kind])
    else:
        flat = torch.relu(batch_norm(x, norm, running, training=True)).flatten(1, 2)
        flat = pool(flat, size) if size > 1 else flat
    return flat.unflatten(1, x.shape[1:3])


class _NormReluPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: Tensor, running: Sequence[Tensor], size: int, kernels: Any) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        out, kept = kernels.pool(x, norm, running, size, EPS, MOMENTUM)
        ctx.save_for_backward(x, norm, *kept)
        ctx.size, ctx.kernels = size, kernels
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        x, norm, *kept = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.channels_last)
        return *ctx.kernels.pool_back(grad, x, norm, kept, ctx.size), None, None, None


@functools.cache
def _kernels() -> dict[str, Any] | None:
    """The modules of kernels by kind, or None, with a warning, where Triton cannot build them."""
    return built(_tried_kernels)


def _tried_kernels() -> dict[str, Any]:
    from . import max_pool_kernels, mean_pool_kernels

    x = torch.randn(2, 4, 7, 7, device="cuda").contiguous(memory_format=torch.channels_last)
    norm = torch.ones(1, 2, 4, device="cuda")
    kinds = {"max": max_pool_kernels, "mean": mean_pool_kernels}
    for kernels in kinds.values():
        out, kept = kernels.pool(x, norm, (), 3, EPS, MOMENTUM)
        kernels.pool_back(out, x, norm, kept, 3)
    return kinds
