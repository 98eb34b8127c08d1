"""Under wait with clip global and loss sync, ours is DeepSpeed's pipeline bit for bit: weights, losses, evaluation."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch

from tests.deepspeed import jobs
from tests.deepspeed.jobs import CLIP_AND_RATE, RESTORING, Job
from tests.ranks import run_ranks

NUM_BATCHES = 10


def _outcome(job: Job) -> tuple[Any, ...]:
    engine = jobs.build(job)
    data = jobs.data_of(engine)
    losses = jobs.train(engine, NUM_BATCHES, data)
    ends = engine.is_first_stage() or engine.is_last_stage()
    held_out = float(engine.eval_batch(jobs.data_of(engine, seed=99) if ends else None))
    losses += jobs.train(engine, 2, data)
    return losses, held_out, engine.get_lr(), jobs.weights(engine)


def _both(rank: int, world: int, cases: list[Job]) -> list[str]:
    """What differs, in words."""
    jobs.start()
    wrong = []
    for job in cases:
        plain, ours = _outcome(replace(job, block=None)), _outcome(replace(job, block=RESTORING))
        for name, one, other in zip(("losses", "evaluation", "rate"), plain, ours, strict=False):
            if one != other:
                wrong.append(f"{job}: {name} {one} and {other}")
        same = [torch.equal(one, other) for one, other in zip(plain[3], ours[3], strict=True)]
        if not all(same):
            wrong.append(f"{job}: weights {same}")
    return wrong


def _cases(num_stages: int) -> list[Job]:
    options = [{}, CLIP_AND_RATE]
    return [
        Job(num_stages, zero, num_microbatches, options=each)
        for zero, num_microbatches, each in product((0, 1), (1, 4), options)
    ]


@pytest.mark.timeout(400)
@pytest.mark.parametrize("num_stages", [2, 3])
def test_wait_equals_plain_bit_for_bit(num_stages: int) -> None:
    assert run_ranks(num_stages, _both, _cases(num_stages), timeout_s=380) == [[]] * num_stages


@pytest.mark.timeout(400)
def test_wait_equals_plain_with_data_parallel_replicas() -> None:
    cases = [Job(2, zero, 2, options=CLIP_AND_RATE) for zero in (0, 1)]
    assert run_ranks(4, _both, cases, timeout_s=380) == [[]] * 4


@pytest.mark.timeout(400)
def test_wait_equals_plain_with_more_of_a_config() -> None:
    bf16 = {"bf16": {"enabled": True}, "gradient_clipping": 0.5}
    cases = [
        Job(2, 0, 3, options=bf16),
        Job(2, 1, 2, options=bf16),
        Job(2, 0, 2, options={"pipeline": {"activation_checkpoint_interval": 1}}),
        Job(2, 1, 2, tied=True, options={"gradient_clipping": 0.5}),
    ]
    assert run_ranks(2, _both, cases, timeout_s=380) == [[]] * 2
