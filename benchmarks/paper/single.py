"""One interface in a network that backpropagates otherwise, at each position: what it costs, and how well it predicts.

python -m benchmarks.paper.single --quick
python -m benchmarks.paper.single --device cuda --limit-s 500
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path

from .nearness import nearness_picture
from .order import Order, read_order
from .results import picture, table
from .rows import HONEST_RULE, PaperRow, chosen_by
from .running import Job, finish, run


def jobs_of(order: Order) -> list[Job]:
    """no_bprop at a position is the cut without an interface: what lies below it stays as it was drawn."""
    model, jobs = order.recipe.model, []
    for layers in order.layers:
        at = [(seed, position) for seed in order.seeds for position in range(1, layers)]
        plain = [model("bprop", seed) for seed in order.seeds]
        plain += [model("no_bprop", seed, position=position) for seed, position in at]
        jobs.append(Job(f"L{layers}_plain", layers, None, tuple(plain)))
        # a stack for each position: one for all would have interfaces of all models at all cuts
        for num_hidden, p in product(order.recipe.num_hidden, range(1, layers)):
            predicted = [model(method, seed, position=p) for seed in order.seeds for method in ("dni", "cdni")]
            jobs.append(Job(f"L{layers}_after{p}_hidden{num_hidden}", layers, num_hidden, tuple(predicted)))
    return jobs


def write(rows: Sequence[PaperRow], path: Path) -> str:
    """Below the errors, how near the last synthetic gradients were; a second picture has it over training."""
    picture(rows, path, "the one interface is after layer", lambda row: row.position)
    nearness_picture(rows, path.with_name(f"{path.stem}_gradients.png"))
    lines = [
        "",
        "| method | after layer | hidden | seed | L2 distance | cosine | wrong signs, % |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in chosen_by(rows, HONEST_RULE):
        if len(row.curve[-1]) == 5:
            distance, cosine, wrong = row.curve[-1][2:]
            start = f"| {row.method} | {row.position} | {row.predictor} | {row.seed} "
            lines.append(f"{start}| {distance:.2e} | {cosine:.3f} | {100 * wrong:.1f} |")
    return table(rows) + "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    order = read_order("single", __doc__ or "", "6", "6", argv)
    finish(order, *run(order, jobs_of(order)), write)


if __name__ == "__main__":
    main()
