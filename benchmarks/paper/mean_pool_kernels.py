"""Kernels in Triton: batch normalisation, ReLU and pooling of the mean, forward and backward, channels last.

Cells of one pixel are no pooling. Passes over x, the input of the normalisation, with cells of 3 x 3 and of one:

    forward     statistics     read x                                1.0    1.0
                pooling        read x, write out                     1.1    2.0
    backward    sums           read x, grad                          1.1    2.0
                gradient       read x, grad; write the gradient      2.1    3.0

So it is 5.3 and 8, where torch's operations make some 15 and 13. Every pixel takes part, so the sums of the backward
need x, and what ReLU let through is found again from it. What all this must give stands in fused_pool.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .statistics_kernels import CHANNELS, ROWS, of_channels, parts_of, statistics

PIXELS = 64  # of one block, or fewer where a cell has more than one


@triton.jit
def _pool(  # type: ignore[no-untyped-def]
    x, norm, mean, inverse, out, cells, height, width, down, across, channels, features,
    SIZE: tl.constexpr, CELLS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """x (B, height, width, channels); out (cells, channels), cells = B * down * across."""
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    cell = tl.program_id(0) * CELLS + tl.arange(0, CELLS)
    kept = channel < channels
    inside = (cell < cells)[:, None] & kept[None, :]
    scale, shift, centre, factor, scale_at = of_channels(norm, mean, inverse, channel, channels, features)
    image, rest = cell // (down * across), cell % (down * across)
    pixel = (image * height + rest // across * SIZE) * width + rest % across * SIZE
    total = tl.zeros((CELLS, CHANNELS), tl.float32)
    for number in tl.static_range(SIZE * SIZE):
        here = (pixel + number // SIZE * width + number % SIZE).to(tl.int64)
        value = tl.load(x + here[:, None] * channels + channel[None, :], mask=inside, other=0.0)
        result = (value - centre[None, :]) * factor[None, :] * scale[None, :] + shift[None, :]
        total += tl.where(result < 0.0, 0.0, result)  # which hides no NaN
    at = cell.to(tl.int64)[:, None] * channels + channel[None, :]
    tl.store(out + at, total / (SIZE * SIZE), mask=inside)


@triton.jit
def _come(  # type: ignore[no-untyped-def]
    grad, row, channel, rows, height, width, down, across, channels, SIZE: tl.constexpr
):
    """What comes from the cells to the pixels `row`; nothing where pooling dropped them."""
    image, rest = row // (height * width), row % (height * width)
    y, z = rest // width // SIZE, rest % width // SIZE
    is_pooled = ((row < rows) & (y < down) & (z < across))[:, None] & (channel < channels)[None, :]
    at = ((image * down + y) * across + z).to(tl.int64)[:, None] * channels + channel[None, :]
    return tl.load(grad + at, mask=is_pooled, other=0.0) / (SIZE * SIZE)


@triton.jit
def _sums(  # type: ignore[no-untyped-def]
    grad, x, norm, mean, inverse, sums, rows, height, width, down, across, channels, features,
    SIZE: tl.constexpr, BLOCKS: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """grad (cells, channels), x (rows, channels); sums (parts, E, 2, features), parts of the gradient of norm."""
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    kept = channel < channels
    scale, shift, centre, factor, scale_at = of_channels(norm, mean, inverse, channel, channels, features)
    of_scale = tl.zeros((ROWS, CHANNELS), tl.float32)
    of_shift = tl.zeros((ROWS, CHANNELS), tl.float32)
    for number in range(BLOCKS):
        row = (tl.program_id(0) * BLOCKS + number) * ROWS + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & kept[None, :]
        value = tl.load(x + row.to(tl.int64)[:, None] * channels + channel[None, :], mask=inside, other=0.0)
        come = _come(grad, row, channel, rows, height, width, down, across, channels, SIZE)
        normal = (value - centre[None, :]) * factor[None, :]
        passed = tl.where(normal * scale[None, :] + shift[None, :] > 0.0, come, 0.0)
        of_scale += passed * normal
        of_shift += passed
    own = sums + tl.program_id(0) * 2 * channels + scale_at
    tl.store(own, tl.sum(of_scale, 0), mask=kept)
    tl.store(own + features, tl.sum(of_shift, 0), mask=kept)


@triton.jit
def _back(  # type: ignore[no-untyped-def]
    grad, x, norm, mean, inverse, grad_norm, grad_x, rows, height, width, down, across, channels, features,
    SIZE: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    kept = channel < channels
    inside = (row < rows)[:, None] & kept[None, :]
    scale, shift, centre, factor, scale_at = of_channels(norm, mean, inverse, channel, channels, features)
    mean_scale = tl.load(grad_norm + scale_at, mask=kept, other=0.0) / rows
    mean_shift = tl.load(grad_norm + scale_at + features, mask=kept, other=0.0) / rows
    at = row.to(tl.int64)[:, None] * channels + channel[None, :]
    come = _come(grad, row, channel, rows, height, width, down, across, channels, SIZE)
    normal = (tl.load(x + at, mask=inside, other=0.0) - centre[None, :]) * factor[None, :]
    passed = tl.where(normal * scale[None, :] + shift[None, :] > 0.0, come, 0.0)
    moved = passed - mean_shift[None, :] - normal * mean_scale[None, :]
    tl.store(grad_x + at, moved * (scale * factor)[None, :], mask=inside)


def pool(
    x: Tensor, norm: Tensor, running: Sequence[Tensor], size: int, eps: float, momentum: float
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """As max_pool_kernels.pool, but what is kept for the backward is mean and 1 / deviation alone."""
    batch, channels, height, width = x.shape
    mean, inverse = statistics(x, running, eps, momentum)
    down, across = height // size, width // size
    shape, cells = (batch, channels, down, across), batch * down * across
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    sizes = cells, height, width, down, across, channels, norm.shape[2]
    block = triton.next_power_of_2(triton.cdiv(PIXELS, size * size))
    grid = (triton.cdiv(cells, block), triton.cdiv(channels, CHANNELS))
    _pool[grid](x, norm, mean, inverse, out, *sizes, SIZE=size, CELLS=block, CHANNELS=CHANNELS)
    return out, (mean, inverse)


def pool_back(grad: Tensor, x: Tensor, norm: Tensor, kept: tuple[Tensor, Tensor], size: int) -> tuple[Tensor, Tensor]:
    """As max_pool_kernels.pool_back."""
    channels = x.shape[1]
    rows = x.numel() // channels
    sizes = rows, *x.shape[2:], *grad.shape[2:], channels, norm.shape[2]
    blocks, parts = parts_of(rows)
    sums = x.new_empty(parts, *norm.shape)
    grid = (parts, triton.cdiv(channels, CHANNELS))
    tile = {"SIZE": size, "ROWS": ROWS, "CHANNELS": CHANNELS}
    _sums[grid](grad, x, norm, *kept, sums, *sizes, BLOCKS=blocks, **tile)
    grad_norm, grad_x = sums.sum(0), torch.empty_like(x, memory_format=torch.channels_last)
    grid = (triton.cdiv(rows, ROWS), triton.cdiv(channels, CHANNELS))
    _back[grid](grad, x, norm, *kept, grad_norm, grad_x, *sizes, **tile)
    return grad_x, grad_norm
