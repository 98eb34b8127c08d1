"""The `"dnipipe"` block of a ds_config: every key, what it may be, and what is said when it is not.

{"train_batch_size": 64, ..., "dnipipe": {"policy": "auto", "lag": 2}}
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from ..boundary import TRANSPORTS
from ..schedule.policy import DEFAULT_LAG, LATE, Policy

NAME = "dnipipe"
POLICIES = ("wait", "synthetic", "auto")
CLIPS = ("stage", "travelling", "global")
LOSSES = ("newest", "sync")
LABELS = ("auto", "relay", "none")
TIES = ("async", "sync")


@dataclass(frozen=True)
class Block:
    """What the block says. Raises: ValueError naming "dnipipe.KEY", the value, the rule and the cure."""

    enabled: bool = True
    """false: plain DeepSpeed, as if the block were not there."""
    policy: str = "auto"
    """wait: true gradients only. synthetic: predicted ones at once. auto: wait for unlock_after_steps, then synthetic.
    """
    interface: str | tuple[str, ...] | None = None
    """How the gradient at a stage's output is predicted (linear, mlp, conv, local_head, scaled_head, sampled_head,
    transformer, potential), one name for all outputs or a list, one per output that needs a gradient; null chooses by
    the activation and the label."""
    interface_learning_rate: float | None = None
    """Of Adam, which trains the predictors; more than 0; null: each kind of interface names its own."""
    lag: int = DEFAULT_LAG
    """Microbatches between an activation and the true gradient that trains its predictor, at least 1; also how far a
    stage may lead the next one. Each costs a stage one output in memory, its gradient and its label."""
    unlock_after_steps: int | None = None
    """train_batch() calls under wait first; null: 200 for auto, 0 for synthetic."""
    transport: str = "auto"
    """group: the process group (NCCL, gloo). direct: copies between GPUs of one host. auto: direct on one GPU."""
    clip: str = "stage"
    """By which norm gradient_clipping clips. stage: of this stage. travelling: of all stages, the others' one batch
    old. global: DeepSpeed's own, which locks the stages together, and counts stage 0 only in fp32 with ZeRO 0."""
    loss: str = "newest"
    """What train_batch() returns. newest: the newest true loss known here, engine.loss_batch says of which batch; nan
    before the first. sync: this batch's, which locks the stages together."""
    labels: str = "auto"
    """Whether the predictors see labels. relay: the first stage's batch[1] travels with the activations. none. auto:
    where there is one row of it for each row of the activation."""
    num_classes: int | None = None
    """Of the labels, at least 1; null reads it off the last stage's output."""
    tied: str = "async"
    """Tied layers under synthetic. async: both ends take the summed gradient one batch late. sync: DeepSpeed's own
    all-reduce, which locks the tied stages together."""
    check_every_steps: int = 100
    """How often, in batches, the stages agree by one small all-reduce whether to fall back to wait; 0: never."""
    fall_back: bool = True
    """Whether a diverging loss sends all stages back to wait."""
    timeout_s: float = 600.0
    """Seconds that a rank waits for a neighbour, more than 0."""

    def __post_init__(self) -> None:
        for name, check in _CHECKS.items():
            check(name, getattr(self, name))
        if self.policy == "wait" and self.unlock_after_steps is not None:
            raise ValueError(
                f'"{NAME}.unlock_after_steps" is {self.unlock_after_steps}, and policy "wait" never unlocks: leave it '
                f'out, or choose policy "synthetic"'
            )

    def schedule_policy(self, *, may_post_ahead: bool) -> Policy:
        """may_post_ahead: as Policy.post_ahead; False: never."""
        return Policy(self.policy, self.lag, self.unlock_after_steps, None if may_post_ahead else False)

    @property
    def interfaces(self) -> tuple[str, ...]:
        """As a list; empty: to be chosen."""
        if self.interface is None:
            return ()
        return (self.interface,) if isinstance(self.interface, str) else self.interface


def read_block(values: Mapping[str, Any]) -> Block:
    """The block from what JSON gave. Raises: ValueError: an unknown key, which names the nearest one; bad values."""
    if not isinstance(values, Mapping):
        raise ValueError(f'"{NAME}" is {values!r}: it must be an object, as "{NAME}": {{"policy": "auto"}}')
    known = [field.name for field in fields(Block)]
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.4)
            cure = f'did you mean "{near[0]}"?' if near else "remove it."
            raise ValueError(f'"{NAME}.{key}" is not known: {cure} (Known: {", ".join(known)})')
    taken: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    return Block(**taken)


def _complain(name: str, value: Any, rule: str) -> None:
    default = next(field.default for field in fields(Block) if field.name == name)
    words = {"None": "null", "True": "true", "False": "false"}.get(str(default), repr(default))
    raise ValueError(f'"{NAME}.{name}" is {value!r}: it must be {rule}; leave it out for {words}')


def _one_of(*choices: str) -> Callable[[str, Any], None]:
    def check(name: str, value: Any) -> None:
        if value not in choices:
            _complain(name, value, f"one of {', '.join(choices)}")

    return check


def _is_policy(name: str, value: Any) -> None:
    if value in LATE:
        raise ValueError(
            f'"{NAME}.{name}" is {value!r}, which keeps the weights of each forward, and DeepSpeed\'s optimizers write '
            f"theirs in place: late backwards would silently mix old activations with new weights. Choose one of "
            f"{', '.join(POLICIES)}"
        )
    _one_of(*POLICIES)(name, value)


def _is_bool(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        _complain(name, value, "true or false")


def _whole(smallest: int, unit: str, *, or_null: bool = False) -> Callable[[str, Any], None]:
    def check(name: str, value: Any) -> None:
        if value is None and or_null:
            return
        if isinstance(value, bool) or not isinstance(value, int) or value < smallest:
            _complain(name, value, f"a whole number of {unit}, at least {smallest}" + (", or null" if or_null else ""))

    return check


def _above_0(unit: str, *, or_null: bool = False) -> Callable[[str, Any], None]:
    def check(name: str, value: Any) -> None:
        if value is None and or_null:
            return
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not 0 < value < math.inf:
            _complain(name, value, f"a number{unit} above 0" + (", or null" if or_null else ""))

    return check


def _is_interface(name: str, value: Any) -> None:
    names = value if isinstance(value, tuple) else (value,)
    if value is not None and (not names or not all(isinstance(each, str) for each in names)):
        _complain(name, value, "the name of an interface, a list of names, or null")


_CHECKS: dict[str, Callable[[str, Any], None]] = {
    "enabled": _is_bool,
    "policy": _is_policy,
    "interface": _is_interface,
    "interface_learning_rate": _above_0("", or_null=True),
    "lag": _whole(1, "microbatches"),
    "unlock_after_steps": _whole(0, "batches", or_null=True),
    "transport": _one_of(*TRANSPORTS),
    "clip": _one_of(*CLIPS),
    "loss": _one_of(*LOSSES),
    "labels": _one_of(*LABELS),
    "num_classes": _whole(1, "classes", or_null=True),
    "tied": _one_of(*TIES),
    "check_every_steps": _whole(0, "batches"),
    "fall_back": _is_bool,
    "timeout_s": _above_0(" of seconds"),
}
