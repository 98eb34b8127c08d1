"""The command line that all experiments of the paper share."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from .recipe import QUICK, RECIPES, Recipe


@dataclass(frozen=True)
class Order:
    """What a command line asks for."""

    experiment: str
    dataset: str
    recipe: Recipe
    layers: tuple[int, ...]
    seeds: tuple[int, ...]
    device: str
    json: Path
    limit_s: float
    data: Path | None
    limit: int | None


def read_order(
    experiment: str,
    description: str,
    layers: str,
    quick_layers: str,
    argv: Sequence[str] | None,
    hidden: str | None = None,
) -> Order:
    """The options that all experiments share; hidden: the default of --hidden, None: the recipe's."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.paper.{experiment}", description=description)
    parser.add_argument("--quick", action="store_true", help="narrow and short: two minutes of two CPU cores")
    parser.add_argument("--recipe", choices=["paper", "ours"], default="ours", help="see recipe.py")
    parser.add_argument("--dataset", choices=["mnist", "cifar10"], default="mnist")
    parser.add_argument("--layers", type=_numbers, help=f"default {layers}; with --quick {quick_layers}")
    parser.add_argument(
        "--hidden", type=_numbers, help=f"hidden layers of the interfaces, 0 to 2; default {hidden or 'the recipe'}"
    )
    parser.add_argument("--seeds", type=_numbers, help="default 0,1,2; with --quick 0")
    parser.add_argument("--steps", type=int, help="of each model; default: the recipe's")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="rows; table, picture and checkpoints lie beside it")
    parser.add_argument(
        "--limit-s", type=float, default=float("inf"), help="stop after so many seconds; call again, it goes on"
    )
    parser.add_argument("--data", type=Path, help="folder of the images; default: as dnipipe.data.images.load_images")
    parser.add_argument("--images", type=int, help="take only so many training and test images")
    given = parser.parse_args(argv)
    recipe = QUICK if given.quick else RECIPES[given.recipe]
    if given.steps is not None:
        if given.steps < 1:
            parser.error(f"--steps {given.steps}: a model is trained for 1 step or more")
        recipe = replace(recipe, steps=given.steps)
    num_hidden = given.hidden or (_numbers(hidden) if hidden else recipe.num_hidden)
    if not set(num_hidden) <= {0, 1, 2}:
        parser.error(f"--hidden {given.hidden}: an interface has 0, 1 or 2 hidden layers")
    recipe = replace(recipe, num_hidden=num_hidden)
    name = f"{experiment}_quick" if given.quick else f"{experiment}_{given.dataset}_{recipe.name}"
    return Order(
        experiment=experiment,
        dataset=given.dataset,
        recipe=recipe,
        layers=given.layers or _numbers(quick_layers if given.quick else layers),
        seeds=given.seeds or ((0,) if given.quick else (0, 1, 2)),
        device=given.device,
        json=given.json or Path("runs/paper") / f"{name}.json",
        limit_s=given.limit_s,
        data=given.data,
        limit=given.images,
    )


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))
