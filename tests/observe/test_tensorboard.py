"""What TensorBoard will show, read back with its own reader."""

import math
import sys

import pytest

from dnipipe.observe.tensorboard import TensorBoardFile

accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")


def _shown(folder):
    """{tag: [(step, value), ...]}"""
    events = accumulator.EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {
        tag: [(event.step, pytest.approx(event.value)) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def _line(step, loss, **more):
    return {"schedule": "DNI", "step": step, "loss": loss, **more}


def test_numbers_and_the_parts_of_lists_are_scalars_at_their_step(tmp_path):
    record = _line(20, 2.5, cosine=0.8, cosine_by_boundary=[0.8, 0.6], wait_s_by_rank=[1, 2], grad_norm_by_stage=[3.0])
    with TensorBoardFile(tmp_path) as board:
        board.write(record)
    assert _shown(tmp_path) == {
        "loss": [(20, 2.5)],
        "cosine": [(20, 0.8)],
        "cosine/boundary 0": [(20, 0.8)],
        "cosine/boundary 1": [(20, 0.6)],
        "wait_s/rank 0": [(20, 1)],
        "wait_s/rank 1": [(20, 2)],
        "grad_norm/stage 0": [(20, 3)],
    }


def test_what_is_not_known_is_left_out_and_keeps_no_place(tmp_path):
    with TensorBoardFile(tmp_path) as board:
        board.write(_line(20, None, mfu=math.nan, speed=math.inf, note="x", r2_by_boundary=[None, 0.5, math.nan]))
    assert _shown(tmp_path) == {"r2/boundary 1": [(20, 0.5)]}


def test_it_is_on_disk_before_the_file_is_closed(tmp_path):
    board = TensorBoardFile(tmp_path)
    for step in range(1, 51):
        board.write(_line(step, 2.5))
    assert _shown(tmp_path) == {"loss": [(step, 2.5) for step in range(1, 51)]}
    board.close()


def test_a_validation_repeats_no_number_of_its_step(tmp_path):
    with TensorBoardFile(tmp_path) as board:
        board.write(_line(20, 2.5))
        board.write(_line(20, 2.5, val_bits=3.0))
    assert _shown(tmp_path) == {"loss": [(20, 2.5)], "val_bits": [(20, 3.0)]}


def test_a_run_that_goes_on_shows_nothing_twice(tmp_path):
    """Killed after step 60, it goes on from the checkpoint after 40, where a validation follows."""
    with TensorBoardFile(tmp_path, resumed_step=0) as board:
        for step in (20, 40, 60):
            board.write(_line(step, float(step)))
    with TensorBoardFile(tmp_path, resumed_step=40) as board:
        board.write(_line(40, 40.0, val_bits=3.0))
        for step in (60, 80):
            board.write(_line(step, step + 0.5))
    shown = _shown(tmp_path)
    assert shown == {"loss": [(20, 20), (40, 40), (60, 60.5), (80, 80.5)], "val_bits": [(40, 3.0)]}


def test_without_tensorboard_it_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r"pip install 'dnipipe\[tensorboard\]'"):
        TensorBoardFile(tmp_path)
