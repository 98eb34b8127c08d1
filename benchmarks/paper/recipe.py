"""How long, how fast and with which interfaces: the recipe of the paper, one of our own, and one for two CPU cores."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .models import METHODS, PREDICTED, ZERO, Model, Shape

DECAYS = (0.0, 0.5, 0.9, 0.99)
"""Of the stale baseline, searched."""

STAIRS = 100
"""In so many steps a rate falls to 0: a graph that was captured on a GPU need not be written to at each."""

HELD_OUT = 0.1
"""The part of the training images that no model learns from; the honest selection is by these."""


@dataclass(frozen=True)
class Dni:
    """What is otherwise in networks with unconditional interfaces. Fields: as in Recipe; None: as there."""

    learning_rate: float
    predictor_rate: float
    deep_rates: tuple[float, float, float] | None = None
    mirror: bool | None = None
    shift: int | None = None
    weight_decay: float | None = None


@dataclass(frozen=True)
class Recipe:
    """Fields:
    steps: of each model, unless --steps says otherwise. evaluate_every: steps. num_hidden: of the interfaces to try.
    predictor_width: of their hidden layers. normalise: as in dnipipe.interface.Regressed. anneal: both rates fall to 0
    along a straight line. identity: as in models.Shape; of fully connected networks. weight_decay: as in models.Model,
        of all that may have it. mirror, shift: as in batches.Images. deep_rates: where interfaces with hidden layers
        stand after every layer: of the network, of these, and of an interface's last layer; None: as linear ones.
        dni: what is otherwise there without the label.
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
    deep_rates: tuple[float, float, float] | None = None
    dni: Dni | None = None
    label_at_places: bool = False

    def shape(self, features: int, num_classes: int, layers: int, num_hidden: int | None) -> Shape:
        sizes = self.width, num_hidden, self.predictor_width
        return Shape(features, num_classes, layers, *sizes, self.normalise, self.identity)

    def rates_left(self, step: int) -> float:
        """What is left of both rates at this step: 1 at first; it falls in STAIRS equal steps."""
        return 1 - step * STAIRS // self.steps / STAIRS if self.anneal else 1.0

    def of(self, method: str) -> Recipe:
        """What this method goes by."""
        if method != "dni" or self.dni is None:
            return self
        own = {name: value for name, value in vars(self.dni).items() if value is not None}
        return replace(self, dni=None, **own)

    def model(
        self,
        method: str,
        seed: int,
        num_hidden: int | None = None,
        *,
        position: int | None = None,
        p_update: float = 1.0,
        decay: float = 0.0,
        synthetic_inputs: bool = False,
    ) -> Model:
        """num_hidden: layers of its interfaces; None: it has none, or they are linear."""
        own = self.of(method)
        rates: tuple[float, float, float | None] = own.learning_rate, own.predictor_rate, None
        if METHODS[method] == PREDICTED and num_hidden and position is None and own.deep_rates is not None:
            rates = own.deep_rates
        weight_decay = 0.0 if METHODS[method] == ZERO else own.weight_decay
        rate, predictor_rate, last_rate = rates
        return Model(
            method, seed, rate, predictor_rate, position, p_update, decay, synthetic_inputs, weight_decay, last_rate
        )


PAPER = Recipe("paper", 500_000, 5_000, 256, 3e-5, 3e-5, 256, (0, 1, 2), 1024, normalise=False, anneal=False)
"""Batch 256, Adam 3e-5 for networks and interfaces, squared error of the gradient as it is. How many steps is
our guess."""

OURS = Recipe(
    "ours",
    100_000,
    2_000,
    256,
    1e-3,
    3e-5,
    256,
    (0, 1, 2),
    1024,
    normalise=False,
    anneal=True,
    dni=Dni(3e-4, 1e-4, deep_rates=(3e-5, 3e-4, 1e-5)),
)
"""The paper's interfaces and their rate under networks that learn 30 times as fast, annealed.

Targets stay as they are, about a thousandth, so at 3e-5 the last layer, which starts at zero, has them within a hundred
steps. Divided by their running RMS they need a rate of .1 to be followed as fast, at which hidden layers go to pieces;
at the usual 1e-3 to 1e-2 interfaces lag behind, each behind the next, and many layers learn nothing (docs/log.md).

Hidden layers of interfaces want the rates of any network's, so without the label, where everything hangs on what they
make of an activation, they have 30 to 1000 times that of the last one, and the network below is slow.
"""

QUICK = Recipe("quick", 1000, 100, 64, 3e-3, 3e-4, 128, (0, 1), 128, normalise=False, anneal=True)
"""Ours, narrow and short, for the order of the methods."""


def for_dataset(recipe: Recipe, dataset: str) -> Recipe:
    """Ours on CIFAR-10: of each image 18 copies, and weight decay.

    Without them a network has its 45 000 images by heart after 3000 steps; with them 100 000 steps are not too many. An
    interface that does not see the label learns from so little there that its network must be slower still, and that
    2 copies are better than 18.
    """
    if dataset != "cifar10" or recipe.name.partition(",")[0] != OURS.name:
        return recipe
    recipe = replace(recipe, mirror=True, shift=2, weight_decay=0.3)
    changes = recipe.name.partition(", ")[2]
    if "predictor rate" not in changes:
        recipe = replace(recipe, predictor_rate=1e-4)
    if changes:
        return recipe
    dni = Dni(1e-4, 1e-5, deep_rates=(1e-5, 1e-3, 1e-6), mirror=True, shift=0, weight_decay=0.0)
    return replace(recipe, deep_rates=(1e-3, 3e-4, 1e-6), dni=dni)


RECIPES = {recipe.name: recipe for recipe in (PAPER, OURS, QUICK)}
