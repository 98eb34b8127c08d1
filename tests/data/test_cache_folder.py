"""Where image files lie when nobody names a folder."""

from pathlib import Path

import pytest

from dnipipe.data import cache_folder, load_images
from tests.data.official import names_in


def test_the_variable_names_the_folder_and_else_it_is_the_cache(server, digits, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("DNIPIPE_DATA", str(tmp_path / "data"))
    load_images("mnist")
    monkeypatch.delenv("DNIPIPE_DATA")
    load_images("mnist")
    assert names_in(tmp_path / "data" / "mnist") == names_in(tmp_path / "cache" / "dnipipe" / "mnist") != []


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
