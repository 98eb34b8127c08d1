"""An image file on the disk that is not the official one is named, with what is wrong and the cure."""

import gzip
import zlib

import pytest

from dnipipe.data import cifar10, load_images
from tests.data.official import MEMBERS, drawn, idx, publish_cifar10


def _break_stream(packed, at):
    """The same as gzip until so many bytes are unpacked; from there no block is one."""
    compressor = zlib.compressobj(wbits=31)
    return compressor.compress(gzip.decompress(packed)[:at]) + compressor.flush(zlib.Z_FULL_FLUSH) + b"\xff" * 9


@pytest.mark.parametrize(
    ("damage", "refusal"),
    [
        (lambda packed: packed[:-9], "is no whole gzip file: .*delete it"),
        (lambda packed: packed[:-8] + bytes(8), "is no whole gzip file: CRC.*delete it"),
        (lambda packed: _break_stream(packed, at=9000), "is no whole gzip file: .*delete it"),
        (lambda packed: b"<html>", "is no whole gzip file: Not a gzipped file.*delete it"),
        (lambda packed: gzip.compress(idx(drawn((20,)))), "magic number is 2049 and must be 2051; delete it"),
        (lambda packed: gzip.compress(b""), "magic number is 0 and must be 2051"),
        (
            lambda packed: gzip.compress(gzip.decompress(packed)[:-5]),
            r"its shape \[20, 28, 28\] needs 15696 bytes, but unpacked it has 15691; delete it",
        ),
        (
            lambda packed: gzip.compress(idx(drawn((20, 28, 28)) ^ 1)),
            "is not the official file: its sha256 is [0-9a-f]{64} and must be [0-9a-f]{64}; delete it",
        ),
    ],
)
def test_a_damaged_mnist_file_is_named_with_what_is_wrong(server, digits, tmp_path, damage, refusal):
    load_images("mnist", tmp_path)
    path = tmp_path / "mnist" / "train-images-idx3-ubyte.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=f"{path}.* {refusal}"):
        load_images("mnist", tmp_path)
    path.unlink()
    load_images("mnist", tmp_path)  # the cure


@pytest.mark.parametrize(
    ("damage", "refusal"),
    [
        (lambda content: content[:-1], "has 12291 bytes and must have a multiple of 3073; delete it"),
        (lambda content: b"", "has 0 bytes and must have a multiple of 3073; delete it"),
        (lambda content: content[3073:], "is not the official file: its sha256 is .*; delete it"),
    ],
)
def test_a_damaged_cifar10_file_is_named_with_what_is_wrong(colours, tmp_path, damage, refusal):
    folder = tmp_path / "cifar10" / "cifar-10-batches-bin"
    folder.mkdir(parents=True)
    for name, rows in zip(MEMBERS, colours, strict=True):
        (folder / name).write_bytes(rows.tobytes())
    load_images("cifar10", tmp_path, download=False)
    path = folder / "data_batch_3.bin"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=f"{path} {refusal}"):
        load_images("cifar10", tmp_path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda packed: packed[:-200],
        lambda packed: gzip.compress(gzip.decompress(packed)[:30000]) + b"<html>",
        lambda packed: _break_stream(packed, at=30000),
        lambda packed: b"<html>",
    ],
)
def test_a_damaged_archive_is_named(colours, server, tmp_path, damage):
    load_images("cifar10", tmp_path)
    path = tmp_path / "cifar10" / "cifar-10-binary.tar.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=rf"{path} is no whole tar.gz archive: .*delete it"):
        load_images("cifar10", tmp_path)


def test_an_archive_that_lacks_a_file_is_named(server, colours, tmp_path, monkeypatch):
    rows, names = [batch.tobytes() for batch in colours], [f"data_batch_{n}.bin" for n in (1, 2, 3, 4, 6)]
    publish_cifar10(monkeypatch, server.address, server.folder, rows, [*names, "test_batch.bin"])
    monkeypatch.setattr(cifar10, "MEMBERS", dict.fromkeys(MEMBERS, ""))
    with pytest.raises(ValueError, match=r"cifar-10-binary.tar.gz lacks cifar-10-batches-bin/data_batch_5.bin; delete"):
        load_images("cifar10", tmp_path)
