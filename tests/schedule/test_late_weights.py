"""Which weights late backwards see: several steps for one update, "new" weights, and each optimizer, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dnipipe.schedule.old_weights import OldWeights
from dnipipe.schedule.policy import Policy
from tests.ranks import run_ranks
from tests.schedule.harness import Case, Oracle, Pipeline, differences

STEPS = 7


@contextmanager
def _counting_parts() -> Iterator[list[int]]:
    """How often weights are cloned."""
    parted, part = [0], OldWeights.part

    def counted(weights: OldWeights) -> None:
        parted[0] += weights._parted is None
        part(weights)

    OldWeights.part = counted  # type: ignore[method-assign]
    try:
        yield parted
    finally:
        OldWeights.part = part  # type: ignore[method-assign]


def _run(
    rank: int, world: int, case: Case, accumulate: int = 1, wrap: Callable[[nn.Module], nn.Module] = lambda m: m
) -> list[str]:
    case.steps_per_update = accumulate if case.late_weights == "predicted" else 1  # the others see it themselves
    pipeline, oracle = Pipeline(rank, world, case, wrap), Oracle(world, case)
    for step in range(STEPS):
        updates = (step + 1) % accumulate == 0
        pipeline.step(step, optimize=updates)
        oracle.step(step, optimize=updates)
    wrong = [f"{case}: {each} before flush()" for each in differences(pipeline, oracle)]
    pipeline.schedule.flush()
    oracle.reference.flush()
    for step in (STEPS, STEPS + 1):
        pipeline.step(step)
        oracle.step(step)
    return wrong + [f"{case}: {each} after flush()" for each in differences(pipeline, oracle)]


ACCUMULATED = [
    Case("mlp", "linear", 1, "stale", labels="none", optimizer="adamw"),
    Case("sequence", "linear", 2, "corrected", in_flight=5, labels="relay"),
    Case("mlp", "mlp", 4, "corrected", unlock_after_steps=2, optimizer="adamw"),
    Case("sequence", "local_head", 1, "corrected", optimizer="adamw"),
]


def _accumulated(rank: int, world: int) -> tuple[list[str], list[int]]:
    wrong, counts = [], []
    for case in ACCUMULATED:
        case.late_weights = "old"
        with _counting_parts() as parted:
            wrong += _run(rank, world, case, accumulate=3)
        counts.append(parted[0])
    return wrong, counts


def test_steps_of_one_update_share_a_copy_of_the_weights() -> None:
    ranks = run_ranks(3, _accumulated)
    assert [wrong for wrong, _ in ranks] == [[], [], []]
    # 9 steps, updates after 3, 6, 8 and 9, flush() after 7. Without a gradient a stage cannot tell: a clone each step
    assert [counts for _, counts in ranks] == [[7, 5, 5, 5], [6, 5, 5, 5], [0, 0, 0, 0]]


NEW = [
    Case("mlp", "linear", 1, "stale", labels="none", optimizer="adamw"),
    Case("sequence", "linear", 2, "corrected", in_flight=5, labels="relay"),
    Case("mlp", "mlp", 4, "stale", unlock_after_steps=2, labels="none"),
    Case("sequence", "local_head", 1, "corrected", optimizer="adamw"),
]


def _new(rank: int, world: int) -> tuple[list[str], int]:
    wrong = []
    with _counting_parts() as parted:
        for case in NEW:
            case.late_weights = "new"
            wrong += _run(rank, world, case)
            wrong += _run(rank, world, case, accumulate=2)
    return wrong, parted[0]


def test_new_weights_under_old_activations_equal_the_oracles() -> None:
    assert run_ranks(3, _new) == [([], 0)] * 3


class _Recomputed(nn.Module):
    """Keeps of a microbatch what it was given, and runs it forward again when its gradient is here."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = checkpoint(self.inner, x, use_reentrant=False)
        return output


def _recomputed(rank: int, world: int) -> list[str]:
    wrong = []
    for case in (*ACCUMULATED[:2], *OPTIMIZED[2:4]):
        wrong += _run(rank, world, case, wrap=_Recomputed)
    return wrong


def test_recomputed_stages_equal_the_oracles_too() -> None:
    assert run_ranks(3, _recomputed) == [[], [], []]


def _same_as_copies(rank: int, world: int) -> bool:
    """Whether the parameters end as with copies."""
    case = Case("sequence", "linear", 1, "stale", labels="none")
    ended = []
    for case.late_weights in ("old", "new"):
        pipeline = Pipeline(rank, world, case)
        for step in range(STEPS):
            pipeline.step(step)
        ended.append(pipeline.state())
    return all((a == b).all() for a, b in zip(*ended, strict=True))


def test_new_weights_make_a_difference() -> None:
    assert run_ranks(2, _same_as_copies) == [False, False]


OPTIMIZED = [
    Case("mlp", "linear", 1, "stale", labels="none", optimizer="adamw_foreach"),
    Case("sequence", "local_head", 4, "corrected", optimizer="adamw_foreach"),
    Case("sequence", "linear", 2, "stale", labels="none", optimizer="adamw"),
    Case("mlp", "mlp", 1, "corrected", optimizer="adamw"),
    Case("sequence", "linear", 4, "stale", labels="none", optimizer="muon"),
    Case("sequence", "linear", 1, "corrected", optimizer="muon"),
    Case("bfloat16", "linear", 1, "stale", labels="none", optimizer="stage_adamw"),
    Case("bfloat16", "local_head", 2, "corrected", optimizer="stage_adamw"),
    Case("bfloat16", "linear", 4, "stale", labels="none", optimizer="muon"),
    Case("bfloat16", "local_head", 1, "corrected", optimizer="muon"),
]


def _optimized(rank: int, world: int, first: int) -> list[str]:
    wrong = []
    for case in OPTIMIZED[first::2]:
        wrong += _run(rank, world, case) + _run(rank, world, case, accumulate=2)
    return wrong


@pytest.mark.parametrize("first", [0, 1])
def test_late_gradients_move_weights_as_the_oracles_under_each_optimizer(first: int) -> None:
    assert run_ranks(3, _optimized, first) == [[], [], []]


def test_unknown_old_weights_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown late_weights 'recompute': choose one of predicted, old, new"):
        Policy("stale", late_weights="recompute")


@pytest.mark.parametrize(
    "text",
    [
        "predicted*",
        "predicted*0",
        "predicted*-1",
        "predicted*nan",
        "old*2",
        "predicted*x",
        "predicted@",
        "predicted@0",
        "new@3",
        "predicted*2@3",
        "*2",
    ],
)
def test_a_distance_is_a_number_above_0_and_of_foretold_weights_alone(text: str) -> None:
    with pytest.raises(
        ValueError, match=r"choose one of predicted, old, new, or predicted\*FACTOR or predicted@UPDATES"
    ):
        Policy("stale", late_weights=text)


@pytest.mark.parametrize(
    "text, far",
    [("predicted", (1, 2, 3)), ("predicted*2", (2, 4, 6)), ("predicted*.5", (0.5, 1, 1.5)), ("predicted@3", (3, 3, 3))],
)
def test_how_far_weights_are_foretold(text: str, far: tuple[float, ...]) -> None:
    distance = Policy("stale", late_weights=text).prediction
    assert distance is not None and tuple(distance(late) for late in (1, 2, 3)) == far


@pytest.mark.parametrize("text", ["old", "new"])
def test_some_weights_are_not_foretold(text: str) -> None:
    assert Policy("stale", late_weights=text).prediction is None
