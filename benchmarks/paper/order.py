"""The command line that all experiments of the paper share."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from .recipe import QUICK, RECIPES, Recipe, for_dataset

WORKERS, CNN_WORKERS = 8, 3
"""On an H100 eight stacks side by side are 1.4 times as fast as three where interfaces are linear (docs/log.md)."""


@dataclass(frozen=True)
class Order:
    """What a command line asks for.

    Fields:
        datasets, networks: of every_layer all, of the others the first. stack: most models of a stack; None: as many as
            there are. workers: stacks that train side by side. steps, filters: None where not asked for.
    """

    experiment: str
    datasets: tuple[str, ...]
    networks: tuple[str, ...]
    recipe: Recipe
    layers: tuple[int, ...]
    seeds: tuple[int, ...]
    device: str
    json: Path
    limit_s: float
    data: Path | None
    limit: int | None
    stack: int | None = None
    workers: int = 1
    save_every_s: float = 120.0
    steps: int | None = None
    filters: int | None = None

    @property
    def dataset(self) -> str:
        return self.datasets[0]


def read_order(
    experiment: str,
    description: str,
    layers: str,
    quick_layers: str,
    argv: Sequence[str] | None,
    hidden: str | None = None,
) -> Order:
    """The options that all experiments share; hidden: the default of --hidden, None: the recipe's."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.paper.{experiment}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _what(parser, layers, quick_layers, hidden, several=", or several, as a,b" if experiment == "every_layer" else "")
    _how(parser)
    given = parser.parse_args(argv)
    _refuse(parser, experiment, given)
    recipe = _recipe(given, hidden)
    if experiment != "every_layer":
        recipe = for_dataset(recipe, given.dataset[0])
    networks = given.network or (("fcn", "cnn") if given.quick and experiment == "every_layer" else ("fcn",))
    what = "quick" if given.quick else "_".join((*networks, *given.dataset, given.recipe))
    return Order(
        experiment=experiment,
        datasets=given.dataset,
        networks=networks,
        recipe=recipe,
        layers=given.layers or _numbers(quick_layers if given.quick else layers),
        seeds=given.seeds or ((0,) if given.quick else (0, 1, 2)),
        device=given.device,
        json=given.json or Path("runs/paper") / f"{experiment}_{what}.json",
        limit_s=given.limit_s,
        data=given.data,
        limit=given.images,
        stack=given.stack,
        workers=given.workers or _workers(given.device, networks),
        save_every_s=given.save_every_s,
        steps=given.steps,
        filters=given.filters,
    )


def _what(parser: argparse.ArgumentParser, layers: str, quick_layers: str, hidden: str | None, several: str) -> None:
    """Options of what is trained."""
    datasets, networks = _words("mnist", "cifar10"), _words("fcn", "cnn")
    add = parser.add_argument
    add("--quick", action="store_true", help="narrow and short: two minutes of two CPU cores")
    add("--recipe", choices=["paper", "ours"], default="ours", help="the paper's, or ours (see docs/paper.md)")
    add("--dataset", type=datasets, default=("mnist",), help=f"mnist or cifar10{several}")
    add("--network", type=networks, help=f"fcn or cnn{several}; default fcn, of every_layer with --quick both")
    add("--layers", type=_numbers, help=f"default {layers}; with --quick {quick_layers}")
    usual = hidden or "the recipe's"
    add("--hidden", type=_numbers, help=f"hidden layers of the interfaces, 0 to 2; default {usual}")
    add("--seeds", type=_numbers, help="default 0,1,2; with --quick 0")
    add("--steps", type=int, help="of each model; default: the recipe's")
    add("--filters", type=int, help="of each convolution; default 64, with --quick 6")
    add("--learning-rate", type=float, help="default: the recipe's")
    add("--predictor-rate", type=float, help="of the interfaces; default: the recipe's")
    add("--data", type=Path, help="folder of the images; default: as dnipipe.data.images.load_images")
    add("--images", type=int, help="take only so many training and test images")


def _how(parser: argparse.ArgumentParser) -> None:
    """Options of how it is trained, none of which changes a figure."""
    add = parser.add_argument
    add("--stack", type=int, help="most models of a stack; default: all that are alike in shape")
    usual = f"{WORKERS} on a GPU, {CNN_WORKERS} of convolutional networks, 1 on a CPU"
    add("--workers", type=int, help=f"stacks that train side by side; default {usual}")
    add("--device", default="cpu")
    add("--json", type=Path, help="rows; table, picture and checkpoints lie beside it")
    add("--limit-s", type=float, default=float("inf"), help="stop before so many seconds; call again, it goes on")
    add("--save-every-s", type=float, default=120.0, help="seconds between checkpoints of a stack")


def _refuse(parser: argparse.ArgumentParser, experiment: str, given: argparse.Namespace) -> None:
    """Ends the program for what cannot be."""
    for name in ("steps", "stack", "workers", "filters"):
        if getattr(given, name) is not None and getattr(given, name) < 1:
            parser.error(f"--{name} {getattr(given, name)}: must be 1 or more")
    if experiment != "every_layer" and (len(given.dataset) > 1 or given.network not in (None, ("fcn",))):
        parser.error(f"{experiment} trains fully connected networks on one dataset: name one, and no --network")
    if not set(given.hidden or ()) <= {0, 1, 2}:
        parser.error(f"--hidden {given.hidden}: an interface has 0, 1 or 2 hidden layers")


def _recipe(given: argparse.Namespace, hidden: str | None) -> Recipe:
    """With what is asked for in its place; another rate shows in the name."""
    recipe = QUICK if given.quick else RECIPES[given.recipe]
    num_hidden = given.hidden or (_numbers(hidden) if hidden else recipe.num_hidden)
    recipe = replace(recipe, num_hidden=num_hidden, steps=given.steps or recipe.steps)
    for field in ("learning_rate", "predictor_rate"):
        if (rate := getattr(given, field)) is not None:
            name = f"{recipe.name}, {field.replace('_', ' ')} {rate:g}"
            recipe = replace(recipe, name=name, dni=None, **{field: rate})
    return recipe


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _workers(device: str, networks: tuple[str, ...]) -> int:
    """On a GPU as many as it takes to fill it: kernels of fully connected networks are short."""
    return 1 if not device.startswith("cuda") else CNN_WORKERS if "cnn" in networks else WORKERS


def _words(*allowed: str) -> Callable[[str], tuple[str, ...]]:
    def read(text: str) -> tuple[str, ...]:
        words = tuple(text.split(","))
        if unknown := [word for word in words if word not in allowed]:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(allowed)}")
        return words

    return read
