"""Pictures made of panels, one above the other: rows of one height, margins of one width, whatever their number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure


@dataclass(frozen=True, kw_only=True)
class Panels:
    """The measures of a picture, in inches. row: the height of one row; axis: of what stands under a panel."""

    width: float
    left: float
    right: float
    legend: float
    title: float
    row: float
    axis: float
    bottom: float

    def canvas(self, rows: Sequence[int]) -> tuple[Figure, list[Axes]]:
        """A panel for each number of rows, from top to bottom."""
        height = self.legend + sum(self.title + self.row * count + self.axis for count in rows) + self.bottom
        figure = Figure(figsize=(self.width, height), dpi=150)
        all_axes, top = [], height - self.legend
        for count in rows:
            base = top - self.title - self.row * count
            corner = (self.left / self.width, base / height)
            size = ((self.width - self.left - self.right) / self.width, self.row * count / height)
            all_axes.append(figure.add_axes((*corner, *size)))
            top = base - self.axis
        return figure, all_axes
