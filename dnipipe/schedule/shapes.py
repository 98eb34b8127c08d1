"""Whether a step has the shapes of the last one, and what to do when it has not.

Receives are posted before their data exists, so every rank must know of a changed shape before the first message. A
rank sees the shapes of its own arguments only: the input on the first stage, the target where it is passed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

Shape = tuple[int, ...]


def shapes_of(values: Any) -> tuple[Shape, ...]:
    return tuple(tuple(leaf.shape) for leaf in tree_leaves(values) if isinstance(leaf, Tensor))


class Shapes:
    """The shapes of one microbatch on one rank, as of the last step."""

    def __init__(self, stage: int) -> None:
        self.stage = stage
        self.forget()

    def forget(self) -> None:
        self._input: tuple[Shape, ...] | None = None
        self._target: tuple[Shape, ...] | None = None

    def remember(self, args: Any, kwargs: Any, target: Any) -> None:
        self._input = shapes_of((args, kwargs)) if self.stage == 0 else ()
        if target is not None:
            self._target = shapes_of(target)

    def changed(self, args: Any, kwargs: Any, target: Any, *, every_rank_has_target: bool) -> bool:
        """Whether all ranks see, at this step, that shapes have changed.

        Raises: ValueError on the first stage when its input changed and the other ranks cannot know.
        """
        new_target = shapes_of(target) if target is not None else None
        seen_by_all = every_rank_has_target and None not in (new_target, self._target) and new_target != self._target
        new_input = shapes_of((args, kwargs))
        if self.stage == 0 and self._input is not None and new_input != self._input and not seen_by_all:
            raise ValueError(
                f"stage 0: the input of one microbatch was {_words(self._input)} and is {_words(new_input)}, which the "
                f"other ranks cannot know: call reset_shapes() on every rank before this step, or pass on every "
                f"rank a target= whose shape changes too"
            )
        return seen_by_all

    def check_even(self, args: Sequence[Any], kwargs: Sequence[Any], targets: Sequence[Any] | None) -> None:
        """Raises: ValueError when the microbatches of one step differ in shape: torch splits unevenly in silence."""
        num_microbatches = len(args)
        for name, chunks in (("input", list(zip(args, kwargs, strict=True))), ("target", targets or [])):
            shapes = [shapes_of(chunk) for chunk in chunks]
            if len(set(shapes)) > 1:
                rows = [chunk[0][0] if chunk and chunk[0] else 0 for chunk in shapes]
                raise ValueError(
                    f"stage {self.stage}: {name} of {sum(rows)} rows does not split into {num_microbatches} equal "
                    f"microbatches (rows {rows}): use a batch size that is a multiple of n_microbatches"
                )


def _words(shapes: tuple[Shape, ...]) -> str:
    return ", ".join(str(shape) for shape in shapes) or "nothing"
