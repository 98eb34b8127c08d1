"""Numbers along a logarithmic axis that one reads at once: 2, 5, 10, not 2 x 10^0."""

from __future__ import annotations

from matplotlib.axis import Axis
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter


def plain_log_ticks(axis: Axis) -> None:
    """At 1, 2 and 5 times each power of ten, as plain numbers; the axis must be logarithmic already."""
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
