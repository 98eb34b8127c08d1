"""Which files a list of files and folders means, in an order that all ranks and runs agree on, and the text in them."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path


def stdlib_sources() -> list[Path]:
    """The *.py files of the installed standard library, sorted; what was installed beside it is left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    foreign = {"site-packages", "dist-packages"}
    return sorted(path for path in root.rglob("*.py") if foreign.isdisjoint(path.relative_to(root).parts))


def find_files(paths: Iterable[str | Path], suffixes: tuple[str, ...] = ()) -> list[Path]:
    """Files as they are given, and for a folder all that fit in it and in its folders, sorted; hidden ones do not.

    Args:   suffixes: of files that fit, as ".npy"; without any, all do.
    Raises: FileNotFoundError: no such path. ValueError: a file that does not fit, or a folder without one that does.
    """
    wanted = " or ".join(suffixes) or "visible"
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.is_file() and _fits(file, path, suffixes))
            if not files:
                raise ValueError(f"the folder {path} holds no {wanted} file: give another, or the files themselves")
            found += files
        elif not path.exists():
            raise FileNotFoundError(f"there is no file or folder {path}: give one that exists, or leave it out")
        elif suffixes and path.suffix not in suffixes:
            raise ValueError(f"{path}: its name must end in {wanted}: rename it, or leave it out")
        else:
            found.append(path)
    return found


def read_texts(paths: Iterable[Path], max_bytes: int) -> Iterator[tuple[Path, bytes]]:
    """Each file with its bytes, one file in memory at a time.

    Args: max_bytes: of all files together; the file that reaches it is cut and the rest is not read.
    """
    left = max_bytes
    for path in paths:
        if left <= 0:
            return
        with open(path, "rb") as file:
            text = file.read(left)
        left -= len(text)
        yield path, text


def _fits(file: Path, folder: Path, suffixes: tuple[str, ...]) -> bool:
    hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
    return not hidden and (not suffixes or file.suffix in suffixes)
