"""A schedule that fails must not take the others with it: who failed is written down, and they run again without it.

A rank that is out of memory cannot go on while its neighbours wait for it inside NCCL, so all processes end, and the
launcher starts new ones for what is not measured yet.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

OUT_OF_MEMORY = "out of memory"


class ContestantError(RuntimeError):
    """title: whose work failed. The cause is the error that it met."""

    def __init__(self, title: str) -> None:
        super().__init__(title)
        self.title = title


@contextmanager
def work_of(title: str) -> Iterator[None]:
    """What fails within is this contestant's failure; ValueError, which refuses before anything runs, passes.

    Raises: ContestantError.
    """
    try:
        yield
    except (ValueError, ContestantError):
        raise
    except Exception as error:
        raise ContestantError(title) from error


@dataclass(frozen=True)
class Failure:
    """title: whose; reason: one line. at_s: seconds since the Unix epoch; the first to fail is the one to blame."""

    title: str
    microbatches: int
    rank: int
    reason: str
    at_s: float


def note_failure(error: ContestantError, microbatches: int, rank: int, folder: Path) -> None:
    """Writes one rank's account of it into the folder."""
    cause = error.__cause__ or error
    first, *_ = str(cause).strip().splitlines() or [type(cause).__name__]
    memory = isinstance(cause, torch.OutOfMemoryError) or OUT_OF_MEMORY in str(cause).lower()
    kind = OUT_OF_MEMORY if memory else f"failed with {type(cause).__name__}"
    failure = Failure(error.title, microbatches, rank, f"{kind} on rank {rank}: {first}", time.time())
    path = folder / f"failure-{rank}.json"
    path.with_suffix(".part").write_text(json.dumps(asdict(failure)), encoding="utf-8")
    path.with_suffix(".part").replace(path)  # at once: the launcher ends all ranks when the first has failed


def take_failure(folder: Path) -> Failure | None:
    """The first failure of those noted, which are removed; one for want of memory goes before all that followed it."""
    failures = []
    for path in sorted(folder.glob("failure-*.json")):
        failures.append(Failure(**json.loads(path.read_text(encoding="utf-8"))))
        path.unlink()
    return min(failures, key=lambda each: (not is_memory(each.reason), each.at_s), default=None)


def is_memory(reason: str) -> bool:
    """Whether a row's `refused` says that memory was short, which is a result and no fault."""
    return reason.startswith(OUT_OF_MEMORY)
