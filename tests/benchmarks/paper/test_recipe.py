"""What the recipes say of deep networks, of a dataset and of what interfaces are told."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.paper import every_layer, recipe
from benchmarks.paper.deep import for_deep
from benchmarks.paper.models import Model
from benchmarks.paper.order import read_order


def test_deep_networks_begin_as_the_identity_but_for_the_paper_s_recipe() -> None:
    assert for_deep(recipe.PAPER) == recipe.PAPER
    ours = for_deep(recipe.OURS)
    assert ours.identity and ours.name == "ours, from the identity" and ours.predictor_rate < recipe.OURS.predictor_rate
    asked = replace(recipe.OURS, name="ours, predictor rate 0.5", predictor_rate=0.5)
    assert for_deep(asked).predictor_rate == 0.5 and for_deep(asked).identity
    assert ours.shape(784, 10, 21, 0).identity and not recipe.OURS.shape(784, 10, 21, 0).identity


def test_cifar10_has_copies_decay_and_rates_of_its_own_in_our_recipe_alone() -> None:
    ours = recipe.for_dataset(recipe.OURS, "cifar10")
    assert (ours.mirror, ours.shift) == (True, 2)
    rates = {method: ours.model(method, 0) for method in ("bprop", "cdni", "dni", "no_bprop")}
    assert rates["cdni"].predictor_rate != recipe.OURS.predictor_rate
    assert rates["dni"].learning_rate < rates["cdni"].learning_rate == rates["bprop"].learning_rate
    assert rates["no_bprop"].weight_decay == 0 < rates["bprop"].weight_decay == rates["cdni"].weight_decay
    for other, dataset in ((recipe.OURS, "mnist"), (recipe.PAPER, "cifar10"), (recipe.QUICK, "cifar10")):
        assert recipe.for_dataset(other, dataset) == other
    with pytest.raises(ValueError, match=r"weight_decay = 0.1 with no_bprop"):
        Model("no_bprop", weight_decay=0.1)


@pytest.mark.parametrize("method", ["dni", "cdni"])
def test_the_last_layer_of_a_deep_interface_is_slower_than_its_hidden_ones(method: str) -> None:
    ours = recipe.for_dataset(recipe.OURS, "cifar10")
    linear, deep = ours.model(method, 0, 0), ours.model(method, 0, 2)
    assert linear.last_rate is None and linear == ours.model(method, 0)
    assert deep.last_rate is not None and deep.last_rate < linear.predictor_rate < deep.predictor_rate
    in_the_middle = ours.model(method, 0, 2, position=3)
    assert in_the_middle.last_rate is None, "searched with an interface after every layer alone"
    asked = replace(ours, deep_rates=None, dni=None)  # as --predictor-rate has it
    assert asked.model(method, 0, 2).last_rate is None


def test_networks_without_labels_train_on_images_of_their_own_in_stacks_of_their_own(tmp_path: Path) -> None:
    options = ["--dataset", "mnist,cifar10", "--layers", "3", "--hidden", "1", "--json", str(tmp_path / "rows.json")]
    jobs = every_layer.jobs_of(read_order("every_layer", "", "3", "3", options))
    found = {(job.dataset, *sorted({model.method for model in job.models})): job for job in jobs if job.num_hidden}
    assert set(found) == {("mnist", "cdni", "dni"), ("cifar10", "cdni"), ("cifar10", "dni")}
    assert len({job.name for job in jobs if job.dataset == "cifar10"}) == 3
    copied, own = found["cifar10", "cdni"], found["cifar10", "dni"]
    assert copied.recipe is not None and own.recipe is not None
    assert (copied.recipe.mirror, copied.recipe.shift) == (True, 2)
    assert (own.recipe.mirror, own.recipe.shift) == (True, 0)
    assert [model.weight_decay for model in own.models] == [0.0] * 3 and copied.models[0].weight_decay > 0
