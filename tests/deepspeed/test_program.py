"""What a stage does in one batch, read from the instructions alone."""

from __future__ import annotations

import pytest

from dnipipe.deepspeed.program import DNISchedule

SHORT = {"Forward": "F", "Backward": "B", "NothingForward": "--"}


def _words(schedule: DNISchedule) -> str:
    steps = list(schedule)
    assert [each.name for each in steps[0]] == ["BeginBatch"]
    assert [each.name for each in steps[-1]] == ["EndBatch", "ReduceTiedGrads", "ReduceGrads", "OptimizerStep"]
    return " ".join(f"{SHORT[each.name]}{each.kwargs.get('buffer_id', '')}" for step in steps[1:-1] for each in step)


@pytest.mark.parametrize(
    "num_microbatches, delay, words",
    [
        (3, 0, "F0 B0 F0 B0 F0 B0"),
        (3, 1, "F0 F1 B0 F0 B1 -- B0"),
        (4, 2, "F0 F1 F2 B0 F0 B1 -- B2 -- B0"),
        (1, 2, "F0 -- -- B0"),
    ],
)
def test_the_order_of_a_batch_by_buffers(num_microbatches: int, delay: int, words: str) -> None:
    schedule = DNISchedule(num_microbatches, 3, 0, delay)
    assert _words(schedule) == words and schedule.num_pipe_buffers() == delay + 1
