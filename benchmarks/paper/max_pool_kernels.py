"""Kernels in Triton: batch normalisation, ReLU and pooling of the maximum, forward and backward, channels last.

All of it is bound by passes over x, the input of the normalisation. Pooled 3 x 3, a tensor is a tenth of it:

    forward     statistics     read x                                                      1.0
                pooling        read x but for what is dropped; write out, chosen, place    1.2
    backward    sums           read grad, chosen, place                                    0.2
                gradient       read x, grad, place; write the gradient                     2.1

So it is 4.5 passes, where torch's operations, each for itself, make some 15. The sums of the backward need none: what
comes through pooling and ReLU is zero but at the places kept. chosen is x there, since from the output it could not be
had back where a scale is 0. What all this must give stands in fused_pool.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .statistics_kernels import CHANNELS, ROWS, of_channels, parts_of, statistics

CELLS = 8  # pooled cells of one block


@triton.jit
def _pool(  # type: ignore[no-untyped-def]
    x, norm, mean, inverse, out, chosen, place, cells, height, width, down, across, channels, features,
    SIZE: tl.constexpr, CELLS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """x (B, height, width, channels); out, chosen, place (cells, channels), cells = B * down * across.

    place: where in its cell the maximum is, or SIZE**2 where ReLU lets nothing through.
    """
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    cell = tl.program_id(0) * CELLS + tl.arange(0, CELLS)
    kept = channel < channels
    inside = (cell < cells)[:, None] & kept[None, :]
    scale, shift, centre, factor, scale_at = of_channels(norm, mean, inverse, channel, channels, features)
    steep = scale * factor
    image, rest = cell // (down * across), cell % (down * across)
    pixel = (image * height + rest // across * SIZE) * width + rest % across * SIZE
    best = tl.full((CELLS, CHANNELS), float("-inf"), tl.float32)
    best_x = tl.zeros((CELLS, CHANNELS), tl.float32)
    best_place = tl.zeros((CELLS, CHANNELS), tl.int32)
    for number in tl.static_range(SIZE * SIZE):
        here = (pixel + number // SIZE * width + number % SIZE).to(tl.int64)
        value = tl.load(x + here[:, None] * channels + channel[None, :], mask=inside, other=0.0)
        result = (value - centre[None, :]) * steep[None, :] + shift[None, :]
        better = (result <= best) == 0  # of equal ones the first; a NaN has spoiled its channel
        best = tl.where(better, result, best)
        best_x = tl.where(better, value, best_x)
        best_place = tl.where(better, number, best_place)
    at = cell.to(tl.int64)[:, None] * channels + channel[None, :]
    tl.store(out + at, tl.where(best < 0.0, 0.0, best), mask=inside)
    tl.store(chosen + at, best_x, mask=inside)
    tl.store(place + at, tl.where(best > 0.0, best_place, SIZE * SIZE).to(tl.uint8), mask=inside)


@triton.jit
def _sums(  # type: ignore[no-untyped-def]
    grad, chosen, place, mean, inverse, sums, cells, channels, features,
    SIZE: tl.constexpr, BLOCKS: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """grad, chosen, place (cells, channels); sums (parts, E, 2, features), parts of the gradient of norm."""
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    kept = channel < channels
    centre = tl.load(mean + channel, mask=kept, other=0.0)
    factor = tl.load(inverse + channel, mask=kept, other=0.0)
    of_scale = tl.zeros((ROWS, CHANNELS), tl.float32)
    of_shift = tl.zeros((ROWS, CHANNELS), tl.float32)
    for number in range(BLOCKS):
        cell = (tl.program_id(0) * BLOCKS + number) * ROWS + tl.arange(0, ROWS)
        inside = (cell < cells)[:, None] & kept[None, :]
        at = cell.to(tl.int64)[:, None] * channels + channel[None, :]
        where = tl.load(place + at, mask=inside, other=0).to(tl.int32)
        passed = tl.where(where < SIZE * SIZE, tl.load(grad + at, mask=inside, other=0.0), 0.0)
        value = tl.load(chosen + at, mask=inside, other=0.0)
        of_scale += passed * (value - centre[None, :]) * factor[None, :]
        of_shift += passed
    scale_at = tl.program_id(0) * 2 * channels + channel // features * 2 * features + channel % features
    tl.store(sums + scale_at, tl.sum(of_scale, 0), mask=kept)
    tl.store(sums + scale_at + features, tl.sum(of_shift, 0), mask=kept)


@triton.jit
def _back(  # type: ignore[no-untyped-def]
    grad, place, x, norm, mean, inverse, grad_norm, grad_x,
    cells, rows, height, width, down, across, channels, features,
    SIZE: tl.constexpr, CELLS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """As above, but that cells cover the whole image: what pooling drops lies in those at the lower and right end."""
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    cell = tl.program_id(0) * CELLS + tl.arange(0, CELLS)
    kept = channel < channels
    scale, shift, centre, factor, scale_at = of_channels(norm, mean, inverse, channel, channels, features)
    steep = scale * factor
    mean_scale = tl.load(grad_norm + scale_at, mask=kept, other=0.0) / rows
    mean_shift = tl.load(grad_norm + scale_at + features, mask=kept, other=0.0) / rows
    all_down, all_across = (height + SIZE - 1) // SIZE, (width + SIZE - 1) // SIZE
    image, rest = cell // (all_down * all_across), cell % (all_down * all_across)
    row, column = rest // all_across, rest % all_across
    is_pooled = ((cell < cells) & (row < down) & (column < across))[:, None] & kept[None, :]
    at = ((image * down + row) * across + column).to(tl.int64)[:, None] * channels + channel[None, :]
    where = tl.load(place + at, mask=is_pooled, other=SIZE * SIZE).to(tl.int32)
    come = tl.load(grad + at, mask=is_pooled, other=0.0)
    for number in tl.static_range(SIZE * SIZE):
        y, z = row * SIZE + number // SIZE, column * SIZE + number % SIZE
        inside = ((cell < cells) & (y < height) & (z < width))[:, None] & kept[None, :]
        here = ((image * height + y) * width + z).to(tl.int64)[:, None] * channels + channel[None, :]
        normal = (tl.load(x + here, mask=inside, other=0.0) - centre[None, :]) * factor[None, :]
        passed = tl.where(where == number, come, 0.0)
        moved = passed - mean_shift[None, :] - normal * mean_scale[None, :]
        tl.store(grad_x + here, moved * steep[None, :], mask=inside)


def pool(
    x: Tensor, norm: Tensor, running: Sequence[Tensor], size: int, eps: float, momentum: float
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """x (B, E * C, H, W) channels last, norm (E, 2, C), running mean and variance (E, C), or nothing, changed in place.

    Returns: the output (B, E * C, H / size, W / size), and for the backward what was chosen, its place, and mean and
             1 / deviation (E * C,).
    """
    batch, channels, height, width = x.shape
    mean, inverse = statistics(x, running, eps, momentum)
    down, across = height // size, width // size
    shape, cells = (batch, channels, down, across), batch * down * across
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    chosen, place = torch.empty_like(out), torch.empty_like(out, dtype=torch.uint8)
    sizes = cells, height, width, down, across, channels, norm.shape[2]
    grid = (triton.cdiv(cells, CELLS), triton.cdiv(channels, CHANNELS))
    _pool[grid](x, norm, mean, inverse, out, chosen, place, *sizes, SIZE=size, CELLS=CELLS, CHANNELS=CHANNELS)
    return out, (chosen, place, mean, inverse)


def pool_back(
    grad: Tensor, x: Tensor, norm: Tensor, kept: tuple[Tensor, Tensor, Tensor, Tensor], size: int
) -> tuple[Tensor, Tensor]:
    """The gradients of x and norm; grad, that of the output, and x channels last; kept as pool() gave it."""
    chosen, place, mean, inverse = kept
    batch, channels, height, width = x.shape
    down, across = grad.shape[2:]
    features, cells = norm.shape[2], batch * down * across
    blocks, parts = parts_of(cells)
    sums = x.new_empty(parts, *norm.shape)
    grid = (parts, triton.cdiv(channels, CHANNELS))
    tile = {"SIZE": size, "BLOCKS": blocks, "ROWS": ROWS, "CHANNELS": CHANNELS}
    _sums[grid](grad, chosen, place, mean, inverse, sums, cells, channels, features, **tile)
    grad_norm, grad_x = sums.sum(0), torch.empty_like(x, memory_format=torch.channels_last)
    cells = batch * triton.cdiv(height, size) * triton.cdiv(width, size)
    tensors = grad, place, x, norm, mean, inverse, grad_norm, grad_x
    sizes = cells, batch * height * width, height, width, down, across, channels, features
    grid = (triton.cdiv(cells, CELLS), triton.cdiv(channels, CHANNELS))
    _back[grid](*tensors, *sizes, SIZE=size, CELLS=CELLS, CHANNELS=CHANNELS)
    return grad_x, grad_norm
