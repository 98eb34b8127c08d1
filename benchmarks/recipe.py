"""How the GPTs of benchmarks.policies and benchmarks.time_to_loss train: alike, so that one's loss is the other's.

A cosine over the steps of the run after a tenth of warm-up, decoupled weight decay, gradients clipped per stage.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn

from dnipipe.optim import OptimizerName, StageClip, StageOptimizer, learning_rate_at

WEIGHT_DECAY, MAX_NORM, FINAL_FRACTION = 0.1, 1.0, 0.1
MAX_WARMUP_STEPS = 100


def rate_of(peak: float, steps: int) -> Callable[[int], float]:
    """The learning rate of each step of a run of so many."""
    return partial(
        learning_rate_at,
        peak=peak,
        warmup_steps=min(MAX_WARMUP_STEPS, steps // 10),
        total_steps=steps,
        schedule="cosine",
        final_fraction=FINAL_FRACTION,
    )


def optimizer_of(
    module: nn.Module, name: OptimizerName, rate: Callable[[int], float], head: nn.Module | None
) -> StageOptimizer:
    """head: the layer that makes the model's output, in the last stage."""
    return StageOptimizer(
        module, name=name, learning_rate=rate, weight_decay=WEIGHT_DECAY, clip=StageClip(MAX_NORM), head=head
    )
