"""Whether a step has the shapes of the last one: what each rank may conclude from its own arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dnipipe.schedule.shapes import Shapes, shapes_of


def _x(rows: int, length: int = 5) -> tuple[Tensor]:
    return (torch.zeros(rows, length),)


def _seen(stage: int, target: Tensor | None = None, args: Any = None) -> Shapes:
    """One step was made, with an input of (2, 5) on the first stage."""
    shapes = Shapes(stage)
    shapes.remember(args or _x(2), {}, target)
    return shapes


def test_shapes_are_those_of_all_tensors_in_a_nest_of_arguments() -> None:
    nest = (_x(2), {"mask": torch.zeros(3), "name": "x", "pair": [torch.zeros(()), None]})
    assert shapes_of(nest) == ((2, 5), (3,), ())
    assert shapes_of("nothing") == ()


@pytest.mark.parametrize("stage", [0, 1])
def test_nothing_has_changed_at_the_first_step_nor_when_all_is_as_before(stage: int) -> None:
    assert not Shapes(stage).changed(_x(2), {}, torch.zeros(2), every_rank_has_target=True)
    for target in (None, torch.zeros(2)):
        assert not _seen(stage, target).changed(_x(2), {}, target, every_rank_has_target=target is not None)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_changed_target_that_every_rank_has_is_seen_by_every_rank(stage: int) -> None:
    args: Any = _x(3) if stage == 0 else ()
    assert _seen(stage, torch.zeros(2)).changed(args, {}, torch.zeros(3), every_rank_has_target=True)
    assert _seen(stage, torch.zeros(2, 5)).changed(args, {}, torch.zeros(2, 6), every_rank_has_target=True)


@pytest.mark.parametrize("target, every", [(None, False), (torch.zeros(3), False), (None, True)])
def test_a_changed_input_that_others_cannot_see_is_refused_on_the_first_stage(target: Any, every: bool) -> None:
    with pytest.raises(ValueError) as caught:
        _seen(0, torch.zeros(2)).changed(_x(3), {"mask": torch.zeros(4)}, target, every_rank_has_target=every)
    assert str(caught.value) == (
        "stage 0: the input of one microbatch was (2, 5) and is (3, 5), (4,), which the other ranks cannot know: call "
        "reset_shapes() on every rank before this step, or pass on every rank a target= whose shape changes too"
    )


def test_an_input_that_changes_under_an_unchanged_target_is_refused_too() -> None:
    with pytest.raises(ValueError, match=r"was \(2, 5\) and is \(2, 6\), which the other ranks cannot know"):
        _seen(0, torch.zeros(2)).changed(_x(2, 6), {}, torch.zeros(2), every_rank_has_target=True)
    with pytest.raises(ValueError, match=r"was \(2, 5\) and is nothing, which the other ranks cannot know"):
        _seen(0).changed((), {}, None, every_rank_has_target=False)


def test_later_stages_say_nothing_of_what_they_cannot_judge() -> None:
    assert not _seen(1, torch.zeros(2), ()).changed((), {}, torch.zeros(3), every_rank_has_target=False)
    assert not _seen(1, None, ()).changed((), {"mask": torch.zeros(7)}, None, every_rank_has_target=False)


def test_a_step_without_a_target_does_not_make_the_next_one_look_changed() -> None:
    shapes = _seen(1, torch.zeros(2))
    shapes.remember((), {}, None)
    assert not shapes.changed((), {}, torch.zeros(2), every_rank_has_target=True)
    assert shapes.changed((), {}, torch.zeros(3), every_rank_has_target=True)


def test_after_forget_any_shape_is_right() -> None:
    shapes = _seen(0, torch.zeros(2))
    shapes.forget()
    assert not shapes.changed(_x(9), {}, torch.zeros(9), every_rank_has_target=True)


def test_microbatches_of_one_shape_are_even() -> None:
    Shapes(0).check_even([_x(2)] * 3, [{}] * 3, [torch.zeros(2)] * 3)
    Shapes(1).check_even([()] * 3, [{}] * 3, None)


CURE = "use a batch size that is a multiple of n_microbatches"


@pytest.mark.parametrize(
    "stage, args, kwargs, targets, message",
    [
        (
            0,
            [_x(3), _x(3), _x(2)],
            [{}] * 3,
            None,
            f"stage 0: input of 8 rows does not split into 3 equal microbatches (rows [3, 3, 2]): {CURE}",
        ),
        (
            2,
            [(), ()],
            [{}, {}],
            [torch.zeros(4), torch.zeros(3)],
            f"stage 2: target of 7 rows does not split into 2 equal microbatches (rows [4, 3]): {CURE}",
        ),
        (
            1,
            [(), ()],
            [{"mask": torch.zeros(2, 2)}, {"mask": torch.zeros(1, 2)}],
            None,
            f"stage 1: input of 3 rows does not split into 2 equal microbatches (rows [2, 1]): {CURE}",
        ),
    ],
)
def test_uneven_microbatches_are_refused_with_their_rows(
    stage: int, args: Any, kwargs: Any, targets: Any, message: str
) -> None:
    with pytest.raises(ValueError) as caught:
        Shapes(stage).check_even(args, kwargs, targets)
    assert str(caught.value) == message
