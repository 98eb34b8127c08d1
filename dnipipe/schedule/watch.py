"""Watches whether synthetic gradients do harm: a predictor that has learned nothing, a loss that diverges.

The loss is known on the last stage. That all stages go back to `wait` at the same step takes one small all-reduce every
`check_every_steps` steps: the only collective across stages after the first step.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .flow import Flow

LOW_COSINE = 0.1
DIVERGED = 2.0  # times the loss at unlocking
SMOOTHING = 0.9


class Watch:
    """Args: check_every_steps: 0 = never. fall_back: whether a diverging loss sends all stages back to `wait`."""

    def __init__(self, check_every_steps: int, fall_back: bool, group: dist.ProcessGroup | None) -> None:
        self.check_every_steps, self.fall_back, self.group = check_every_steps, fall_back, group
        self._smoothed: Tensor | None = None
        self._at_unlocking: Tensor | None = None
        self._warned = False

    def after_step(self, flow: Flow) -> None:
        """To be called on every stage after each training step; `flow.step` is the next one."""
        waited = flow.fell_back or flow.policy.waits(flow.step - 1)
        if flow.down is None:
            self._follow(flow.news[1], waited)
        if waited or not self.check_every_steps or flow.step % self.check_every_steps:
            return
        self._warn_of_low_cosine(flow)
        if self._agree_on_divergence(flow):
            flow.fell_back = True

    def _follow(self, loss: Tensor, waited: bool) -> None:
        if self._smoothed is None:
            self._smoothed = loss.clone()
        else:
            self._smoothed = SMOOTHING * self._smoothed + (1 - SMOOTHING) * loss
        if waited or self._at_unlocking is None:
            self._at_unlocking = self._smoothed.clone()

    def _warn_of_low_cosine(self, flow: Flow) -> None:
        if flow.learner is None or self._warned:
            return
        cosine = flow.learner.metrics()["cosine"]
        if cosine < LOW_COSINE:
            self._warned = True
            warnings.warn(
                f"stage {flow.stage}: after {flow.step} steps the predicted gradient has a cosine of {cosine:.3f} with "
                f"the true one, under {LOW_COSINE}: it hardly helps this stage. Try another interface=, a larger "
                f"unlock_after_steps=, or policy='wait'",
                RuntimeWarning,
                stacklevel=2,
            )

    def _agree_on_divergence(self, flow: Flow) -> bool:
        if not self.fall_back:
            return False
        diverged = torch.zeros(1, device=flow.device)
        if self._smoothed is not None and self._at_unlocking is not None:
            bound = DIVERGED * self._at_unlocking
            diverged += (~torch.isfinite(self._smoothed) | (self._smoothed > bound)).float()
        dist.all_reduce(diverged, op=dist.ReduceOp.MAX, group=self.group)
        if not diverged.item():
            return False
        if flow.down is None and self._smoothed is not None and self._at_unlocking is not None:
            print(
                f"[dnipipe] !!! step {flow.step}: the loss is {self._smoothed.item():.4g}, it was "
                f"{self._at_unlocking.item():.4g} when synthetic gradients began. All stages go back to policy 'wait'. "
                f"(fall_back=False switches this off.)",
                file=sys.stderr,
                flush=True,
            )
        return True

    def state_dict(self) -> dict[str, Any]:
        return {"smoothed": self._smoothed, "at_unlocking": self._at_unlocking, "warned": self._warned}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._smoothed, self._at_unlocking = state["smoothed"], state["at_unlocking"]
        self._warned = state["warned"]
