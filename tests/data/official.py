"""Image files of ours that stand for the official ones: made, published at an address, and served from there."""

import gzip
import hashlib
import io
import tarfile
from dataclasses import replace
from http.server import SimpleHTTPRequestHandler

import numpy as np

from dnipipe.data import cifar10, mnist

MEMBERS = list(cifar10.MEMBERS)


def drawn(shape, high=256):
    """Bytes at random, always the same of as many dimensions."""
    return np.random.default_rng(len(shape)).integers(high, size=shape, dtype=np.uint8)


def idx(numbers):
    """An unpacked file of the MNIST format."""
    header = bytes([0, 0, 8, numbers.ndim]) + np.array(numbers.shape, ">i4").tobytes()
    return header + numbers.tobytes()


def _sha256(content):
    return hashlib.sha256(content).hexdigest()


def publish_mnist(monkeypatch, address, folder, contents):
    """Writes four files, and makes them the official ones at an address."""
    files = []
    for file, content in zip(mnist.FILES, contents, strict=True):
        packed = gzip.compress(content)
        (folder / file.name).write_bytes(packed)
        files.append(replace(file, url=f"{address}/{file.name}", sha256=_sha256(packed)))
    monkeypatch.setattr(mnist, "FILES", tuple(files))


def publish_cifar10(monkeypatch, address, folder, rows, names=MEMBERS):
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


class Handler(SimpleHTTPRequestHandler):
    """Its server remembers in .asked what it was asked for."""

    def do_GET(self):
        self.server.asked.append(self.path)
        super().do_GET()

    def log_message(self, *_):
        pass


def names_in(folder):
    """Of all files, however deep."""
    return sorted(path.name for path in folder.rglob("*") if path.is_file())
