"""What a stage does in one batch, as DeepSpeed's instructions: data, so that it can be read and tested by itself.

policy wait, stage 0 of 2       F0 F1 B0 F2 B1 -- B2      one more goes forward before the first goes backward
policy synthetic, any stage     F0 B0 F1 B1 F2 B2         the gradient of B0 is predicted
"""

from __future__ import annotations

from collections.abc import Iterator

from deepspeed.runtime.pipe.schedule import (
    BufferOpInstruction,
    OptimizerStep,
    PipeInstruction,
    PipeSchedule,
    ReduceGrads,
    ReduceTiedGrads,
)


class BeginBatch(PipeInstruction):  # type: ignore[misc]
    """The boundaries are set for this batch."""


class Forward(BufferOpInstruction):  # type: ignore[misc]
    """One microbatch: load or receive, forward, send."""


class NothingForward(PipeInstruction):  # type: ignore[misc]
    """Under wait, after the last activation of a batch: only gradients are left to come."""


class Backward(BufferOpInstruction):  # type: ignore[misc]
    """The oldest microbatch that has not gone backward: gradient, backward, return, learn."""


class EndBatch(PipeInstruction):  # type: ignore[misc]
    """Under wait, nothing is left in flight. The predictors take their step; now and then the stages agree whether
    synthetic gradients do harm."""


class DNISchedule(PipeSchedule):  # type: ignore[misc]
    """Args: delay: microbatches that go forward before the first goes backward. The rest as DeepSpeed's schedules."""

    def __init__(self, micro_batches: int, stages: int, stage_id: int, delay: int) -> None:
        super().__init__(micro_batches, stages, stage_id)
        self.delay = delay

    def num_pipe_buffers(self) -> int:
        return self.delay + 1

    def steps(self) -> Iterator[list[PipeInstruction]]:
        yield [BeginBatch()]
        for slot in range(self.micro_batches + self.delay):
            instructions = [self._forward(slot)]
            if slot >= self.delay:
                instructions.append(Backward(self._buffer_idx(slot - self.delay)))
            yield instructions
        # EndBatch first: under wait with few microbatches it is what sends the last gradients, and whatever locks the
        # stages together afterwards (a global norm, tied layers) would wait for the stage that waits for them.
        yield [EndBatch(), ReduceTiedGrads(), ReduceGrads(), OptimizerStep()]

    def _forward(self, slot: int) -> PipeInstruction:
        return Forward(self._buffer_idx(slot)) if slot < self.micro_batches else NothingForward()
