"""What the recipes say of deep networks and of a dataset."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.paper import recipe
from benchmarks.paper.deep import for_deep
from benchmarks.paper.models import Model


def test_deep_networks_begin_as_the_identity_but_for_the_paper_s_recipe() -> None:
    assert for_deep(recipe.PAPER) == recipe.PAPER
    ours = for_deep(recipe.OURS)
    assert ours.identity and ours.name == "ours, from the identity" and ours.predictor_rate < recipe.OURS.predictor_rate
    asked = replace(recipe.OURS, name="ours, predictor rate 0.5", predictor_rate=0.5)
    assert for_deep(asked).predictor_rate == 0.5 and for_deep(asked).identity
    assert ours.shape(784, 10, 21, 0).identity and not recipe.OURS.shape(784, 10, 21, 0).identity


def test_cifar10_has_copies_and_decay_and_dni_rates_of_its_own_in_our_recipe_alone() -> None:
    ours = recipe.for_dataset(recipe.OURS, "cifar10")
    assert (ours.mirror, ours.shift) == (True, 2)
    rates = {method: ours.model(method, 0) for method in ("bprop", "cdni", "dni", "no_bprop")}
    assert rates["cdni"].predictor_rate != recipe.OURS.predictor_rate
    assert rates["dni"].learning_rate < rates["cdni"].learning_rate == rates["bprop"].learning_rate
    assert rates["no_bprop"].weight_decay == 0 < rates["bprop"].weight_decay == rates["dni"].weight_decay
    for other, dataset in ((recipe.OURS, "mnist"), (recipe.PAPER, "cifar10"), (recipe.QUICK, "cifar10")):
        assert recipe.for_dataset(other, dataset) == other
    with pytest.raises(ValueError, match=r"weight_decay = 0.1 with no_bprop"):
        Model("no_bprop", weight_decay=0.1)
