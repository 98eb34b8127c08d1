"""Files that others publish: their address, the checksum that tells them from any other; fetched where missing."""

from __future__ import annotations

import hashlib
import importlib
from dataclasses import dataclass
from pathlib import Path

CURE = "delete it, then it is fetched anew"


@dataclass(frozen=True)
class OfficialFile:
    """url: its address, which ends in its name. sha256: of its bytes, in hexadecimal."""

    url: str
    sha256: str

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]


def obtain(file: OfficialFile, folder: Path, *, download: bool) -> Path:
    """The file's path in a folder, into which it is fetched if it is not there.

    Whatever is there already is taken as it is: who reads it checks it, see check(). What is fetched gets its name only
    when it is whole and its checksum is right, so several processes may fetch it at one time.

    Raises:
        FileNotFoundError: it is not there, and download is False.
        ImportError: it must be fetched, and the package pooch is missing.
        OSError: it could not be fetched or written.
        ValueError: the address gives another file.
    """
    path = folder / file.name
    if path.is_file():
        return path
    if not download:
        raise FileNotFoundError(f"there is no {path}: allow the download, or {_by_hand(file, folder)}")
    try:
        pooch = importlib.import_module("pooch")
    except ImportError as error:
        raise ImportError(
            f"to fetch {file.url} takes the package pooch: pip install 'dnipipe[paper]', or {_by_hand(file, folder)}"
        ) from error
    try:
        downloader = pooch.HTTPDownloader(timeout=30, chunk_size=1 << 16)
        pooch.retrieve(file.url, f"sha256:{file.sha256}", fname=file.name, path=folder, downloader=downloader)
    except OSError as error:  # requests raises no other
        raise OSError(f"{file.url} could not be fetched into {folder}: {error}; {_by_hand(file, folder)}") from error
    except ValueError as error:
        raise ValueError(
            f"{file.url} gave another file than the official one, which was dropped: {error} Try again, or "
            f"{_by_hand(file, folder)}"
        ) from error
    return path


def check(content: bytes, sha256: str, path: Path) -> None:
    """Refuses a file that is not the official one, whatever it holds.

    Raises: ValueError: another checksum.
    """
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise ValueError(f"{path} is not the official file: its sha256 is {found} and must be {sha256}; {CURE}")


def _by_hand(file: OfficialFile, folder: Path) -> str:
    return (
        f"put {file.name} from {file.url} into {folder}, or let DNIPIPE_DATA name a folder that has it in {folder.name}"
    )
