"""The paper's experiments from the command line to table and picture, on made-up images; and what a table says."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.paper import recipe
from benchmarks.paper.batches import Batches, Images
from benchmarks.paper.deep import for_deep
from benchmarks.paper.every_layer import jobs_of
from benchmarks.paper.job import Job
from benchmarks.paper.models import Model
from benchmarks.paper.order import read_order
from benchmarks.paper.results import table
from benchmarks.paper.rows import PaperRow, chosen_by, read_rows, selected, write_rows
from benchmarks.paper.running import _Starter
from benchmarks.paper.training import Training, agreement
from dnipipe.data.images import ImageData

TINY = replace(
    recipe.QUICK,
    steps=12,
    evaluate_every=4,
    batch=16,
    width=8,
    num_hidden=(0, 1),
    predictor_width=8,
    learning_rate=1e-2,
    anneal=False,
)
ROW = PaperRow(
    experiment="every_layer",
    dataset="mnist",
    model="fcn",
    layers=3,
    method="cdni",
    position=None,
    p_update=1.0,
    decay=0.0,
    predictor=0,
    recipe="ours",
    seed=0,
    steps=10,
    batch=256,
    learning_rate=3e-5,
    test_error_percent=2.0,
    held_out_error_percent=3.0,
    device="CPU",
    commit="",
    seconds_of_stack=1.0,
    models_of_stack=2,
)


def _made_up_images(count: int = 120, side: int = 4) -> ImageData:
    """Four classes, each a bright row of its own."""
    random = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 4
    images = torch.randint(60, (count, 1, side, side), generator=random, dtype=torch.uint8)
    images[torch.arange(count), 0, labels * side // 4] += 150
    return ImageData(images, labels, images.clone(), labels.clone(), num_classes=4)


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.paper.running.load_images", lambda name, folder: _made_up_images())
    monkeypatch.setattr("benchmarks.paper.order.QUICK", TINY)
    monkeypatch.setattr("benchmarks.paper.convolutional_recipe.QUICK_FILTERS", 4)
    monkeypatch.setattr("benchmarks.paper.sparse_updates.QUICK_RUNS", 3)
    monkeypatch.setattr("benchmarks.paper.complete_unlock.QUICK_RUNS", 3)
    monkeypatch.setattr("benchmarks.paper.deep.LEARNING_RATE", 1e-2)


def _without_times(row: PaperRow) -> tuple[Any, ...]:
    return (row.cell, row.choice, row.seed), row.test_error_percent, row.held_out_error_percent


def _run(experiment: str, path: Path, *options: str) -> list[PaperRow]:
    importlib.import_module(f"benchmarks.paper.{experiment}").main(["--quick", "--json", str(path), *options])
    return read_rows(path)


@pytest.mark.parametrize(
    "experiment, options, models",
    [
        ("every_layer", ("--layers", "3", "--seeds", "0,1", "--network", "fcn"), 2 * (2 + 4) + 2 * 2 * 2),
        ("every_layer", ("--layers", "3", "--network", "cnn", "--steps", "12"), 2 + 4 + 2 * 2),
        ("sparse_updates", ("--layers", "3"), 2 * 3),
        ("complete_unlock", ("--layers", "3"), 3 + 2 + 2 * 3),
        ("sparse_updates", ("--layers", "3", "--hidden", "0,2"), 2 * 2 * 3),
        ("deep", ("--layers", "5"), 2),
        ("deep", ("--layers", "5", "--hidden", "0,1,2"), 1 + 3),
        ("single", ("--layers", "4"), 1 + 3 + 2 * 2 * 3),
    ],
)
def test_an_experiment_leaves_rows_a_table_and_a_picture(
    experiment: str, options: tuple[str, ...], models: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, is_conv = tmp_path / "rows.json", "cnn" in options
    if is_conv:
        monkeypatch.setattr("benchmarks.paper.running.load_images", lambda name, folder: _made_up_images(side=12))
    rows = _run(experiment, path, *options)
    assert len(rows) == models
    assert all(row.experiment == experiment and row.steps == 12 for row in rows)
    assert {len(row.curve) for row in rows} == {2 if is_conv else 3}, "evaluations"
    assert {row.model for row in rows} == {"cnn" if is_conv else "fcn"}
    pictures = {"rows.png", "rows_gradients.png"} if experiment == "single" else {"rows.png"}
    assert {f.name for f in tmp_path.iterdir()} == {"rows.json", "rows.md"} | pictures, "checkpoints are cleared away"
    bprop = [row.test_error_percent for row in rows if row.method == "bprop"]
    limit = 74 if experiment == "deep" or is_conv else 40  # 12 steps are few for 5 narrow layers, and for filters
    assert all(error < limit for error in bprop), "guessing is 75"


def test_only_a_single_interface_is_measured_against_the_true_gradient(tmp_path: Path) -> None:
    rows = _run("single", tmp_path / "rows.json", "--layers", "3")
    for row in rows:
        assert {len(point) for point in row.curve} == ({5} if row.method in ("dni", "cdni") else {2})


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


def test_a_rate_from_the_command_line_holds_for_every_method_and_dataset() -> None:
    argv = ["--dataset", "mnist,cifar10", "--predictor-rate", "0.5", "--seeds", "0"]
    for network, shift in (("fcn", 2), ("cnn", 0)):
        order = read_order("every_layer", "", "3", "3", [*argv, "--network", network])
        jobs = [job for job in jobs_of(order) if job.num_hidden is not None]
        assert {model.predictor_rate for job in jobs for model in job.models} == {0.5}
        copies = {job.dataset: (job.recipe.mirror, job.recipe.shift) for job in jobs if job.recipe}
        assert copies == {"mnist": (False, 0), "cifar10": (True, shift)}


def test_rates_fall_to_nothing_along_a_line_and_a_run_trains_by_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    annealed = replace(TINY, steps=200, anneal=True)
    assert [annealed.rates_left(step) for step in (0, 1, 2, 100, 199)] == [1, 1, 0.99, 0.5, pytest.approx(0.01)]
    assert replace(TINY, anneal=False).rates_left(11) == 1
    monkeypatch.setattr("benchmarks.paper.order.QUICK", replace(TINY, anneal=True))
    scales: list[float] = []
    monkeypatch.setattr("benchmarks.paper.stack.Stack.scale_rates", lambda _, factor: scales.append(round(factor, 9)))
    _run("deep", tmp_path / "rows.json", "--layers", "3", "--limit-s", "0")
    assert scales == [], "step 0 goes by the rate as it is, and the steps up to an evaluation with it"
    _run("deep", tmp_path / "rows.json", "--layers", "3", "--limit-s", "0")
    assert scales == [0.67], "a run that goes on has the rate of its step, 4 of 12, in hundredths"


def test_a_run_that_is_cut_off_ends_as_one_that_is_not(tmp_path: Path) -> None:
    options = "--layers", "3", "--network", "fcn"
    whole = _run("every_layer", tmp_path / "whole.json", *options)
    path = tmp_path / "cut.json"
    assert _run("every_layer", path, *options, "--limit-s", "0") == []
    cut: list[PaperRow] = []
    for _ in range(3 * 3 - 1):  # every call makes one chunk of the three of one stack of the three
        assert len(cut) < len(whole)
        cut = _run("every_layer", path, *options, "--limit-s", "0")
    assert [replace(row, seconds_of_stack=0.0) for row in cut] == [replace(row, seconds_of_stack=0.0) for row in whole]


def test_a_run_that_is_killed_goes_on_from_its_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, options = tmp_path / "rows.json", ("--layers", "3", "--network", "fcn", "--save-every-s", "0")
    whole = _run("every_layer", tmp_path / "whole.json", *options)
    looks: list[int] = []
    look = Training.look

    def killed(training: Training) -> None:
        looks.append(training.step)
        if len(looks) == 5:  # in the second stack, with a checkpoint of step 4
            raise KeyboardInterrupt
        look(training)

    monkeypatch.setattr(Training, "look", killed)
    with pytest.raises(KeyboardInterrupt):
        _run("every_layer", path, *options)
    assert looks == [4, 8, 12, 4, 8] and len(read_rows(path)) == 2, "the first stack's rows are there"
    rows = _run("every_layer", path, *options)
    assert looks[5:] == [8, 12, 4, 8, 12]
    assert [replace(row, seconds_of_stack=0.0) for row in rows] == [replace(row, seconds_of_stack=0.0) for row in whole]


def test_side_by_side_in_small_stacks_or_cut_off_it_is_the_same(tmp_path: Path) -> None:
    options = "--layers", "3", "--network", "fcn"
    whole = [_without_times(row) for row in _run("every_layer", tmp_path / "whole.json", *options)]
    path = tmp_path / "apart.json"
    more = "--stack", "4", "--workers", "3"
    assert len(_run("every_layer", path, *options, *more, "--limit-s", "0")) == 0
    apart = _run("every_layer", path, *options, *more)
    assert {row.models_of_stack for row in apart} == {4, 2}
    assert sorted(_without_times(row) for row in apart) == sorted(whole)


def test_rows_of_another_length_or_dataset_are_kept_and_not_taken(tmp_path: Path) -> None:
    path, options = tmp_path / "rows.json", ("--layers", "3", "--network", "fcn")
    first = _run("every_layer", path, *options)
    assert _run("every_layer", path, *options) == first, "nothing was left to do"
    _run("every_layer", path, *options, "--steps", "8", "--limit-s", "0")
    longer = _run("every_layer", path, *options, "--steps", "16")
    assert [row for row in longer if row.steps == 12] == first
    assert [len(row.curve) for row in longer if row.steps == 16] == [4] * len(first)
    both = _run("every_layer", path, *options, "--dataset", "mnist,cifar10")
    assert len(both) == 3 * len(first)
    text = path.with_suffix(".md").read_text()
    assert all(f"| fcn | {name} | 3 | backprop |" in text for name in ("mnist", "cifar10"))


def test_rows_come_back_as_they_were_written(tmp_path: Path) -> None:
    rows = [ROW, replace(ROW, seed=1, curve=[[4.0, 90.0], [8.0, 2.0]])]
    write_rows(rows, tmp_path / "new" / "rows.json")
    assert read_rows(tmp_path / "new" / "rows.json") == rows
    assert read_rows(tmp_path / "none.json") == []


def _two_depths() -> list[PaperRow]:
    """Depth 1 is best on the test set and depth 0 on what was held out, each by the mean of its seeds."""
    return selected(
        [
            replace(ROW, predictor=0, seed=0, test_error_percent=1.0, held_out_error_percent=2.0),
            replace(ROW, predictor=0, seed=1, test_error_percent=4.0, held_out_error_percent=2.0),
            replace(ROW, predictor=1, seed=0, test_error_percent=2.0, held_out_error_percent=1.0),
            replace(ROW, predictor=1, seed=1, test_error_percent=2.0, held_out_error_percent=4.0),
        ]
    )


def test_each_rule_selects_one_depth_by_its_mean_over_the_seeds() -> None:
    rows = _two_depths()
    assert {row.predictor for row in chosen_by(rows, "best test")} == {1}
    assert {row.predictor for row in chosen_by(rows, "held out")} == {0}
    assert selected(rows) == rows


def test_a_table_has_both_selections_beside_the_paper() -> None:
    (line,) = (line for line in table(_two_depths()).splitlines() if "cDNI" in line)
    assert line == (
        "| fcn | mnist | 3 | cDNI | every | 2.00 ± 0.00 | 1 hidden | 2.50 ± 2.12 | 0 hidden | 2 | 10 | 2.2 |  |"
    )
    for network, figure in (("fcn", "1.9"), ("cnn", "0.9")):
        remembered = table(selected([replace(ROW, method="dni", model=network)])).splitlines()[-3]
        assert remembered.endswith(f"|  | {figure} |"), "not in the text of the paper, so in the last column"
    assert table(_two_depths()).splitlines()[-1] == (
        "fcn on CPU: 4 models in 2 s: 20 steps of a model a second, 7200 models an hour."
    )


def test_copies_are_mirrored_and_moved_and_only_of_what_is_learned_from() -> None:
    data = _made_up_images()
    plain, copied = Images(data), Images(data, mirror=True, shift=1)
    (images, labels), (copies, their_labels) = plain.train, copied.train
    assert copies.shape == (18 * len(images), *images.shape[1:])
    assert torch.equal(their_labels, labels.repeat(18))
    assert all(
        torch.equal(*pair) for pair in zip(plain.held_out + plain.test, copied.held_out + copied.test, strict=True)
    )
    by_copy = copies.unflatten(0, (18, -1))
    assert torch.equal(by_copy[0], images) and torch.equal(by_copy[9], images.flip(-1))
    down = torch.cat([images[:, :, :1], images[:, :, :-1]], 2)  # by one; what comes in is the edge again
    left = torch.cat([down[:, :, :, 1:], down[:, :, :, -1:]], 3)
    expected = (down, torch.cat([down[:, :, :, :1], down[:, :, :, :-1]], 3), left)
    assert all(torch.equal(*pair) for pair in zip(by_copy[3:6], expected, strict=True))
    assert len({copy.numpy().tobytes() for copy in by_copy}) == 18, "no two copies are alike"
    order = read_order("deep", "", "3", "3", ["--quick", "--layers", "3", "--seeds", "0"])
    start = _Starter(order)
    for copies_of, count in ((TINY, 1), (replace(TINY, mirror=True, shift=1), 18), (replace(TINY, mirror=True), 2)):
        job = Job("", 3, None, (Model("bprop"),), copies_of).completed(order)
        assert len(start(job, 0).images.train[0]) == count * len(images), "each recipe has its own"


def test_an_epoch_has_every_image_once_and_each_seed_its_own_order() -> None:
    images = Images(_made_up_images())
    batches = Batches(images, [5, 7, 5], batch=27)
    seen = [batches.at(step) for step in range(4)]
    x, labels = (torch.cat([each[part] for each in seen], -1) for part in (0, 1))
    everything = images.prepared(images.train[0])
    assert torch.equal(x[0], x[2]) and not torch.equal(x[0], x[1])
    for own, own_labels in zip(x, labels, strict=True):
        assert torch.equal(own.sort(1).values, everything.sort(1).values)
        assert own_labels.bincount().tolist() == images.train[1].bincount().tolist()
    again = Batches(images, [5, 7, 5], batch=27).at(3)
    assert torch.equal(again[0], seen[3][0]), "any step can be asked for"
    alone = Batches(images, [7], batch=27).at(2)
    assert torch.equal(alone[0], seen[2][0][1]) and torch.equal(alone[1], seen[2][1][1])
    held_out, train = ({bytes(each.numpy()) for each in part[0]} for part in (images.held_out, images.train))
    assert len(held_out) + len(train) == 120, "no image is in both"


def test_agreement_of_two_gradients() -> None:
    true = torch.tensor([[3.0, 0.0], [4.0, 2.0]]).unsqueeze(0)
    figures = agreement(torch.cat([true, -true, 2 * true]), true.expand(3, -1, -1))
    torch.testing.assert_close(figures[:, 0], torch.tensor([0.0, 7.0, 3.5]))
    torch.testing.assert_close(figures[:, 1], torch.tensor([1.0, -1.0, 1.0]))
    torch.testing.assert_close(figures[:, 2], torch.tensor([0.0, 0.75, 0.0]))


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="too few"):
        Images(_made_up_images(), limit=9)
    with pytest.raises(ValueError, match="take a smaller one"):
        Batches(Images(_made_up_images()), [0], batch=109)
