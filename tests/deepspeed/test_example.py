"""launch/deepspeed/train.py, as its docstring says to start it, on made pictures: by both launchers, and without the
block."""

from __future__ import annotations

import json
import math
import os
import re
import runpy
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
TRAIN, CONFIG = ROOT / "launch/deepspeed/train.py", ROOT / "launch/deepspeed/ds_config.json"
STEPS = 80


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
DEEPSPEED = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2"]


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    "launcher, with_block",
    [(TORCHRUN, True), (TORCHRUN, False), (DEEPSPEED, True)],
    ids=["torchrun", "torchrun-plain", "deepspeed"],
)
def test_the_example_trains(launcher: list[str], with_block: bool, tmp_path: Path) -> None:
    config = json.loads(CONFIG.read_text())
    block = config.pop("dnipipe")
    if with_block:
        config["dnipipe"] = {**block, "unlock_after_steps": 30}  # so that most batches are unlocked
    config["train_micro_batch_size_per_gpu"] = 16
    config["scheduler"]["params"]["warmup_num_steps"] = 5
    (tmp_path / "ds.json").write_text(json.dumps(config))
    command = [*launcher, str(TRAIN), "--deepspeed_config", str(tmp_path / "ds.json"), "--steps", str(STEPS)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=220, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    said = re.search(r"loss (\S+), mean of the last \d+: (\S+), held out: (\S+)", done.stdout)
    assert said is not None, done.stdout[-3000:]
    first, last, held_out = map(float, said.groups())
    assert all(map(math.isfinite, (first, last, held_out))) and last < first, said.group()
    assert ("plain DeepSpeed" in done.stdout) != with_block


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What train.py defines, without running it."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    return runpy.run_path(str(TRAIN), run_name="example")


def test_both_ends_of_the_pipeline_read_the_same_rows_and_replicas_others(
    example: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    numbered = torch.arange(24.0).view(24, 1), torch.arange(24)

    def epoch(rank: int, replica: int) -> list[int]:
        monkeypatch.setenv("RANK", str(rank))
        rows = [(x, label) for x, label in islice(example["microbatches"](numbered, 3, replica, 2), 4)]
        assert all(torch.equal(x.flatten().long(), label) for x, label in rows), "a picture has its own label"
        return torch.cat([label for _, label in rows]).tolist()

    first, last, other = epoch(0, 0), epoch(2, 0), epoch(1, 1)
    assert first == last and sorted(first + other) == list(range(24)) and first != sorted(first)


def test_no_picture_that_is_held_out_is_trained_with(example: dict[str, Any]) -> None:
    (train, label), (held_out, label_held_out) = example["pictures"](None, 0)
    assert (len(train), len(held_out)) == (len(label), len(label_held_out)) == (4096, 1024)
    assert not {tuple(x.flatten()[:8].tolist()) for x in train} & {tuple(x.flatten()[:8].tolist()) for x in held_out}


def test_records_of_cifar_10_are_cut_into_class_and_picture(example: dict[str, Any], tmp_path: Path) -> None:
    def record(label: int, value: int) -> bytes:
        return bytes([label]) + bytes([value]) * 1024 + bytes([255]) * 1024 + bytes([0]) * 1023 + bytes([128])

    (tmp_path / "data_batch_1.bin").write_bytes(record(3, 64) + record(9, 192))
    (tmp_path / "data_batch_2.bin").write_bytes(record(1, 0))
    with pytest.raises(SystemExit, match=r"has no test_batch\.bin: give the folder"):
        example["pictures"](tmp_path, 0)
    (tmp_path / "test_batch.bin").write_bytes(record(5, 128))
    (x, label), (held_out, its_label) = example["pictures"](tmp_path, 0)
    assert label.tolist() == [3, 9, 1] and its_label.tolist() == [5] and x.shape == (3, 3, 32, 32)
    assert x[:, 0].amin((1, 2)).tolist() == x[:, 0].amax((1, 2)).tolist() == [-0.5, 0.5, -1.0]
    assert float(x[0, 2, 31, 31]) == 0.0 and float(x[0, 2, 31, 30]) == -1.0 and not held_out[:, 0].any()
