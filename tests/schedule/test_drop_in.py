"""What people do with a torch schedule works with ScheduleDNI too."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.pipelining.schedules import get_schedule_class

import dnipipe
from dnipipe import ScheduleDNI
from dnipipe.interface import MLP, Learner
from dnipipe.schedule import preparation
from dnipipe.schedule.choose import choose_policy
from dnipipe.schedule.policy import Policy
from dnipipe.schedule.reference import Reference
from tests.ranks import run_ranks
from tests.schedule import models
from tests.schedule.harness import Case, Oracle, Pipeline, differences

CPU = torch.device("cpu")


def _plain(rank: int, world: int, kind: str, tell: str, steps: int = 6, m: int = 2, **options: Any) -> tuple[str, list]:
    """Only what Schedule1F1B takes, and what `options` adds. tell: which ranks pass target=. Returns stderr, losses."""
    module = models.build(kind, world)[rank]
    schedule = ScheduleDNI(PipelineStage(module, rank, world, CPU), n_microbatches=m, loss_fn=models.loss_fn, **options)
    optimizer, means = models.optimizer(module), []
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        for _ in range(steps):
            x, y = models.batch(kind, 0, 4 * m)
            told = tell == "all" or rank == world - 1 or (tell == "first" and rank == 0)
            losses: list[Tensor] = []
            output = schedule.step(*((x,) if rank == 0 else ()), **({"target": y} if told else {}), losses=losses)
            optimizer.step()
            optimizer.zero_grad()
            means += [sum(float(loss.detach()) for loss in losses) / m] if losses else []
            assert (output is not None) == (rank == world - 1)
    return said.getvalue(), means


def _plain_with_hooks(rank: int, world: int, kind: str, tell: str) -> tuple[str, list]:
    """A hook on the parameters keeps `auto` from holding graphs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparation, "why_no_graphs", lambda module: "it has a hook")
        return _plain(rank, world, kind, tell)


def test_the_constructor_of_1f1b_is_enough_and_says_once_what_was_chosen() -> None:
    (said, _), (silence, losses) = run_ranks(2, _plain, "mlp", "all")
    assert said == (
        "[dnipipe] DNI over 2 stages, 2 microbatches: policy wait for 300 steps, then stale, in flight by stage 2, 1; "
        f"interfaces by stage: none (labels none). Chosen by auto: {choose_policy(2, 2, None)[1]}\n"
    )
    assert silence == "" and losses[-1] < losses[0]


def _unlocked(rank: int, world: int, kind: str, tell: str) -> tuple[str, list]:
    return _plain(rank, world, kind, tell, steps=40, policy="wait:5,synthetic")


def test_it_learns_when_only_the_last_rank_gets_a_target_as_in_torchs_tutorial() -> None:
    (said, _), (_, losses) = run_ranks(2, _unlocked, "mlp", "last")
    assert "interfaces by stage: mlp (labels none)" in said
    assert f"predictors begin at their own rates, here MLP at {MLP(models.D).learning_rate:g}\n" in said
    assert losses[-1] < 0.6 * losses[0]


def test_it_learns_when_the_first_rank_alone_adds_its_target() -> None:
    (said, _), _, (_, losses) = run_ranks(3, _unlocked, "sequence", "first")
    assert "interfaces by stage: local_head, local_head (labels relay, 7 classes)" in said
    assert losses[-1] < 0.8 * losses[0]


def _own_optimizer(rank: int, world: int) -> str:
    return _plain(rank, world, "mlp", "all", policy="synthetic", interface_optimizer=models.interface_optimizer)[0]


def test_with_an_optimizer_of_the_users_nothing_is_said_of_rates() -> None:
    said, _ = run_ranks(2, _own_optimizer)
    assert "interfaces by stage: local_head" in said and "rates" not in said


def test_a_sequence_without_labels_stays_at_wait_and_says_what_to_pass() -> None:
    (said, _), (_, losses) = run_ranks(2, _plain_with_hooks, "sequence", "last")
    assert "stays at policy wait" in said and "pass target= on every rank, or label_fn= on the first stage" in said
    assert losses[-1] < losses[0]


def _flattened(rank: int, world: int) -> bool:
    """A target that only the loss function understands, as many a training loop has it, passed on every rank."""
    ours, theirs = (models.build("sequence", world)[rank] for _ in range(2))
    dni = ScheduleDNI(PipelineStage(ours, rank, world, CPU), 2, models.loss_fn)
    torch_schedule = Schedule1F1B(PipelineStage(theirs, rank, world, CPU), 2, models.loss_fn)
    x, y = models.batch("sequence", 0, 4)
    for schedule in (dni, torch_schedule):
        schedule.step(*((x,) if rank == 0 else ()), target=y.reshape(-1))
    return all(torch.equal(a.grad, b.grad) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_a_flattened_target_is_left_to_the_loss_function() -> None:
    assert run_ranks(2, _flattened) == [True, True]


def _label_fn(rank: int, world: int) -> list[str]:
    """The label is derived from the input on the first stage; the oracle is told the same."""
    case = Case("sequence", "local_head", m=3, labels="relay", options={"label_fn": lambda x: (x + 1) % models.V})
    pipeline = Pipeline(rank, world, case)
    oracle = Oracle(world, case)
    for step in range(4):
        x, y = models.batch("sequence", step, case.rows * case.m)
        losses: list[Tensor] = []
        args = (x,) if rank == 0 else ()
        pipeline.schedule.step(*args, **({"target": y} if rank == world - 1 else {}), losses=losses)
        oracle.reference.step(x, y, (x + 1) % models.V)
        for optimizer in (pipeline.optimizer, *oracle.optimizers):
            optimizer.step()
            optimizer.zero_grad()
    return differences(pipeline, oracle)


def test_label_fn_on_the_first_stage_reaches_every_predictor() -> None:
    assert run_ranks(3, _label_fn) == [[], [], []]


class TwoOutputs(nn.Module):
    """(B, D) -> (h, a mask that needs no gradient, a second h); the next stage uses all three."""

    def __init__(self, stage: int, num_stages: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(models.D, models.D), nn.Linear(models.D, models.D)
        self.first, self.last = stage == 0, stage == num_stages - 1
        self.head = nn.Linear(models.D, models.V)

    def forward(self, h: Tensor, mask: Tensor | None = None, g: Tensor | None = None) -> Any:
        if mask is not None and g is not None:
            h = h * mask + g
        h, g = torch.tanh(self.a(h)), torch.tanh(self.b(h))
        return self.head(h + g) if self.last else (h, (h.detach() > 0).float(), g)


def _two_outputs(rank: int, world: int) -> list[bool]:
    """No optimizer is given, so on both sides each of the two interfaces learns at its own rate."""
    equal = []
    for policy in ("wait", "synthetic"):
        torch.manual_seed(0)
        stages = [TwoOutputs(stage, world) for stage in range(world)]
        torch.manual_seed(0)
        twins = [TwoOutputs(stage, world) for stage in range(world)]

        def interfaces() -> list[nn.Module]:
            return [models.interface("mlp", "linear", True), models.interface("mlp", "mlp", True)]

        given = interfaces()
        if not hasattr(PipelineStage(stages[rank], rank, world, CPU), "_stage_meta"):
            given.insert(1, models.interface("mlp", "linear", True))  # torch 2.11 asks a gradient for the mask too

        learners = [Learner(interfaces()) for _ in range(world - 1)]
        reference = Reference(
            twins, [*learners, None], models.loss_fn, num_microbatches=3, policy=Policy(policy, lag=2)
        )
        schedule = ScheduleDNI(
            PipelineStage(stages[rank], rank, world, CPU),
            3,
            models.loss_fn,
            interface=given if rank < world - 1 else None,
            policy=policy,
        )
        for step in range(4):
            x, y = models.batch("mlp", step, 6)
            schedule.step(*((x,) if rank == 0 else ()), target=y)
            reference.step(x, y, y)
            for module in (stages[rank], *twins):
                models.optimizer(module).step()
                module.zero_grad()
        pairs = zip(stages[rank].parameters(), twins[rank].parameters(), strict=True)
        equal.append(all(torch.equal(a, b) for a, b in pairs))
    return equal


def test_several_outputs_of_which_one_needs_no_gradient() -> None:
    assert run_ranks(3, _two_outputs) == [[True, True]] * 3


class Scaled(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        return self.module(x if scale is None else x * scale)


def _kwargs(rank: int, world: int) -> bool:
    case = Case(m=2, policy="wait")
    ours = Pipeline(rank, world, case, wrap=Scaled)
    twin = Scaled(models.build("mlp", world)[rank])
    theirs = Schedule1F1B(PipelineStage(twin, rank, world, CPU), 2, models.loss_fn)
    x, y = models.batch("mlp", 0, 4)
    kwargs = {"scale": torch.linspace(0, 1, 4).unsqueeze(1)} if rank == 0 else {}
    args, target = ((x,) if rank == 0 else ()), ({"target": y} if rank == world - 1 else {})
    ours.schedule.step(*args, target=y, **kwargs)
    theirs.step(*args, **target, **kwargs)
    return all(torch.equal(a.grad, b.grad) for a, b in zip(ours.module.parameters(), twin.parameters(), strict=True))


def test_keyword_arguments_of_the_first_stage_are_split_as_torch_splits_them() -> None:
    assert run_ranks(2, _kwargs) == [True, True]


def _precision(rank: int, world: int, pure: bool) -> list[str]:
    wrong = []
    for policy in ("wait", "synthetic"):
        case = Case("sequence", "local_head", m=2, policy=policy)
        pipeline = Pipeline(rank, world, case, wrap=(lambda m: m.bfloat16()) if pure else (lambda m: m))
        oracle = Oracle(world, case)
        if pure:
            for stage in oracle.reference.stages:
                stage.bfloat16()
        with torch.autocast("cpu", torch.bfloat16, enabled=not pure):
            for step in range(4):
                pipeline.step(step)
                oracle.step(step)
        dtype = next(iter(pipeline.schedule._flow.down.pending), None) if policy == "synthetic" and rank == 0 else None
        if dtype is not None and dtype.activations[0].dtype is not (torch.bfloat16 if pure else torch.float32):
            wrong.append(f"activation dtype {dtype.activations[0].dtype}")
        wrong += differences(pipeline, oracle)
    return wrong


def test_bf16_under_autocast_equals_the_oracle() -> None:
    assert run_ranks(2, _precision, False) == [[], []]


def test_pure_bf16_equals_the_oracle() -> None:
    assert run_ranks(2, _precision, True) == [[], []]


def _masked_loss(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output.reshape(-1, models.V), target.reshape(-1), ignore_index=-100)


def _ignored(rank: int, world: int) -> float:
    module = models.build("sequence", world)[rank]
    schedule = ScheduleDNI(PipelineStage(module, rank, world, CPU), 2, _masked_loss, policy="synthetic")
    optimizer = models.optimizer(module)
    for step in range(12):
        x, y = models.batch("sequence", step, 8)
        y[:, : 1 + step % models.T] = -100
        schedule.step(*((x,) if rank == 0 else ()), target=y)
        optimizer.step()
        optimizer.zero_grad()
    schedule.flush()
    return sum(float(p.detach().abs().sum()) for p in module.parameters()) + float(schedule.metrics["loss"])


def test_a_loss_with_ignored_tokens_gives_finite_weights() -> None:
    assert all(abs(value) < 1e6 for value in run_ranks(2, _ignored))


def _with_eval(rank: int, world: int, m: int) -> list[str]:
    case = Case(m=m, lag=2)
    pipeline, oracle = Pipeline(rank, world, case), Oracle(world, case)
    outputs = []
    for step in range(-1, 5):
        if step >= 0:
            pipeline.step(step)
            oracle.step(step)
        if step in (-1, 1, 2, 4):
            x, y = models.batch("mlp", 90, case.rows * m)
            losses: list[Tensor] = []
            args = (x,) if rank == 0 else ()
            last = {"target": y, "losses": losses} if rank == world - 1 else {}
            outputs.append((pipeline.schedule.eval(*args, **last), losses))
            model = nn.Sequential(*oracle.reference.stages)
            with torch.no_grad():
                expected = torch.cat([model(chunk) for chunk in x.chunk(m)])
            if rank == world - 1 and not torch.equal(outputs[-1][0], expected):
                return ["eval() output"]
            if rank == world - 1 and len(losses) != m:
                return [f"{len(losses)} losses of eval()"]
    return differences(pipeline, oracle)


def test_eval_before_between_and_after_steps_changes_nothing() -> None:
    for m in (1, 4):
        assert run_ranks(3, _with_eval, m) == [[], [], []]


def _accumulated(rank: int, world: int) -> list[str]:
    case = Case(m=2, options={"scale_grads": False})
    pipeline, oracle = Pipeline(rank, world, case), Oracle(world, case)
    oracle.reference.scale_grads = False
    for step in range(6):
        pipeline.step(step, optimize=step % 3 == 2)
        oracle.step(step, optimize=step % 3 == 2)
    return differences(pipeline, oracle)


def test_several_steps_before_one_optimizer_step() -> None:
    assert run_ranks(2, _accumulated) == [[], []]


def _reused(rank: int, world: int) -> list[str]:
    case = Case("sequence", "local_head", m=2, lag=3)
    pipeline, oracle = Pipeline(rank, world, case), Oracle(world, case)
    x_buffer, y_buffer = models.batch("sequence", 0, case.rows * case.m)
    for step in range(5):
        x, y = models.batch("sequence", step, case.rows * case.m)
        x_buffer.copy_(x)
        y_buffer.copy_(y)
        pipeline.schedule.step(*((x_buffer,) if rank == 0 else ()), target=y_buffer)
        x_buffer.zero_()
        y_buffer.zero_()
        pipeline.optimizer.step()
        pipeline.optimizer.zero_grad()
        oracle.step(step)
    return differences(pipeline, oracle)


def test_the_caller_may_reuse_the_memory_of_input_and_target_after_step() -> None:
    assert run_ranks(3, _reused) == [[], [], []]


class Checkpointed(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(self.module, x, use_reentrant=False)


def _compile(module: nn.Module) -> nn.Module:
    return torch.compile(module, backend="aot_eager")


def _wrapped(rank: int, world: int, name: str) -> list[str]:
    wrap = {"compile": _compile, "checkpoint": Checkpointed}[name]
    case = Case(m=3)
    pipeline, oracle = Pipeline(rank, world, case, wrap=wrap), Oracle(world, case)
    for step in range(3):
        pipeline.step(step)
        oracle.step(step)
    return differences(pipeline, oracle)


def test_compiled_stages_equal_the_oracle() -> None:
    assert run_ranks(2, _wrapped, "compile") == [[], []]


def test_activation_checkpointing_inside_a_stage_equals_the_oracle() -> None:
    assert run_ranks(2, _wrapped, "checkpoint") == [[], []]


def test_register_makes_torch_know_the_name() -> None:
    import torch.distributed.pipelining.schedules as schedules

    original = schedules.get_schedule_class
    try:
        dnipipe.register()
        dnipipe.register("Bubbleless")
        for name in ("DNI", "dni", "bubbleless"):
            assert schedules.get_schedule_class(name) is ScheduleDNI
        assert schedules.get_schedule_class("1F1B") is Schedule1F1B
        # a module that had imported the function by value, as this one, is served too
        assert get_schedule_class("DNI") is ScheduleDNI
    finally:
        schedules.get_schedule_class = original
        globals()["get_schedule_class"] = original
