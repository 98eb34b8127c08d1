"""A network of 21 layers, each learning by an interface that sees the label, beside backprop.

python -m benchmarks.paper.deep --quick
python -m benchmarks.paper.deep --device cuda --limit-s 500 --hidden 0,1,2
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .order import Order, read_order
from .results import curves, table
from .rows import PaperRow
from .running import Job, finish, run


def jobs_of(order: Order) -> list[Job]:
    """By default linear interfaces, which the paper found enough here."""
    jobs = []
    for layers in order.layers:
        for method, num_hidden in [("bprop", None), *(("cdni", number) for number in order.recipe.num_hidden)]:
            models = tuple(order.recipe.model(method, seed) for seed in order.seeds)
            name = method if num_hidden is None else f"{method}_hidden{num_hidden}"
            jobs.append(Job(f"L{layers}_{name}", layers, num_hidden, models))
    return jobs


def write(rows: Sequence[PaperRow], path: Path) -> str:
    curves(rows, path)
    return table(rows)


def main(argv: Sequence[str] | None = None) -> None:
    order = read_order("deep", __doc__ or "", "21", "21", argv, hidden="0")
    finish(order, *run(order, jobs_of(order)), write)


if __name__ == "__main__":
    main()
