"""Official image files: read to the byte, fetched once, from a server of our own here, and any other file refused."""

import gzip
import hashlib
import io
import os
import sys
import tarfile
import threading
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch

from dnipipe.data import cache_folder, cifar10, load_images, mnist

REAL = os.environ.get("DNIPIPE_DATA", "")
MEMBERS = list(cifar10.MEMBERS)


def _numbers(shape, high=256):
    return np.random.default_rng(len(shape)).integers(high, size=shape, dtype=np.uint8)


def _idx(numbers):
    header = bytes([0, 0, 8, numbers.ndim]) + np.array(numbers.shape, ">i4").tobytes()
    return header + numbers.tobytes()


def _sha256(content):
    return hashlib.sha256(content).hexdigest()


def _publish_mnist(monkeypatch, address, folder, contents):
    """Writes four files, and makes them the official ones at an address."""
    files = []
    for file, content in zip(mnist.FILES, contents, strict=True):
        packed = gzip.compress(content)
        (folder / file.name).write_bytes(packed)
        files.append(replace(file, url=f"{address}/{file.name}", sha256=_sha256(packed)))
    monkeypatch.setattr(mnist, "FILES", tuple(files))


def _publish_cifar10(monkeypatch, address, folder, rows, names=MEMBERS):
    """The same with an archive of files of rows; one more file lies in it, as in the real one."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for name, content in [("readme.html", b"?"), *zip(names, rows, strict=True)]:
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    (folder / cifar10.ARCHIVE.name).write_bytes(packed.getvalue())
    file = replace(cifar10.ARCHIVE, url=f"{address}/{cifar10.ARCHIVE.name}", sha256=_sha256(packed.getvalue()))
    monkeypatch.setattr(cifar10, "ARCHIVE", file)
    monkeypatch.setattr(cifar10, "MEMBERS", dict(zip(names, map(_sha256, rows), strict=True)))


class _Handler(SimpleHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append(self.path)
        super().do_GET()

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Serves tmp_path/served; .asked: what it was asked for; .address: without a slash at its end."""
    served = tmp_path / "served"
    served.mkdir()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, directory=served)) as server:
        server.asked, server.folder, server.address = [], served, f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def digits(monkeypatch, server):
    """Published: 20 images and labels to train, 7 to test."""
    arrays = _numbers((20, 28, 28)), _numbers((20,), 10), _numbers((7, 28, 28)) ^ 255, _numbers((7,), 10)
    _publish_mnist(monkeypatch, server.address, server.folder, map(_idx, arrays))
    return arrays


@pytest.fixture
def colours(monkeypatch, server):
    """Published: six files of 4 rows."""
    rows = _numbers((6, 4, 3073))
    rows[..., 0] %= 10
    _publish_cifar10(monkeypatch, server.address, server.folder, [batch.tobytes() for batch in rows])
    return rows


def _files(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_mnist_is_fetched_once_and_read_in_its_order(server, digits, tmp_path):
    data = load_images("mnist", tmp_path / "data")
    assert sorted(server.asked) == sorted(f"/{file.name}" for file in mnist.FILES)
    assert _files(tmp_path / "data") == sorted(file.name for file in mnist.FILES)
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
        assert server.asked == ["/cifar-10-binary.tar.gz"] and _files(tmp_path / "data") == ["cifar-10-binary.tar.gz"]
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


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_another_file_from_the_address_is_refused_and_nothing_is_left(server, digits, colours, tmp_path, name):
    for file in server.folder.iterdir():
        file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(ValueError, match=rf"{server.address}/.*gave another file than the official one"):
        load_images(name, tmp_path / "data")
    assert _files(tmp_path / "data") == []


def test_a_download_that_breaks_off_leaves_nothing(server, digits, tmp_path, monkeypatch):
    monkeypatch.setattr(_Handler, "copyfile", lambda self, source, output: output.write(source.read(10)))
    with pytest.raises(OSError, match="train-images-idx3-ubyte.gz could not be fetched"):
        load_images("mnist", tmp_path / "data")
    assert _files(tmp_path / "data") == []


def test_what_the_server_does_not_have_is_named_with_the_cure(server, digits, tmp_path):
    (server.folder / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(OSError, match=r"t10k-labels-idx1-ubyte.gz could not be fetched into .*mnist: 404"):
        load_images("mnist", tmp_path / "data")
    assert len(_files(tmp_path / "data")) == 3  # the others need not be fetched again


def test_without_a_network_address_folder_and_variable_are_named(digits, server, tmp_path):
    server.shutdown()
    server.server_close()
    with pytest.raises(OSError, match=rf"{server.address}/train-images.* into {tmp_path}/data/mnist: .*DNIPIPE_DATA"):
        load_images("mnist", tmp_path / "data")


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_without_download_a_missing_file_is_an_error_and_nobody_is_asked(server, digits, colours, tmp_path, name):
    with pytest.raises(FileNotFoundError, match=rf"there is no {tmp_path}/data/{name}/.*gz: .*DNIPIPE_DATA"):
        load_images(name, tmp_path / "data", download=False)
    assert server.asked == [] and not (tmp_path / "data").exists()


def test_without_pooch_only_a_download_is_refused(server, digits, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pooch", None)  # as if it were not installed
    with pytest.raises(ImportError, match=r"pooch: pip install 'dnipipe\[paper\]', or put train-images"):
        load_images("mnist", tmp_path / "data")
    server.folder.rename(tmp_path / "mnist")
    assert len(load_images("mnist", tmp_path).test_labels) == 7


@pytest.mark.parametrize(
    ("damage", "refusal"),
    [
        (lambda packed: packed[:-9], "is no whole gzip file: .*delete it"),
        (lambda packed: packed[:-8] + bytes(8), "is no whole gzip file: CRC.*delete it"),
        (lambda packed: packed[:20] + bytes([255]) * 9 + packed[29:], "is no whole gzip file: .*delete it"),
        (lambda packed: b"<html>", "is no whole gzip file: Not a gzipped file.*delete it"),
        (lambda packed: gzip.compress(_idx(_numbers((20,)))), "magic number is 2049 and must be 2051; delete it"),
        (lambda packed: gzip.compress(b""), "magic number is 0 and must be 2051"),
        (
            lambda packed: gzip.compress(gzip.decompress(packed)[:-5]),
            r"its shape \[20, 28, 28\] needs 15696 bytes, but unpacked it has 15691; delete it",
        ),
        (
            lambda packed: gzip.compress(_idx(_numbers((20, 28, 28)) ^ 1)),
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
    [lambda packed: packed[:-200], lambda packed: packed[:3000] + b"?" * 99 + packed[3099:], lambda packed: b"<html>"],
)
def test_a_damaged_archive_is_named(colours, server, tmp_path, damage):
    load_images("cifar10", tmp_path)
    path = tmp_path / "cifar10" / "cifar-10-binary.tar.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=rf"{path} is no whole tar.gz archive: .*delete it"):
        load_images("cifar10", tmp_path)


def test_an_archive_that_lacks_a_file_is_named(server, colours, tmp_path, monkeypatch):
    rows, names = [batch.tobytes() for batch in colours], [f"data_batch_{n}.bin" for n in (1, 2, 3, 4, 6)]
    _publish_cifar10(monkeypatch, server.address, server.folder, rows, [*names, "test_batch.bin"])
    monkeypatch.setattr(cifar10, "MEMBERS", dict.fromkeys(MEMBERS, ""))
    with pytest.raises(ValueError, match=r"cifar-10-binary.tar.gz lacks cifar-10-batches-bin/data_batch_5.bin; delete"):
        load_images("cifar10", tmp_path)


def test_the_variable_names_the_folder_and_else_it_is_the_cache(server, digits, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("DNIPIPE_DATA", str(tmp_path / "data"))
    load_images("mnist")
    monkeypatch.delenv("DNIPIPE_DATA")
    load_images("mnist")
    assert _files(tmp_path / "data" / "mnist") == _files(tmp_path / "cache" / "dnipipe" / "mnist") != []


@pytest.mark.parametrize(
    ("system", "folder"),
    [
        ("Linux", "~/.cache/dnipipe"),
        ("Darwin", "~/Library/Caches/dnipipe"),
        ("Windows", "~/AppData/Local/dnipipe/Cache"),
    ],
)
def test_the_cache_is_where_the_system_has_it(monkeypatch, system, folder):
    for variable in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr("platform.system", lambda: system)
    assert cache_folder.cache_folder() == Path(folder).expanduser()


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
    pixels = data.train_images.double() / 255
    assert pixels.mean((0, 2, 3)).tolist() == pytest.approx([0.4914, 0.4822, 0.4465], abs=1e-4)
