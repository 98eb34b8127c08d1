"""One short run of the real command on two ranks, and what it leaves; then the commands that must be refused."""

import io
import json
import math
import os
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from dnipipe.checkpoint import load_checkpoint, newest_step
from dnipipe.config import load_config
from dnipipe.data import byte_corpus, stdlib_sources
from dnipipe.interface import Linear
from dnipipe.observe.chunks import waits_between
from dnipipe.observe.trace import Span
from dnipipe.trainer import Trainer
from dnipipe.trainer.training import pauses
from launch.gpt import byte_gpt
from tests.ranks import run_ranks
from tests.trainer.workers import make_worker

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "launch" / "configs" / "quickstart.yaml"
TINY = [
    "model.factory=launch.gpt:byte_gpt", "model.options={vocab_size: 256, seq_len: 32, width: 32, depth: 2, heads: 2}",
    "data.seq_len=32", "data.max_mb=1", "run.train_seconds=0", "run.steps=60", "run.batch_size=8", "run.eval_every_s=0",
    "run.eval_batches=2", "run.log_every_steps=10", "run.sample_tokens=40", "run.trace_steps=[50, 53]",
    "pipeline.split=parameters", "pipeline.policy=synthetic", "pipeline.interface=local_head",
]  # fmt: skip


def _train(arguments, *, torchrun=True, **environment):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if torchrun else []
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | environment
    command = [sys.executable, *launcher, str(ROOT / "launch" / "train.py"), str(QUICKSTART), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "new"
    done = _train([*TINY, f"run.output_dir={folder}"])
    assert done.returncode == 0, done.stderr
    return folder, done


def _records(folder, schedule):
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["schedule"] == schedule]


@pytest.mark.parametrize("schedule", ["DNI", "1F1B"])
def test_rank_0_knows_the_true_loss_which_falls(run, schedule):
    records = _records(run[0], schedule)
    losses = [record["loss"] for record in records]
    assert records[-1]["step"] == 60 and len(records) >= 6
    assert all(loss is not None and math.isfinite(loss) for loss in losses)
    assert abs(losses[0] - math.log(256)) < 0.3 and losses[-1] < losses[0] - 0.5
    assert all(0 <= record["loss_step"] < record["step"] for record in records)
    assert all(record["tokens_per_s"] > 0 and record["elapsed_s"] > 0 for record in records)


def test_only_a_schedule_that_predicts_has_a_cosine(run):
    assert all(-1 <= record["cosine"] <= 1 for record in _records(run[0], "DNI")[1:])
    assert all(record["cosine"] is None for record in _records(run[0], "1F1B"))


def test_the_checkpoint_is_the_model_that_was_validated(run):
    """The stages' weights, loaded here into the whole model, give the bits per byte that the pipeline reported."""
    config = load_config(run[0] / "config.yaml")
    newest = run[0] / "checkpoint" / "DNI" / "step-00000060"
    stages = [load_checkpoint(newest, stage) for stage in (0, 1)]
    assert [stage["step"] for stage in stages] == [60, 60]
    model = byte_gpt(**config.model.options)
    model.load_state_dict(stages[0]["model"] | stages[1]["model"], strict=True)
    corpus = byte_corpus(stdlib_sources(), max_bytes=10**6)
    losses = []
    for step in (0, len(corpus.validation) // (8 * 32) // 2):  # two batches, half the text apart
        input, target = corpus.batch("validation", step=step, batch_size=8, seq_len=32, seed=0)
        with torch.no_grad():
            losses.append(F.cross_entropy(model(input).flatten(0, 1), target.flatten()).item())
    (reported,) = [record["val_bits"] for record in _records(run[0], "DNI") if "val_bits" in record]
    assert sum(losses) / 2 / math.log(2) == pytest.approx(reported, rel=1e-5)


def test_the_folder_holds_the_settings_as_they_were_resolved(run):
    config = load_config(run[0] / "config.yaml")
    assert config == load_config(QUICKSTART, [*TINY, f"run.output_dir={run[0]}"])


@pytest.mark.parametrize("name", ["trace.json", "trace-1F1B.json"])
def test_the_trace_shows_both_ranks_and_the_steps_asked_for(run, name):
    events = json.loads((run[0] / name).read_text())["traceEvents"]
    for rank in (0, 1):
        slices = [event for event in events if event["pid"] == rank and event["ph"] == "X"]
        counts = {kind: sum(event["name"] == kind for event in slices) for kind in ("forward", "backward", "optimizer")}
        assert counts == {"forward": 6, "backward": 6, "optimizer": 3}
    assert (run[0] / "timeline.png").read_bytes().startswith(b"\x89PNG")


def test_the_table_has_a_row_for_each_schedule_and_the_end_says_which_won(run):
    output = run[1].stdout
    for schedule in ("DNI", "1F1B"):
        val_bits = _records(run[0], schedule)[-1]["val_bits"]
        (row,) = [line for line in output.splitlines() if line.startswith("│") and f" {schedule} " in line]
        assert " 60 " in row and f"{val_bits:.3f}" in row
    assert output.count("In this run") == 1
    assert all(str(run[0] / name) in output for name in ("checkpoint", "config.yaml", "metrics.jsonl", "timeline.png"))


def _go_on(folder, *overrides):
    """(results, what it said) of each rank, in ranks that need no torchrun, which is quicker."""
    arguments = [*TINY, "run.resume=auto", "run.sample_tokens=0", "run.trace_steps=[5, 8]", f"run.output_dir={folder}"]
    return run_ranks(2, _run_trainer, [*arguments, *overrides])


def _run_trainer(rank, world, arguments):
    said = io.StringIO()
    with redirect_stdout(said):
        results = Trainer(load_config(QUICKSTART, arguments), world).run(torch.device("cpu"))
    return results, said.getvalue()


def _lines(folder):
    """Which lines of metrics there are: (schedule, step, whether it was validated)."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(record["schedule"], record["step"], "val_bits" in record) for record in records]


def test_a_finished_run_started_again_says_the_same_and_a_longer_one_goes_on(tmp_path):
    (results, _), other = _go_on(tmp_path, "run.steps=10", "run.checkpoint_every_steps=4", "run.eval_every_s=0")
    assert other[0] == results and [result.steps for result in results] == [10, 10]
    picture, lines = (tmp_path / "timeline.png").read_bytes(), _lines(tmp_path)
    assert ("DNI", 10, True) in lines and len(set(lines)) == len(lines)
    (again, said), _ = _go_on(tmp_path, "run.steps=10")
    assert again == results and said.count("goes on after step 10") == 2
    assert _lines(tmp_path) == lines and (tmp_path / "timeline.png").read_bytes() == picture
    shutil.rmtree(tmp_path / "checkpoint" / "1F1B" / "step-00000010")  # as if it had been killed before
    (resumed, said), _ = _go_on(tmp_path, "run.steps=10")
    assert "goes on after step 8" in said and [result.steps for result in resumed] == [10, 10]
    assert resumed[0] == results[0] and resumed[1].val_bits == results[1].val_bits
    lines = _lines(tmp_path)
    assert len(set(lines)) == len(lines) and ("1F1B", 10, True) in lines
    (longer, _), _ = _go_on(tmp_path, "run.steps=14")
    assert [result.steps for result in longer] == [14, 14]
    assert all(after.seconds > before.seconds for before, after in zip(resumed, longer, strict=True))
    assert newest_step(tmp_path / "checkpoint" / "DNI") == 14
    lines = _lines(tmp_path)
    assert ("DNI", 14, True) in lines and ("1F1B", 14, True) in lines and len(set(lines)) == len(lines)


def test_seconds_count_over_restarts(tmp_path):
    once = [tmp_path, "run.steps=0", "run.compare_with=[]", "run.log_every_steps=2"]
    ((first,), _), _ = _go_on(*once, "run.train_seconds=1")
    ((second,), _), _ = _go_on(*once, "run.train_seconds=1.5")
    elapsed_s = [record["elapsed_s"] for record in _records(tmp_path, "DNI")]
    assert elapsed_s == sorted(elapsed_s)
    assert first.steps < second.steps and 0.9 < first.seconds < 1.4 and 1.4 < second.seconds < 2.2


def test_a_run_begins_anew_if_told_so_and_goes_on_only_by_the_same_settings(tmp_path):
    once = [tmp_path, "run.compare_with=[]", "run.steps=4"]
    _go_on(*once)
    (tmp_path / "checkpoint" / "DNI" / "step-00000009.partial").mkdir()
    for name in ("optim.clip", "run.seed"):
        with pytest.raises(RuntimeError, match=rf"{name} = 3.*: the checkpoints in run.output_dir = .* were made with"):
            _go_on(*once, f"{name}=3")
    _, said = _go_on(*once, "optim.clip=3", "run.resume=never")[0]
    assert "goes on" not in said and load_config(tmp_path / "config.yaml").optim.clip == 3
    assert [path.name for path in (tmp_path / "checkpoint" / "DNI").glob("step-*")] == ["step-00000004"]
    (tmp_path / "config.yaml").unlink()
    with pytest.raises(RuntimeError, match="holds checkpoints of nobody knows which settings"):
        _go_on(*once)


def test_a_run_goes_on_with_another_number_of_ranks(tmp_path):
    once = [*TINY, "run.resume=auto", "run.sample_tokens=0", f"run.output_dir={tmp_path}"]
    for world, steps in ((2, 4), (3, 6), (1, 8)):
        arguments = [*once, "model.options.depth=3", "pipeline.num_microbatches=4", f"run.steps={steps}"]
        results, said = run_ranks(world, _run_trainer, arguments)[0]
        assert [result.steps for result in results] == [steps, steps]
        assert said.count("goes on in") == (0 if world == 2 else 2)
    assert said.count("predictors begin anew") == 1  # 1F1B has none


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("pipeline.lag=0", "pipeline.lag = 0: it must be at least 1"),
        ("run.log_every_steps=0", "run.log_every_steps = 0: it must be at least 1"),
        ("run.sample_temperature=0", "run.sample_temperature = 0.0: it must be above 0"),
        ("run.sample_prompt=''", "run.sample_prompt = '': it must be at least one character"),
        ("model.options.width=33", "model.options = "),
        ("model.factory=gpt:byte_gtp", "model.factory = 'gpt:byte_gtp'"),
        ("data.files=[nowhere.txt]", "nowhere.txt"),
        ("run.compare_with=[1F1B, DNI]", "run.compare_with = ['1F1B', 'DNI']: it must name other schedules"),
        ("pipeline.num_microbatches=1", "pipeline.num_microbatches = 1: 1F1B needs at least as many"),
    ],
)
def test_what_cannot_work_is_refused_before_the_processes_join(wrong, message, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "launch"))
    with pytest.raises(ValueError) as refusal:
        Trainer(load_config(QUICKSTART, [wrong]), 2)
    assert message in str(refusal.value)


def test_a_refusal_is_exit_code_2_and_comes_before_any_process_group():
    # no MASTER_ADDR: a process that tried to join a group would fail in another way
    done = _train(["pipeline.lag=0"], torchrun=False, RANK="0", WORLD_SIZE="2")
    assert (done.returncode, done.stderr) == (2, "dnipipe: pipeline.lag = 0: it must be at least 1\n")


def test_all_ranks_refuse_but_one_of_them_says_so():
    done = _train(["pipeline.lag=0"])
    assert done.returncode != 0
    assert done.stderr.count("dnipipe: pipeline.lag = 0: it must be at least 1") == 1


def test_a_rank_that_fails_says_which_it_is_and_why(tmp_path):
    (tmp_path / "file").write_text("in the way")
    done = _train([*TINY, f"run.output_dir={tmp_path / 'file' / 'folder'}"])
    assert done.returncode != 0
    assert "dnipipe: rank 0 of 2 failed:" in done.stderr and "NotADirectoryError" in done.stderr


def _rates_of_predictors(rank, world):
    rates = []
    corpus = byte_corpus(stdlib_sources(), max_bytes=10**6)
    of_ours = ["pipeline.interface=linear", "pipeline.unlock_after_steps=0"]
    for given in ("null", "0.005"):
        config = load_config(QUICKSTART, [*TINY, *of_ours, f"optim.interface_learning_rate={given}"])
        worker = make_worker(config, "DNI", corpus)
        worker.train_step(0)
        learner = worker.schedule._flow.learner
        rates.append([group["lr"] for group in learner.optimizer.param_groups] if learner is not None else None)
    return rates


def test_predictors_learn_at_the_rate_of_the_config_or_else_at_their_own():
    first, last = run_ranks(2, _rates_of_predictors)
    assert first == [[Linear(32).learning_rate], [0.005]] and last == [None, None]


def _train_both(rank, world, steps):
    weights = []
    config = load_config(QUICKSTART, [*TINY, "pipeline.policy=wait"])
    corpus = byte_corpus(stdlib_sources(), max_bytes=10**6)
    for name in ("DNI", "1F1B"):
        worker = make_worker(config, name, corpus)
        for step in range(steps):
            worker.train_step(step)
        weights.append([parameter.detach().clone() for parameter in worker.module.parameters()])
    return weights


def test_every_schedule_starts_from_the_same_weights_and_sees_the_same_batches():
    """Under `wait` DNI computes what 1F1B computes, so equal weights after three steps mean an equal start and data."""
    for dni, one_f_one_b in run_ranks(2, _train_both, 3):
        for ours, torchs in zip(dni, one_f_one_b, strict=True):
            torch.testing.assert_close(ours, torchs)


def test_a_run_pauses_to_validate_and_ends_when_its_time_is_over():
    assert list(pauses(30, 10)) == [10, 20, 30]
    assert list(pauses(33, 10)) == [10, 20, 33]
    assert list(pauses(33, 10, after_s=10)) == [20, 33] and list(pauses(33, 10, after_s=34)) == [33]
    assert list(pauses(5, 10)) == [5] and list(pauses(5, 0)) == [5] and list(pauses(0, 0)) == [math.inf]
    endless = pauses(0, 10)
    assert [next(endless) for _ in range(3)] == [10, 20, 30]


def test_the_time_between_two_pieces_of_work_is_a_wait():
    work = [
        Span("forward", 1, 1, 0, 0.0, 1.0),
        Span("backward", 1, 1, 0, 3.0, 4.0),
        Span("optimizer", 1, 1, 0, 4.0, 5.0),
    ]
    assert waits_between(work) == [replace(work[0], name="wait", microbatch=None, start_s=1.0, end_s=3.0)]
