"""Hugging Face decoders in the pipeline against the unsplit model of transformers in one process."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage

from dnipipe import ScheduleDNI
from dnipipe.partition import decoder_as_sequential, hf_names, split_decoder
from tests.partition.test_decoder import FAMILIES, V, options_of
from tests.ranks import run_ranks

CPU = torch.device("cpu")
STEPS, M, ROWS, T = 10, 2, 4, 11


def _loss(logits_BTV: Tensor, target_BT: Tensor) -> Tensor:
    return F.cross_entropy(logits_BTV.flatten(0, 1), target_BT.flatten())


def _batch(step: int) -> tuple[Tensor, Tensor]:
    """Eight sequences, over and over; each token follows from the one before it."""
    first_B = torch.randint(V, (ROWS,), generator=torch.Generator().manual_seed(step % 2))
    token_BT = (first_B[:, None] + 5 * torch.arange(T + 1)) % V
    return token_BT[:, :-1].contiguous(), token_BT[:, 1:].contiguous()


def _optimizer(module: nn.Module, lr: float = 1e-3) -> torch.optim.Optimizer:
    # eps: the gradient of a key's bias is rounding alone, which AdamW would scale up to whole steps
    return torch.optim.AdamW(module.parameters(), lr=lr, eps=1e-4)


def _pipelined(
    rank: int, world: int, options: dict[str, Any], steps: int, policy: str, lr: float = 1e-3
) -> tuple[dict[str, Tensor], list]:
    """What a stage's parameters are called and have become, and the mean losses on the last stage."""
    torch.manual_seed(0)
    module = split_decoder(options, world, untie=True)[rank]
    schedule = ScheduleDNI(PipelineStage(module, rank, world, CPU), M, loss_fn=_loss, timeout_s=30.0, policy=policy)
    optimizer, means = _optimizer(module, lr), []
    for step in range(steps):
        losses: list[Tensor] = []
        input_BT, target_BT = _batch(step)
        schedule.step(*((input_BT,) if rank == 0 else ()), target=target_BT, losses=losses)
        optimizer.step()
        optimizer.zero_grad()
        means += [float(torch.stack(losses).mean())] if losses else []
    schedule.flush()
    names = hf_names(module)
    return {names[name]: parameter.detach() for name, parameter in module.named_parameters()}, means


def _unsplit(options: dict[str, Any]) -> dict[str, Tensor]:
    """What the parameters of the model of transformers have become."""
    import transformers

    torch.manual_seed(0)
    row = decoder_as_sequential(options, untie=True)
    model = transformers.AutoModelForCausalLM.from_config(row[0].config)
    model.load_state_dict({theirs: row.get_parameter(ours) for ours, theirs in hf_names(row).items()})
    model.train()
    optimizer = _optimizer(model)
    for step in range(STEPS):
        input_BT, target_BT = _batch(step)
        _loss(model(input_BT).logits, target_BT).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def _waiting(rank: int, world: int, families: list[str]) -> dict[str, dict[str, Tensor]]:
    return {family: _pipelined(rank, world, options_of(family), STEPS, "wait")[0] for family in families}


def _assert_equal_to_unsplit(world: int, families: list[str]) -> None:
    by_rank = run_ranks(world, _waiting, families)
    for family in families:
        expected = _unsplit(options_of(family))
        ours = {name: value for rank in by_rank for name, value in rank[family].items()}
        assert sorted(ours) == sorted(expected)
        for name, value in expected.items():
            assert float((ours[name] - value).abs().max()) < 1e-5, f"{family}: {name}"


def test_two_stages_that_wait_are_the_unsplit_model_of_every_family() -> None:
    _assert_equal_to_unsplit(2, list(FAMILIES))


def test_three_stages_that_wait_are_the_unsplit_model() -> None:
    _assert_equal_to_unsplit(3, ["llama"])


def _decoupled(rank: int, world: int) -> dict[str, list]:
    return {family: _pipelined(rank, world, options_of(family), 40, "synthetic", lr=4e-3)[1] for family in FAMILIES}


def test_stages_that_never_wait_learn() -> None:
    for family, losses in run_ranks(2, _decoupled)[1].items():
        assert sum(losses[-4:]) < 0.5 * sum(losses[:4]), f"{family}: {losses}"
