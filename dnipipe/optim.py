"""How the weights of one stage move: by AdamW, or its hidden matrices by Muon, in float32 also where they are bfloat16.

Sources: Loshchilov and Hutter 2019 (AdamW); Jordan et al. 2024 and Liu et al. 2025, "Muon is Scalable for LLM Training"
(Muon, scaled so that AdamW's learning rate and decay fit it); Micikevicius et al. 2018 (a float32 copy of the weights).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

OptimizerName: TypeAlias = Literal["AdamW", "Muon"]
RateSchedule: TypeAlias = Literal["constant", "cosine"]

HALF = (torch.bfloat16, torch.float16)
MASTER = "master"
MOMENTS = {torch.optim.AdamW: {"step", "exp_avg", "exp_avg_sq"}, torch.optim.Muon: {"momentum_buffer"}}
"""What each optimizer keeps of a parameter."""


def learning_rate_at(
    step: int,
    *,
    peak: float,
    warmup_steps: int = 0,
    total_steps: int = 0,
    schedule: RateSchedule = "constant",
    final_fraction: float = 0.0,
) -> float:
    """The learning rate of one step.

    It rises linearly from peak / warmup_steps at step 0 to the peak at step warmup_steps - 1. Then it stays there, or
    falls along half a cosine from the peak at step warmup_steps to final_fraction * peak at total_steps and later.

    Args:   step: 0 for the first. total_steps: needed by "cosine" alone.
    Raises: ValueError: a cosine that ends before it begins.
    """
    if schedule == "cosine" and total_steps <= warmup_steps:
        raise ValueError(
            f"total_steps = {total_steps}: a cosine falls from warmup_steps = {warmup_steps} to total_steps, which "
            "must be more; train for more steps, or warm up for fewer"
        )
    if step < warmup_steps or schedule == "constant":
        return peak * min(1.0, (step + 1) / max(1, warmup_steps))
    done = min(1.0, (step - warmup_steps) / (total_steps - warmup_steps))
    return peak * (final_fraction + (1 - final_fraction) * (1 + math.cos(math.pi * done)) / 2)


class StageOptimizer:
    """The optimizer of one stage, which waits for no other: also the norm that it clips by is of this stage alone.

    Weight decay is for what has two or more dimensions, embeddings included, as is usual in training GPTs: gains and
    biases have no scale to lose. Muon moves the weights of nn.Linear; AdamW all the rest, that is vectors, embeddings
    (also one that a Linear shares), matrices that belong to no Linear, and the head.

    Make it when the module has its weights, its dtype and its device: float32 copies are taken then.

    Args:
        module: the stage. Parameters that need no gradient are left alone.
        learning_rate: of each step, as from learning_rate_at().
        weight_decay: decoupled, per unit of learning rate.
        betas: of AdamW; Muon has its own momentum, 0.95.
        clip: the largest gradient norm; 0 does not clip.
        head: the layer that makes the model's output, in the last stage; Muon leaves it alone.
        master_weights: whether parameters in bfloat16 or float16 move by way of a float32 copy. Without it, what a
            step changes by less than half the distance to the next number is lost.
    """

    grad_norm: Tensor
    """The norm, (), of the newest step's gradients before clipping; on the device, so that nobody waits for it."""

    def __init__(
        self,
        module: nn.Module,
        *,
        name: OptimizerName = "AdamW",
        learning_rate: Callable[[int], float],
        weight_decay: float,
        betas: tuple[float, float] = (0.9, 0.95),
        clip: float = 0.0,
        head: nn.Module | None = None,
        master_weights: bool = True,
    ) -> None:
        self._learning_rate, self._clip, self.grad_norm = learning_rate, clip, torch.zeros(())
        self._parameters = {n: p for n, p in module.named_parameters() if p.requires_grad}
        self._weights: dict[str, Tensor] = {
            n: p.detach().float().requires_grad_() if master_weights and p.dtype in HALF else p
            for n, p in self._parameters.items()
        }
        """What the optimizers move: a float32 copy, or the parameter itself."""
        hidden = _hidden_matrices(module, head) if name == "Muon" else set()
        muon = [weight for n, weight in self._weights.items() if n in hidden]
        rest = [weight for n, weight in self._weights.items() if n not in hidden]
        rate = learning_rate(0)
        self._optimizers: list[torch.optim.Optimizer] = []
        if rest:
            self._optimizers.append(_adamw(rest, rate, betas, weight_decay))
        if muon:
            self._optimizers.append(
                torch.optim.Muon(muon, lr=rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
            )

    def step(self, step: int) -> None:
        """Moves the weights by the gradients that there are, at the learning rate of `step`, and drops these."""
        halves = [(p, self._weights[n]) for n, p in self._parameters.items() if self._weights[n] is not p]
        for parameter, weight in halves:
            weight.grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None
        weights = list(self._weights.values())
        self.grad_norm = get_total_norm([weight.grad for weight in weights if weight.grad is not None])
        if self._clip:
            clip_grads_with_norm_(weights, self._clip, self.grad_norm)
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self._learning_rate(step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for parameter, weight in halves:
                parameter.copy_(weight)

    def state_dict(self) -> dict[str, Any]:
        """{"state": {parameter: {moment: tensor}}}, by the parameters' names, with the float32 copy as "master".

        The tensors are those in use, not copies. The states of all stages together are the whole model's.
        """
        moments = {weight: kept for optimizer in self._optimizers for weight, kept in optimizer.state.items()}
        state: dict[str, dict[str, Tensor]] = {}
        for name, weight in self._weights.items():
            state[name] = dict(moments.get(weight, {}))
            if weight is not self._parameters[name]:
                state[name][MASTER] = weight.detach()
        return {"state": state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over copies of what is kept of its own parameters, from the state of a stage or of any others with it.

        Call it after the module's load_state_dict(): without a "master" the float32 copy is taken anew from the
        parameter; with one, the parameter becomes what that says.

        Raises: ValueError: nothing about one of its parameters, or what another optimizer or shape would keep; then
                nothing is changed.
        """
        entries = state["state"]
        missing = [name for name in self._weights if name not in entries]
        if missing:
            raise ValueError(
                f"the optimizer's state holds nothing about {', '.join(missing)}: load the states of all stages that "
                "the parameters of this one come from"
            )
        names = {weight: name for name, weight in self._weights.items()}
        loaded: list[dict[str, Any]] = []
        for optimizer in self._optimizers:
            weights = [weight for group in optimizer.param_groups for weight in group["params"]]
            kept = [_moments(type(optimizer), names[weight], weight, entries[names[weight]]) for weight in weights]
            by_index = {index: moments for index, moments in enumerate(kept) if moments}
            loaded.append({**optimizer.state_dict(), "state": by_index})
        for optimizer, moments in zip(self._optimizers, loaded, strict=True):
            optimizer.load_state_dict(moments)
        with torch.no_grad():
            for name, weight in self._weights.items():
                weight.copy_(entries[name].get(MASTER, self._parameters[name]))
                self._parameters[name].copy_(weight)


def _hidden_matrices(module: nn.Module, head: nn.Module | None) -> set[str]:
    """The names of the weights of nn.Linear that belong neither to an embedding nor to the head."""
    embeddings = [each for each in module.modules() if isinstance(each, (nn.Embedding, nn.EmbeddingBag))]
    kept = {p for each in (*embeddings, *([] if head is None else [head])) for p in each.parameters()}
    linear = {each.weight for each in module.modules() if isinstance(each, nn.Linear)}
    return {name for name, parameter in module.named_parameters() if parameter in linear - kept}


def _adamw(
    weights: list[Tensor], learning_rate: float, betas: tuple[float, float], weight_decay: float
) -> torch.optim.AdamW:
    groups = [
        {"params": [weight for weight in weights if weight.ndim >= 2], "weight_decay": weight_decay},
        {"params": [weight for weight in weights if weight.ndim < 2], "weight_decay": 0.0},
    ]
    # fused: one pass over the memory, where torch's default makes several; None: that default
    fused = all(weight.is_cuda for weight in weights) or None
    return torch.optim.AdamW(groups, learning_rate, betas, fused=fused)


def _moments(
    optimizer: type[torch.optim.Optimizer], name: str, weight: Tensor, entry: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Copies of what was kept of one parameter; nothing if it never had a gradient."""
    moments = {key: value for key, value in entry.items() if key != MASTER}
    if moments and moments.keys() != MOMENTS[optimizer]:
        raise ValueError(
            f"the optimizer's state of {name} holds {', '.join(sorted(moments))}, {optimizer.__name__} keeps "
            f"{', '.join(sorted(MOMENTS[optimizer]))}: go on with the optimizer that the state was saved from"
        )
    for key, value in moments.items():
        if key != "step" and value.shape != weight.shape:
            raise ValueError(
                f"the optimizer's state of {name} has {key} of shape {tuple(value.shape)}, the parameter has "
                f"{tuple(weight.shape)}: load it into the model that it was saved from"
            )
    # a fused optimizer keeps the number of steps on its device, others on the CPU: from there torch moves it itself
    return {key: value.to("cpu" if key == "step" else value.device, copy=True) for key, value in moments.items()}
