"""What is to be trained as one stack, and which rows say that it has been."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from .convolutions import ConvShape
from .models import Model, Shape
from .order import Order
from .recipe import Recipe
from .rows import PaperRow


@dataclass(frozen=True)
class Job:
    """Models of one shape. name: of its checkpoint; says what is in it.

    Fields:
        recipe, dataset, network: those of the order where they are not given; network: "fcn" or "cnn".
    """

    name: str
    layers: int
    num_hidden: int | None
    models: tuple[Model, ...]
    recipe: Recipe | None = None
    dataset: str = ""
    network: str = "fcn"

    def completed(self, order: Order) -> Job:
        return replace(self, recipe=self.recipe or order.recipe, dataset=self.dataset or order.dataset)

    def shape(self, image: tuple[int, int, int], num_classes: int) -> Shape:
        assert self.recipe is not None
        channels, height, width = image
        shape = self.recipe.shape(channels * height * width, num_classes, self.layers, self.num_hidden)
        if self.network == "fcn":
            return shape
        return ConvShape(**vars(shape), image=image, label_at_places=self.recipe.label_at_places)

    def predictor_of(self, model: Model) -> int | None:
        return self.num_hidden if model.method in ("dni", "cdni") else None

    def is_done(self, rows: Sequence[PaperRow]) -> bool:
        """Whether each model has its row: of as many steps, at the same rates."""
        have = {_key(row, row.predictor_rate, *_where(row)) for row in rows}
        assert self.recipe is not None
        facts = self.dataset, self.network, self.layers, self.recipe.name, self.recipe.steps, self.recipe.batch

        def is_there(model: Model) -> bool:
            # without an interface, or older than this field, a row names no rate
            rates = model.predictor_rate, None
            return any(_key(model, rate, *facts, self.predictor_of(model)) in have for rate in rates)

        return all(is_there(model) for model in self.models)


def by_images(jobs: Sequence[Job]) -> list[Job]:
    """A job for each training set, since a stack has one: some methods want copies of the images that others do not."""
    parts = []
    for job in jobs:
        assert job.recipe is not None
        groups: dict[tuple[bool, int], list[Model]] = {}
        for model in job.models:
            own = job.recipe.of(model.method)
            groups.setdefault((own.mirror, own.shift), []).append(model)
        for (mirror, shift), models in groups.items():
            name = job.name if len(groups) == 1 else f"{job.name}_{'mirrored' if mirror else 'plain'}_{shift}"
            recipe = replace(job.recipe, mirror=mirror, shift=shift)
            parts.append(replace(job, name=name, models=tuple(models), recipe=recipe))
    return parts


def split(jobs: Sequence[Job], most: int | None) -> list[Job]:
    """Jobs of no more than `most` models each, of neighbours; None: the jobs as they are."""
    if most is None:
        return list(jobs)
    parts = []
    for job in jobs:
        pieces = [job.models[start : start + most] for start in range(0, len(job.models), most)]
        parts += [replace(job, name=f"{job.name}_{number}", models=piece) for number, piece in enumerate(pieces)]
    return parts


def _where(row: PaperRow) -> tuple[object, ...]:
    return row.dataset, row.model, row.layers, row.recipe, row.steps, row.batch, row.predictor


def _key(of: Model | PaperRow, predictor_rate: float | None, *facts: object) -> tuple[object, ...]:
    rates = of.learning_rate, predictor_rate, of.last_rate
    return of.method, of.position, of.p_update, of.decay, of.seed, rates, of.synthetic_inputs, *facts
