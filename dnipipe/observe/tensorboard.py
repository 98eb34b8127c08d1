"""A run's numbers for TensorBoard, from the same records as the file of metrics."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

PARTS = ("boundary", "rank", "stage")
VALIDATION = "val_bits"


class TensorBoardFile:
    """Writes each number of a record as a scalar, at the record's step; a list becomes a scalar for each part.

        {"schedule": "DNI", "step": 20, "loss": 2.5, "cosine_by_boundary": [0.8, 0.6]}
        ->  loss    cosine/boundary 0    cosine/boundary 1

    A validation repeats numbers of the line before it, of the same step: they are shown once.

    Args:
        folder: made if missing, of one schedule alone; TensorBoard draws it over the folders beside it.
        resumed_step: what was written there after this many steps will be written again, and is hidden; None or 0
            hides nothing.

    Raises: ImportError: TensorBoard is not installed.
    """

    def __init__(self, folder: str | Path, *, resumed_step: int | None = None) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter  # here: nobody else needs it, and it takes a second
        except ImportError as error:
            raise ImportError(
                "TensorBoard is not installed: pip install 'dnipipe[tensorboard]', or do without it"
            ) from error
        self._resumed_step = resumed_step or -1
        self._shown: dict[str, int] = {}
        purge_step = resumed_step + 1 if resumed_step else None
        self._writer = SummaryWriter(str(folder), purge_step=purge_step)

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends the numbers of one record, which has at least a step; they are on disk at its return.

        What is no finite number is left out.
        """
        step = record["step"]
        for name, value in _scalars(record):
            # at resumed_step itself all is there already, but for a validation, which came after the checkpoint
            if step > self._shown.get(name, -1 if name == VALIDATION else self._resumed_step):
                self._writer.add_scalar(name, value, global_step=step)
                self._shown[name] = step
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()

    def __enter__(self) -> TensorBoardFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _scalars(record: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """(name, finite number) of all that a record says, but for the step, which is the axis."""
    for key, value in record.items():
        if key == "step":
            continue
        if not isinstance(value, (list, tuple)):
            parts = [(key, value)]
        else:
            base, _, part = key.rpartition("_by_")
            named = (base, part) if part in PARTS else (key, "part")
            parts = [(f"{named[0]}/{named[1]} {index}", each) for index, each in enumerate(value)]
        yield from ((name, float(each)) for name, each in parts if _is_finite(each))


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
