"""Watches whether synthetic gradients do harm: a predictor that has learned nothing, a loss that diverges.

The loss is known on the last stage. That all stages go back to `wait` at the same step takes one small all-reduce every
`check_every_steps` steps: the only collective across stages after the first step.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..boundary import reduce_within
from .flow import Flow

LOW_COSINE = 0.1
DIVERGED_BY = 1.0  # times the size of the loss at unlocking, above it: twice a positive loss
SMALL_LOSS = 0.05  # a loss nearer to 0 than this at unlocking counts as this, so that noise is no divergence
NOT_FINITE_STEPS = 3  # in a row: one batch without any valid token is no divergence
SMOOTHING = 0.9


class Watch:
    """Args: check_every_steps: 0 = never. fall_back: whether a diverging loss sends all stages back to `wait`.

    groups: of all stages, and of this stage's replicas. timeout_s: of the agreement.
    """

    def __init__(
        self, check_every_steps: int, fall_back: bool, groups: Sequence[dist.ProcessGroup | None], timeout_s: float
    ) -> None:
        self.check_every_steps, self.fall_back = check_every_steps, fall_back
        self.groups, self.timeout_s = groups, timeout_s
        self._smoothed: Tensor | None = None
        self._at_unlocking: Tensor | None = None
        self._not_finite: Tensor | None = None
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
        """On the last stage, without waiting for the device."""
        finite = torch.isfinite(loss)
        if self._smoothed is None or self._at_unlocking is None or self._not_finite is None:
            self._smoothed, self._at_unlocking, self._not_finite = loss.clone(), loss.clone(), torch.zeros_like(loss)
        smoothed = SMOOTHING * self._smoothed + (1 - SMOOTHING) * loss
        smoothed = torch.where(torch.isfinite(self._smoothed), smoothed, loss)
        self._smoothed = torch.where(finite, smoothed, self._smoothed)
        self._not_finite = torch.where(finite, 0.0, self._not_finite + 1)
        if waited:
            self._at_unlocking = self._smoothed.clone()
        self._at_unlocking = torch.where(torch.isfinite(self._at_unlocking), self._at_unlocking, self._smoothed)

    def _warn_of_low_cosine(self, flow: Flow) -> None:
        if flow.learner is None or self._warned or flow.phase == "stale":  # which uses none
            return
        cosine = flow.learner.metrics()["cosine"]
        if cosine < LOW_COSINE:
            self._warned = True
            warnings.warn(
                f"stage {flow.stage}: after {flow.step} steps the predicted gradient has a cosine of {cosine:.3f} with "
                f"the true one, under {LOW_COSINE}: it hardly helps this stage. Try another interface=, more steps "
                f"of wait first (policy='wait:300,...'), or policy='wait'",
                RuntimeWarning,
                stacklevel=2,
            )

    def _agree_on_divergence(self, flow: Flow) -> bool:
        """The same answer on every stage, and on every replica, for those must keep in step too."""
        if not self.fall_back:
            return False
        diverged = torch.zeros(1, device=flow.device)
        if self._smoothed is not None and self._at_unlocking is not None and self._not_finite is not None:
            bound = self._at_unlocking + DIVERGED_BY * self._at_unlocking.abs().clamp_min(SMALL_LOSS)
            diverged += ((self._not_finite >= NOT_FINITE_STEPS) | (self._smoothed > bound)).float()
        own = diverged.clone()
        for group in self.groups:
            reduce_within(
                diverged,
                group,
                self.timeout_s,
                f"rank {dist.get_rank()} (stage {flow.stage}) at the agreement of all stages after step {flow.step}",
            )
        if not diverged.item():
            return False
        if own.item() and self._smoothed is not None and self._at_unlocking is not None:
            print(
                f"[dnipipe] !!! step {flow.step}: the loss is {self._smoothed.item():.4g}, it was "
                f"{self._at_unlocking.item():.4g} when the stages were unlocked. All stages go back to policy 'wait'. "
                f"(fall_back=False switches this off.)",
                file=sys.stderr,
                flush=True,
            )
        return True

    def state_dict(self) -> dict[str, Any]:
        names = ("_smoothed", "_at_unlocking", "_not_finite", "_warned")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        for name, value in state.items():
            setattr(self, name, value.to(device) if isinstance(value, Tensor) else value)
