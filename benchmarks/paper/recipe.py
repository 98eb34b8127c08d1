"""How long, how fast and with which interfaces: the recipe of the paper, one of our own, and one for two CPU cores."""

from __future__ import annotations

from dataclasses import dataclass

from .models import Model, Shape

DECAYS = (0.0, 0.5, 0.9, 0.99)
"""Of the stale baseline, searched."""

HELD_OUT = 0.1
"""The part of the training images that no model learns from; the honest selection is by these."""


@dataclass(frozen=True)
class Recipe:
    """Fields:
    steps: of each model, unless --steps says otherwise. evaluate_every: steps. num_hidden: of the interfaces to try.
    predictor_width: of their hidden layers. normalise: as in dnipipe.interface.Regressed.
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

    def shape(self, features: int, num_classes: int, layers: int, num_hidden: int | None) -> Shape:
        return Shape(features, num_classes, layers, self.width, num_hidden, self.predictor_width, self.normalise)

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
        return Model(method, seed, *rates, position, p_update, decay, synthetic_inputs)


PAPER = Recipe("paper", 500_000, 5_000, 256, 3e-5, 3e-5, 256, (0, 1, 2), 1024, normalise=False)
"""Batch 256, Adam 3e-5 for networks and interfaces, squared error of the gradient as it is. How many steps is
our guess."""

OURS = Recipe("ours", 100_000, 2_000, 256, 3e-4, 1e-3, 256, (0, 1, 2), 1024, normalise=True)
"""Targets divided by their running RMS: gradients of a mean loss are tiny, and one step of Adam
overshoots them."""

QUICK = Recipe("quick", 1000, 250, 64, 1e-3, 1e-2, 128, (0, 1), 128, normalise=True)
"""Ours, narrow and short: the order of the methods is what it shows."""

RECIPES = {recipe.name: recipe for recipe in (PAPER, OURS, QUICK)}
