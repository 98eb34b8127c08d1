"""A network of 21 layers, each learning by an interface that sees the label, beside backprop.

At the start a gradient through 20 random layers with batch norm is noise: it has a cosine of 0 with anything that can
be foretold from an activation and its label. So with our recipes, not with the paper's, layers begin as the identity.

python -m benchmarks.paper.deep --quick
python -m benchmarks.paper.deep --device cuda --limit-s 500 --hidden 0,1,2
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from .order import Order, read_order
from .recipe import PAPER, RECIPES, Recipe
from .results import curves, table
from .rows import PaperRow
from .running import Job, finish, run

LEARNING_RATE, PREDICTOR_RATE = 1e-3, 1e-6


def jobs_of(order: Order) -> list[Job]:
    """By default linear interfaces, which the paper found enough here."""
    jobs, recipe = [], for_deep(order.recipe)
    for layers in order.layers:
        for method, num_hidden in [("bprop", None), *(("cdni", number) for number in order.recipe.num_hidden)]:
            models = tuple(recipe.model(method, seed) for seed in order.seeds)
            name = method if num_hidden is None else f"{method}_hidden{num_hidden}"
            jobs.append(Job(f"L{layers}_{name}", layers, num_hidden, models, recipe))
    return jobs


def for_deep(recipe: Recipe) -> Recipe:
    """From the identity, and slower, unless rates were asked for, which shows in the name; the paper's as it is."""
    if recipe.name.startswith(PAPER.name):
        return recipe
    if recipe.name in RECIPES:
        recipe = replace(recipe, learning_rate=LEARNING_RATE, predictor_rate=PREDICTOR_RATE)
    return replace(recipe, name=f"{recipe.name}, from the identity", identity=True, deep_rates=None, dni=None)


def write(rows: Sequence[PaperRow], path: Path) -> str:
    curves(rows, path)
    return table(rows)


def main(argv: Sequence[str] | None = None) -> None:
    order = read_order("deep", __doc__ or "", "21", "21", argv, hidden="0")
    finish(order, *run(order, jobs_of(order)), write)


if __name__ == "__main__":
    main()
