"""The whole model that a run has trained, in one process, whatever number of stages trained it."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from ..checkpoint import load_checkpoint, newest_step, reshard, step_folder
from ..config import Config, load_config
from ..partition import shared_names
from ..report import CHECKPOINTS, CONFIG
from .model import make_model


def load_trained(run: Path, schedule: str | None = None) -> tuple[Config, nn.Sequential]:
    """The settings of a run, and its model as the newest checkpoint has it.

    Args:   run: its folder. schedule: whose model, where the run compared several; None: the first.
    Raises: ValueError, OSError: no such run, no checkpoint in it, or settings whose model is not found.
    """
    config = load_config(run / CONFIG)
    folder = run / CHECKPOINTS / (schedule or config.pipeline.schedule)
    step = newest_step(folder)
    if step is None:
        raise ValueError(f"{folder} holds no checkpoint: give the folder of a run, and a --schedule that it ran")
    whole = step_folder(folder, step)
    model = make_model(config.model).eval()
    num_stages = len(load_checkpoint(whole, 0)["cut"])
    states = (load_checkpoint(whole, stage) for stage in range(num_stages))
    model.load_state_dict(reshard(states, model, shared_names(model))["model"])
    return config, model
