"""What the layers of a Hugging Face decoder are in a row, and where each family of models keeps their parts.

Each layer wraps modules of the Hugging Face model itself, so what they compute and how they start is theirs.
Legend: B sequences, T tokens in a sequence, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Family:
    """Names in a model for causal language modelling: trunk in the model, all others in the trunk; None: it has none.

    A family without rotary has learned positions, which are added to the tokens.
    """

    trunk: str
    tokens: str
    blocks: str
    norm: str
    positions: str | None = None
    dropout: str | None = None
    rotary: str | None = None
    slides: bool = False
    """Whether a config may give layers a sliding window."""


HEAD = "lm_head"
_LLAMA = Family("model", "embed_tokens", "layers", "norm", rotary="rotary_emb")
FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "gpt2": Family("transformer", "wte", "h", "ln_f", positions="wpe", dropout="drop"),
        "llama": _LLAMA,
        "mistral": replace(_LLAMA, slides=True),
        "qwen2": replace(_LLAMA, slides=True),
        "qwen3": replace(_LLAMA, slides=True),
    }
)


class Part(nn.Module):
    """A layer of the row. hf_prefix: where each of its modules with weights is in the Hugging Face model."""

    def __init__(self, config: Any, hf_prefix: Mapping[str, str]) -> None:
        super().__init__()
        self.config, self.hf_prefix = config, dict(hf_prefix)

    def hf_names(self) -> Iterator[tuple[str, str]]:
        """(name in this layer, name in the Hugging Face model) of every parameter."""
        for module, prefix in self.hf_prefix.items():
            for name, _ in self.get_submodule(module).named_parameters():
                yield f"{module}.{name}", f"{prefix}.{name}"


class Embedding(Part):
    """Tokens, and positions where they are learned: (B, T) int64 -> (B, T, D).

    Raises (forward): ValueError: T is more than the learned positions.
    """

    def __init__(self, config: Any, family: Family, trunk: Any) -> None:
        super().__init__(config, {"tokens": f"{family.trunk}.{family.tokens}"})
        self.tokens: nn.Embedding = trunk.get_submodule(family.tokens)
        self.positions: nn.Embedding | None = trunk.get_submodule(family.positions) if family.positions else None
        self.dropout: nn.Module = trunk.get_submodule(family.dropout) if family.dropout else nn.Identity()
        if family.positions:
            self.hf_prefix["positions"] = f"{family.trunk}.{family.positions}"

    def forward(self, token_BT: Tensor) -> Tensor:
        h_BTD = self.tokens(token_BT)
        if self.positions is not None:
            T, most = token_BT.shape[1], self.positions.num_embeddings
            if T > most:
                raise ValueError(f"sequences of {T} tokens; the model has {most} learned positions: cut them shorter")
            h_BTD = h_BTD + self.positions(torch.arange(T, device=token_BT.device))
        dropped: Tensor = self.dropout(h_BTD)
        return dropped


class Block(Part):
    """One decoder layer, causal, at positions 0 to T - 1, without a cache: (B, T, D) -> (B, T, D).

    Args: rotary: makes the rotary embedding; without weights, so every stage has its own.
    """

    def __init__(self, config: Any, family: Family, index: int, layer: nn.Module, rotary: nn.Module | None) -> None:
        super().__init__(config, {"layer": f"{family.trunk}.{family.blocks}.{index}"})
        self.layer, self.rotary = layer, rotary
        self.window = _window(config, index) if family.slides else None

    def forward(self, h_BTD: Tensor) -> Tensor:
        position_T = torch.arange(h_BTD.shape[1], device=h_BTD.device)
        options: dict[str, Any] = {"attention_mask": self._mask(position_T)}
        if self.rotary is not None:
            options["position_ids"] = position_T[None]
            options["position_embeddings"] = self.rotary(h_BTD, position_T[None])
        output_BTD: Tensor = self.layer(h_BTD, **options)
        return output_BTD

    def _mask(self, position_T: Tensor) -> Tensor | None:
        """True where a token (third axis) looks at another (fourth). None: at itself and all before it."""
        if self.window is None or len(position_T) <= self.window:
            return None
        apart_TT = position_T[:, None] - position_T
        return ((apart_TT >= 0) & (apart_TT < self.window))[None, None]


class Head(Part):
    """The last norm, and a logit for every token of the vocabulary: (B, T, D) -> (B, T, V)."""

    def __init__(self, config: Any, family: Family, norm: nn.Module, project: nn.Linear) -> None:
        super().__init__(config, {"norm": f"{family.trunk}.{family.norm}", "project": HEAD})
        self.norm, self.project = norm, project

    def forward(self, h_BTD: Tensor) -> Tensor:
        logits_BTV: Tensor = self.project(self.norm(h_BTD))
        return logits_BTV


def family_of(model_type: object) -> Family:
    """Raises: ValueError: a model_type that is not among FAMILIES."""
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(f"model_type {model_type!r} is none of the decoders known here: {', '.join(FAMILIES)}")
    return FAMILIES[model_type]


def row_of(model: Any) -> nn.Sequential:
    """The layers of a Hugging Face model for causal language modelling; its own modules, not copies."""
    config, family = model.config, family_of(model.config.model_type)
    trunk = model.get_submodule(family.trunk)
    rotary = trunk.get_submodule(family.rotary) if family.rotary else None
    blocks = [
        Block(config, family, index, layer, rotary)
        for index, layer in enumerate(trunk.get_submodule(family.blocks).children())
    ]
    head = Head(config, family, trunk.get_submodule(family.norm), model.get_submodule(HEAD))
    return nn.Sequential(Embedding(config, family, trunk), *blocks, head)


def _window(config: Any, index: int) -> int | None:
    """How many tokens, itself included, one of layer `index` looks at; None: at all before it."""
    kinds = getattr(config, "layer_types", None)  # without it, all layers are alike
    return config.sliding_window if kinds is None or kinds[index] == "sliding_attention" else None
