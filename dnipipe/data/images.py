"""Images with labels, as their authors publish them: MNIST and CIFAR-10."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from torch import Tensor

from .cache_folder import cache_folder
from .cifar10 import read_cifar10
from .mnist import read_mnist

ImageSet: TypeAlias = Literal["mnist", "cifar10"]

_READERS = {"mnist": read_mnist, "cifar10": read_cifar10}


@dataclass(frozen=True)
class ImageData:
    """The official split, in the official order.

    Shapes: train_images, test_images: (N, C, H, W) uint8, 0 to 255. train_labels, test_labels: (N,) int64, from 0 to
            num_classes - 1. MNIST: C, H, W = 1, 28, 28; CIFAR-10: 3, 32, 32, colours red, green, blue.
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    num_classes: int


def load_images(name: ImageSet, folder: Path | None = None, download: bool = True) -> ImageData:
    """Reads a set of images, which is fetched first if it is not there. Every rank may call it.

    Args:
        name: "mnist", 60000 images to train and 10000 to test, or "cifar10", 50000 and 10000.
        folder: holds the files in its folder of that name: MNIST's four .gz files; cifar-10-binary.tar.gz, or what is
            in it, cifar-10-batches-bin. None: $DNIPIPE_DATA or, where that is not set, the user's cache.
        download: fetch what is missing from the official address; False makes it an error.

    Raises:
        ValueError: another name, a file that is damaged or not the official one.
        FileNotFoundError: a file is missing, and download is False.
        ImportError: something must be fetched without the package that does it.
        OSError: something could not be fetched, read or written.
    """
    if name not in _READERS:
        raise ValueError(f'name = {name!r}; it must be "mnist" or "cifar10"')
    if folder is None:
        folder = Path(os.environ.get("DNIPIPE_DATA") or cache_folder())
    return ImageData(*_READERS[name](Path(folder) / name, download=download), num_classes=10)
