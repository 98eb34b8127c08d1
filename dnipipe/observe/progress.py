"""How far a run is, in one line: live in a terminal, a plain line every ten seconds in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar


class Progress:
    """Shows step, true loss, tokens per second, predictor cosine and elapsed time.

    Args:
        total_s: the run's budget in seconds; 0 means that the run ends by its number of steps and no bar is drawn.
        enabled: False shows nothing at all; pass `rank == 0`.
        every_s: seconds between two plain lines, when the stream is no terminal.
        stream: where to write; stdout by default.
        clock: seconds from any zero, growing; for tests.
    """

    def __init__(
        self,
        *,
        total_s: float,
        enabled: bool = True,
        every_s: float = 10.0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total_s = total_s
        self._enabled = enabled
        self._stream = sys.stdout if stream is None else stream
        self._clock = clock
        self._bar = _bar(total_s, self._stream) if enabled and self._stream.isatty() else None
        # a person sees four changes a second, and drawing costs the trainer's own thread
        self._every_s = every_s if self._bar is None else 0.25
        self._shown_at = -float("inf")
        self._waiting = ""
        if self._bar is not None:
            self._task = self._bar.add_task("", total=total_s or None)
            self._bar.start()

    def update(
        self, *, step: int, loss: float | None, tokens_per_s: float, cosine: float | None, elapsed_s: float
    ) -> None:
        """Says where the run is; shown at once, or by a later call if a line was shown just now.

        Args:
            step: of the optimizer, from 0.
            loss: true mean loss per byte or token in nats; None before the first has come home.
            tokens_per_s: training bytes or tokens per second.
            cosine: between predicted and true gradient, -1 to 1; None where nothing is predicted.
            elapsed_s: seconds of training so far.
        """
        if not self._enabled:
            return
        self._waiting = _line(step, loss, tokens_per_s, cosine, elapsed_s, self._total_s)
        self._elapsed_s = elapsed_s
        if self._clock() - self._shown_at >= self._every_s:
            self._show()

    def close(self) -> None:
        """Shows what update() said last and gives the terminal back; calling it again does nothing."""
        if self._waiting:
            self._show()
        if self._bar is not None:
            self._bar.stop()

    def _show(self) -> None:
        if self._bar is None:
            print(self._waiting, file=self._stream, flush=True)
        else:
            self._bar.update(self._task, description=self._waiting, completed=self._elapsed_s, refresh=True)
        self._waiting = ""
        self._shown_at = self._clock()


def _bar(total_s: float, stream: TextIO) -> Bar:
    columns = [TextColumn("{task.description}", markup=False)]
    bar = [BarColumn(bar_width=20)] if total_s else []
    # auto_refresh would start a thread that competes with the trainer for the interpreter
    return Bar(*bar, *columns, console=Console(file=stream), auto_refresh=False)


def _line(
    step: int, loss: float | None, tokens_per_s: float, cosine: float | None, elapsed_s: float, total_s: float
) -> str:
    loss_text = "-" if loss is None else f"{loss:.4f}"
    cosine_text = "-" if cosine is None else f"{cosine:+.2f}"
    budget = f" of {total_s:.0f}" if total_s else ""
    pace = f"{_short(tokens_per_s)}tok/s  cosine {cosine_text}"
    return f"step {step:>6}  loss {loss_text}  {pace}  {elapsed_s:.0f}{budget} s"


def _short(number: float) -> str:
    """1234567 -> "1.2 M"."""
    for prefix in ("", "k", "M", "G"):
        if abs(number) < 1000:
            return f"{number:.1f} {prefix}"
        number /= 1000
    return f"{number:.1f} T"
