"""Where the seconds before the first step go."""

from __future__ import annotations

import os
import time
from pathlib import Path


class Startup:
    """Names what was done since the process started."""

    def __init__(self) -> None:
        self.phases: dict[str, float] = {}
        """Seconds of each, in their order."""
        self._until_s = time.monotonic() - _age_s()

    def done(self, phase: str) -> None:
        """What took all the time since the phase before."""
        now_s = time.monotonic()
        self.phases[phase] = self.phases.get(phase, 0.0) + now_s - self._until_s
        self._until_s = now_s

    def in_words(self) -> str:
        """As in "8.2 s to the first step: imports 5.1, first step 3.1"."""
        of_each = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in self.phases.items())
        return f"{sum(self.phases.values()):.1f} s to the first step: {of_each}"


def _age_s() -> float:
    """Seconds since this process began, where the system tells; else 0."""
    stat = Path("/proc/self/stat")
    if not stat.exists():
        return 0.0
    # after the command in parentheses, which may hold spaces: the 20th field is the start, in ticks since boot
    ticks = int(stat.read_text(encoding="utf-8").rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
