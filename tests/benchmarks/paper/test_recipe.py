"""What the recipes say of deep networks, of a dataset and of what interfaces are told."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType

import pytest

from benchmarks.paper import complete_unlock, every_layer, recipe, single, sparse_updates
from benchmarks.paper.convolutional_recipe import for_convolutions
from benchmarks.paper.deep import for_deep
from benchmarks.paper.job import by_images
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
    for other in (for_deep(ours), for_convolutions(ours, None, None), _asked("--predictor-rate", "3e-5")):
        assert other.model(method, 0, 2).last_rate is None
    asked = _asked("--learning-rate", "0.5").model(method, 0, 2)
    assert (asked.learning_rate, asked.last_rate) == (0.5, None)


def _asked(*options: str) -> recipe.Recipe:
    order = read_order("every_layer", "", "3", "3", ["--dataset", "cifar10", *options])
    return recipe.for_dataset(order.recipe, "cifar10")


@pytest.mark.parametrize(
    "module, hidden", [(every_layer, "1"), (sparse_updates, "1"), (single, "1"), (complete_unlock, None)]
)
def test_networks_without_labels_train_on_images_of_their_own_in_stacks_of_their_own(
    module: ModuleType, hidden: str | None
) -> None:
    name = module.__name__.rpartition(".")[2]
    order = read_order(name, "", "4", "4", ["--dataset", "cifar10"], hidden=hidden)
    made = [job.completed(order) for job in module.jobs_of(order)]
    jobs = by_images(made)
    assert sorted(map(repr, (m for job in made for m in job.models))) == sorted(
        map(repr, (m for job in jobs for m in job.models))
    )
    assert len({job.name for job in jobs}) == len(jobs), "a checkpoint each"
    for job in jobs:
        assert job.recipe is not None
        methods = {model.method for model in job.models}
        assert methods == {"dni"} or "dni" not in methods
        assert (job.recipe.mirror, job.recipe.shift) == ((True, 0) if methods == {"dni"} else (True, 2))
        assert all((model.weight_decay > 0) == (model.method not in ("dni", "no_bprop")) for model in job.models)
    mnist = read_order(name, "", "4", "4", [], hidden=hidden)
    alike = [job.completed(mnist) for job in module.jobs_of(mnist)]
    assert by_images(alike) == alike
