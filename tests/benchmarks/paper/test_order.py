"""What a command line asks for."""

from __future__ import annotations

import pytest

from benchmarks.paper.convolutional_recipe import for_convolutions
from benchmarks.paper.every_layer import jobs_of
from benchmarks.paper.job import split
from benchmarks.paper.order import Order, read_order
from benchmarks.paper.recipe import OURS, PAPER, QUICK, for_dataset


def _order(*options: str, experiment: str = "every_layer") -> Order:
    return read_order(experiment, "", "3,4,5,6", "3", options)


def test_quick_has_both_networks_and_else_one_names_them() -> None:
    assert _order("--quick").networks == ("fcn", "cnn")
    assert _order().networks == _order("--quick", experiment="single").networks == ("fcn",)
    order = _order("--network", "fcn,cnn", "--dataset", "mnist,cifar10")
    jobs = jobs_of(order)
    assert {(job.dataset, job.network, job.layers) for job in jobs} == {
        (dataset, network, layers)
        for dataset in ("mnist", "cifar10")
        for network, most in (("fcn", 6), ("cnn", 4))
        for layers in range(3, most + 1)
    }
    assert len(jobs) == len({(job.dataset, job.network, job.name) for job in jobs}), "a checkpoint each"
    assert {job.recipe.steps for job in jobs if job.recipe} == {OURS.steps, 20_000}


def test_a_gpu_is_filled_by_more_stacks_of_fully_connected_networks_than_of_others() -> None:
    cuda = ("--device", "cuda")
    assert _order().workers == 1 < _order(*cuda, "--network", "cnn").workers < _order(*cuda).workers
    assert _order(*cuda, "--workers", "2").workers == 2


def test_other_rates_and_filters_show_in_the_name() -> None:
    recipe = _order("--quick", "--predictor-rate", "1e-5").recipe
    assert (recipe.name, recipe.predictor_rate) == ("quick, predictor rate 1e-05", 1e-5)
    conv = for_convolutions(recipe, None, 7)
    assert (conv.name, conv.predictor_rate) == ("quick, predictor rate 1e-05, 7 filters", 1e-5)
    assert for_convolutions(QUICK, None, None).steps == conv.steps < 1000
    assert for_convolutions(OURS, 50, None).steps == 50
    assert for_convolutions(PAPER, None, None).predictor_rate == PAPER.predictor_rate
    asked = _order("--predictor-rate", f"{OURS.predictor_rate}").recipe
    assert for_convolutions(asked, None, None).predictor_rate == OURS.predictor_rate


def test_a_rate_from_the_command_line_holds_for_every_method_and_dataset() -> None:
    argv = ["--dataset", "mnist,cifar10", "--predictor-rate", "0.5", "--seeds", "0", "--layers", "3"]
    for network, shift in (("fcn", 2), ("cnn", 0)):
        jobs = [job for job in jobs_of(_order(*argv, "--network", network)) if job.num_hidden is not None]
        assert {model.predictor_rate for job in jobs for model in job.models} == {0.5}
        copies = {job.dataset: (job.recipe.mirror, job.recipe.shift) for job in jobs if job.recipe}
        assert copies == {"mnist": (False, 0), "cifar10": (True, shift)}


def test_ours_for_convolutions_predicts_scaled_targets_and_copies_less() -> None:
    for dataset, shift in (("mnist", 0), ("cifar10", 2)):
        linear = for_dataset(OURS, dataset)
        conv = for_convolutions(linear, None, None)
        assert (linear.normalise, linear.shift, conv.normalise, conv.shift) == (False, shift, True, 0)
        assert conv.mirror == linear.mirror and conv.label_at_places and not linear.label_at_places
        assert (conv.weight_decay > 0) == (linear.weight_decay > 0)
    assert for_convolutions(OURS, None, None).model("dni", 0).learning_rate < OURS.learning_rate
    for option, field in (("--learning-rate", "learning_rate"), ("--predictor-rate", "predictor_rate")):
        asked = for_convolutions(_order(option, "0.0007").recipe, None, None)
        assert getattr(asked, field) == 0.0007 and asked.dni is None
    assert not for_convolutions(PAPER, None, None).label_at_places


def test_split_keeps_every_model_once() -> None:
    jobs = [job.completed(_order()) for job in jobs_of(_order())]
    parts = split(jobs, 4)
    assert max(len(job.models) for job in parts) == 4
    for job in jobs:
        own = [part for part in parts if part.name.startswith(f"{job.name}_")]
        assert [model for part in own for model in part.models] == list(job.models)
    assert split(jobs, None) == jobs


@pytest.mark.parametrize(
    "options, experiment, message",
    [
        (("--network", "rnn"), "every_layer", "'rnn' is none of fcn, cnn"),
        (("--steps", "0"), "every_layer", "--steps 0: must be 1 or more"),
        (("--network", "cnn"), "deep", "deep trains fully connected networks on one dataset"),
        (("--hidden", "3"), "every_layer", "0, 1 or 2 hidden layers"),
    ],
)
def test_what_cannot_be_is_refused(
    options: tuple[str, ...], experiment: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        _order(*options, experiment=experiment)
    assert message in capsys.readouterr().err
