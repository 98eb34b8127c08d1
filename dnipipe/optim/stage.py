"""How the weights of one stage move: by AdamW, or its hidden matrices by Muon, in float32 also where they are bfloat16.

Sources: Loshchilov and Hutter 2019 (AdamW); Jordan et al. 2024 and Liu et al. 2025, "Muon is Scalable for LLM Training"
(Muon, scaled so that AdamW's learning rate and decay fit it); Micikevicius et al. 2018 (a float32 copy of the weights).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from .clip import Clip, StageClip

OptimizerName: TypeAlias = Literal["AdamW", "Muon"]

HALF = (torch.bfloat16, torch.float16)
MASTER = "master"
MOMENTS = {torch.optim.AdamW: {"step", "exp_avg", "exp_avg_sq"}, torch.optim.Muon: {"momentum_buffer"}}
"""What each optimizer keeps of a parameter."""


class StageOptimizer:
    """The optimizer of one stage. It waits for no other, unless its `clip` does.

    Weight decay is for what has two or more dimensions, embeddings included, as is usual in training GPTs: gains and
    biases have no scale to lose. Muon moves the weights of linear layers; AdamW all the rest: vectors, embeddings (also
    one that a Linear shares), matrices that belong to no such layer, and the head.

    Make it when the module has its weights, its dtype and its device: float32 copies are taken then.

    Args:
        module: the stage. Parameters that need no gradient are left alone.
        learning_rate: of each step, as from learning_rate_at().
        weight_decay: decoupled, per unit of learning rate.
        betas: of AdamW; Muon has its own momentum, 0.95.
        clip: bounds the gradients; None only measures them. One object for one optimizer.
        head: the layer that makes the model's output, in the last stage; Muon leaves it alone.
        alone: parameters that are copies of a weight of another stage. The copies stay bit-equal only if all that moves
            them comes from the same numbers at both ends. So each is clipped by its own norm, counts in no other norm,
            and is moved by AdamW: what is a Linear here may be an embedding there.
        master_weights: whether parameters in bfloat16 or float16 move by way of a float32 copy. Without it, what a
            step changes by less than half the distance to the next number is lost.

    Raises: ValueError: `alone` holds what is no parameter of the module, or one that needs no gradient.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        name: OptimizerName = "AdamW",
        learning_rate: Callable[[int], float],
        weight_decay: float,
        betas: tuple[float, float] = (0.9, 0.95),
        clip: Clip | None = None,
        head: nn.Module | None = None,
        alone: Sequence[nn.Parameter] = (),
        master_weights: bool = True,
    ) -> None:
        self._learning_rate = learning_rate
        self.clip: Clip = StageClip(0.0) if clip is None else clip
        self._parameters: dict[str, nn.Parameter] = {n: p for n, p in module.named_parameters() if p.requires_grad}
        self._weights: dict[str, Tensor] = {
            n: p.detach().float().requires_grad_() if master_weights and p.dtype in HALF else p
            for n, p in self._parameters.items()
        }
        """What the optimizers move: a float32 copy, or the parameter itself."""
        apart = _names_of(alone, self._parameters)
        self._alone = [weight for n, weight in self._weights.items() if n in apart]
        self._together = [weight for n, weight in self._weights.items() if n not in apart]
        hidden = _hidden_matrices(module, head) - apart if name == "Muon" else set()
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

    @property
    def masters(self) -> dict[nn.Parameter, Tensor]:
        """The float32 copies in use, by parameter; none where the parameter itself is moved."""
        return {p: self._weights[n] for n, p in self._parameters.items() if self._weights[n] is not p}

    @property
    def grad_norm(self) -> Tensor:
        """The norm, (), of the newest step's gradients before clipping; on the device, so that nobody waits for it."""
        return self.clip.grad_norm

    def step(self, step: int, *, divide_by: float = 1.0) -> None:
        """Moves the weights by the gradients that there are, at the learning rate of `step`, and drops these.

        Args: divide_by: by this the gradients are divided first, in float32 where there are copies in it: the number of
              batches, where each gradient is the sum of the means over several.
        """
        halves = [(p, self._weights[n]) for n, p in self._parameters.items() if self._weights[n] is not p]
        self._take_gradients(halves)
        gradients = [weight.grad for weight in self._weights.values() if weight.grad is not None]
        if divide_by != 1.0 and gradients:
            torch._foreach_div_(gradients, divide_by)
        self.clip.clip(self._together, self._alone)
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self._learning_rate(step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if halves:
            with torch.no_grad():
                parameters, weights = zip(*halves, strict=True)
                torch._foreach_copy_(parameters, weights)

    @staticmethod
    def _take_gradients(halves: Sequence[tuple[nn.Parameter, Tensor]]) -> None:
        """The copies get the gradients of their parameters, which lose them."""
        given, sums, copies = [], [], []
        for parameter, weight in halves:
            weight.grad = None if parameter.grad is None else torch.empty_like(weight)
            if parameter.grad is not None and weight.grad is not None:
                given.append(parameter)
                sums.append(parameter.grad)
                copies.append(weight.grad)
        if given:  # one launch for many of them, not one each
            torch._foreach_copy_(copies, sums)
        for parameter in given:
            parameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        """{"state": {parameter: {moment: tensor}}, "clip": that of the clip}.

        By the parameters' names, with the float32 copy as "master". The tensors are those in use, not copies. What the
        stages have in "state" is together the whole model's; "clip" fits this stage of this cut alone.

        A TravellingClip waits here for the other stages: every stage must call it after the same step.
        """
        moments = {weight: kept for optimizer in self._optimizers for weight, kept in optimizer.state.items()}
        state: dict[str, dict[str, Tensor]] = {}
        for name, weight in self._weights.items():
            state[name] = dict(moments.get(weight, {}))
            if weight is not self._parameters[name]:
                state[name][MASTER] = weight.detach()
        return {"state": state, "clip": self.clip.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over copies of what is kept of its own parameters, from the state of a stage or of any others with it.

        Call it after the module's load_state_dict(): without a "master" the float32 copy is taken anew from the
        parameter; with one, the parameter becomes what that says. Without a "clip" the clip begins anew.

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
        self.clip.load_state_dict(state.get("clip", {}))


def _names_of(alone: Sequence[nn.Parameter], parameters: dict[str, nn.Parameter]) -> set[str]:
    wanted = set(alone)
    names = {name for name, parameter in parameters.items() if parameter in wanted}
    if len(names) < len(wanted):
        raise ValueError(
            f"alone holds {len(wanted)} parameters, {len(names)} of them move in this module: give such as are its own "
            "and need a gradient"
        )
    return names


def _hidden_matrices(module: nn.Module, head: nn.Module | None) -> set[str]:
    """The names of the weights of linear layers that belong neither to an embedding nor to the head."""
    embeddings = [each for each in module.modules() if isinstance(each, (nn.Embedding, nn.EmbeddingBag))]
    kept = {p for each in (*embeddings, *([] if head is None else [head])) for p in each.parameters()}
    linear = {each.weight for each in module.modules() if _is_linear(each)}
    return {name for name, parameter in module.named_parameters() if parameter in linear - kept}


def _is_linear(module: nn.Module) -> bool:
    # transformers' GPT-2 has a class of its own for it, whose weight lies the other way round
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


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
