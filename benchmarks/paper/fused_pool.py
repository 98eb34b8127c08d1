"""Batch normalisation, ReLU and pooling of the maximum for E models: by our own kernels on a GPU, else by torch's."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .fused import EPS, MOMENTUM, built


def norm_relu_max_pool(x: Tensor, norm: Tensor, running: Sequence[Tensor], size: int) -> Tensor:
    """Normalised over the batch, scaled, shifted, what is negative taken away, and of each cell the largest.

    Args:    norm: scale and shift of each channel. running: mean and variance, (E, C), which those of the batch enter,
             as in nn.BatchNorm2d; or nothing. size: of a cell, which is size x size; what makes no whole cell at the
             lower and right end counts in the statistics only.
    Shapes:  x (B, E, C, H, W), norm (E, 2, C) -> (B, E, C, H / size, W / size).
    """
    if x.is_cuda and x.dtype == torch.float32 and _kernels() is not None:
        return _NormReluMaxPool.apply(x.flatten(1, 2), norm, running, size).unflatten(1, x.shape[1:3])
    normal = torch.relu(batch_norm(x, norm, running, training=True))
    return F.max_pool2d(normal.flatten(1, 2), size).unflatten(1, x.shape[1:3])


def batch_norm(x: Tensor, norm: Tensor, running: Sequence[Tensor], *, training: bool) -> Tensor:
    """As above, but nothing more than normalised, if not training by the running statistics; like x."""
    mean, variance = (each.view(-1) for each in running) if running else (None, None)
    scale, shift = (each.flatten() for each in norm.unbind(1))
    flat = F.batch_norm(x.flatten(1, 2), mean, variance, scale, shift, training, MOMENTUM, EPS)
    return flat.unflatten(1, x.shape[1:3])


class _NormReluMaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: Tensor, running: Sequence[Tensor], size: int) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        out, kept = _kernels().pool(x, norm, running, size, EPS, MOMENTUM)
        ctx.save_for_backward(x, norm, *kept)
        ctx.size = size
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, norm, *kept = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.channels_last)
        return *_kernels().pool_back(grad, x, norm, kept, ctx.size), None, None


@functools.cache
def _kernels() -> Any:
    """The module of kernels, or None, with a warning, where Triton cannot build them."""
    return built(_tried_kernels)


def _tried_kernels() -> Any:
    from . import pooled_kernels

    x = torch.randn(2, 4, 7, 7, device="cuda").contiguous(memory_format=torch.channels_last)
    norm = torch.ones(1, 2, 4, device="cuda")
    out, kept = pooled_kernels.pool(x, norm, (), 3, EPS, MOMENTUM)
    pooled_kernels.pool_back(out, x, norm, kept, 3)
    return pooled_kernels
