"""An interface after every hidden layer, beside backprop, no backprop and the stale gradient, by number of layers.

python -m benchmarks.paper.every_layer --quick
python -m benchmarks.paper.every_layer --device cuda --limit-s 540 --dataset mnist,cifar10
python -m benchmarks.paper.every_layer --device cuda --limit-s 540 --dataset mnist,cifar10 --network cnn
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

from .convolutional_recipe import for_convolutions
from .order import Order, read_order
from .recipe import DECAYS, Recipe, for_dataset
from .results import picture, table
from .rows import PaperRow
from .running import Job, finish, run

CONVOLUTIONAL = 4
"""Layers of the largest convolutional network in the paper: three times pooled, an image is a pixel."""


def jobs_of(order: Order) -> list[Job]:
    """For each dataset, network and number of layers one stack without interfaces, and one for each depth of them."""
    jobs = []
    for network in order.networks:
        layers = [number for number in order.layers if network == "fcn" or number <= CONVOLUTIONAL]
        for number, dataset in product(layers, order.datasets):
            recipe = for_dataset(order.recipe, dataset)
            if network == "cnn":
                recipe = for_convolutions(recipe, order.steps, order.filters)
            jobs += [replace(job, dataset=dataset, network=network) for job in _jobs(order, recipe, number)]
    return sorted(jobs, key=lambda job: (job.network, -(job.num_hidden or 0), -job.layers))  # long ones first


def _jobs(order: Order, recipe: Recipe, layers: int) -> list[Job]:
    plain = [("bprop", 0.0), ("no_bprop", 0.0), *(("stale", decay) for decay in DECAYS)]
    models = [recipe.model(method, seed, decay=decay) for seed in order.seeds for method, decay in plain]
    jobs = [Job(f"L{layers}_plain", layers, None, tuple(models), recipe)]
    for num_hidden in recipe.num_hidden:
        models = [recipe.model(method, seed, num_hidden) for seed in order.seeds for method in ("dni", "cdni")]
        jobs.append(Job(f"L{layers}_hidden{num_hidden}", layers, num_hidden, tuple(models), recipe))
    return jobs


def write(rows: Sequence[PaperRow], path: Path) -> str:
    picture(rows, path, "layers", lambda row: row.layers)
    return table(rows)


def main(argv: Sequence[str] | None = None) -> None:
    order = read_order("every_layer", __doc__ or "", "3,4,5,6", "3", argv)
    finish(order, *run(order, jobs_of(order)), write)


if __name__ == "__main__":
    main()
