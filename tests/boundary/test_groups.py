"""Groups for the boundaries of a pipeline: each rank gets those of its neighbours, whatever it was in before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from dnipipe.boundary import PairedBoundary, boundary_groups, in_meeting_order
from tests.ranks import run_ranks

TIMEOUT_S = 8.0
Neighbours = tuple[int | None, int | None]


def _meet(ranks: Sequence[int], stage: int, group: dist.ProcessGroup | None = None, tag: int = 0) -> Neighbours:
    """Makes the groups and exchanges `tag` + rank with the neighbours. Returns what came from above and from below."""
    above, below = boundary_groups(ranks, stage, group, TIMEOUT_S, torch.device("cpu"))
    got: list[int | None] = []
    for pair, there in ((above, stage - 1), (below, stage + 1)):
        if pair is None:
            got.append(None)
            continue
        assert sorted(dist.get_process_group_ranks(pair)) == sorted((ranks[stage], ranks[there]))
        boundary = PairedBoundary(
            pair, rank=ranks[stage], stage=stage, peer=ranks[there], peer_stage=there, timeout_s=TIMEOUT_S
        )
        told, sent = torch.tensor([-1]), torch.tensor([tag + ranks[stage]])
        boundary.exchange([sent], [told], microbatch=0).wait()
        got.append(int(told))
    return got[0], got[1]


def _neighbours(ranks: Sequence[int], tag: int = 0) -> list[Neighbours]:
    """What each stage must hear, in order of stages."""
    told: list[int | None] = [None, *(tag + rank for rank in ranks), None]
    return list(zip(told[:-2], told[2:], strict=True))


def _one_pipeline(rank: int, world: int) -> Neighbours:
    return _meet(range(world), rank)


@pytest.mark.parametrize("world", [2, 3, 4, 5])
def test_each_rank_reaches_its_neighbours(world: int) -> None:
    assert run_ranks(world, _one_pipeline) == _neighbours(range(world))


STAGES_OF_RANKS = (2, 0, 3, 1)


def _shuffled(rank: int, world: int) -> Neighbours:
    return _meet([STAGES_OF_RANKS.index(stage) for stage in range(world)], STAGES_OF_RANKS[rank])


def test_the_order_of_the_stages_need_not_be_that_of_the_ranks() -> None:
    by_rank = run_ranks(4, _shuffled)
    ranks = [STAGES_OF_RANKS.index(stage) for stage in range(4)]
    assert [by_rank[rank] for rank in ranks] == _neighbours(ranks)


def _uneven(rank: int, world: int) -> Neighbours:
    """Rank r is in extra groups of its own beforehand: 2, 0, 3 of them."""
    for _ in range((2, 0, 3)[rank]):
        dist.new_group([rank], use_local_synchronization=True)
    return _meet(range(world), rank)


def test_ranks_in_different_numbers_of_groups_find_each_other() -> None:
    assert run_ranks(3, _uneven) == _neighbours(range(3))


def _crossing(rank: int, world: int) -> Neighbours:
    """Ranks 0 and 1 share a group that the others know nothing of, and talk over it before and after."""
    extra = dist.new_group([0, 1], use_local_synchronization=True) if rank < 2 else None
    for tag in (10, 20):
        if extra is not None:
            total = torch.tensor([tag])
            dist.all_reduce(total, group=extra)
            assert int(total) == 2 * tag
        told = _meet(range(world), rank, tag=tag)
    return told


def test_a_group_of_the_same_two_ranks_is_not_taken_for_theirs() -> None:
    assert run_ranks(3, _crossing) == _neighbours(range(3), tag=20)


def _grid(rank: int, world: int) -> list[Neighbours]:
    """Two pipelines of two stages, which make their groups without asking each other, and unequally often."""
    pipeline = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))["pp"]
    group, stage = pipeline.get_group(), pipeline.get_local_rank()
    ranks = dist.get_process_group_ranks(group)
    times = 2 if rank % 2 else 1
    return [_meet(ranks, stage, group, tag=100 * time) for time in range(times)]


def test_a_pipeline_of_a_data_parallel_job_makes_its_groups_alone() -> None:
    assert run_ranks(4, _grid) == [
        [(None, 2)],
        [(None, 3), (None, 103)],
        [(0, None)],
        [(1, None), (101, None)],
    ]


def _twice(rank: int, world: int) -> list[Neighbours]:
    return [_meet(range(world), rank, tag=tag) for tag in (100, 200)]


def test_a_second_pipeline_of_the_same_ranks_gets_groups_of_its_own() -> None:
    first, second = zip(*run_ranks(3, _twice), strict=True)
    assert list(first) == _neighbours(range(3), 100)
    assert list(second) == _neighbours(range(3), 200)


@pytest.mark.parametrize("world", [1, 2, 3, 4, 7])
def test_neighbours_who_meet_in_order_come_together_in_two_rounds(world: int) -> None:
    """Each stage waits for the first of its list, then for the next: none is left, and none waits for a third round."""
    group: Any = object()
    due = [
        [there for there, _ in in_meeting_order(stage, group if stage else None, group if stage < world - 1 else None)]
        for stage in range(world)
    ]
    assert sorted(map(len, due)) == sorted(min(1, stage) + min(1, world - 1 - stage) for stage in range(world))
    for _ in range(2):
        met = [stage for stage, theirs in enumerate(due) if theirs and due[theirs[0]][:1] == [stage]]
        due = [theirs[1:] if stage in met else theirs for stage, theirs in enumerate(due)]
    assert due == [[]] * world
