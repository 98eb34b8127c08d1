"""Complete unlocking: a stage may start from a synthetic input while the real one is late.

    stage 0   F0 B0 F1 B1 (stalls) .. .. .. .. F2 B2 F3 B3 ..
    stage 1   .. F0 B0 F1 B1 F2~B2 F3~B3 F4~B4 .. .. ..        ~ from a synthetic input; window 3: F5 waits for input 2

A synthetic input is predicted from the input of the whole net, so every rank passes that to step(). What a stage makes
of it goes down as any activation does, and the gradient at it goes up as that of the late one: each microbatch has its
one answer, so the exchanges stay as they are in ledger.py, and only the waiting differs.

The real activation trains the model of the inputs `window` microbatches later, whether it was late or in time. So all
that depends on timing is which microbatches started early. That is kept (ScheduleDNI.early_starts), and whoever is
given it repeats the run bit for bit, in one process too (unlocked_reference.py).

Source: Jaderberg et al. 2016, Decoupled Neural Interfaces using Synthetic Gradients: complete unlock.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from ..interface import TensorMeta, check_layout, check_predictable
from .policy import AUTO, LATE, Policy

Start = tuple[int, int, int]  # stage, step() call from 0, microbatch of it from 0


class Agreed(NamedTuple):
    """See ForwardUnlocked."""

    window: int
    patience_s: float
    num_tokens: int
    late: tuple[Start, ...] | None


@dataclass(frozen=True)
class ForwardUnlocked:
    """When a stage starts from a synthetic input, and what predicts it. The same on every rank, but for `model`.

    Args: window: microbatches that a stage may run ahead of its input, at least 1. To bridge a stall it takes the
          stall's seconds over those of a microbatch. Each costs the memory of an input activation and of the net's
          input, and what the model of the inputs learns is as many microbatches old.
          patience_s: seconds that a stage waits for the real input before it starts without. Stages that work equally
          fast never catch up with one that runs ahead of them but by such pauses: at 0 one that is ahead stays ahead.
          late: (stage, step() call, microbatch of it) that start from synthetic inputs, and no other, whatever the
          timing; None: those whose input is late.
          model: called as model(net_input, None), returns this stage's input activation; None: one hidden layer over
          each row, or token by token. num_tokens: of the vocabulary, where the net's input is token ids.
          optimizer: parameters -> Optimizer of the model; None: Adam, at the model's own rate (1e-3).
    Raises: ValueError for a value out of range.
    """

    window: int = 8
    patience_s: float = 0.01
    late: Collection[Start] | None = None
    model: nn.Module | None = None
    num_tokens: int = 0
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.window, int) or self.window < 1:
            raise ValueError(f"window must be at least 1 microbatch, got {self.window}: at 0 nothing is unlocked")
        if not 0 <= self.patience_s < math.inf:
            said = f"patience_s must be at least 0 seconds, and finite, got {self.patience_s}"
            raise ValueError(f"{said}: with late=() all inputs are waited for")
        if self.late is not None:
            object.__setattr__(self, "late", frozenset(self.late))

    @property
    def agreed(self) -> Agreed:
        """What must be the same on every rank."""
        late = None if self.late is None else tuple(sorted(self.late))
        return Agreed(self.window, self.patience_s, self.num_tokens, late)


def check_unlocked(unlocked: ForwardUnlocked, policy: Policy, num_stages: int, num_microbatches: int) -> None:
    """Raises: ValueError for a policy that does not go with it, or a start that cannot be early."""
    if not isinstance(unlocked, ForwardUnlocked):
        raise ValueError(f"forward_unlocked takes an object, got {unlocked!r}: pass ForwardUnlocked(window=8), or None")
    names = [AUTO] if policy.name == AUTO else [phase.policy for phase in policy.phases]
    wrong = next((name for name in names if name == AUTO or name in LATE), None)
    if wrong is not None or "synthetic" not in names:
        raise ValueError(
            f"forward_unlocked goes with synthetic gradients, after true ones if you like, and not with policy "
            f"{wrong or policy.name!r}: choose policy='synthetic' or 'wait:200,synthetic'"
        )
    for start in sorted(unlocked.late or ()):
        stage, step, microbatch = start
        if not (0 < stage < num_stages and step >= 0 and 0 <= microbatch < num_microbatches):
            raise ValueError(
                f"late names {start}: it takes (stage, step, microbatch) with a stage from 1 to {num_stages - 1}, a "
                f"step from 0 and a microbatch from 0 to {num_microbatches - 1}"
            )
        if policy.waits(step):
            raise ValueError(
                f"late names {start}, but step {step} is under policy 'wait', which takes real inputs only"
            )


def check_inputs_known(
    ranks: Iterable[int],
    net_inputs: Iterable[TensorMeta | None],
    received: Iterable[Iterable[TensorMeta]],
    num_tokens: int,
    has_model: Iterable[bool],
) -> None:
    """Whether each stage after the first can predict what it receives; alike on every rank.

    Args:   by stage, from the second on; received: the activations of one microbatch.
    Raises: ValueError.
    """
    for stage, (rank, net_input, metas, given) in enumerate(
        zip(ranks, net_inputs, received, has_model, strict=True), 1
    ):
        if net_input is None:
            raise ValueError(missing(rank, stage))
        metas = list(metas)
        if given and len(metas) != 1:
            raise ValueError(f"stage {stage} receives {len(metas)} tensors, and model= predicts one: leave model out")
        for meta in metas:
            try:
                check_predictable(net_input, meta)
                if not given:
                    check_layout(net_input, meta, num_tokens)
            except ValueError as error:
                raise ValueError(f"forward_unlocked, stage {stage}: {error}") from None


def missing(rank: int, stage: int) -> str:
    return (
        f"rank {rank} (stage {stage}) got no input: under forward_unlocked every rank passes the net's input, a "
        f"tensor, as in schedule.step(x, target=y), since synthetic inputs are made from it"
    )
