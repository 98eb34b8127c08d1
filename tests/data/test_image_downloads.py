"""Image files are fetched once, whoever asks; of what goes wrong nothing is left, and the error names the cure."""

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from dnipipe.data import load_images, mnist
from tests.data.official import Handler, names_in


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_another_file_from_the_address_is_refused_and_nothing_is_left(server, digits, colours, tmp_path, name):
    for file in server.folder.iterdir():
        file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(ValueError, match=rf"{server.address}/.*gave another file than the official one"):
        load_images(name, tmp_path / "data")
    assert names_in(tmp_path / "data") == []


def test_many_may_fetch_at_once(server, digits, tmp_path):
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: load_images("mnist", tmp_path / "data"), range(8)))
    assert all(torch.equal(data.train_images, found[0].train_images) for data in found)
    assert names_in(tmp_path / "data") == sorted(file.name for file in mnist.FILES)


def test_a_download_that_breaks_off_leaves_nothing(server, digits, tmp_path, monkeypatch):
    monkeypatch.setattr(Handler, "copyfile", lambda self, source, output: output.write(source.read(10)))
    with pytest.raises(OSError, match="train-images-idx3-ubyte.gz could not be fetched"):
        load_images("mnist", tmp_path / "data")
    assert names_in(tmp_path / "data") == []


def test_what_the_server_does_not_have_is_named_with_the_cure(server, digits, tmp_path):
    (server.folder / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(OSError, match=r"t10k-labels-idx1-ubyte.gz could not be fetched to .*mnist/t10k-labels.*: 404"):
        load_images("mnist", tmp_path / "data")
    assert len(names_in(tmp_path / "data")) == 3  # the others need not be fetched again


def test_without_a_network_address_folder_and_variable_are_named(digits, server, tmp_path):
    server.shutdown()
    server.server_close()
    with pytest.raises(
        OSError, match=rf"{server.address}/train-images.* to {tmp_path}/data/mnist/train.*: .*DNIPIPE_DATA"
    ):
        load_images("mnist", tmp_path / "data")


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_without_download_a_missing_file_is_an_error_and_nobody_is_asked(server, digits, colours, tmp_path, name):
    with pytest.raises(FileNotFoundError, match=rf"there is no {tmp_path}/data/{name}/.*gz: .*DNIPIPE_DATA"):
        load_images(name, tmp_path / "data", download=False)
    assert server.asked == [] and not (tmp_path / "data").exists()


def test_without_pooch_only_a_download_is_refused(server, digits, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pooch", None)  # as if it were not installed
    with pytest.raises(ImportError, match=r"pooch: pip install 'dnipipe\[paper\]', put it there by hand"):
        load_images("mnist", tmp_path / "data")
    server.folder.rename(tmp_path / "mnist")
    assert len(load_images("mnist", tmp_path).test_labels) == 7
