"""Made up for the tests of the paper's experiments: images, a recipe of a few steps, a row of results."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.paper import recipe
from benchmarks.paper.rows import PaperRow, read_rows
from dnipipe.data.images import ImageData

TINY = replace(
    recipe.QUICK,
    steps=12,
    evaluate_every=4,
    batch=16,
    width=8,
    num_hidden=(0, 1),
    predictor_width=8,
    learning_rate=1e-2,
    anneal=False,
)

ROW = PaperRow(
    experiment="every_layer",
    dataset="mnist",
    model="fcn",
    layers=3,
    method="cdni",
    position=None,
    p_update=1.0,
    decay=0.0,
    predictor=0,
    recipe="ours",
    seed=0,
    steps=10,
    batch=256,
    learning_rate=3e-5,
    test_error_percent=2.0,
    held_out_error_percent=3.0,
    device="CPU",
    commit="",
    seconds_of_stack=1.0,
    models_of_stack=2,
)


def made_up_images(count: int = 120, side: int = 4) -> ImageData:
    """Four classes, each a bright row of its own."""
    random = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 4
    images = torch.randint(60, (count, 1, side, side), generator=random, dtype=torch.uint8)
    images[torch.arange(count), 0, labels * side // 4] += 150
    return ImageData(images, labels, images.clone(), labels.clone(), num_classes=4)


def run(experiment: str, path: Path, *options: str) -> list[PaperRow]:
    importlib.import_module(f"benchmarks.paper.{experiment}").main(["--quick", "--json", str(path), *options])
    return read_rows(path)
