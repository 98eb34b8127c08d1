"""Stages that need not wait for their input, as a config asks for them and as the schedule takes them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import nn

from ..config import Config, ForwardUnlockedConfig, ScheduleName
from ..schedule import ForwardUnlocked
from ..schedule.forward_unlocked import check_unlocked
from .model import call_factory
from .policy import policy_of

SECTION = ForwardUnlockedConfig.section


def unlocked_of(config: Config, vocab_size: int | None, stage: int) -> ForwardUnlocked | None:
    """What the schedule of a stage gets; None: every stage waits for its input.

    Args:   vocab_size: tokens of the data are below it; None: not known.
    Raises: ValueError: fewer tokens than the data has, or nobody knows how many, or no model can be made.
    """
    given = config.pipeline.forward_unlocked
    if given is None:
        return None
    return ForwardUnlocked(
        window=given.window,
        patience_s=given.patience_s,
        late=None if given.late is None else [(stage, step, number) for stage, step, number in given.late],
        model=_input_model(given, config.run.seed, stage),
        num_tokens=_num_tokens(given, vocab_size),
        optimizer=partial(torch.optim.Adam, lr=given.learning_rate),
    )


def check_unlocked_config(
    config: Config, schedules: Sequence[ScheduleName], vocab_size: int | None, num_stages: int
) -> None:
    """Raises: ValueError: as unlocked_of, and for a schedule, a policy or a start that does not go with it."""
    if config.pipeline.forward_unlocked is None:
        return
    if "DNI" not in schedules:
        raise ValueError(
            f"{SECTION} with pipeline.schedule = {config.pipeline.schedule!r}: only DNI starts before its input is "
            f"there; take pipeline.schedule=DNI, or {SECTION}=null"
        )
    unlocked = unlocked_of(config, vocab_size, num_stages - 1)
    assert unlocked is not None
    try:
        check_unlocked(unlocked, policy_of(config), num_stages, config.pipeline.num_microbatches)
    except ValueError as error:
        raise ValueError(f"{SECTION} with pipeline.policy = {config.pipeline.policy!r}: {error}") from error


def _num_tokens(given: ForwardUnlockedConfig, vocab_size: int | None) -> int:
    least = given.num_tokens if vocab_size is None else vocab_size
    if least is None and given.model is None:
        raise ValueError(
            f"{SECTION}.num_tokens = None: data.vocab_size is null too, so nobody knows how many tokens there are; "
            f"give either"
        )
    if given.num_tokens is not None and least is not None and given.num_tokens < least:
        raise ValueError(
            f"{SECTION}.num_tokens = {given.num_tokens}: the data has {least} tokens, and the model of the inputs must "
            f"know all of them; raise it, or leave it out"
        )
    return given.num_tokens or least or 0


def _input_model(given: ForwardUnlockedConfig, seed: int, stage: int) -> nn.Module | None:
    """One of the user's own for this stage's input; None: the schedule makes one. The first stage has no use for it."""
    if given.model is None or stage == 0:
        return None
    with torch.random.fork_rng(devices=[]):  # the random numbers outside are those of the model that is trained
        torch.default_generator.manual_seed(seed + stage)
        model = call_factory(f"{SECTION}.model", given.model, f"{SECTION}.options", given.options)
    if not isinstance(model, nn.Module):
        raise ValueError(f"{SECTION}.model = {given.model!r}: it made a {type(model).__name__}; let it return a module")
    return model
