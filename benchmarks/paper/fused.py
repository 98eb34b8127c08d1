"""Batch normalisation with ReLU, and Adam, for E models: by our own kernels on a GPU, else by torch's operations."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

EPS = 1e-5  # of nn.BatchNorm1d, as is the momentum
MOMENTUM = 0.1
BETA_1, BETA_2, ADAM_EPS = 0.9, 0.999, 1e-8  # of torch.optim.AdamW
_CONSTANTS = (BETA_1, BETA_2, math.log(BETA_1), math.log(BETA_2), ADAM_EPS)


def norm_relu(x: Tensor, norm: Tensor, running: Sequence[Tensor] = ()) -> Tensor:
    """Normalised over the batch, scaled, shifted, and what is negative taken away.

    Args:    running: mean and variance, (E, D), which those of the batch enter, as in nn.BatchNorm1d; or nothing.
    Shapes:  x (E, D, B); norm (E, 2, D), scale and shift of each feature -> like x.
    """
    if _has_kernels(x):
        return _NormRelu.apply(x, norm, running)
    normal, mean, inverse = torch.native_layer_norm(x, x.shape[-1:], None, None, EPS)
    if running:
        with torch.no_grad():
            batch = x.shape[-1]
            variance = (inverse**-2 - EPS).clamp_min(0) * (batch / (batch - 1))
            running[0].lerp_(mean.squeeze(-1), MOMENTUM)
            running[1].lerp_(variance.squeeze(-1), MOMENTUM)
    scale, shift = norm.unsqueeze(-1).unbind(1)
    return torch.relu(torch.addcmul(shift, normal, scale))


@torch.no_grad()
def adam(
    parameter: Tensor,
    gradient: Tensor,
    moments: tuple[Tensor, Tensor],
    of_model: tuple[Tensor, Tensor, Tensor, Tensor],
) -> None:
    """A step of torch.optim.AdamW in place; a model that does not move keeps everything.

    Shapes:  parameter, gradient, moments (E, ...); of_model: count of steps with this one, rate, moves (1 or 0), and
             weight decay, (E,).
    """
    count, rate, moves, decay = of_model
    if _has_kernels(parameter):
        of_model = count, rate, moves.contiguous(), decay
        return _kernels().adam(parameter, gradient.contiguous(), moments, of_model, _CONSTANTS)
    first, second = moments
    shape = (-1,) + (1,) * (parameter.ndim - 1)
    steps = count.clamp_min(1)  # who has never moved divides by nothing
    step_size = rate * moves / (1 - BETA_1**steps)
    spread = (1 - BETA_2**steps).sqrt()
    first.lerp_(gradient, ((1 - BETA_1) * moves).view(shape))
    second.lerp_(gradient.square(), ((1 - BETA_2) * moves).view(shape))
    deviation = second.sqrt().div_(spread.view(shape)).add_(ADAM_EPS)
    parameter.mul_((1 - rate * moves * decay).view(shape))
    parameter.addcmul_(first / deviation, step_size.view(shape), value=-1)


class _NormRelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: Tensor, running: Sequence[Tensor]) -> Tensor:
        out, mean, inverse = _kernels().norm_relu(x, norm, running, EPS, MOMENTUM)
        ctx.save_for_backward(x, norm, mean, inverse)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return *_kernels().norm_relu_back(grad.contiguous(), *ctx.saved_tensors), None


def _has_kernels(x: Tensor) -> bool:
    return x.is_cuda and x.dtype == torch.float32 and _kernels() is not None


@functools.cache
def _kernels() -> Any:
    """The module of kernels, or None, with a warning, where Triton cannot build them."""
    return built(_tried_kernels)


def built(attempt: Callable[[], Any]) -> Any:
    """What the attempt gives, or None, with a warning, where it fails."""
    try:
        return attempt()
    except Exception as error:  # no Triton, no compiler, a card that it does not know: whatever it is, torch can do it
        warnings.warn(f"no kernels of our own, so training will be slower: {error!r}", stacklevel=2)
        return None


def _tried_kernels() -> Any:
    from . import kernels

    x, norm = torch.randn(1, 4, 8, device="cuda"), torch.ones(1, 2, 4, device="cuda")
    kernels.norm_relu_back(x, x, norm, *kernels.norm_relu(x, norm, (), EPS, MOMENTUM)[1:])
    return kernels
