"""`dnipipe plan`: its numbers, its files, its refusals."""

import json

import pytest

from dnipipe.cli import main
from dnipipe.plan.compare import compare, row_of, scale
from dnipipe.plan.draw import draw_schedules
from dnipipe.plan.simulate import Times

FIELDS = ["schedule", "stages", "microbatches", "bubble", "peak_in_flight", "step_ms"]
NAMES = ["GPipe", "1F1B", "ZB-H1", "DNI wait", "DNI synthetic", "DNI stale, tight", "DNI stale"]


def _rows(tmp_path, *arguments):
    file = tmp_path / "new" / "plan.json"
    assert main(["plan", *arguments, "--json", str(file)]) == 0
    return json.loads(file.read_text())


def test_json_holds_one_flat_row_per_schedule(tmp_path, capsys):
    rows = _rows(tmp_path, "--stages", "4", "--microbatches", "8")
    assert [row["schedule"] for row in rows] == NAMES
    assert all(list(row) == FIELDS and (row["stages"], row["microbatches"]) == (4, 8) for row in rows)
    by_name = {row["schedule"]: row for row in rows}
    assert by_name["GPipe"]["bubble"] == by_name["1F1B"]["bubble"] == 3 / 11
    assert by_name["DNI synthetic"]["bubble"] == 0 and by_name["DNI synthetic"]["step_ms"] == 24
    assert [row["peak_in_flight"] for row in rows] == [8, 4, 4, 4, 1, 4, 7]
    shown = capsys.readouterr().out
    assert "27.27%" in shown and all(name.split(",")[0] in shown for name in NAMES)


def test_the_command_gives_the_published_rates(tmp_path):
    times = ["--forward-ms", "18.522", "--backward-ms", "18.086,9.337", "--comm-ms", "0.601"]
    rows = _rows(tmp_path, "--stages", "8", "--microbatches", "24", *times)
    assert [round(row["bubble"], 4) for row in rows[1:3]] == [0.2431, 0.1585]


def test_a_backward_given_in_one_is_split_in_halves(tmp_path):
    whole = _rows(tmp_path, "--stages", "3", "--microbatches", "5", "--forward-ms", "2", "--backward-ms", "5")
    halves = _rows(tmp_path, "--stages", "3", "--microbatches", "5", "--forward-ms", "2", "--backward-ms", "2.5,2.5")
    assert whole == halves and whole[0]["step_ms"] == 7 * (5 + 2)


def test_scale_adds_rows_and_says_what_it_assumes(tmp_path, capsys):
    rows = _rows(tmp_path, "--stages", "4", "--microbatches", "8", "--scale", "4,16")
    sizes = {(row["stages"], row["microbatches"]) for row in rows}
    assert sizes == {(4, 8), (16, 8), (16, 32)}
    assert len(rows) == 3 * len(NAMES)
    bubbles = {(row["schedule"], row["microbatches"]): row["bubble"] for row in rows if row["stages"] == 16}
    assert bubbles["1F1B", 8] == 15 / 23 and bubbles["1F1B", 32] == 15 / 47 and bubbles["DNI synthetic", 8] == 0
    assert "Every stage takes the same F, B, W and C" in capsys.readouterr().out


@pytest.mark.parametrize("num_stages, num_microbatches", [(1, 1), (3, 8), (6, 4)])
def test_what_is_extrapolated_equals_what_is_simulated(num_stages, num_microbatches):
    times = Times.ms(3, 4, 2, 1)
    simulated = [row_of(run) for run in compare(num_stages, num_microbatches, times, lag=3)]
    assert scale(num_stages, num_microbatches, times, lag=3) == simulated


def test_timelines_are_drawn_and_the_same_plan_gives_the_same_file(tmp_path):
    arguments = ["plan", "--stages", "3", "--microbatches", "4", "--comm-ms", "0.2", "--out"]
    assert main([*arguments, str(tmp_path / "a")]) == main([*arguments, str(tmp_path / "b")]) == 0
    first, second = ((tmp_path / folder / "plan.svg").read_bytes() for folder in "ab")
    assert first == second and b"<svg" in first
    assert (tmp_path / "a" / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_to_draw_is_refused(tmp_path):
    with pytest.raises(ValueError, match="got no runs"):
        draw_schedules([], tmp_path)


@pytest.mark.parametrize(
    "wrong, found",
    [
        (["--stages", "0"], "num_stages must be at least 1, got 0"),
        (["--microbatches", "-3"], "num_microbatches must be at least 1, got -3"),
        (["--forward-ms", "fast"], "forward must be a finite number of milliseconds, got 'fast'"),
        (["--backward-ms", "1,2,3"], "--backward-ms is B or B,W in milliseconds, got '1,2,3'"),
        (["--backward-ms", "1,"], "weight must be a finite number of milliseconds, got ''"),
        (["--comm-ms", "-1"], "transfer must be at least 0 ms, got -1"),
        (["--lag", "0"], "lag must be at least 1, got 0"),
        (["--scale", "16,many"], "--scale is a list of stage counts such as 16,64,512, got '16,many'"),
        (["--scale", "0"], "--scale needs at least 1 stage each, got '0'"),
    ],
)
def test_a_bad_value_ends_with_one_line_that_names_it(wrong, found, capsys):
    assert main(["plan", "--stages", "2", "--microbatches", "2", *wrong]) == 2
    error = capsys.readouterr().err
    assert found in error and error.count("\n") == 1
