"""The tables hold every number, say what was refused and why, and lose nothing to a narrow console or to markup."""

import io
from dataclasses import replace

from rich.console import Console

from benchmarks.rows import with_ratios
from benchmarks.table import markdown, show
from tests.benchmarks.test_rows import a_row


def shown(rows, width=80):
    console = Console(file=io.StringIO(), width=width)
    show(console, rows)
    return console.file.getvalue()


def measured():
    """Two numbers of microbatches, one refusal at each, in an order that is not theirs."""
    rows = []
    for count in (8, 4):
        rows += [a_row("GPipe", count, 1000.0 * count), a_row("1F1B", count, None)]
        rows += [a_row("DNI", count, 1500.0 * count, "linear", peak_bytes=3_210_000_000, in_flight=2.5)]
        rows[-1] = replace(rows[-1], activation_bytes=987_000_000)
    return with_ratios(rows)


def cells(line):
    return [cell.strip() for cell in line.strip().strip("|").split(" | ")]


def test_a_row_shows_its_numbers_and_a_dash_for_what_it_has_not():
    lines = [line.split() for line in shown(measured()).splitlines()]
    assert "GPipe 4 12.3 ± 0.2 4,000 0.70 0.80 11.5 1.00 1.00 – – – – 4 –".split() in lines
    assert "DNI linear 8 12.3 ± 0.2 12,000 0.70 0.80 11.5 1.50 1.00 – – 3.21 GB 987 MB 2.5 4.1%".split() in lines


def test_the_title_says_the_workload():
    text = " ".join(shown([a_row(card="A [red] processor")]).split())
    assert "cpu, A [red] processor: 4 stages of 1 block, width 128, vocabulary 256, float32" in text
    assert "microbatches of 2 x 64 tokens" in text


def test_rows_are_sorted_by_microbatches_and_then_as_given():
    table = [cells(line)[:2] for line in markdown(measured()).splitlines() if line.startswith("|")][2:]
    assert table == [[name, count] for count in "48" for name in ("GPipe", "1F1B", "DNI linear")]


def test_a_refused_row_is_empty_and_its_reason_is_said_once_brackets_and_all():
    rows = measured()
    lines = [line.split() for line in shown(rows).splitlines()]
    assert ["1F1B", "4", "refused"] in lines and ["1F1B", "8", "refused"] in lines
    for text in (shown(rows), markdown(rows)):
        assert text.count("no [such] schedule") == 1


def test_a_reason_of_many_lines_stays_one_line_of_markdown():
    text = markdown([a_row(), a_row("1F1B", tokens_per_s=None, refused="first `a`\n\n  | second")])
    assert "\n\n1F1B refused: `` first `a` | second ``\n" in text


def test_times_have_the_digits_that_suit_them():
    rows = [a_row(step_ms=1.234, spread_ms=0.5, peak_bytes=987_654_321), a_row(step_ms=1234.5, spread_ms=12.3)]
    text = shown(rows)
    assert "1.23 ± 0.50" in text and "1,234 ± 12 " in text and "988 MB" in text


def test_a_narrow_console_cuts_nothing():
    rows = measured()
    narrow, wide = ([line.split() for line in shown(rows, width).splitlines()] for width in (20, 300))
    assert [line for line in narrow if "GPipe" in line] == [line for line in wide if "GPipe" in line]
    assert "…" not in shown(rows, 20)


def test_each_workload_has_its_table_and_only_a_batch_cut_in_several_ways_has_a_best_one():
    assert shown(measured()).count("predicted") == 1 and "own best" not in shown(measured())
    assert markdown([a_row(), a_row(stages=2)]).count("###") == 2

    cut = [a_row("GPipe", 4, 100.0), a_row("GPipe", 8, 80.0, microbatch_size=1), a_row("DNI", 4, 110.0, "linear")]
    cut += [a_row("DNI", 8, 150.0, "linear", microbatch_size=1)]
    first, best = markdown(with_ratios(cut)).split("### ")[1:]
    assert "own best M" in best and "own best M" not in first and "batches of 8 x 64 tokens" in best
    rows = [cells(line) for line in best.splitlines() if line.startswith("| ")]
    x_gpipe = rows[0].index("x GPipe best")
    assert [(row[0], row[1], row[x_gpipe]) for row in rows[2:]] == [("GPipe", "4", "1.00"), ("DNI linear", "8", "1.50")]


def test_the_markdown_is_well_formed():
    text = markdown([*measured(), a_row(card="A|B", stages=2, interface="a|b")])
    assert text.endswith("\n") and not text.endswith("\n\n")
    for block in text.split("### ")[1:]:
        title, blank, *lines = block.splitlines()
        table = [line for line in lines if line.startswith("|")]
        assert title and blank == "" and lines[: len(table)] == table
        assert all(line.endswith("|") and line.replace("\\|", "").count("|") == 16 for line in table)
        assert cells(table[1]) == ["---", *["---:"] * 14]
        assert not lines[len(table) :] or lines[len(table)] == ""
    assert text.count("###") == 2
