"""What several GPUs are asked to show, what was measured, and whether it is reached: of 4 and of 8 stages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.rows import Row
from benchmarks.table import NONE, marked, said

RATIO_AT_3S = {4: 1.15, 8: 1.2}


@dataclass(frozen=True)
class Claim:
    """asked: in words, least or most of `limit`. measured: None: not measured. by: whose row."""

    asked: str
    limit: float
    at_most: bool
    measured: float | None
    by: str

    @property
    def reached(self) -> bool | None:
        if self.measured is None:
            return None
        return self.measured <= self.limit if self.at_most else self.measured >= self.limit


def claims(rows: Sequence[Row]) -> list[Claim]:
    """Of the rows of one model; none for other numbers of stages."""
    stages = {row.stages for row in rows}
    if len(stages) != 1 or not stages <= RATIO_AT_3S.keys():
        return []
    (num_stages,) = stages
    return [*(_at_4(rows) if num_stages == 4 else []), *_at_3s(rows, num_stages), _activations(rows)]


def _at_4(rows: Sequence[Row]) -> list[Claim]:
    best, by = _fastest(rows, 4)
    torch_s = [row.tokens_per_s for row in rows if row.schedule != "DNI" and row.microbatches == 4 and row.tokens_per_s]
    rate = best.tokens_per_s if best else None
    over_best = rate / max(torch_s) if rate and torch_s else None
    return [
        Claim("S = 4, M = 4: utilisation >= .95", 0.95, False, best.utilisation if best else None, by),
        Claim("S = 4, M = 4: x 1F1B >= 1.6", 1.6, False, best.ratio_to_1f1b if best else None, by),
        Claim("S = 4, M = 4: x the best schedule of torch >= 1.4", 1.4, False, over_best, by),
    ]


def _at_3s(rows: Sequence[Row], num_stages: int) -> list[Claim]:
    m, limit = 3 * num_stages, RATIO_AT_3S[num_stages]
    rival = _rival(rows, m)
    most = rival.peak_bytes if rival else None
    fits = [row for row in rows if most is None or (row.peak_bytes is not None and row.peak_bytes <= most)]
    best, by = _fastest(fits, m)
    if best is None:  # then it is not reached, by so much
        best, by = _fastest(rows, m)
    share = best.peak_bytes / most if best and best.peak_bytes and most else None
    where = f"S = {num_stages}, M = {m}"
    return [
        Claim(f"{where}: x 1F1B >= {limit}", limit, False, best.ratio_to_1f1b if best else None, by),
        Claim(f"{where}: its peak memory / 1F1B's <= 1", 1.0, True, share, by),
    ]


def _activations(rows: Sequence[Row]) -> Claim:
    best, by = _fastest(rows, 4)
    rival = _rival(rows, 4) or _rival(rows, 8)
    own, theirs = (each.activation_bytes if each else None for each in (best, rival))
    share = own / theirs if own and theirs else None
    where = f"first stage's activations / 1F1B's at M = {rival.microbatches if rival else 4} <= 1/3"
    return Claim(where, 1 / 3, True, share, by)


def _fastest(rows: Sequence[Row], m: int) -> tuple[Row | None, str]:
    """DNI's, at m microbatches, and its name."""
    own = [row for row in rows if row.schedule == "DNI" and row.microbatches == m and row.tokens_per_s]
    best = max(own, key=lambda row: row.tokens_per_s or 0.0, default=None)
    return best, best.label if best else NONE


def _rival(rows: Sequence[Row], m: int) -> Row | None:
    return next((row for row in rows if row.schedule == "1F1B" and row.microbatches == m and not row.refused), None)


def markdown(rows: Sequence[Row]) -> str:
    """GitHub's markdown, below a heading of the third level."""
    words = {True: "reached", False: "NOT reached", None: "not measured"}
    lines = [[each.asked, said(each.measured, ".3f"), words[each.reached], each.by] for each in claims(rows)]
    title = "What is asked, and what was measured"
    if not lines:
        return f"### {title}\n\nNothing is asked of this number of stages.\n"
    return marked(title, ["asked", "measured", "", "by DNI's fastest there"], lines)
