"""What a line of metrics says of all ranks, how fast that is, and where the time before it went."""

from __future__ import annotations

import math
import time

import pytest
import torch
import torch.distributed as dist

from dnipipe.config import Config, DataConfig, RunConfig
from dnipipe.trainer.facts import NUM_FACTS, Facts, record_of
from dnipipe.trainer.layout import Layout
from dnipipe.trainer.speed import Speed, measure_by
from dnipipe.trainer.startup import Startup
from tests.ranks import run_ranks

STAGE = Facts(cosine=0.5, r2=0.25, wait_s=2.0, bubble=0.1, memory_mb=7.0, grad_norm=3.0)
LAST = Facts(loss=2.0, loss_step=9, wait_s=1.0, memory_mb=8.0, grad_norm=4.0)


def test_a_record_has_each_rank_each_stage_and_the_mean_loss_of_the_replicas() -> None:
    other = Facts(loss=4.0, loss_step=9, wait_s=5.0, memory_mb=9.0, grad_norm=4.0)
    rows = [facts.row() for facts in (STAGE, LAST, STAGE, other)]
    assert all(len(row) == NUM_FACTS for row in rows)
    record = record_of(rows, Layout(0, num_stages=2, num_replicas=2))
    assert (record["loss"], record["loss_step"], record["cosine"]) == (3.0, 9, 0.5)
    assert record["cosine_by_boundary"] == [0.5] and record["r2_by_boundary"] == [0.25]
    assert record["grad_norm_by_stage"] == [3.0, 4.0] and record["wait_s_by_rank"] == [2.0, 1.0, 2.0, 5.0]
    assert record["bubble_by_rank"] == [0.1, None, 0.1, None] and record["peak_memory_mb_by_rank"] == [7, 8, 7, 9]


def test_a_loss_that_one_replica_does_not_know_is_not_known() -> None:
    record = record_of([STAGE.row(), LAST.row(), STAGE.row(), Facts().row()], Layout(0, 2, 2))
    assert record["loss"] is None and record["loss_step"] is None


def test_speed_is_tokens_and_their_share_of_the_peak() -> None:
    assert Speed(1000, 6e6, 1e12).of(0.1) == {"tokens_per_s": 10_000, "mfu": pytest.approx(0.06)}
    assert Speed(1000, 6e6, None).of(0.1)["mfu"] is None and Speed(1000, 6e6, 1e12).of(0.0)["tokens_per_s"] == 0


def _speed(rank: int, world: int, peak_tflops: float | None) -> Speed:
    config = Config(data=DataConfig(seq_len=10), run=RunConfig(batch_size=8, peak_tflops=peak_tflops))
    assert dist.group.WORLD is not None
    return measure_by(config, 5.0, torch.device("cpu"), dist.group.WORLD)


def test_a_cpu_has_a_peak_if_the_config_gives_one_and_each_process_counts() -> None:
    assert run_ranks(2, _speed, 3.0) == [Speed(80, 5.0, 6e12)] * 2
    assert run_ranks(2, _speed, None) == [Speed(80, 5.0, None)] * 2


def test_start_up_counts_from_the_start_of_the_process_and_names_each_phase() -> None:
    startup = Startup()
    startup.done("imports")
    time.sleep(0.05)
    startup.done("work")
    startup.done("work")
    assert list(startup.phases) == ["imports", "work"]
    assert startup.phases["imports"] > 0.5, "this process has imported torch"
    assert 0.05 <= startup.phases["work"] < 0.5
    assert startup.in_words().startswith(f"{sum(startup.phases.values()):.1f} s to the first step: imports ")
    assert not any(math.isnan(seconds) for seconds in startup.phases.values())
