"""How long, how fast and with which interfaces: the recipe of the paper, one of our own, and one for two CPU cores."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .models import METHODS, ZERO, Model, Shape

DECAYS = (0.0, 0.5, 0.9, 0.99)
"""Of the stale baseline, searched."""

STAIRS = 100
"""In so many steps a rate falls to 0: a graph that was captured on a GPU need not be written to at each."""

HELD_OUT = 0.1
"""The part of the training images that no model learns from; the honest selection is by these."""


@dataclass(frozen=True)
class Recipe:
    """Fields:
    steps: of each model, unless --steps says otherwise. evaluate_every: steps. num_hidden: of the interfaces to try.
    predictor_width: of their hidden layers. normalise: as in dnipipe.interface.Regressed. anneal: both rates fall to 0
    along a straight line. identity: as in models.Shape; of fully connected networks. weight_decay: as in models.Model,
        of all that may have it. mirror, shift: as in batches.Images. dni_rates: of a network with unconditional
        interfaces, and of these; None: those of the others.
    """

    name: str
    steps: int
    evaluate_every: int
    batch: int
    learning_rate: float
    predictor_rate: float
    width: int
    num_hidden: tuple[int, ...]
    predictor_width: int
    normalise: bool
    anneal: bool
    identity: bool = False
    weight_decay: float = 0.0
    mirror: bool = False
    shift: int = 0
    dni_rates: tuple[float, float] | None = None
    label_at_places: bool = False

    def shape(self, features: int, num_classes: int, layers: int, num_hidden: int | None) -> Shape:
        sizes = self.width, num_hidden, self.predictor_width
        return Shape(features, num_classes, layers, *sizes, self.normalise, self.identity)

    def rates_left(self, step: int) -> float:
        """What is left of both rates at this step: 1 at first; it falls in STAIRS equal steps."""
        return 1 - step * STAIRS // self.steps / STAIRS if self.anneal else 1.0

    def model(
        self,
        method: str,
        seed: int,
        *,
        position: int | None = None,
        p_update: float = 1.0,
        decay: float = 0.0,
        synthetic_inputs: bool = False,
    ) -> Model:
        rates = (self.learning_rate, self.predictor_rate)
        if method == "dni" and self.dni_rates is not None:
            rates = self.dni_rates
        weight_decay = 0.0 if METHODS[method] == ZERO else self.weight_decay
        return Model(method, seed, *rates, position, p_update, decay, synthetic_inputs, weight_decay)


PAPER = Recipe("paper", 500_000, 5_000, 256, 3e-5, 3e-5, 256, (0, 1, 2), 1024, normalise=False, anneal=False)
"""Batch 256, Adam 3e-5 for networks and interfaces, squared error of the gradient as it is. How many steps is
our guess."""

OURS = Recipe(
    "ours", 100_000, 2_000, 256, 1e-3, 3e-5, 256, (0, 1, 2), 1024, normalise=False, anneal=True, dni_rates=(3e-4, 1e-4)
)
"""The paper's interfaces and their rate under networks that learn 30 times as fast, annealed; of DNI 10 times.

Targets stay as they are, about a thousandth, so at 3e-5 the last layer, which starts at zero, has them within a hundred
steps. Divided by their running RMS they need a rate of .1 to be followed as fast, at which hidden layers go to pieces;
at the usual 1e-3 to 1e-2 interfaces lag behind, each behind the next, and many layers learn nothing (docs/log.md).
"""

QUICK = Recipe("quick", 1000, 100, 64, 3e-3, 3e-4, 128, (0, 1), 128, normalise=False, anneal=True)
"""Ours, narrow and short, for the order of the methods."""


def for_dataset(recipe: Recipe, dataset: str) -> Recipe:
    """Ours on CIFAR-10: of each image 18 copies, and weight decay.

    Without them a network has its 45 000 images by heart after 3000 steps; with them 100 000 steps are not too many. An
    interface that does not see the label learns from so little there that its network must be slower still.
    """
    if dataset != "cifar10" or recipe.name.partition(",")[0] != OURS.name:
        return recipe
    recipe = replace(recipe, mirror=True, shift=2, weight_decay=0.3)
    if "predictor rate" not in recipe.name:
        recipe = replace(recipe, predictor_rate=1e-4)
    return recipe if recipe.dni_rates is None else replace(recipe, dni_rates=(1e-4, 1e-5))


RECIPES = {recipe.name: recipe for recipe in (PAPER, OURS, QUICK)}
