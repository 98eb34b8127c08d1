"""The same command, a rank of it killed at any moment: torchrun starts it again, and the weights come out bit for bit.

DNIPIPE_KILLS=20 kills more often than CI does.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from dnipipe.checkpoint import load_checkpoint, newest_step
from tests.trainer.test_trainer import QUICKSTART, ROOT, TINY

NUM_KILLS = int(os.environ.get("DNIPIPE_KILLS", "3"))
MAX_RESTARTS = 3
STEPS = 60
TIMEOUT_S = 200.0
ARGUMENTS = [
    *TINY, f"run.steps={STEPS}", "run.checkpoint_every_steps=5", "run.resume=auto", "run.sample_tokens=0",
    "run.trace_steps=[]", "pipeline.policy=synthetic", "pipeline.unlock_after_steps=3",
]  # fmt: skip


class _Torchrun:
    """Two ranks of the trainer, started as a user would, which may be started again three times."""

    def __init__(self, folder):
        self.folder = folder
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        launcher += ["--max-restarts", str(MAX_RESTARTS), str(ROOT / "launch" / "train.py"), str(QUICKSTART)]
        folder.mkdir()
        self.log = (folder / "log.txt").open("w")
        self.process = subprocess.Popen(
            [sys.executable, *launcher, *ARGUMENTS, f"run.output_dir={folder / 'run'}"],
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            stdout=self.log,
            stderr=self.log,
        )

    def ranks(self):
        """The pids of its children that train."""
        return [pid for pid in _children(self.process.pid) if "train.py" in _command(pid)]

    def finish(self):
        assert self.process.wait(TIMEOUT_S) == 0, (self.folder / "log.txt").read_text()

    def end(self):
        """Whatever of it is left, and nothing else."""
        for pid in [*self.ranks(), self.process.pid] if self.process.poll() is None else ():
            _kill(pid)
        self.process.wait()
        self.log.close()


def _children(pid):
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


def _command(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def _kill(pid):
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def _wait_until(condition, torchrun):
    """Whether it came to that; otherwise the run ended before."""
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        if torchrun.process.poll() is not None:
            return False
        assert time.monotonic() < deadline, (torchrun.folder / "log.txt").read_text()
        time.sleep(0.01)
    return True


def _progress(folder):
    """Checkpointed steps under both schedules together."""
    return sum(newest_step(folder / "run" / "checkpoint" / name) or 0 for name in ("DNI", "1F1B"))


def _kill_a_rank(torchrun, moments, known):
    """At a moment of the start, or of the training. Returns the pids that it has seen, or None: the run was over."""
    if not _wait_until(lambda: len(set(torchrun.ranks()) - known) == 2, torchrun):
        return None
    ranks = sorted(set(torchrun.ranks()) - known)
    if len(ranks) < 2:
        return None
    begun = _progress(torchrun.folder)
    if moments.random() < 0.2:
        time.sleep(moments.uniform(0.0, 3.0))
    else:
        goal = begun + 5 * moments.randint(0, 8)
        if not _wait_until(lambda: _progress(torchrun.folder) >= min(goal, 2 * STEPS - 5), torchrun):
            return None
        time.sleep(moments.uniform(0.0, 0.3))
    if torchrun.process.poll() is not None:
        return None
    _kill(moments.choice(ranks))
    return known | set(ranks)


def _train(folder, moments, num_kills):
    """Returns how many of the kills came before the end."""
    torchrun, known, killed = _Torchrun(folder), set(), 0
    try:
        while killed < num_kills:
            seen = _kill_a_rank(torchrun, moments, known)
            if seen is None:
                break
            known, killed = seen, killed + 1
        torchrun.finish()
    finally:
        torchrun.end()
    return killed


def _final_state(folder, schedule, rank):
    state = load_checkpoint(folder / "run" / "checkpoint" / schedule / f"step-{STEPS:08d}", rank)
    return {name: value for name, value in state.items() if name != "elapsed_s"}


def _assert_equal(ours, theirs, where):
    if isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs), where
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), where
        for key, value in ours.items():
            _assert_equal(value, theirs[key], f"{where}/{key}")
    elif isinstance(ours, (list, tuple)):
        assert len(ours) == len(theirs), where
        for index, value in enumerate(ours):
            _assert_equal(value, theirs[index], f"{where}/{index}")
    else:
        assert ours == theirs or ours != ours, where


@pytest.mark.timeout(0 if NUM_KILLS > 3 else 600)
def test_a_run_whose_ranks_are_killed_ends_with_the_weights_of_an_undisturbed_one(tmp_path):
    _train(tmp_path / "undisturbed", random.Random(0), 0)
    killed, attempt = 0, 0
    while killed < NUM_KILLS:
        folder = tmp_path / f"disturbed{attempt}"
        killed += _train(folder, random.Random(attempt), min(MAX_RESTARTS, NUM_KILLS - killed))
        for schedule in ("DNI", "1F1B"):
            for rank in (0, 1):
                undisturbed = _final_state(tmp_path / "undisturbed", schedule, rank)
                _assert_equal(_final_state(folder, schedule, rank), undisturbed, f"{folder.name}/{schedule}/{rank}")
        lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
        records = [(r["schedule"], r["step"], "val_bits" in r) for r in map(json.loads, lines)]
        assert len(set(records)) == len(records)
        assert {("DNI", STEPS, True), ("1F1B", STEPS, True)} <= set(records)
        attempt += 1
        assert attempt <= 2 * NUM_KILLS, f"only {killed} of {attempt * MAX_RESTARTS} kills came before the end"
