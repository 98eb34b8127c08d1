"""One weight on two stages: each end holds a copy, and both take the sum of both ends' gradients, one step late.

    first stage   step t: own gradient a(t) ──┐ exchanged during step t + 1
    last stage    step t: own gradient b(t) ──┘
    both          the optimizer step of t + 1 takes a(t) + b(t); that of step 0 leaves the weight alone

So no end waits for the other, unless it is a whole step ahead. The copies stay bit-equal: they start equal, take the
same gradients, and a sum of two numbers is the same in either order.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..boundary import Exchange, PairedBoundary


@dataclass(frozen=True)
class _UnderWay:
    exchange: Exchange
    own: Tensor
    theirs: Tensor


class TiedWeights:
    """One end of a tied weight.

        schedule.step(...); tied.after_backward(); optimizer.step()             # on the first and the last stage

    Both ends need the same optimizer with the same settings for this weight, and must step it equally often. Clipping
    by a norm over a stage would scale the two copies differently: clip `tied.others(parameters)` instead.

    Args:
        weight: this end's copy; it must start equal to the other's.
        group: holds exactly this rank and `peer`, and carries nothing else. Over NCCL an exchange occupies the GPU of
            whichever end is ahead until the other end has posted it, too.
        stage, peer, peer_stage: this stage, and the other end's global rank and stage.
        timeout_s: seconds that one wait for the other end may take.

    Raises: BoundaryError (rank, stage, peer, seconds; the step stands where it says microbatch), from every method that
            waits, when the other end is lost.
    """

    def __init__(
        self,
        weight: nn.Parameter,
        group: dist.ProcessGroup,
        *,
        stage: int,
        peer: int,
        peer_stage: int,
        timeout_s: float = 600.0,
    ) -> None:
        self.weight = weight
        self.boundary = PairedBoundary(
            group, rank=dist.get_rank(), stage=stage, peer=peer, peer_stage=peer_stage, timeout_s=timeout_s
        )
        self.step = 0
        self._under_way: _UnderWay | None = None
        self._sum: Tensor | None = None

    def after_backward(self) -> None:
        """Once per step, when its gradients are complete and before the optimizer: sends this step's, sets the last's.

        Sets None at step 0, so that the optimizer passes over the weight.
        """
        grad = self.weight.grad
        # a copy, because the gradient may be a view of memory that the next backward writes to
        own = torch.zeros_like(self.weight) if grad is None else grad.detach().clone()
        own = own.detach().contiguous()
        theirs = torch.empty_like(own)
        exchange = self.boundary.exchange([own], [theirs], microbatch=self.step)
        self.drain()
        self.weight.grad, self._sum = self._sum, None
        self._under_way = _UnderWay(exchange, own, theirs)
        self.step += 1

    def drain(self) -> None:
        """Completes the exchange under way and keeps what it brought. It changes no number."""
        if self._under_way is not None:
            self._under_way.exchange.wait()
            self.boundary.confirm()
            self._sum = self._under_way.theirs.add_(self._under_way.own)
            self._under_way = None

    def others(self, parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
        """Those that are not this weight: what may be clipped by a norm over the stage."""
        return [parameter for parameter in parameters if parameter is not self.weight]

    def state_dict(self) -> dict[str, Any]:
        """The step and the gradient that the next one takes. Both ends must call it after the same step."""
        self.drain()
        return {"step": self.step, "gradient": None if self._sum is None else self._sum.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where state_dict() was called. Both ends must call it, before their next step."""
        self.drain()
        gradient = state["gradient"]
        self._sum = None if gradient is None else gradient.to(self.weight, copy=True)
        self.step = state["step"]
