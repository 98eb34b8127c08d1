"""Layers that are updated only now and then, in random order, each with the chance p_update at each step.

python -m benchmarks.paper.sparse_updates --quick
python -m benchmarks.paper.sparse_updates --device cuda --limit-s 500 --hidden 0,1
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from .order import Order, read_order
from .results import picture
from .rows import PaperRow
from .running import Job, finish, run

RUNS, QUICK_RUNS = 100, 8


def jobs_of(order: Order) -> list[Job]:
    """p_update is drawn uniformly from (0, 1), one for each run; with --quick they are spread evenly."""
    if order.recipe.name == "quick":
        chances = [(number + 0.5) / QUICK_RUNS for number in range(QUICK_RUNS)]
    else:
        chances = torch.rand(RUNS, generator=torch.Generator().manual_seed(0)).clamp_min(1e-3).tolist()
    return [
        Job(
            f"L{layers}_{method}_hidden{num_hidden}_seed{seed}",
            layers,
            num_hidden,
            tuple(order.recipe.model(method, seed, num_hidden, p_update=round(chance, 4)) for chance in chances),
        )
        for layers in order.layers
        for method in ("dni", "cdni")
        for num_hidden in order.recipe.num_hidden
        for seed in order.seeds[:1]  # the runs are the spread: they share one order of the images
    ]


def write(rows: Sequence[PaperRow], path: Path) -> str:
    picture(rows, path, "p_update", lambda row: row.p_update)
    ordered = sorted(rows, key=lambda row: (row.layers, row.method, row.predictor or 0, row.p_update))
    lines = [
        f"| {row.layers} | {row.method} | {row.predictor} | {row.p_update:.3f} | {row.test_error_percent:.2f} "
        f"| {row.held_out_error_percent:.2f} |"
        for row in ordered
    ]
    head = ["| layers | method | hidden | p_update | test error, % | held out, % |", "|---|---|---|---|---|---|"]
    return "\n".join([*head, *lines]) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    order = read_order("sparse_updates", __doc__ or "", "4", "4", argv, hidden="0")
    finish(order, *run(order, jobs_of(order)), write)


if __name__ == "__main__":
    main()
