"""All ranks pause after the same step, when rank 0's time is up."""

import math
import time

import torch
import torch.distributed as dist

from dnipipe.trainer.pace import Pace
from tests.ranks import run_ranks

STEP_S = 0.004


def _two_stretches(rank, world, every):
    pace = Pace(dist.group.WORLD, every=every, device=torch.device("cpu"), num_facts=2)
    step, ends, heard = 0, [], []
    for until_s in (0.2, 0.5):
        pace.start(step, until_s=until_s)
        while not pace.is_over(step):
            time.sleep(STEP_S * (rank == 0))
            step += 1
            if pace.is_beat(step):
                pace.beat(step, (step, 10 * rank))
                if pace.newest is not None:
                    heard.append((pace.newest.step, pace.newest.of_ranks))
        time.sleep(0.1 * rank)  # the last to come ends the stretch
        ends.append((step, pace.stop(step, (step, 10 * rank))))
    return ends, heard


def test_all_ranks_pause_at_the_same_step_and_know_the_same():
    (ends, heard), other = run_ranks(2, _two_stretches, 10)
    assert (ends, heard) == other
    assert heard and all(of_ranks == [[step, 0], [step, 10]] for step, of_ranks in heard)


def test_a_pause_comes_when_the_time_is_up():
    (ends, _), _ = run_ranks(2, _two_stretches, 10)
    (first, at_first), (second, at_second) = ends
    assert 0.2 <= at_first.elapsed_s < 0.6 and 0.45 <= at_second.elapsed_s < 1.0
    assert 0 < first < 0.35 / STEP_S and first < second < 0.7 / STEP_S


def test_the_time_between_two_stretches_does_not_count():
    assert all(end < 0.3 for end in run_ranks(2, _with_pause, 0.3))


def _with_pause(rank, world, pause_s):
    pace = Pace(dist.group.WORLD, every=10, device=torch.device("cpu"), num_facts=2)
    for step in (0, 1):
        pace.start(step, until_s=10.0)
        time.sleep(0.02)
        end = pace.stop(step + 1, (math.nan, 0))
        time.sleep(pause_s)
    return end.elapsed_s


def test_a_stretch_shorter_than_a_beat_ends_in_time_too():
    (ends, _), _ = run_ranks(2, _two_stretches, 1000)
    assert ends[0][1].elapsed_s < 0.8
