"""Official image files: fetched once, from a server of our own here, and read to the byte."""

import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from dnipipe.data import load_images, mnist
from tests.data.official import names_in

REAL = os.environ.get("DNIPIPE_DATA", "")


def test_mnist_is_fetched_once_and_read_in_its_order(server, digits, tmp_path):
    data = load_images("mnist", tmp_path / "data")
    assert sorted(server.asked) == sorted(f"/{file.name}" for file in mnist.FILES)
    assert names_in(tmp_path / "data") == sorted(file.name for file in mnist.FILES)
    assert data.train_images.shape == (20, 1, 28, 28) and data.test_images.shape == (7, 1, 28, 28)
    for images, wanted in ((data.train_images, digits[0]), (data.test_images, digits[2])):
        assert images.dtype == torch.uint8 and np.array_equal(images[:, 0].numpy(), wanted)
    for labels, wanted in ((data.train_labels, digits[1]), (data.test_labels, digits[3])):
        assert labels.dtype == torch.int64 and np.array_equal(labels.numpy(), wanted)
    assert data.num_classes == 10

    again = load_images("mnist", tmp_path / "data")
    assert len(server.asked) == 4 and torch.equal(again.train_images, data.train_images)


def test_cifar10_is_fetched_once_and_read_in_its_order(server, colours, tmp_path):
    data = load_images("cifar10", tmp_path / "data")
    for _ in range(2):
        assert server.asked == ["/cifar-10-binary.tar.gz"] and names_in(tmp_path / "data") == ["cifar-10-binary.tar.gz"]
        for rows, images, labels in (
            (colours[:5].reshape(20, 3073), data.train_images, data.train_labels),
            (colours[5], data.test_images, data.test_labels),
        ):
            assert images.dtype == torch.uint8 and images.shape == (len(rows), 3, 32, 32) and images.is_contiguous()
            # red, green and blue one after the other, each line by line
            assert np.array_equal(images[:, 1, 2, 3].numpy(), rows[:, 1 + 1024 + 2 * 32 + 3])
            assert np.array_equal(images.flatten(1).numpy(), rows[:, 1:])
            assert labels.dtype == torch.int64 and np.array_equal(labels.numpy(), rows[:, 0])
        data = load_images("cifar10", tmp_path / "data")


def test_an_unpacked_cifar10_needs_no_archive(server, colours, tmp_path):
    packed = load_images("cifar10", tmp_path / "data")
    with tarfile.open(server.folder / "cifar-10-binary.tar.gz") as archive:
        archive.extractall(tmp_path / "other" / "cifar10", filter="data")
    data = load_images("cifar10", tmp_path / "other", download=False)
    assert torch.equal(data.train_images, packed.train_images) and torch.equal(data.test_labels, packed.test_labels)
    assert len(server.asked) == 1
    (tmp_path / "other" / "cifar10" / "cifar-10-batches-bin" / "data_batch_2.bin").unlink()
    again = load_images("cifar10", tmp_path / "other")
    assert len(server.asked) == 2 and torch.equal(again.train_images, packed.train_images)


def test_another_name_is_refused():
    with pytest.raises(ValueError, match='name = \'cifar100\'; it must be "mnist" or "cifar10"'):
        load_images("cifar100")


@pytest.mark.skipif(not (REAL and Path(REAL, "mnist").is_dir()), reason="DNIPIPE_DATA names no folder that has MNIST")
def test_the_real_mnist():
    data = load_images("mnist", download=False)
    assert data.train_images.shape == (60000, 1, 28, 28) and data.test_images.shape == (10000, 1, 28, 28)
    assert data.train_labels[:5].tolist() == [5, 0, 4, 1, 9] and data.test_labels[:5].tolist() == [7, 2, 1, 0, 4]
    pixels = data.train_images.double() / 255
    assert pixels.mean().item() == pytest.approx(0.1307, abs=1e-4)
    assert pixels.std().item() == pytest.approx(0.3081, abs=1e-4)


@pytest.mark.skipif(not (REAL and Path(REAL, "cifar10").is_dir()), reason="DNIPIPE_DATA names no folder with CIFAR-10")
def test_the_real_cifar10():
    data = load_images("cifar10", download=False)
    assert data.train_images.shape == (50000, 3, 32, 32) and data.test_images.shape == (10000, 3, 32, 32)
    assert data.train_labels[:5].tolist() == [6, 9, 9, 4, 1] and data.test_labels[:5].tolist() == [3, 8, 8, 0, 6]
    assert data.train_labels.bincount().tolist() == [5000] * 10
    means = data.train_images.mean((0, 2, 3), dtype=torch.float64) / 255
    assert means.tolist() == pytest.approx([0.4914, 0.4822, 0.4465], abs=1e-4)
