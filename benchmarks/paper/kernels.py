"""Two kernels in Triton: batch normalisation with ReLU, forward and backward, and Adam, each in one pass over memory.

torch needs six passes for the first and about twenty for its backward. What they must give stands in fused.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 4  # features that one program normalises
BLOCK = 1024  # weights that one program of Adam moves


@triton.jit
def _norm_relu(  # type: ignore[no-untyped-def]
    x, norm, out, mean, inverse, running_mean, running_variance, rows, width, features, eps, momentum,
    HAS_RUNNING: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """x, out (rows, width); norm (E, 2, features), scales and shifts; the others (rows,), rows = E * features."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    at = row.to(tl.int64)[:, None] * width + column[None, :]
    scale_at = row // features * 2 * features + row % features
    scale = tl.load(norm + scale_at, mask=row < rows, other=0.0)
    shift = tl.load(norm + scale_at + features, mask=row < rows, other=0.0)
    value = tl.load(x + at, mask=inside, other=0.0)
    centre = tl.sum(value, 1) / width
    away = tl.where(inside, value - centre[:, None], 0.0)
    squares = tl.sum(away * away, 1)
    factor = 1.0 / tl.sqrt(squares / width + eps)
    result = away * (factor * scale)[:, None] + shift[:, None]
    tl.store(out + at, tl.maximum(result, 0.0), mask=inside)
    tl.store(mean + row, centre, mask=row < rows)
    tl.store(inverse + row, factor, mask=row < rows)
    if HAS_RUNNING:
        old_mean = tl.load(running_mean + row, mask=row < rows, other=0.0)
        tl.store(running_mean + row, old_mean + momentum * (centre - old_mean), mask=row < rows)
        old_variance = tl.load(running_variance + row, mask=row < rows, other=0.0)
        variance = old_variance + momentum * (squares / (width - 1) - old_variance)
        tl.store(running_variance + row, variance, mask=row < rows)


@triton.jit
def _norm_relu_back(  # type: ignore[no-untyped-def]
    grad, x, norm, mean, inverse, grad_x, grad_norm, rows, width, features, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    at = row.to(tl.int64)[:, None] * width + column[None, :]
    scale_at = row // features * 2 * features + row % features
    scale = tl.load(norm + scale_at, mask=row < rows, other=0.0)
    shift = tl.load(norm + scale_at + features, mask=row < rows, other=0.0)
    centre = tl.load(mean + row, mask=row < rows, other=0.0)
    factor = tl.load(inverse + row, mask=row < rows, other=0.0)
    away = tl.where(inside, tl.load(x + at, mask=inside, other=0.0) - centre[:, None], 0.0)
    result = away * (factor * scale)[:, None] + shift[:, None]  # as in the forward, so that no sign differs
    passed = tl.where(inside & (result > 0), tl.load(grad + at, mask=inside, other=0.0), 0.0)
    normal = away * factor[:, None]
    grad_scale, grad_shift = tl.sum(passed * normal, 1), tl.sum(passed, 1)
    moved = passed - (grad_shift / width)[:, None] - normal * (grad_scale / width)[:, None]
    tl.store(grad_x + at, moved * (scale * factor)[:, None], mask=inside)
    tl.store(grad_norm + scale_at, grad_scale, mask=row < rows)
    tl.store(grad_norm + scale_at + features, grad_shift, mask=row < rows)


@triton.jit
def _adam(  # type: ignore[no-untyped-def]
    parameter, gradient, first, second, count, rate, moves, decay, size, beta_1, beta_2, log_1, log_2, eps,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """parameter, gradient, first, second (E, size); count of steps with this one, rate, moves and decay (E,)."""
    model = tl.program_id(1)
    inside = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = inside < size
    at = model.to(tl.int64) * size + inside
    moving = tl.load(moves + model)
    steps = tl.maximum(tl.load(count + model), 1.0)
    learning_rate = tl.load(rate + model) * moving
    kept = 1.0 - learning_rate * tl.load(decay + model)
    step_size = learning_rate / (1.0 - tl.exp(steps * log_1))
    spread = tl.sqrt(1.0 - tl.exp(steps * log_2))
    g = tl.load(gradient + at, mask=mask, other=0.0)
    m = tl.load(first + at, mask=mask, other=0.0)
    v = tl.load(second + at, mask=mask, other=0.0)
    m += (1.0 - beta_1) * moving * (g - m)
    v += (1.0 - beta_2) * moving * (g * g - v)
    tl.store(first + at, m, mask=mask)
    tl.store(second + at, v, mask=mask)
    p = tl.load(parameter + at, mask=mask, other=0.0) * kept
    tl.store(parameter + at, p - step_size * m / (tl.sqrt(v) / spread + eps), mask=mask)


def norm_relu(
    x: Tensor, norm: Tensor, running: Sequence[Tensor], eps: float, momentum: float
) -> tuple[Tensor, Tensor, Tensor]:
    """x (E, D, B) contiguous, norm (E, 2, D), running mean and variance (E, D), or nothing, changed in place.

    Returns: the output like x, mean and 1 / deviation (E, D).
    """
    out, mean = torch.empty_like(x), x.new_empty(x.shape[:2])
    inverse = torch.empty_like(mean)
    kept = running or (mean, mean)  # never touched then
    numbers = *_sizes(x), eps, momentum
    _norm_relu[_programs(x)](x, norm, out, mean, inverse, *kept, *numbers, HAS_RUNNING=bool(running), **_blocks(x))
    return out, mean, inverse


def norm_relu_back(grad: Tensor, x: Tensor, norm: Tensor, mean: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of x and norm."""
    grad_x, grad_norm = torch.empty_like(x), torch.empty_like(norm)
    _norm_relu_back[_programs(x)](grad, x, norm, mean, inverse, grad_x, grad_norm, *_sizes(x), **_blocks(x))
    return grad_x, grad_norm


def adam(
    parameter: Tensor,
    gradient: Tensor,
    moments: tuple[Tensor, Tensor],
    of_model: tuple[Tensor, Tensor, Tensor, Tensor],
    constants: tuple[float, float, float, float, float],
) -> None:
    """One step in place.

    Args:    of_model: count, rate, moves and decay, (E,). constants: both betas, their logarithms, epsilon.
    """
    size = parameter[0].numel()
    grid = (triton.cdiv(size, BLOCK), len(parameter))
    _adam[grid](parameter, gradient, *moments, *of_model, size, *constants, BLOCK=BLOCK)


def _programs(x: Tensor) -> tuple[int]:
    return (triton.cdiv(x.shape[0] * x.shape[1], ROWS),)


def _sizes(x: Tensor) -> tuple[int, int, int]:
    """Rows, their width, and how many of them are a model's."""
    return x.shape[0] * x.shape[1], x.shape[2], x.shape[1]


def _blocks(x: Tensor) -> dict[str, Any]:
    return {"ROWS": ROWS, "WIDTH": triton.next_power_of_2(x.shape[2])}
