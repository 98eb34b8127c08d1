"""An interface after every hidden layer, beside backprop, no backprop and the stale gradient, by number of layers.

python -m benchmarks.paper.every_layer --quick
python -m benchmarks.paper.every_layer --device cuda --limit-s 500 --layers 3,4,5,6
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .order import Order, read_order
from .recipe import DECAYS
from .results import picture, table
from .rows import PaperRow
from .running import Job, finish, run


def jobs_of(order: Order) -> list[Job]:
    """For each number of layers one stack without interfaces, and one for each depth of them."""
    model, jobs = order.recipe.model, []
    for layers in order.layers:
        plain = [model(method, seed) for seed in order.seeds for method in ("bprop", "no_bprop")]
        plain += [model("stale", seed, decay=decay) for seed in order.seeds for decay in DECAYS]
        jobs.append(Job(f"L{layers}_plain", layers, None, tuple(plain)))
        for num_hidden in order.recipe.num_hidden:
            predicted = [model(method, seed) for seed in order.seeds for method in ("dni", "cdni")]
            jobs.append(Job(f"L{layers}_hidden{num_hidden}", layers, num_hidden, tuple(predicted)))
    return jobs


def write(rows: Sequence[PaperRow], path: Path) -> str:
    picture(rows, path, "layers", lambda row: row.layers)
    return table(rows)


def main(argv: Sequence[str] | None = None) -> None:
    order = read_order("every_layer", __doc__ or "", "3,4,5,6", "3", argv)
    finish(order, *run(order, jobs_of(order)), write)


if __name__ == "__main__":
    main()
