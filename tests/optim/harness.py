"""A small stage, its optimizer, and gradients that every process draws alike."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import nn

from dnipipe.optim import StageClip, StageOptimizer, learning_rate_at

RATE = partial(learning_rate_at, peak=0.02, warmup_steps=3, total_steps=12, schedule="cosine", final_fraction=0.1)


def make_stage() -> nn.Sequential:
    torch.manual_seed(0)
    block = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
    return nn.Sequential(nn.Embedding(5, 8), block, nn.Linear(8, 5))


def make_optimizer(module: nn.Module, **options: Any) -> StageOptimizer:
    return StageOptimizer(module, **{"learning_rate": RATE, "weight_decay": 0.1, "clip": StageClip(1.0), **options})


def draw_gradients(module: nn.Module, step: int) -> None:
    for index, parameter in enumerate(module.parameters()):
        drawn = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(100 * step + index))
        # of so few bits that bfloat16 holds it exactly: a module in either dtype has the same gradients
        parameter.grad = drawn.bfloat16().to(parameter)


def train(module: nn.Module, optimizer: StageOptimizer, steps: Iterable[int]) -> nn.Module:
    for step in steps:
        draw_gradients(module, step)
        optimizer.step(step)
    return module


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def loaded(module: nn.Module, state: dict[str, Any], **options: Any) -> StageOptimizer:
    """A new optimizer that goes on from a state."""
    optimizer = make_optimizer(module, **options)
    optimizer.load_state_dict(state)
    return optimizer


def state_of(module: nn.Module, **options: Any) -> dict[str, Any]:
    """An optimizer's state after two steps."""
    optimizer = make_optimizer(module, **options)
    train(module, optimizer, range(2))
    return optimizer.state_dict()
