"""initialize(): takes the block out of the ds_config, and lets DeepSpeed build our engine in place of its own."""

from __future__ import annotations

import copy
import functools
import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch.distributed as dist
from deepspeed.runtime.tensor_parallel.init_utils import load_ds_config

from .block import NAME, Block, read_block
from .engine import DNIPipelineEngine
from .refuse import check_job, check_model

_plain_initialize = deepspeed.initialize
_SIGNATURE = inspect.signature(_plain_initialize)


def initialize(*args: Any, **kwargs: Any) -> tuple[Any, Any, Any, Any]:
    """As deepspeed.initialize, with the same arguments; a "dnipipe" block in the config makes a DNIPipelineEngine.

    Returns: engine, optimizer, training_dataloader, lr_scheduler.
    Raises:  ValueError: a bad block, or a job that the engine cannot train, before anything is built.
    """
    given = _SIGNATURE.bind(*args, **kwargs).arguments
    config = _config_of(given)
    block = read_block(config.pop(NAME)) if config is not None and NAME in config else None
    if config is None or block is None:
        return _plain_initialize(*args, **kwargs)
    given = {**given, "config": config, "config_params": None, "args": _without_config(given.get("args"))}
    if not block.enabled:
        return _plain_initialize(**given)
    model: Any = given.get("model")
    check_model(model)
    if model.num_stages == 1:
        if not dist.is_initialized() or dist.get_rank() == 0:
            print(f'[dnipipe] one stage has no bubble: the "{NAME}" block does nothing', file=sys.stderr)
        return _plain_initialize(**given)
    check_job(config, model, block)
    with _engine_class(block):
        return _plain_initialize(**given)


def _config_of(given: dict[str, Any]) -> dict[str, Any] | None:
    """A copy of the ds_config, from wherever DeepSpeed would take it; None: there is none, or it is ambiguous."""
    args = given.get("args")
    of_args = getattr(args, "deepspeed_config", None) or getattr(args, "deepscale_config", None)
    given_here = given.get("config") if given.get("config") is not None else given.get("config_params")
    if given_here is not None and of_args is not None:
        return None  # DeepSpeed says what is wrong
    config = given_here if given_here is not None else of_args
    if config is None:
        return None
    return copy.deepcopy(config) if isinstance(config, dict) else dict(load_ds_config(config))


def _without_config(args: Any) -> Any:
    """The script's arguments without the path of the config, which DeepSpeed would read a second time."""
    if args is None:
        return None
    args = copy.copy(args)
    for name in ("deepspeed_config", "deepscale_config"):
        if hasattr(args, name):
            setattr(args, name, None)
    return args


@contextmanager
def _engine_class(block: Block) -> Iterator[None]:
    """DeepSpeed has no argument for the engine's class; it looks the name up in its own module at each call (0.19)."""
    original = deepspeed.PipelineEngine
    deepspeed.PipelineEngine = functools.partial(DNIPipelineEngine, block=block)
    try:
        yield
    finally:
        deepspeed.PipelineEngine = original
