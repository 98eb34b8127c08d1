"""The factor that DeepSpeed's fp16 puts on a loss, and so on every gradient behind it."""

from __future__ import annotations

import warnings
from typing import Any

from deepspeed.runtime.base_optimizer import ZeROOptimizer


def loss_scale_of(engine: Any) -> float:
    """What `engine` multiplies a loss by for fp16's sake, at present; 1 where it does not."""
    if not (engine.fp16_enabled() and isinstance(engine.optimizer, ZeROOptimizer)):
        return 1.0
    return float(engine._get_optimizer_loss_scale() or 1.0)


def check_loss_scale(engine: Any) -> None:
    """Warns of a fault of DeepSpeed's own, which this engine shares."""
    if engine.fp16_enabled() and not isinstance(engine.optimizer, ZeROOptimizer):
        warnings.warn(
            "fp16 with ZeRO 0: DeepSpeed 0.19 does not multiply the loss by its loss scale there (deepspeed/runtime/"
            'engine.py, backward) and divides the gradients by it all the same: set "zero_optimization.stage" 1',
            RuntimeWarning,
            stacklevel=2,
        )
