"""The command line that all experiments of the paper share."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from .recipe import QUICK, RECIPES, Recipe


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
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.paper.{experiment}", description=description)
    parser.add_argument("--quick", action="store_true", help="narrow and short: two minutes of two CPU cores")
    parser.add_argument("--recipe", choices=["paper", "ours"], default="ours", help="see recipe.py")
    several = ", or several, as a,b" if experiment == "every_layer" else ""
    datasets, networks = _words("mnist", "cifar10"), _words("fcn", "cnn")
    parser.add_argument("--dataset", type=datasets, default=("mnist",), help=f"mnist or cifar10{several}")
    parser.add_argument("--network", type=networks, help=f"fcn or cnn{several}; with --quick both")
    parser.add_argument("--layers", type=_numbers, help=f"default {layers}; with --quick {quick_layers}")
    parser.add_argument(
        "--hidden", type=_numbers, help=f"hidden layers of the interfaces, 0 to 2; default {hidden or 'the recipe'}"
    )
    parser.add_argument("--seeds", type=_numbers, help="default 0,1,2; with --quick 0")
    parser.add_argument("--steps", type=int, help="of each model; default: the recipe's")
    parser.add_argument("--filters", type=int, help="of each convolution; default 64, with --quick 6")
    parser.add_argument("--stack", type=int, help="most models of a stack; default: all that are alike in shape")
    parser.add_argument("--workers", type=int, help="stacks that train side by side; default 3 on a GPU, 1 on a CPU")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="rows; table, picture and checkpoints lie beside it")
    parser.add_argument(
        "--limit-s", type=float, default=float("inf"), help="stop after so many seconds; call again, it goes on"
    )
    parser.add_argument("--data", type=Path, help="folder of the images; default: as dnipipe.data.images.load_images")
    parser.add_argument("--images", type=int, help="take only so many training and test images")
    parser.add_argument("--save-every-s", type=float, default=120.0, help="seconds between checkpoints of a stack")
    given = parser.parse_args(argv)
    both = given.quick and experiment == "every_layer"
    given.network = given.network or (("fcn", "cnn") if both else ("fcn",))
    for name in ("stack", "workers", "filters"):
        if getattr(given, name) is not None and getattr(given, name) < 1:
            parser.error(f"--{name} {getattr(given, name)}: must be 1 or more")
    if experiment != "every_layer" and (len(given.dataset) > 1 or given.network != ("fcn",)):
        parser.error(
            f"{experiment} trains fully connected networks on one dataset: leave --network out, name one dataset"
        )
    recipe = QUICK if given.quick else RECIPES[given.recipe]
    if given.steps is not None:
        if given.steps < 1:
            parser.error(f"--steps {given.steps}: a model is trained for 1 step or more")
        recipe = replace(recipe, steps=given.steps)
    num_hidden = given.hidden or (_numbers(hidden) if hidden else recipe.num_hidden)
    if not set(num_hidden) <= {0, 1, 2}:
        parser.error(f"--hidden {given.hidden}: an interface has 0, 1 or 2 hidden layers")
    recipe = replace(recipe, num_hidden=num_hidden)
    what = "quick" if given.quick else "_".join((*given.network, *given.dataset, recipe.name))
    return Order(
        experiment=experiment,
        datasets=given.dataset,
        networks=given.network,
        recipe=recipe,
        layers=given.layers or _numbers(quick_layers if given.quick else layers),
        seeds=given.seeds or ((0,) if given.quick else (0, 1, 2)),
        device=given.device,
        json=given.json or Path("runs/paper") / f"{experiment}_{what}.json",
        limit_s=given.limit_s,
        data=given.data,
        limit=given.images,
        stack=given.stack,
        workers=given.workers or (3 if given.device.startswith("cuda") else 1),
        save_every_s=given.save_every_s,
        steps=given.steps,
        filters=given.filters,
    )


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _words(*allowed: str) -> Callable[[str], tuple[str, ...]]:
    def read(text: str) -> tuple[str, ...]:
        words = tuple(text.split(","))
        if unknown := [word for word in words if word not in allowed]:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(allowed)}")
        return words

    return read
