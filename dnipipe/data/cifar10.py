"""CIFAR-10 in its official binary version: six files of rows, packed into one archive.

A row: a byte for the label, then 1024 bytes for each of red, green and blue, line by line. The archive is fetched and
read as it is; one that somebody has unpacked will do too. Source: www.cs.toronto.edu/~kriz/cifar.html.
"""

from __future__ import annotations

import tarfile
import zlib
from pathlib import Path

import torch
from torch import Tensor

from .official import CURE, OfficialFile, check, obtain

ARCHIVE = OfficialFile(
    "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
    "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
)
MEMBERS = {
    "data_batch_1.bin": "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5",
    "data_batch_2.bin": "a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed",
    "data_batch_3.bin": "bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67",
    "data_batch_4.bin": "014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48",
    "data_batch_5.bin": "755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add",
    "test_batch.bin": "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b",
}
"""Their sha256; the last is the test."""

UNPACKED = "cifar-10-batches-bin"
SHAPE = (3, 32, 32)
ROW_BYTES = 1 + 3 * 32 * 32


def read_cifar10(folder: Path, *, download: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images and labels, test images and labels: images (N, 3, 32, 32) uint8, labels (N,) int64.

    Raises: ValueError: a file that is damaged or not the official one. What obtain() raises.
    """
    unpacked = folder / UNPACKED
    if all((unpacked / name).is_file() for name in MEMBERS):
        batches = [_rows((unpacked / name).read_bytes(), sha256, unpacked / name) for name, sha256 in MEMBERS.items()]
    else:
        batches = _read_archive(obtain(ARCHIVE, folder, download=download))
    train, test = torch.cat(batches[:-1]), batches[-1]
    return *_images_and_labels(train), *_images_and_labels(test)


def _read_archive(path: Path) -> list[Tensor]:
    """Of each member the rows. Nothing is written: there is no half-unpacked folder to find later."""
    contents: dict[str, bytes] = {}
    try:
        with tarfile.open(path, "r:gz") as archive:
            for member in archive:
                folder, _, name = member.name.rpartition("/")
                if folder == UNPACKED and name in MEMBERS and (file := archive.extractfile(member)) is not None:
                    contents[name] = file.read()
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise ValueError(f"{path} is no whole tar.gz archive: {error}; {CURE}") from error
    if missing := MEMBERS.keys() - contents.keys():
        raise ValueError(f"{path} lacks {UNPACKED}/{', '.join(sorted(missing))}; {CURE}")
    return [_rows(contents[name], sha256, path / UNPACKED / name) for name, sha256 in MEMBERS.items()]


def _rows(content: bytes, sha256: str, path: Path) -> Tensor:
    """(N, ROW_BYTES) uint8."""
    if not content or len(content) % ROW_BYTES:
        raise ValueError(f"{path} has {len(content)} bytes and must have a multiple of {ROW_BYTES}; {CURE}")
    check(content, sha256, path)
    return torch.frombuffer(bytearray(content), dtype=torch.uint8).view(-1, ROW_BYTES)


def _images_and_labels(rows: Tensor) -> tuple[Tensor, Tensor]:
    return rows[:, 1:].reshape(-1, *SHAPE).contiguous(), rows[:, 0].long()
