"""Trains stacks, in chunks that a cut cannot hurt: rows after each stack, a checkpoint after each chunk."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.machine import card, commit
from dnipipe.data.images import load_images

from .batches import Batches, Images
from .models import Model
from .order import Order
from .rows import PaperRow, read_rows, selected, write_rows
from .stack import Stack

EVALUATED_AT_ONCE = 2_000  # images


@dataclass(frozen=True)
class Job:
    """Models of one shape, to be trained as one stack. name: of its checkpoint; says what is in it."""

    name: str
    layers: int
    num_hidden: int | None
    models: tuple[Model, ...]


def run(order: Order, jobs: Sequence[Job]) -> tuple[list[PaperRow], bool]:
    """Trains what has no rows yet.

    Returns: all rows, with their selection, and whether every job is done.
    """
    until = time.monotonic() + order.limit_s
    rows = read_rows(order.json)
    images = Images(load_images(order.dataset, order.data), order.device, order.limit)  # type: ignore[arg-type]
    for job in jobs:
        if _is_done(order, job, rows):
            continue
        new = _Run(order, job, images).go_on(until)
        if new is None:
            return selected(rows), False
        rows = selected([*rows, *new])
        write_rows(rows, order.json)
        _checkpoint(order, job).unlink(missing_ok=True)
    return rows, True


class _Run:
    """One stack under way."""

    def __init__(self, order: Order, job: Job, images: Images) -> None:
        self.order, self.job, self.images = order, job, images
        recipe = order.recipe
        shape = recipe.shape(images.features, images.num_classes, job.layers, job.num_hidden)
        self.stack = Stack(shape, job.models, order.device)
        self.batches = Batches(images, [model.seed for model in job.models], recipe.batch)
        self.step, self.seconds = 0, 0.0
        self.rates_left = 1.0
        self.curves: list[list[list[float]]] = [[] for _ in job.models]
        self.chances = torch.tensor([[model.p_update] for model in job.models])
        if _checkpoint(order, job).exists():
            self._load()

    def go_on(self, until: float) -> list[PaperRow] | None:
        """The rows, or None if time is up before the last step."""
        while self.step < self.order.recipe.steps:
            self._chunk()  # before a look at the clock: every call gets on, however short
            if time.monotonic() > until and self.step < self.order.recipe.steps:
                return None
        held_out, test = (self._errors(*images) for images in (self.images.held_out, self.images.test))
        facts = zip(self.job.models, held_out, test, self.curves, strict=True)
        return [self._row(*each) for each in facts]

    def _chunk(self) -> None:
        began = time.monotonic()
        recipe = self.order.recipe
        end = min(recipe.steps, self.step + recipe.evaluate_every)
        while self.step < end:
            self._anneal()
            self.stack.step(*self.batches.at(self.step), *self._draw())
            self.step += 1
        errors = self._errors(*self.images.test)
        for curve, error, agreement in zip(self.curves, errors, self._agreements(), strict=True):
            curve.append([self.step, error, *agreement])
        self.seconds += time.monotonic() - began
        name = f"{self.job.name}: step {self.step}, test error % "
        print(
            name + " ".join(f"{model.method} {e:.2f}" for model, e in zip(self.job.models, errors, strict=True))[:160]
        )
        self._save()

    def _anneal(self) -> None:
        left = self.order.recipe.rates_left(self.step)
        if left != self.rates_left:
            self.stack.scale_rates(left)
            self.rates_left = left

    def _draw(self) -> tuple[Tensor, Tensor] | tuple[()]:
        """Which layers are updated and in which order, drawn anew at each step; nothing if all always are."""
        if not self.stack.is_sparse:
            return ()
        random = torch.Generator().manual_seed(self.step)
        size = len(self.job.models), self.job.layers
        fires = torch.rand(size, generator=random) < self.chances
        return fires.float().to(self.order.device), torch.rand(size, generator=random).to(self.order.device)

    def _errors(self, x: Tensor, labels: Tensor) -> list[float]:
        """Percent of wrong answers of each model."""
        wrong = torch.zeros(len(self.job.models), device=labels.device)
        for start in range(0, len(labels), EVALUATED_AT_ONCE):
            part = slice(start, start + EVALUATED_AT_ONCE)
            wrong += (self.stack.evaluate(x[:, part]).argmax(1) != labels[part]).sum(1)
        return (100 * wrong / len(labels)).tolist()

    def _agreements(self) -> list[list[float]]:
        """Of models with an interface at one place only: how near its prediction was at the last step."""
        found: list[list[float]] = [[] for _ in self.job.models]
        for cut, (synthetic, true) in zip(reversed(range(1, self.job.layers)), self.stack.seen, strict=True):
            if synthetic is None:
                continue
            figures = agreement(synthetic, true).tolist()
            for number, model in enumerate(self.job.models):
                if model.position == cut:
                    found[number] = figures[number]
        return found

    def _row(self, model: Model, held_out: float, test: float, curve: list[list[float]]) -> PaperRow:
        order, recipe = self.order, self.order.recipe
        is_predicted = model.method in ("dni", "cdni")
        return PaperRow(
            experiment=order.experiment,
            dataset=order.dataset,
            model="fcn",
            layers=self.job.layers,
            method=model.method,
            position=model.position,
            p_update=model.p_update,
            decay=model.decay,
            predictor=self.job.num_hidden if is_predicted else None,
            recipe=recipe.name,
            seed=model.seed,
            steps=recipe.steps,
            batch=recipe.batch,
            learning_rate=model.learning_rate,
            test_error_percent=test,
            held_out_error_percent=held_out,
            device=card(torch.device(order.device)),
            commit=commit(),
            seconds_of_stack=self.seconds,
            models_of_stack=len(self.job.models),
            curve=curve,
        )

    def _save(self) -> None:
        path = _checkpoint(self.order, self.job)
        path.parent.mkdir(parents=True, exist_ok=True)
        state = [each.detach() for each in self.stack.state()]
        torch.save({"state": state, "step": self.step, "seconds": self.seconds, "curves": self.curves}, f"{path}.part")
        Path(f"{path}.part").replace(path)

    def _load(self) -> None:
        saved = torch.load(_checkpoint(self.order, self.job), map_location=self.order.device, weights_only=True)
        self.stack.load(saved["state"])
        self.step, self.seconds, self.curves = saved["step"], saved["seconds"], saved["curves"]


def agreement(synthetic: Tensor, true: Tensor) -> Tensor:
    """L2 distance, mean over the batch; cosine of the whole batch; share of wrong signs: (E, D, B) -> (E, 3).

    The cosine is one over all examples, because most of them are right soon and have next to no gradient: theirs would
    drown the few that the layers below learn from.
    """
    distance = (synthetic - true).norm(dim=1).mean(-1)
    cosine = torch.cosine_similarity(synthetic.flatten(1), true.flatten(1), dim=1, eps=1e-30)
    wrong = (synthetic.sign() != true.sign()).float().mean((1, 2))
    return torch.stack([distance, cosine, wrong], 1)


def finish(
    order: Order, rows: Sequence[PaperRow], done: bool, write: Callable[[Sequence[PaperRow], Path], str]
) -> None:
    """Prints and saves the table, and the picture, of what there is."""
    text = write(rows, order.json.with_suffix(".png")) if rows else "no row yet\n"
    order.json.with_suffix(".md").write_text(text) if rows else None
    print(text if done else text + "\nTime is up before the last model: call again to go on.")


def _checkpoint(order: Order, job: Job) -> Path:
    return order.json.parent / f"{order.json.stem}_{job.name}.pt"


def _is_done(order: Order, job: Job, rows: Sequence[PaperRow]) -> bool:
    have = {(row.layers, row.method, row.position, row.p_update, row.decay, row.seed, row.predictor) for row in rows}
    return all(
        (
            job.layers, model.method, model.position, model.p_update, model.decay, model.seed,
            job.num_hidden if model.method in ("dni", "cdni") else None,
        ) in have
        for model in job.models
    )  # fmt: skip
