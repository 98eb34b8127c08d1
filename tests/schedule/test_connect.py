"""A stage reaches its neighbours, and no other, over its boundaries and over what announces shapes."""

from __future__ import annotations

import torch
from torch.distributed.pipelining import PipelineStage

from dnipipe.boundary import Boundary
from dnipipe.schedule.connect import Connections
from tests.ranks import run_ranks
from tests.schedule import models


def _heard(boundaries: dict[int, Boundary], rank: int) -> dict[int, int]:
    """By neighbour: the rank that it says it has, after each side was told of the other's."""
    heard = {there: torch.tensor([-1]) for there in boundaries}
    posted = [
        boundary.exchange([torch.tensor([rank])], [heard[there]], microbatch=0)
        for there, boundary in boundaries.items()
    ]
    for exchange in posted:
        exchange.wait()
    return {there: int(heard[there]) for there in sorted(heard)}


def _connected(rank: int, world: int) -> tuple[list[dict[int, int]], dict[int, tuple[int, ...]]]:
    connections = Connections(PipelineStage(models.build("mlp", world)[rank], rank, world, torch.device("cpu")), 10.0)
    boundaries = connections.boundaries(direct=False, depth=8)
    announcers = {there: announcer.boundary for there, announcer in connections.announcers().items()}
    names = {there: (each.rank, each.stage, each.peer, each.peer_stage) for there, each in boundaries.items()}
    return [_heard(boundaries, rank), _heard(announcers, rank)], names


def test_each_stage_hears_its_neighbours_twice_and_knows_their_names() -> None:
    for rank, (heard, names) in enumerate(run_ranks(4, _connected)):
        due = {there: there for there in (rank - 1, rank + 1) if 0 <= there < 4}
        assert heard == [due, due]
        assert names == {there: (rank, rank, there, there) for there in due}


def test_a_single_stage_has_no_neighbours() -> None:
    assert run_ranks(1, _connected) == [([{}, {}], {})]
