"""MNIST in its official form: four gzipped idx files.

An idx file: two zero bytes, a byte for the type (8: uint8), a byte for the number of axes, the length of each axis as a
big-endian int32, then the numbers, last axis fastest. Source: yann.lecun.com/exdb/mnist.
"""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import torch
from torch import Tensor

from .official import CURE, OfficialFile, check, obtain

_MIRROR = "https://ossci-datasets.s3.amazonaws.com/mnist"  # the original address serves it no longer
FILES = (
    OfficialFile(
        f"{_MIRROR}/train-images-idx3-ubyte.gz", "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609"
    ),
    OfficialFile(
        f"{_MIRROR}/train-labels-idx1-ubyte.gz", "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c"
    ),
    OfficialFile(
        f"{_MIRROR}/t10k-images-idx3-ubyte.gz", "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6"
    ),
    OfficialFile(
        f"{_MIRROR}/t10k-labels-idx1-ubyte.gz", "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6"
    ),
)
"""Images and labels of training, then of the test."""


def read_mnist(folder: Path, *, download: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images and labels, test images and labels: images (N, 1, 28, 28) uint8, labels (N,) int64.

    Raises: ValueError: a file that is damaged or not the official one. What obtain() raises.
    """
    train_images, train_labels, test_images, test_labels = (
        _read(file, obtain(file, folder, download=download), num_axes)
        for file, num_axes in zip(FILES, (3, 1, 3, 1), strict=True)
    )
    return train_images[:, None], train_labels.long(), test_images[:, None], test_labels.long()


def _read(file: OfficialFile, path: Path, num_axes: int) -> Tensor:
    packed = path.read_bytes()
    try:
        content = gzip.decompress(packed)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is no whole gzip file: {error}; {CURE}") from error
    numbers = _idx(content, num_axes, path)
    check(packed, file.sha256, path)
    return numbers


def _idx(content: bytes, num_axes: int, path: Path) -> Tensor:
    """The uint8 numbers of an idx file, in its own shape."""
    begin = 4 + 4 * num_axes
    magic, wanted = int.from_bytes(content[:4], "big"), 0x800 + num_axes
    if magic != wanted:
        raise ValueError(f"{path}: its magic number is {magic} and must be {wanted}; {CURE}")
    shape = [int.from_bytes(content[at : at + 4], "big") for at in range(4, begin, 4)]
    length = begin + math.prod(shape)
    if len(content) != length:
        raise ValueError(f"{path}: its shape {shape} needs {length} bytes, but unpacked it has {len(content)}; {CURE}")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)[begin:].view(shape)
