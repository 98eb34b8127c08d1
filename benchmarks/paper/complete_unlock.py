"""Layers that wait for nothing: synthetic gradients and synthetic inputs, also where each is updated only now and then.

python -m benchmarks.paper.complete_unlock --quick
python -m benchmarks.paper.complete_unlock --device cuda --limit-s 500
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

import torch

from .models import Model
from .order import Order, read_order
from .results import NAMES, picture
from .rows import PaperRow
from .running import Job, finish, run

RUNS, QUICK_RUNS = 100, 3
PREDICTED = ("dni", "cdni")


def jobs_of(order: Order) -> list[Job]:
    """Every layer at every step, with real and with synthetic inputs; and by p_update from (0, 1) with synthetic ones,
    drawn uniformly, one for each run; with --quick they are spread evenly."""
    model = order.recipe.model
    if order.recipe.name == "quick":
        chances = [(number + 0.5) / QUICK_RUNS for number in range(QUICK_RUNS)]
    else:
        chances = torch.rand(RUNS, generator=torch.Generator().manual_seed(0)).clamp_min(1e-3).tolist()
    jobs = []
    for layers in order.layers:
        locked = [model(method, seed) for seed in order.seeds for method in ("bprop", *PREDICTED)]
        always = [model(method, seed, synthetic_inputs=True) for seed in order.seeds for method in PREDICTED]
        # the runs are the spread: they share one order of the images
        sparse = {
            method: [
                model(method, order.seeds[0], p_update=round(chance, 4), synthetic_inputs=True) for chance in chances
            ]
            for method in PREDICTED
        }
        jobs += [_job(layers, "locked", locked), _job(layers, "unlocked", always)]
        jobs += [_job(layers, f"sparse_{method}", models) for method, models in sparse.items()]
    return jobs


def _job(layers: int, name: str, models: Sequence[Model]) -> Job:
    return Job(f"L{layers}_{name}", layers, 0, tuple(models))  # linear interfaces: with the label it is enough


def write(rows: Sequence[PaperRow], path: Path) -> str:
    """Test error by p_update in a picture; in a table the runs at 1, and the others."""
    picture([row for row in rows if row.synthetic_inputs], path, "p_update", lambda row: row.p_update)
    lines = ["| layers | method | inputs | p_update | test error, % |", "|---|---|---|---|---|"]
    cells: dict[tuple[int, str, bool, float], list[float]] = {}
    for row in rows:
        place = (row.layers, row.method, row.synthetic_inputs, row.p_update)
        cells.setdefault(place, []).append(row.test_error_percent)
    for (layers, method, unlocked, chance), errors in sorted(cells.items(), key=lambda cell: (-cell[0][3], cell[0])):
        spread = f" ± {stdev(errors):.2f}" if len(errors) > 1 else ""
        inputs = "synthetic" if unlocked else "real"
        lines.append(f"| {layers} | {NAMES[method]} | {inputs} | {chance:g} | {mean(errors):.2f}{spread} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    order = read_order("complete_unlock", __doc__ or "", "4", "4", argv)
    finish(order, *run(order, jobs_of(order)), write)


if __name__ == "__main__":
    main()
