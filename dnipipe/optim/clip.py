"""How large the gradients of a stage may be: by the norm of this stage alone, or of all stages as far as it is known.

    stage 0   step t: own norm a(t) ──┐ summed while step t + 1 is computed
    stage 1   step t: own norm b(t) ──┘
    stage 0   at step t + 1 scales by max_norm / sqrt(a(t + 1)^2 + b(t)^2), stage 1 by that of b(t + 1) and a(t)

So no stage waits for another, unless it is a whole step ahead.

Source: Pascanu, Mikolov and Bengio 2013 (clipping by the norm); that the others' norms are a step old is our own.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils import clip_grad_norm_, clip_grads_with_norm_, get_total_norm


class Clip(ABC):
    """Scales the gradients of a stage down to a largest norm; the kinds differ in which norm they hold against it.

    Args:   max_norm: the largest norm; 0 only measures.
    Raises: ValueError: max_norm < 0.
    """

    grad_norm: Tensor
    """The norm, (), of this stage's newest gradients before clipping; on their device. 0 before the first step."""

    def __init__(self, max_norm: float) -> None:
        if not max_norm >= 0:
            raise ValueError(f"max_norm = {max_norm}: a norm is not negative; give the largest one, or 0 not to clip")
        self.max_norm, self.grad_norm = max_norm, torch.zeros(())

    def clip(self, weights: Sequence[Tensor], alone: Sequence[Tensor] = ()) -> None:
        """Scales what these have in .grad, in place; once per step.

        Args: weights: share one norm. alone: each has a norm of its own, which does not count in `grad_norm`.
        """
        self.grad_norm = get_total_norm([weight.grad for weight in weights if weight.grad is not None])
        if not self.max_norm:
            return
        clip_grads_with_norm_(weights, self.max_norm, self._norm())
        for weight in alone:
            clip_grad_norm_(weight, self.max_norm)

    @abstractmethod
    def _norm(self) -> Tensor:
        """The norm, (), that is held against max_norm, given grad_norm; on the same device."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """What the next step needs to know of those before it."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where state_dict() was called; {} begins anew."""


class StageClip(Clip):
    """Clips by the norm of this stage alone, and waits for nothing. The rest as in Clip."""

    def _norm(self) -> Tensor:
        return self.grad_norm

    def state_dict(self) -> dict[str, Any]:
        """Nothing: each step stands for itself."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes nothing, also from the state of another kind of clip."""


@dataclass(frozen=True)
class _UnderWay:
    work: dist.Work
    own: Tensor
    total: Tensor


class TravellingClip(Clip):
    """Clips by the norm over all stages: this stage's is of this step, the others' are of the step before.

    At its first step nothing is known of the others, and this stage's own norm counts alone. A step waits only for
    stages that have not reached the step before it. Each step also waits for the device once, to have this stage's norm
    on the CPU. With max_norm 0 nothing is exchanged and nothing waited for.

    Args:
        max_norm: the same on every stage.
        group: over gloo, holds exactly the ranks of this pipeline, and carries nothing else. Call drain() before
            leaving it.
        timeout_s: seconds that one wait for the other stages may take.

    Raises: ValueError: a group over another backend, or timeout_s not above 0.
            RuntimeError (rank, seconds), from every method that waits, when another stage is lost.
    """

    total_norm: Tensor
    """The norm, (), that the newest step was clipped by, on the gradients' device; NaN while there was none."""

    def __init__(self, max_norm: float, group: dist.ProcessGroup, *, timeout_s: float = 600.0) -> None:
        super().__init__(max_norm)
        if not timeout_s > 0:
            raise ValueError(f"timeout_s = {timeout_s}: give the seconds to wait for other stages, more than 0")
        if max_norm and (backend := dist.get_backend(group)) != "gloo":
            raise ValueError(f"norms travel on the CPU, so over gloo, the group is over {backend}: make one for them")
        self.total_norm = torch.tensor(math.nan)
        self._group, self._timeout_s = group, timeout_s
        self._under_way: _UnderWay | None = None
        self._others: Tensor | None = None
        """The newest known squared norm of all other stages together, () float64 on the CPU."""

    def _norm(self) -> Tensor:
        # float64 holds the square of a float32 exactly: where the others have no gradient, the root is grad_norm again
        own = self.grad_norm.detach().to("cpu", torch.float64).square()
        total = own.clone()
        work = dist.all_reduce(total, group=self._group, async_op=True)
        assert work is not None, "an asynchronous collective returns its handle"
        self.drain()
        self._under_way = _UnderWay(work, own, total)
        known = own if self._others is None else self._others + own
        self.total_norm = known.sqrt().to(self.grad_norm)
        return self.total_norm

    def drain(self) -> None:
        """Completes the sum under way and keeps what it brought. It changes no number."""
        if self._under_way is None:
            return
        # gloo blocks until its timeout when a finished Work is waited for again, even to learn that it failed
        under_way, self._under_way = self._under_way, None
        start = time.perf_counter()
        try:
            under_way.work.wait(timedelta(seconds=self._timeout_s))
        except RuntimeError as error:
            seconds = time.perf_counter() - start
            raise RuntimeError(
                f"rank {dist.get_rank()} waited {seconds:.1f} s, at most {self._timeout_s:g} s, for the gradient norms "
                f"of the other stages: some rank is stopped, dead or far behind. ({error})"
            ) from error
        # rounding may leave a little less than nothing of the others
        self._others = (under_way.total - under_way.own).clamp_(min=0.0)

    def state_dict(self) -> dict[str, Any]:
        """The others' squared norm of the newest step. Every rank of the group must call it after the same step."""
        self.drain()
        return {"others": None if self._others is None else self._others.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where state_dict() was called; {} begins anew. Every rank of the group must call it at one time."""
        self.drain()
        others = state.get("others")
        self._others = None if others is None else others.to("cpu", torch.float64, copy=True)
