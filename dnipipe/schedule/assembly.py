"""Puts a stage's parts together: boundaries and ledgers before the first message, predictors once shapes are known."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..boundary import choose_transport, where_am_i
from ..interface import (
    Custom,
    Interface,
    Learner,
    SyntheticInput,
    TensorMeta,
    build_interface,
    build_synthetic_input,
)
from ..observe.trace import Trace
from . import torch_names
from .agreement import Agreement, agree
from .connect import Connections
from .early_inputs import EarlyUpward
from .facts import GIVEN, Call, Facts, check_calls
from .flow import Flow
from .forward_unlocked import ForwardUnlocked
from .late import LateFlow
from .ledger import Downward, Upward
from .policy import Policy
from .replicas import averager, start_alike
from .unlocked_flow import UnlockedFlow
from .weight_prediction import Masters

InterfaceChoice = str | nn.Module | Sequence[str | nn.Module] | None
OptimizerFactory = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


def as_list(interface: InterfaceChoice) -> list[str | nn.Module]:
    """Raises: ValueError for what is neither a name nor a module, such as a class, or a module that takes no label."""
    if interface is None:
        return []
    given: list[Any] = list(interface) if isinstance(interface, (list, tuple, nn.ModuleList)) else [interface]
    for each in given:
        if not isinstance(each, (str, nn.Module)):
            raise ValueError(
                f"interface takes a name, or a module that is called as module(activation, label), got {each!r}: build "
                f"an object of a class, make a function the forward() of a torch.nn.Module"
            )
        if isinstance(each, nn.Module) and not isinstance(each, Interface):
            _check_takes_label(each)
    return given


def _check_takes_label(module: nn.Module) -> None:
    try:
        signature = inspect.signature(module.forward)
    except (TypeError, ValueError):  # of compiled code nothing is known
        return
    try:
        signature.bind("activation", "label")
    except TypeError:
        name, parameters = type(module).__name__, ", ".join(signature.parameters)
        raise ValueError(
            f"interface {name}: forward({parameters}) cannot be called as forward(activation, label): give it a second "
            f"argument, which is None where there are no labels"
        ) from None


def interface_names(given: Sequence[str | nn.Module]) -> tuple[str, ...]:
    return tuple(each if isinstance(each, str) else f"{GIVEN}{type(each).__name__}" for each in given)


def open_flow(
    stage: Any,
    num_microbatches: int,
    policy: Policy,
    timeout_s: float,
    trace: Trace,
    transport: str = "auto",
    announces: bool = False,
    holds_graphs: bool = False,
    masters: Masters | None = None,
    unlocked: ForwardUnlocked | None = None,
) -> Flow:
    """The flow of a stage with its two boundaries. Every rank of the pipeline must call it at the same time.

    Args: announces: whether shapes may differ from one microbatch to the next; needs policy.post_ahead False, and a
          transport other than "direct". holds_graphs: whether the engine can leave graphs to the flow (LateFlow.hold).
          masters: as of LateFlow. unlocked: of UnlockedFlow, which holds no graphs.
    """
    here, device = stage.stage_index, torch.device(stage.device)
    direct = choose_transport(transport, _from_all_ranks(where_am_i(device), stage)) == "direct"
    assert not (announces and direct), "direct copies have slots of one size"
    # far more than can ever be under way: `lag` of training, twice, as each side learns late what the other fetched
    depth = 2 * (max(policy.lag, 2 * stage.num_stages) + (unlocked.window if unlocked is not None else 0)) + 8
    connections = Connections(stage, timeout_s)
    opened = connections.boundaries(direct=direct, depth=depth)
    announcers = connections.announcers() if announces else {}

    def side(kind: type[Any], there: int) -> Any:
        return kind(opened[there], device, announcers.get(there)) if there in opened else None

    parts: dict[str, Any] = {
        "stage": here,
        "num_stages": stage.num_stages,
        "num_microbatches": num_microbatches,
        "policy": policy,
        "up": side(Upward if unlocked is None else EarlyUpward, here - 1),
        "down": side(Downward, here + 1),
        "device": device,
        "trace": trace,
    }
    if unlocked is not None:
        return UnlockedFlow(unlocked=unlocked, **parts)
    return LateFlow(module=stage.submod, masters=masters, **parts) if holds_graphs else Flow(**parts)


def agree_over(facts: Facts, stage: Any) -> Agreement:
    """Every rank of the pipeline must call it at the same time; see agreement.py."""
    everyone = sorted(_from_all_ranks(facts, stage), key=lambda fact: fact.stage)
    return agree(everyone, stage.stage_index)


def every_rank_has_target(call: Call, stage: Any) -> bool:
    """Every rank of the pipeline must call it at the same time. Raises: ValueError as check_calls."""
    calls = _from_all_ranks(call, stage)
    check_calls(calls)
    return all(each.has_target for each in calls)


def _from_all_ranks(value: Any, stage: Any) -> list[Any]:
    everyone: list[Any] = [None] * stage.num_stages
    dist.all_gather_object(everyone, value, group=stage.group)
    return everyone


def set_metas(flow: Flow, stage: Any, agreement: Agreement) -> None:
    """What each training exchange carries down: the outputs, and a relayed label."""
    meta = agreement.label
    label = ((torch.Size(meta.shape), meta.dtype),) if meta is not None else ()
    if flow.up is not None:
        flow.up.metas = torch_names.input_metas(stage)
        flow.up.metas += label if agreement.relays_label_to(stage.stage_index) else ()
    if flow.down is not None:
        flow.down.metas = torch_names.output_metas(stage)
        flow.down.metas += label if agreement.relays_label_to(stage.stage_index + 1) else ()


def build_learner(
    stage: Any,
    agreement: Agreement,
    given: Sequence[str | nn.Module],
    optimizer: OptimizerFactory | None,
    replicas: Sequence[dist.ProcessGroup],
) -> Learner:
    """The predictors agreed upon, on the stage's device, averaged over the stage's data-parallel replicas."""
    outputs = zip(torch_names.output_metas(stage), agreement.needs_grad, strict=True)
    metas = [TensorMeta(tuple(shape), dtype) for (shape, dtype), needed in outputs if needed]
    modules = iter(each for each in given if isinstance(each, nn.Module))
    interfaces: list[Interface] = []
    for name, meta in zip(agreement.interfaces, metas, strict=True):
        if name.startswith(GIVEN):
            module = next(modules)
            interfaces.append(module if isinstance(module, Interface) else Custom(module))
        else:
            with torch.random.fork_rng(devices=[]):  # the caller's random numbers are the model's
                torch.default_generator.manual_seed(torch.initial_seed() + stage.stage_index)
                built = build_interface(name, meta, num_classes=agreement.num_classes, label=agreement.label)
            interfaces.append(built)
    device = torch.device(stage.device)
    for interface in interfaces:
        start_alike(interface.to(device), replicas)
    return Learner(interfaces, optimizer, averager(replicas))


def build_input_learner(
    stage: Any,
    unlocked: ForwardUnlocked,
    net_input: TensorMeta,
    replicas: Sequence[dist.ProcessGroup],
) -> Learner | None:
    """The models of what a stage receives, without a label, which would leak; None on the first stage."""
    if stage.is_first:
        return None
    models: list[SyntheticInput] = []
    for shape, dtype in torch_names.input_metas(stage):
        meta = TensorMeta(tuple(shape), dtype)
        if unlocked.model is not None:
            models.append(SyntheticInput(unlocked.model, meta))
            continue
        with torch.random.fork_rng(devices=[]):  # the caller's random numbers are the model's
            torch.default_generator.manual_seed(torch.initial_seed() + stage.num_stages + stage.stage_index)
            models.append(build_synthetic_input(net_input, meta, num_tokens=unlocked.num_tokens))
    for model in models:
        start_alike(model.to(torch.device(stage.device)), replicas)
    return Learner(models, unlocked.optimizer, averager(replicas))
