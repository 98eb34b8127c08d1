"""A run's numbers, one JSON object a line: what was written survives a crash, and any tool reads it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any


class MetricsFile:
    """Appends records to a file of JSON lines; each line is on disk when write() returns.

    A run that starts again goes on in the same file. A last line that a crash cut short is closed first, so that it
    spoils no other.

    Args:
        path: the file; it and its folder are made if missing.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        cut_short = _is_cut_short(self.path)
        self._file = self.path.open("a", encoding="utf-8")
        if cut_short:
            self._file.write("\n")

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends one line. nan and infinity become null: JSON has no word for them.

        Raises: TypeError: a value that JSON has no form for, such as a tensor.
        """
        self._file.write(json.dumps(_finite(record), allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> MetricsFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _is_cut_short(path: Path) -> bool:
    if not path.exists() or path.stat().st_size == 0:
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() != b"\n"


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if value is None or isinstance(value, (str, int)):
        return value
    raise TypeError(
        f"a metric is a number, text, list or mapping, got {type(value).__name__}; of a tensor, pass .item()"
    )
