"""What a recipe becomes for convolutional networks: fewer steps, each of which is far more work, and filters."""

from __future__ import annotations

from dataclasses import replace

from .recipe import QUICK, Recipe

STEPS, FILTERS = 20_000, 64
"""64 filters, as the paper has on MNIST, from memory; 128 on CIFAR-10, says a reimplementation: --filters 128."""

QUICK_STEPS, QUICK_FILTERS, QUICK_PREDICTOR_RATE = 300, 6, 1e-4
"""The rate of --quick is too high here: DNI ended at 28.7 % on MNIST after 200 steps, no backprop at 24.9 %."""


def for_convolutions(recipe: Recipe, steps: int | None, filters: int | None) -> Recipe:
    """steps, filters: those asked for; None: those above. Another number of filters shows in the name."""
    is_quick = recipe.name.startswith(QUICK.name)
    usual = QUICK_FILTERS if is_quick else FILTERS
    name = recipe.name if filters in (None, usual) else f"{recipe.name}, {filters} filters"
    steps, filters = steps or (QUICK_STEPS if is_quick else STEPS), filters or usual
    every = max(1, steps // (2 if is_quick else 20))
    recipe = replace(recipe, name=name, steps=steps, evaluate_every=every, width=filters, predictor_width=filters)
    if recipe.predictor_rate == QUICK.predictor_rate:
        recipe = replace(recipe, predictor_rate=QUICK_PREDICTOR_RATE)
    return recipe
