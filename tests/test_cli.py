"""`dnipipe plan`: its numbers, its files, its refusals; from times that are given and from a model that is measured."""

import json
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from dnipipe.cli import main
from dnipipe.partition import LayerCost
from dnipipe.plan.compare import compare, row_of, scale
from dnipipe.plan.draw import draw_schedules
from dnipipe.plan.simulate import Times
from dnipipe.trainer.measure import Measurement

FIELDS = ["schedule", "stages", "microbatches", "bubble", "peak_in_flight", "step_ms"]
NAMES = ["GPipe", "1F1B", "ZB-H1", "DNI wait", "DNI synthetic", "DNI stale, tight", "DNI stale"]
QUICKSTART = str(Path(__file__).parents[1] / "launch" / "configs" / "quickstart.yaml")
TINY = [
    "model.factory=launch.gpt:byte_gpt", "model.options={vocab_size: 256, seq_len: 32, width: 32, depth: 2, heads: 2}",
    "data.seq_len=32", "run.batch_size=12", "pipeline.num_microbatches=3", "pipeline.split=parameters",
    "pipeline.policy=synthetic",
]  # fmt: skip
SLEEP_MS = 15


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
    assert "tight: as many in flight as 1F1B, ScheduleDNI's default; else in_flight=7" in " ".join(shown.split())


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


@pytest.mark.parametrize("interface", [0, 5])
@pytest.mark.parametrize("num_stages, num_microbatches", [(1, 1), (3, 8), (6, 4)])
def test_what_is_extrapolated_equals_what_is_simulated(num_stages, num_microbatches, interface):
    times = Times.ms(3, 4, 2, 1, interface)
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
        (["--interface-ms", "-1"], "interface must be at least 0 ms, got -1"),
        (["--lag", "0"], "lag must be at least 1, got 0"),
        (["--scale", "16,many"], "--scale is a list of stage counts such as 16,64,512, got '16,many'"),
        (["--scale", "0"], "--scale needs at least 1 stage each, got '0'"),
    ],
)
def test_a_bad_value_ends_with_one_line_that_names_it(wrong, found, capsys):
    assert main(["plan", "--stages", "2", "--microbatches", "2", *wrong]) == 2
    error = capsys.readouterr().err
    assert found in error and error.count("\n") == 1


def test_prediction_makes_a_bubble_of_its_own(tmp_path, capsys):
    rows = _rows(tmp_path, "--stages", "4", "--microbatches", "8", "--interface-ms", "0.75", "--scale", "4")
    by_name = {row["schedule"]: row for row in rows}
    assert by_name["DNI synthetic"]["bubble"] == 0.2 and by_name["DNI synthetic"]["step_ms"] == 8 * 3.75
    assert by_name["1F1B"]["bubble"] == by_name["DNI wait"]["bubble"] == 3 / 11
    assert "P 0.75 ms" in capsys.readouterr().out


def test_without_microbatches_the_cure_is_named(capsys):
    assert main(["plan", "--stages", "2"]) == 2
    assert "--microbatches is missing: give it, or a --config" in capsys.readouterr().err


class Sleep(nn.Module):
    def forward(self, h):
        time.sleep(SLEEP_MS / 1e3)
        return h * 1


def sleepy(width):
    """A factory for the command: byte embedding, a layer that sleeps, and a head."""
    return nn.Sequential(nn.Embedding(256, width), Sleep(), nn.Linear(width, 256))


def one_layer():
    """A factory whose model is no row."""
    return nn.Linear(2, 2)


SLEEPY = [f"model.factory={__name__}:sleepy", "model.options={width: 8}", *TINY[2:]]


def test_a_config_is_measured_and_planned_with(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "150")
    rows = _rows(tmp_path, "--stages", "2", "--config", QUICKSTART, *TINY)
    by_name = {row["schedule"]: row for row in rows}
    assert all((row["stages"], row["microbatches"]) == (2, 3) for row in rows)
    assert by_name["GPipe"]["bubble"] == 1 / 4 and by_name["GPipe"]["step_ms"] > 0
    work_ms = by_name["GPipe"]["step_ms"] * 3 / 4
    assert by_name["DNI synthetic"]["step_ms"] > work_ms, "prediction takes time"
    shown = capsys.readouterr().out
    assert "a microbatch of 4 x 32 bytes" in shown and "P is what local_head takes" in shown
    cells = _cells(shown)
    assert {"0 Embedding", "1 Block", "2 Block", "3 Sequential"} < cells.keys()
    assert {"0 Embedding to 1 Block", "2 Block to 3 Sequential"} < cells.keys()
    embedding_bytes, indices_bytes = (256 + 32) * 32 * 4, (4 * 32 + 32) * 8
    assert cells["0 Embedding"][-2:] == [f"{embedding_bytes / 1e6:.3f}", f"{indices_bytes / 1e6:.3f}"]


def test_the_slowest_stage_sets_the_times_and_the_fullest_the_memory(tmp_path, capsys, monkeypatch):
    stages = [LayerCost("a", 2.0, 4.0, 0, 3_000_000, 0), LayerCost("b", 3.0, 9.0, 0, 1_000_000, 0)]
    measured = Measurement((4, 32), "paper", stages, [1, 1], "mlp", 1.5)
    monkeypatch.setattr("dnipipe.cli.plan.measure", lambda *arguments, **options: measured)
    arguments = ["--stages", "2", "--config", QUICKSTART, *TINY, "pipeline.lag=1", "--comm-ms", "20"]
    rows = {row["schedule"]: row for row in _rows(tmp_path, *arguments)}
    shown = capsys.readouterr().out
    assert "the slowest, b, with" in shown and "F 3, B 4.5, W 4.5, transfer 20, P 1.5 ms" in shown
    assert rows["GPipe"]["step_ms"] == (3 + 1) * 12 + 2 * 20 and rows["DNI synthetic"]["step_ms"] == 3 * (12 + 20)
    assert _cells(shown)["GPipe"][-2:] == ["9.0", "18.0"] and _cells(shown)["DNI synthetic"][-2:] == ["3.0", "6.0"]
    given = _rows(tmp_path, *arguments, "--lag", "2", "--microbatches", "6")
    assert given[4]["step_ms"] == 6 * (3 + 20), "with a lag of 2 the round trip is hidden"
    predicting = _rows(tmp_path, *arguments, "--comm-ms", "0")
    assert predicting[4]["step_ms"] == 3 * (12 + 1.5)


def _cells(shown):
    """By first cell, the others of each table row."""
    rows = ([cell.strip() for cell in line.split("│")[1:-1]] for line in shown.splitlines() if line.startswith("│"))
    return {name: cells for name, *cells in rows}


def test_a_layer_that_sleeps_makes_its_stage_the_slowest(tmp_path, capsys):
    rows = _rows(tmp_path, "--stages", "3", "--config", QUICKSTART, *SLEEPY)
    assert "as long as the slowest, 1 Sleep, with" in capsys.readouterr().out
    assert (3 + 2) * SLEEP_MS <= rows[0]["step_ms"] < 4 * (3 + 2) * SLEEP_MS


def test_a_rank_has_one_thread_and_so_has_the_measurement(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        _rows(tmp_path, "--stages", "2", "--config", QUICKSTART, *SLEEPY)
        assert torch.get_num_threads() == 2
        assert torch.cuda.is_available() or "on the CPU, threads: 1;" in capsys.readouterr().out
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
        _rows(tmp_path, "--stages", "2", "--config", QUICKSTART, *SLEEPY)
        assert torch.cuda.is_available() or "on the CPU, threads: 2;" in capsys.readouterr().out
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    "asked, chosen", [("auto", "local_head"), ("linear", "linear"), ("transformer", "transformer")]
)
def test_the_interface_is_the_configs_or_the_one_that_suits(asked, chosen, tmp_path, capsys):
    _rows(tmp_path, "--stages", "2", "--config", QUICKSTART, *SLEEPY, f"pipeline.interface={asked}")
    assert f"P is what {chosen} takes" in capsys.readouterr().out


@pytest.mark.parametrize("run", ["pipeline.policy=stale", "pipeline.schedule=1F1B"])
def test_what_predicting_costs_is_compared_where_the_run_predicts_nothing(run, tmp_path, capsys):
    rows = {row["schedule"]: row for row in _rows(tmp_path, "--stages", "2", "--config", QUICKSTART, *TINY, run)}
    assert "P is what local_head takes" in capsys.readouterr().out
    assert rows["DNI synthetic"]["step_ms"] > rows["DNI stale, tight"]["step_ms"]


def test_one_stage_predicts_nothing(tmp_path, capsys):
    rows = _rows(tmp_path, "--stages", "1", "--config", QUICKSTART, *SLEEPY)
    assert "nothing is predicted" in capsys.readouterr().out and rows[4]["bubble"] == 0


@pytest.mark.parametrize(
    "wrong, found",
    [
        ([*SLEEPY, "--forward-ms", "3"], "--forward-ms and --config: a config's model is measured instead; leave one"),
        ([*SLEEPY, "--backward-ms", "3,1"], "--backward-ms and --config"),
        ([*SLEEPY, "--interface-ms", "0"], "--interface-ms and --config"),
        (["pipeline.lagg=1"], "there is no setting pipeline.lagg; did you mean pipeline.lag?"),
        (["model.factory=nowhere:model"], "model.factory = 'nowhere:model': No module named 'nowhere'"),
        ([f"model.factory={__name__}:one_layer", "model.options={}"], "made a Linear, and only the layers of"),
        ([*SLEEPY, "--stages", "4"], "num_stages = 4; 3 layers make at least 1 and at most 3 stages"),
        ([*TINY, "model.options.seq_len=16"], "layer 0 Embedding cannot be measured on a torch.int64 of shape (4, 32)"),
        ([*SLEEPY, "pipeline.interface=conv"], "pipeline.interface = 'conv': interface 'conv' takes an activation of"),
    ],
)  # fmt: skip
def test_a_bad_config_ends_with_one_line_that_names_it(wrong, found, capsys):
    assert main(["plan", "--stages", "2", "--config", QUICKSTART, *wrong]) == 2
    error = capsys.readouterr().err
    assert found in error and error.count("\n") == 1


def test_a_config_that_is_not_there_is_named(capsys):
    assert main(["plan", "--stages", "2", "--config", "nowhere.yaml"]) == 2
    assert "nowhere.yaml" in capsys.readouterr().err


def test_config_prints_what_is_resolved_and_what_can_be_set(capsys):
    assert main(["config", QUICKSTART, "optim.clip=0.25"]) == 0
    assert "clip: 0.25" in capsys.readouterr().out
    assert main(["config", "--explain", "optim"]) == 0
    said = capsys.readouterr().out
    assert "optim.clip" in said and "pipeline.lag" not in said
    assert main(["config", QUICKSTART, "optim.clup=0.25"]) == 2
    assert "optim.clip" in capsys.readouterr().err
    assert main(["config"]) == 2
    assert "--explain" in capsys.readouterr().err


def test_the_model_of_the_example_is_found_as_its_training_finds_it(tmp_path, monkeypatch):
    monkeypatch.chdir(Path(QUICKSTART).parents[2])
    monkeypatch.setattr(sys, "path", [each for each in sys.path if Path(each).name != "launch"])
    monkeypatch.delitem(sys.modules, "gpt", raising=False)
    rows = _rows(tmp_path, "--stages", "2", "--config", QUICKSTART, *TINY[1:])
    assert [row["schedule"] for row in rows] == NAMES
    del sys.modules["gpt"]
