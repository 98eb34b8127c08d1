"""Where the model is cut, and what is kept of that."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from dnipipe.config import Config, ForwardUnlockedConfig, ModelConfig, PipelineConfig
from dnipipe.partition import LayerCost, stage_costs
from dnipipe.trainer.cut import FILE, Cut, choose_lengths, held, layer_bytes, state_bytes
from dnipipe.trainer.measure import measure

CPU = torch.device("cpu")
MB = 1_000_000
# the last layer has few weights and takes long
LAYERS = [LayerCost(f"{n} Layer", ms, 0.0, weights, MB, 1, 60) for n, (ms, weights) in enumerate(
    [(1.0, 8 * MB), (1.0, 8 * MB), (1.0, 8 * MB), (1.0, 8 * MB), (3.5, 4)]
)]  # fmt: skip


def _config(**pipeline: Any) -> Config:
    return Config(pipeline=PipelineConfig(**{"policy": "synthetic", **pipeline}))


def _lengths(config: Config, num_stages: int = 2, extra_ms: float = 0.0) -> list[int]:
    return choose_lengths(config, LAYERS, num_stages, extra_ms, CPU)


def test_stages_are_balanced_by_time_with_what_predicting_costs_or_by_weights() -> None:
    assert _lengths(_config()) == [4, 1] and _lengths(_config(split="parameters")) == [2, 3]
    assert _lengths(_config(), extra_ms=1.5) == [3, 2] and _lengths(_config(split="parameters"), extra_ms=9.0 * MB) == [
        2,
        3,
    ]
    assert _lengths(_config(layers_per_stage=[1, 4])) == [1, 4]


def test_a_stage_that_has_no_room_is_not_chosen_and_no_room_at_all_is_refused() -> None:
    three_layers_gb = 3 * layer_bytes(_config(), LAYERS[0], 1, num_stages=2) / 1e9
    assert _lengths(_config(max_stage_gb=three_layers_gb)) == [3, 2]
    with pytest.raises(ValueError, match="pipeline.max_stage_gb.*use more stages"):
        _lengths(_config(max_stage_gb=three_layers_gb * 0.6))


def test_inputs_that_wait_for_the_models_of_inputs_take_room() -> None:
    one_layer_gb = layer_bytes(_config(), LAYERS[0], 1, num_stages=2) / 1e9
    layers = [replace(layer, output_bytes=MB) for layer in LAYERS]

    def lengths(room_gb: float, window: int) -> list[int]:
        config = _config(max_stage_gb=room_gb, forward_unlocked=ForwardUnlockedConfig(window=window))
        return choose_lengths(config, layers, 2, 0.0, CPU)

    assert lengths(4 * one_layer_gb, window=1) == lengths(3 * one_layer_gb + 0.0011, window=1) == [3, 2]
    assert lengths(4 * one_layer_gb + 0.0011, window=1) == [4, 1]
    with pytest.raises(ValueError, match=r"less what pipeline.forward_unlocked.window = 50 takes.*use more stages"):
        lengths(3 * one_layer_gb, window=50)
    with pytest.raises(ValueError, match=r"window = 5000 takes.*max_size = -"):
        lengths(3 * one_layer_gb, window=5000)


@pytest.mark.parametrize("given", [[5], [2, 2], [1, 2, 2]])
def test_numbers_of_layers_that_do_not_fit_are_refused(given: list[int]) -> None:
    with pytest.raises(ValueError, match="pipeline.layers_per_stage = .*2 stages share 5 layers"):
        _lengths(_config(layers_per_stage=given))


def test_memory_counts_what_is_in_flight_before_dni_unlocks_too() -> None:
    assert held(_config(num_microbatches=4), 3) == [1, 1, 1]
    for waits in (
        _config(policy="auto"),
        _config(policy="wait"),
        _config(unlock_after_steps=5),
        _config(schedule="1F1B"),
    ):
        assert held(waits, 3) == [3, 2, 1]
    assert held(_config(schedule="GPipe"), 3) == [4, 4, 4]


def test_weights_come_with_gradient_and_moments_and_half_ones_with_a_float32_copy() -> None:
    half = replace(_config(), model=ModelConfig(dtype="bfloat16"))
    assert state_bytes(_config(), 4 * 10, 3) == 16 * 10
    assert state_bytes(half, 2 * 10, 3) == (2 + 2 + 4 * 4) * 10


def test_weights_kept_for_late_backwards_are_counted() -> None:
    stale = _config(policy="wait:5,stale", num_microbatches=2, late_weights="old")
    assert state_bytes(stale, 4 * 10, 3) == (4 + 1) * 40  # the first of 3 stages is one update late
    predicted = _config(policy="wait:5,stale", num_microbatches=2)
    assert state_bytes(predicted, 4 * 10, 3) == (4 + 1 + 2) * 40  # the present ones, and two forecasts
    half = replace(predicted, model=ModelConfig(dtype="bfloat16"))
    assert state_bytes(half, 2 * 10, 3) == (2 + 2 + 4 * 4 + 4 + 2 * 2) * 10
    new = _config(policy="wait:5,stale", num_microbatches=2, late_weights="new")
    assert state_bytes(new, 4 * 10, 3) == 4 * 40


def test_a_cut_is_read_back_where_there_are_as_many_stages(tmp_path: Path) -> None:
    cut = Cut([4, 1], stage_costs(LAYERS, [4, 1]), 180.0)
    assert Cut.read(tmp_path, 2) is None
    (tmp_path / FILE).write_text(cut.to_json())
    assert Cut.read(tmp_path, 2) == cut and Cut.read(tmp_path, 3) is None
    assert [(row["stage"], row["layers"], row["parameters"]) for row in cut.facts(4)] == [(0, 4, 8 * MB), (1, 1, 1)]
    shown = io.StringIO()
    Console(file=shown, width=120).print(cut.table())
    assert "4: 0 Layer to 3 Layer" in shown.getvalue() and "53%" in shown.getvalue() and "47%" in shown.getvalue()


class Shift(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(8))

    def forward(self, h_BTV: Tensor) -> Tensor:
        return h_BTV + self.weight


class Start(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, 8)

    def forward(self, token_BT: Tensor) -> Tensor:
        return self.embed(token_BT)


def test_layers_that_are_alike_cost_alike_and_operations_are_counted() -> None:
    model = nn.Sequential(Start(), Shift(), Shift(), Shift(), nn.Linear(8, 256))
    config = replace(_config(num_microbatches=2), run=replace(Config().run, batch_size=8))
    measured = measure(config, model, 2, CPU, Console(quiet=True))
    assert len({(layer.forward_ms, layer.backward_ms) for layer in measured.layers[1:4]}) == 1
    assert measured.flops_per_token == 3 * 2 * 8 * 256 and sum(measured.lengths) == 5
    assert measured.microbatch == (4, config.data.seq_len) and math.isclose(
        sum(stage.total_ms for stage in measured.stages), sum(layer.total_ms for layer in measured.layers)
    )
