"""The tables of a comparison, for a terminal and for a page: one per workload, then each schedule at its own best M."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .rows import Row, best_of, grouped, place, same_batch, side_by_side, with_ratios, work

NONE = "–"
Column = tuple[str, Callable[[Row], str]]
"""A heading, in as many lines as a narrow column needs, and what stands below it, of a row that was not refused."""


@dataclass(frozen=True)
class _Sheet:
    """rows: by their number of microbatches; in the table of each schedule's best, one per schedule."""

    title: str
    rows: Sequence[Row]
    of_best: bool = False

    @property
    def columns(self) -> list[Column]:
        rival = " best" if self.of_best else ""
        return [
            ("schedule", lambda row: row.label),
            ("M", lambda row: f"{row.microbatches}"),
            ("step ms\n± IQR", _step),
            ("tokens/s", lambda row: said(row.tokens_per_s, ",.0f")),
            ("utilisation", lambda row: said(row.utilisation, ".2f")),
            ("bound", lambda row: said(row.bound, ".2f")),
            ("predicted\nms", lambda row: ms(row.predicted_ms, row.predicted_ms)),
            (f"x\nGPipe{rival}", lambda row: said(row.ratio_to_gpipe, ".2f")),
            ("bound", lambda row: said(row.bound_to_gpipe, ".2f")),
            (f"x\n1F1B{rival}", lambda row: said(row.ratio_to_1f1b, ".2f")),
            ("bound", lambda row: said(row.bound_to_1f1b, ".2f")),
            ("peak", lambda row: size(row.peak_bytes)),
            ("activations\nfirst stage", lambda row: size(row.activation_bytes)),
            ("in\nflight", lambda row: said(row.in_flight, ".4g")),
            ("interface\nshare", lambda row: said(row.interface_cost_share, ".1%")),
        ]

    def cells(self, row: Row) -> list[str]:
        """Under each column; of a refused row the third says so and the rest is empty."""
        cells = [cell(row) for _, cell in self.columns]
        return cells if row.refused is None else [*cells[:2], "refused", *[""] * (len(cells) - 3)]

    def refusals(self) -> list[tuple[str, str]]:
        """The schedules that were refused, and the reason: each reason once, in one line."""
        refused = [(row, " ".join(row.refused.split())) for row in self.rows if row.refused is not None]
        reasons = dict.fromkeys(reason for _, reason in refused)
        names = [dict.fromkeys(row.label for row, said in refused if said == reason) for reason in reasons]
        return [(", ".join(labels), reason) for labels, reason in zip(names, reasons, strict=True)]


def show(console: Console, rows: Sequence[Row]) -> None:
    for sheet in _sheets(rows):
        print_whole(console, _drawn(sheet))


def print_whole(console: Console, table: Table) -> None:
    """Even where the console is narrower: a log has 80 columns whoever reads it."""
    table.width = console.measure(table, options=console.options.update(max_width=1000)).maximum
    console.print(table, crop=False)


def markdown(rows: Sequence[Row]) -> str:
    """The same tables as GitHub's markdown, each below a heading of the third level."""
    return "\n".join(_marked(sheet) for sheet in _sheets(rows))


def _sheets(rows: Sequence[Row]) -> list[_Sheet]:
    sheets = [_Sheet(f"{place(alike[0])}: {work(alike)}", alike) for alike in side_by_side(rows)]
    for alike in grouped(rows, same_batch):
        if len({row.microbatches for row in alike}) > 1:
            title = f"Each at its own best M, {place(alike[0])}: {work(alike)}"
            sheets.append(_Sheet(title, with_ratios(best_of(alike), same_batch), of_best=True))
    return sheets


def _drawn(sheet: _Sheet) -> Table:
    ends = [
        not sheet.of_best and after.microbatches != row.microbatches
        for row, after in zip(sheet.rows, sheet.rows[1:], strict=False)
    ]
    headings = [heading for heading, _ in sheet.columns]
    table = drawn(sheet.title, headings, [sheet.cells(row) for row in sheet.rows], [*ends, False])
    refusals = [f"{names} refused: {reason}" for names, reason in sheet.refusals()]
    table.caption = Text("\n".join(refusals)) if refusals else None
    return table


def drawn(title: str, headings: Sequence[str], lines: Sequence[Sequence[str]], ends: Sequence[bool]) -> Table:
    """A table for a terminal. ends: of each line, whether a rule is drawn below it."""
    # Text, for a plain str would lose what stands in brackets, as torch's messages have it
    table = Table(title=Text(title), title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD)
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left", no_wrap=True, vertical="bottom")
    for line, end in zip(lines, ends, strict=True):
        table.add_row(*line, end_section=end)
    return table


def _marked(sheet: _Sheet) -> str:
    refusals = [f"\n{names} refused: `` {reason} ``\n" for names, reason in sheet.refusals()]
    return marked(sheet.title, [heading for heading, _ in sheet.columns], map(sheet.cells, sheet.rows)) + "".join(
        refusals
    )


def marked(title: str, headings: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """The same as GitHub's markdown, below a heading of the third level."""
    first = [heading.replace("\n", " ") for heading in headings]
    rows = [first, ["---", *["---:"] * (len(first) - 1)], *lines]
    return (
        "\n".join(
            [f"### {title}\n", *("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)]
        )
        + "\n"
    )


def _step(row: Row) -> str:
    spread = "" if row.spread_ms is None else f" ± {ms(row.spread_ms, row.step_ms)}"
    return ms(row.step_ms, row.step_ms) + spread


def ms(value: float | None, scale: float | None) -> str:
    """Milliseconds, with the digits that suit a time of `scale`: a time and its spread have as many."""
    digits = 0 if scale is None or scale >= 1000 else 1 if scale >= 10 else 2
    return said(value, f",.{digits}f")


def said(value: float | None, form: str) -> str:
    return NONE if value is None else format(value, form)


def size(num_bytes: int | None) -> str:
    if num_bytes is None:
        return NONE
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.0f} MB"
