"""A server of image files, and what is published there."""

import threading
from functools import partial
from http.server import ThreadingHTTPServer

import pytest

from tests.data.official import Handler, drawn, idx, publish_cifar10, publish_mnist


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Serves tmp_path/served; .asked: what it was asked for; .address: without a slash at its end."""
    served = tmp_path / "served"
    served.mkdir()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=served)) as server:
        server.asked, server.folder, server.address = [], served, f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def digits(monkeypatch, server):
    """Published: 20 images and labels to train, 7 to test."""
    arrays = drawn((20, 28, 28)), drawn((20,), 10), drawn((7, 28, 28)) ^ 255, drawn((7,), 10)
    publish_mnist(monkeypatch, server.address, server.folder, map(idx, arrays))
    return arrays


@pytest.fixture
def colours(monkeypatch, server):
    """Published: six files of 4 rows."""
    rows = drawn((6, 4, 3073))
    rows[..., 0] %= 10
    publish_cifar10(monkeypatch, server.address, server.folder, [batch.tobytes() for batch in rows])
    return rows
