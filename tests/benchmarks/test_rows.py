"""Rows survive their file, and are set against those that did the same work and no others."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.rows import Row, best_of, read_rows, same_batch, side_by_side, with_ratios, write_rows


def a_row(schedule="GPipe", microbatches=4, tokens_per_s=100.0, interface=None, **changes):
    """A measured row of a small workload; tokens_per_s None: refused."""
    row = Row(
        device="cpu", card="A processor", schedule=schedule, interface=interface,
        policy="synthetic" if interface else None, transport="gloo", stages=4, microbatches=microbatches,
        microbatch_size=2, seq_len=64,
        width=128, blocks_per_stage=1, vocab_size=256, dtype="float32", refused=None, step_ms=12.345, spread_ms=0.25,
        tokens_per_s=tokens_per_s, utilisation=0.7, bound=0.8, predicted_ms=11.5, ratio_to_gpipe=None,
        ratio_to_1f1b=None, peak_bytes=None, in_flight=4.0, interface_cost_share=0.041 if interface else None,
        commit="abc", torch="2.11", date="2030-01-31",
    )  # fmt: skip
    measured = ("step_ms", "spread_ms", "utilisation", "bound", "predicted_ms", "in_flight")
    if tokens_per_s is None:
        row = replace(row, refused="no [such] schedule", **dict.fromkeys(measured))
    return replace(row, **changes)


def test_rows_come_back_from_their_file_as_they_were(tmp_path):
    rows = [
        a_row(step_ms=0.1 + 0.2, peak_bytes=2**40, peak_bytes_by_rank=[2**40, 3]),
        a_row("1F1B", tokens_per_s=None, refused="„no“\n"),
        a_row(),
    ]
    path = tmp_path / "new" / "rows.json"
    write_rows(rows, path)
    assert read_rows(path) == rows
    text = path.read_text()
    assert text.startswith('[\n {\n  "device": "cpu",\n') and text.endswith("]\n")
    nested = {name for each in json.loads(text) for name, value in each.items() if isinstance(value, dict | list)}
    assert nested == {"peak_bytes_by_rank"}


def test_rows_of_an_earlier_version_are_read():
    rows = read_rows(Path(__file__).parents[2] / "benchmarks" / "results" / "throughput_h100.json")
    assert len(rows) == 10 and all(row.activation_bytes is None and row.tokens_per_s for row in rows)


def test_a_nan_is_not_written_and_what_was_there_stays(tmp_path):
    path = tmp_path / "rows.json"
    write_rows([a_row()], path)
    with pytest.raises(ValueError, match="JSON"):
        write_rows([a_row(step_ms=float("nan"))], path)
    assert read_rows(path) == [a_row()]


@pytest.mark.parametrize(
    "spoil, said",
    [
        (lambda row: row.update(colour="red"), "rows.json, row 1: unknown field colour"),
        (lambda row: row.pop("bound"), "rows.json, row 1: missing field bound"),
    ],
)
def test_a_field_too_many_or_too_few_is_named_with_its_file(tmp_path, spoil, said):
    path = tmp_path / "rows.json"
    write_rows([a_row(), a_row()], path)
    loaded = json.loads(path.read_text())
    spoil(loaded[1])
    path.write_text(json.dumps(loaded))
    with pytest.raises(ValueError, match=said):
        read_rows(path)


@pytest.mark.parametrize("text, said", [("{}", "not a list"), ("[1]", "row 0 is a JSON int"), ("[", "is not JSON")])
def test_a_file_that_holds_no_rows_is_named(tmp_path, text, said):
    path = tmp_path / "rows.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"rows.json.*{said}"):
        read_rows(path)


def test_the_bounds_of_ratios_are_of_bounds_at_the_same_microbatches():
    rows = [a_row(bound=0.5), a_row("DNI", 4, 150.0, "linear", bound=1.0), a_row("DNI", 8, 900.0, "linear", bound=1.0)]
    rows += [a_row("GPipe", 8, None, bound=None), a_row("1F1B", 8, 800.0, bound=0.8)]
    bounds = [(row.bound_to_gpipe, row.bound_to_1f1b) for row in with_ratios(rows)]
    assert bounds == [(1, None), (2, None), (None, 1.25), (None, None), (None, 1)]


def test_ratios_are_of_throughput_at_the_same_microbatches():
    rows = [a_row(), a_row("DNI", 4, 150.0, "linear"), a_row("1F1B", 4, 120.0), a_row("DNI", 8, 900.0, "linear")]
    rows += [a_row("GPipe", 8, 300.0), a_row("1F1B", 8, None)]
    ratios = [(row.ratio_to_gpipe, row.ratio_to_1f1b) for row in with_ratios(rows)]
    assert ratios == [(1, 100 / 120), (1.5, 150 / 120), (1.2, 1), (3, None), (1, None), (None, None)]


@pytest.mark.parametrize(
    "field, value",
    [
        ("device", "cuda"), ("card", "another"), ("stages", 2), ("microbatches", 8), ("microbatch_size", 1),
        ("seq_len", 32), ("width", 64), ("blocks_per_stage", 2), ("vocab_size", 512), ("dtype", "bfloat16"),
    ],
)  # fmt: skip
def test_a_row_of_other_work_is_no_reference(field, value):
    other = a_row("DNI", tokens_per_s=150.0, interface="linear")
    assert with_ratios([a_row(), other])[1].ratio_to_gpipe == 1.5
    assert with_ratios([a_row(), replace(other, **{field: value})])[1].ratio_to_gpipe is None


def test_who_measured_it_when_does_not_make_it_other_work():
    later = a_row("DNI", tokens_per_s=150.0, interface="linear", commit="def", torch="2.12", date="2030-02-01")
    assert with_ratios([a_row(), later])[1].ratio_to_gpipe == 1.5


def test_the_best_is_taken_over_the_cuts_of_one_batch_for_each_schedule_and_interface():
    def cut(schedule, microbatches, tokens_per_s, interface=None, batch=16):
        return a_row(schedule, microbatches, tokens_per_s, interface, microbatch_size=batch // microbatches)

    rows = [cut("GPipe", 4, 10.0), cut("DNI", 4, 30.0, "linear"), cut("DNI", 4, 5.0, "transformer")]
    rows += [cut("GPipe", 8, 20.0), cut("DNI", 8, 25.0, "linear"), cut("DNI", 8, 6.0, "transformer")]
    rows += [cut("1F1B", 4, None), cut("1F1B", 8, 1.0), cut("ZBVZeroBubble", 4, None), cut("ZBVZeroBubble", 8, None)]
    other_batch = cut("GPipe", 4, 99.0, batch=32)
    best = best_of([*rows, other_batch])
    assert best == [rows[3], rows[1], rows[5], rows[7], rows[8], other_batch]
    assert [row.ratio_to_gpipe for row in with_ratios(best, same_batch)] == [1, 1.5, 0.3, 0.05, None, 1]


def test_workloads_share_the_microbatch_or_the_batch_whichever_makes_fewer():
    grown = [a_row(microbatches=count) for count in (8, 4, 16)]
    cut = [a_row(microbatches=count, microbatch_size=16 // count) for count in (8, 4, 16)]
    for rows in (grown, cut):
        workloads = side_by_side([*rows, replace(rows[0], stages=2)])
        assert [[row.microbatches for row in workload] for workload in workloads] == [[4, 8, 16], [8]]
    mixed = [a_row(microbatches=count, microbatch_size=size) for count, size in ((4, 2), (8, 2), (2, 4), (4, 4))]
    assert side_by_side(mixed) == [mixed[:2], mixed[2:]]


def test_a_label_tells_schedules_apart():
    rows = [a_row("1F1B"), a_row("DNI", interface="linear"), a_row("DNI", interface="linear", policy="wait")]
    assert [row.label for row in rows] == ["1F1B", "DNI linear", "DNI linear wait"]
