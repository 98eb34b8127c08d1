"""Kernels in Triton: mean and deviation of each channel over all pixels, in one pass over memory, channels last."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

ROWS, CHANNELS = 32, 64  # pixels and channels of one block: 256 bytes in a row of memory
PARTS, FEW = 512, 8  # a sum is taken in so many parts at most, and a program brings those of so many channels together


@triton.jit
def of_channels(norm, mean, inverse, channel, channels, features):  # type: ignore[no-untyped-def]
    """Scale, shift, mean and 1 / deviation of each channel, and where the scale lies in norm (E, 2, features)."""
    kept = channel < channels
    scale_at = channel // features * 2 * features + channel % features
    scale = tl.load(norm + scale_at, mask=kept, other=0.0)
    shift = tl.load(norm + scale_at + features, mask=kept, other=0.0)
    centre = tl.load(mean + channel, mask=kept, other=0.0)
    factor = tl.load(inverse + channel, mask=kept, other=0.0)
    return scale, shift, centre, factor, scale_at


@triton.jit
def _statistics(  # type: ignore[no-untyped-def]
    x, means, squares, rows, width, BLOCKS: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr
):
    """x (rows, width) -> of each part of BLOCKS * ROWS rows the mean, and the sum of squared distances, (parts, width).

    By Welford's method, each row of a block for itself: a sum of squares less a squared sum would lose what is small.
    """
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    count = tl.zeros((ROWS,), tl.float32)
    mean = tl.zeros((ROWS, CHANNELS), tl.float32)
    square = tl.zeros((ROWS, CHANNELS), tl.float32)
    for number in range(BLOCKS):
        row = (tl.program_id(0) * BLOCKS + number) * ROWS + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (channel < width)[None, :]
        value = tl.load(x + row.to(tl.int64)[:, None] * width + channel[None, :], mask=inside, other=0.0)
        count += tl.where(row < rows, 1.0, 0.0)
        away = tl.where(inside, value - mean, 0.0)
        mean += away * (1.0 / tl.maximum(count, 1.0))[:, None]
        square += away * (value - mean)
    centre = tl.sum(mean * count[:, None], 0) / tl.sum(count, 0)
    away = mean - centre[None, :]
    at = tl.program_id(0) * width + channel
    tl.store(means + at, centre, mask=channel < width)
    tl.store(squares + at, tl.sum(square + away * away * count[:, None], 0), mask=channel < width)


@triton.jit
def _together(  # type: ignore[no-untyped-def]
    means, squares, mean, inverse, running_mean, running_variance, rows, width, each, parts, eps, momentum,
    HAS_RUNNING: tl.constexpr, PARTS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """means, squares (parts, width), as above; the others (width,)."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    part = tl.arange(0, PARTS)
    inside = (part < parts)[:, None] & (channel < width)[None, :]
    at = part[:, None] * width + channel[None, :]
    count = tl.maximum(tl.minimum(rows - part * each, each), 0).to(tl.float32)[:, None]
    own = tl.load(means + at, mask=inside, other=0.0)
    centre = tl.sum(own * count, 0) / rows
    away = own - centre[None, :]
    square = tl.sum(tl.load(squares + at, mask=inside, other=0.0) + away * away * count, 0)
    kept = channel < width
    tl.store(mean + channel, centre, mask=kept)
    tl.store(inverse + channel, 1.0 / tl.sqrt(square / rows + eps), mask=kept)
    if HAS_RUNNING:
        old_mean = tl.load(running_mean + channel, mask=kept, other=0.0)
        tl.store(running_mean + channel, old_mean + momentum * (centre - old_mean), mask=kept)
        old = tl.load(running_variance + channel, mask=kept, other=0.0)
        tl.store(running_variance + channel, old + momentum * (square / (rows - 1) - old), mask=kept)


def statistics(x: Tensor, running: Sequence[Tensor], eps: float, momentum: float) -> tuple[Tensor, Tensor]:
    """x (B, K, H, W) channels last; running: mean and variance, K of each, changed in place, or nothing.

    Returns: mean and 1 / deviation (K,).
    """
    width = x.shape[1]
    rows = x.numel() // width
    blocks, parts = parts_of(rows)
    means, squares = x.new_empty(2, parts, width)
    mean, inverse = x.new_empty(2, width)
    grid = (parts, triton.cdiv(width, CHANNELS))
    _statistics[grid](x, means, squares, rows, width, BLOCKS=blocks, ROWS=ROWS, CHANNELS=CHANNELS)
    kept = running or (mean, mean)  # never touched then
    numbers = rows, width, blocks * ROWS, parts, eps, momentum
    tile = {"PARTS": triton.next_power_of_2(parts), "CHANNELS": FEW}
    each = (triton.cdiv(width, FEW),)
    _together[each](means, squares, mean, inverse, *kept, *numbers, HAS_RUNNING=bool(running), **tile)
    return mean, inverse


def parts_of(rows: int) -> tuple[int, int]:
    """How many blocks of rows a part has, and how many parts there are."""
    blocks = triton.cdiv(triton.cdiv(rows, ROWS), PARTS)
    return blocks, triton.cdiv(rows, blocks * ROWS)
