"""What ScheduleDNI refuses when it is built."""

from __future__ import annotations

from typing import Any, SupportsIndex

from torch import nn

from ..boundary import TRANSPORTS
from .assembly import OptimizerFactory
from .choose import check_optimizer
from .forward_unlocked import ForwardUnlocked, check_unlocked
from .old_weights import check_possible
from .policy import Policy

LABELS = ("auto", "local", "relay", "none")


def check_arguments(
    stage: Any,
    policy: Policy,
    n_microbatches: int,
    labels: str,
    transport: str,
    check_every_steps: int,
    timeout_s: float,
    optimizer: str | None,
    forward_unlocked: ForwardUnlocked | None,
    interface_optimizer: OptimizerFactory | None,
) -> None:
    if stage.num_stages != stage.group_size:
        raise ValueError(
            f"ScheduleDNI runs one stage per rank: num_stages is {stage.num_stages}, its group has {stage.group_size} "
            f"ranks; start {stage.num_stages} ranks, or split the model into {stage.group_size} stages"
        )
    if not isinstance(n_microbatches, SupportsIndex):
        raise ValueError(f"n_microbatches must be a whole number, got {n_microbatches!r}")
    if n_microbatches < 1:
        raise ValueError(f"n_microbatches must be at least 1, got {n_microbatches}")
    if labels not in LABELS:
        raise ValueError(f"unknown labels {labels!r}: choose one of {', '.join(LABELS)}")
    if transport not in TRANSPORTS:
        raise ValueError(f"unknown transport {transport!r}: choose one of {', '.join(TRANSPORTS)}")
    if check_every_steps < 0:
        raise ValueError(f"check_every_steps must be at least 0 steps (0: never), got {check_every_steps}")
    if timeout_s <= 0:
        raise ValueError(f"timeout_s must be more than 0 seconds, got {timeout_s}")
    check_optimizer(optimizer)
    policy.check(stage.num_stages)
    if interface_optimizer is not None and not callable(interface_optimizer):
        raise ValueError(
            f"interface_optimizer is called with the parameters of the predictors, which are built later, got an "
            f"object of {type(interface_optimizer).__name__}: pass functools.partial(torch.optim.Adam, lr=3e-3)"
        )
    if forward_unlocked is not None:
        check_unlocked(forward_unlocked, policy, stage.num_stages, n_microbatches)
    if policy.late:
        check_possible(stage.submod, policy.name)


def why_no_graphs(module: nn.Module) -> str | None:
    """Why a stage cannot hold graphs, as `stale` and `corrected` do; None: it can."""
    try:
        check_possible(module, "stale")
    except ValueError as error:
        return str(error)
    return None
