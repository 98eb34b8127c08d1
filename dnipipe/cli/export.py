"""dnipipe export: a trained Hugging Face decoder as a folder that transformers loads.

dnipipe export runs/gpt2_150m --out my_model
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from rich.console import Console

from dnipipe.partition import export_hf
from dnipipe.trainer.trained import load_trained

from .model_path import look_where_training_does


def add_arguments(export: argparse.ArgumentParser) -> None:
    add = export.add_argument
    add("run", type=Path, metavar="RUN", help="the folder of a run: its run.output_dir")
    add(
        "--out",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="for config.json and model.safetensors; made if missing",
    )
    add("--schedule", metavar="NAME", help="whose model, where the run compared schedules (default: the first)")


def run(options: argparse.Namespace, console: Console) -> None:
    """Raises: ValueError, OSError: no such run, no checkpoint in it, or a model that is no Hugging Face decoder."""
    look_where_training_does()
    config, model = load_trained(options.run, options.schedule)
    try:
        export_hf(model.to(getattr(torch, config.model.dtype)), options.out)
    except TypeError as error:
        raise ValueError(f"model.factory = {config.model.factory!r} makes no Hugging Face decoder: {error}") from error
    console.print(f"{options.out} holds config.json and model.safetensors", highlight=False, soft_wrap=True)
