"""What a network sees of the images: copies, and batches in each seed's own order."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.paper.batches import Batches, Images
from benchmarks.paper.job import Job
from benchmarks.paper.models import Model
from benchmarks.paper.order import read_order
from benchmarks.paper.running import _Starter
from tests.benchmarks.paper.made_up import TINY, made_up_images


@pytest.mark.usefixtures("tiny")
def test_copies_are_mirrored_and_moved_and_only_of_what_is_learned_from() -> None:
    data = made_up_images()
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
    images = Images(made_up_images())
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


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="too few"):
        Images(made_up_images(), limit=9)
    with pytest.raises(ValueError, match="take a smaller one"):
        Batches(Images(made_up_images()), [0], batch=109)
