"""One trained model is one row; a file of rows is what a run leaves, and what a table and a picture are made of."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

PAPER_RULE, HONEST_RULE = "best test", "held out"


@dataclass(frozen=True)
class PaperRow:
    """A flat JSON object but for the curve.

    Fields:
        experiment: the module that ran it. dataset, model: "mnist", "fcn". layers: L, the output layer among them.
        method, position, p_update, decay: as in models.Model. seed: of weights and of the order of the images.
        synthetic_inputs: of models.Model. predictor: hidden layers of the interfaces; None: it has none.
        test_error_percent, held_out_error_percent: after the last step.
        selection: by which rules this predictor depth, or decay, is the one to show for its cell, means over the seeds:
            "best test" (the paper's: lowest test error), "held out" (lowest held-out error), both with a comma, or
            none.
        predictor_rate, last_rate: as in models.Model; predictor_rate None: no interface, or the row is older.
        seconds_of_stack: of training and evaluating the models_of_stack models of its stack, all calls together.
        curve: of each evaluation [step, test error %], and of `single` also [L2 distance, cosine, share of wrong signs]
            of the synthetic and the true gradient, see training.agreement.
    """

    experiment: str
    dataset: str
    model: str
    layers: int
    method: str
    position: int | None
    p_update: float
    decay: float
    predictor: int | None
    recipe: str
    seed: int
    steps: int
    batch: int
    learning_rate: float
    test_error_percent: float
    held_out_error_percent: float
    device: str
    commit: str
    seconds_of_stack: float
    models_of_stack: int
    synthetic_inputs: bool = False
    selection: str = ""
    predictor_rate: float | None = None
    last_rate: float | None = None
    curve: list[list[float]] = field(default_factory=list)

    @property
    def cell(self) -> tuple[object, ...]:
        """What a table has one figure for; p_update is a matter of single rows."""
        where = self.dataset, self.model, self.layers, self.method, self.position or 0, self.p_update
        return *where, self.synthetic_inputs, self.recipe, self.steps

    @property
    def choice(self) -> tuple[object, ...]:
        """What is selected within a cell."""
        return -1 if self.predictor is None else self.predictor, self.decay


def joined(rows: Sequence[PaperRow], newer: Sequence[PaperRow]) -> list[PaperRow]:
    """All of them, selected anew; what was trained again takes the place of what was there."""
    again = {(row.cell, row.choice, row.seed) for row in newer}
    return selected([*(row for row in rows if (row.cell, row.choice, row.seed) not in again), *newer])


def selected(rows: Sequence[PaperRow]) -> list[PaperRow]:
    """The rows with their selection filled in."""
    winners: dict[tuple[object, ...], set[str]] = {}
    for cell in dict.fromkeys(row.cell for row in rows):
        alike = [row for row in rows if row.cell == cell]
        choices = list(dict.fromkeys(row.choice for row in alike))
        for rule in (PAPER_RULE, HONEST_RULE):
            best = min(choices, key=lambda choice: _mean_error([r for r in alike if r.choice == choice], rule))  # noqa: B023
            winners.setdefault((cell, best), set()).add(rule)
    return [replace(row, selection=", ".join(sorted(winners.get((row.cell, row.choice), ())))) for row in rows]


def chosen_by(rows: Sequence[PaperRow], rule: str) -> list[PaperRow]:
    return [row for row in rows if rule in row.selection.split(", ")]


def write_rows(rows: Sequence[PaperRow], path: Path) -> None:
    """All at once: a run that is cut off leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    beside.replace(path)


def read_rows(path: Path) -> list[PaperRow]:
    """Of no file: none."""
    return [PaperRow(**each) for each in json.loads(path.read_text())] if path.exists() else []


def _mean_error(rows: Sequence[PaperRow], rule: str) -> float:
    errors = [row.test_error_percent if rule == PAPER_RULE else row.held_out_error_percent for row in rows]
    return sum(errors) / len(errors)
