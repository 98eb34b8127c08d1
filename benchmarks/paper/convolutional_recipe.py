"""What a recipe becomes for convolutional networks: fewer steps, each of which is far more work, and filters."""

from __future__ import annotations

from dataclasses import replace

from .recipe import OURS, QUICK, Recipe

STEPS, FILTERS = 20_000, 64
"""64 filters, as the paper has on MNIST, from memory; 128 on CIFAR-10, says a reimplementation: --filters 128."""

QUICK_STEPS, QUICK_FILTERS = 300, 6

PREDICTOR_RATES = {OURS.name: 3e-6, QUICK.name: 1e-4}
"""Of interfaces, unless the command line says otherwise; PAPER keeps its own. A step of Adam moves a prediction by the
rate times its inputs, of which there are 1600 with 64 filters, and 256 in a fully connected network (docs/log.md).
"""


def for_convolutions(recipe: Recipe, steps: int | None, filters: int | None) -> Recipe:
    """steps, filters: those asked for; None: those above. Another number of filters shows in the name."""
    base, _, changes = recipe.name.partition(", ")
    is_quick = base == QUICK.name
    usual = QUICK_FILTERS if is_quick else FILTERS
    name = recipe.name if filters in (None, usual) else f"{recipe.name}, {filters} filters"
    rate = recipe.predictor_rate if "predictor rate" in changes else PREDICTOR_RATES.get(base, recipe.predictor_rate)
    steps, filters = steps or (QUICK_STEPS if is_quick else STEPS), filters or usual
    every = max(1, steps // (2 if is_quick else 20))
    recipe = replace(recipe, name=name, predictor_rate=rate, dni_rates=None, steps=steps, evaluate_every=every)
    return replace(recipe, width=filters, predictor_width=filters)
