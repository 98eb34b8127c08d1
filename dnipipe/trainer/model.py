"""The model of a config, and the loss that it is trained by."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..config import ModelConfig


def make_model(config: ModelConfig) -> nn.Sequential:
    """Calls the factory that the config names.

    Raises: ValueError: no such module or function, options that it does not take, or a result that is no nn.Sequential.
    """
    model = call_factory("model.factory", config.factory, "model.options", config.options)
    if not isinstance(model, nn.Sequential):
        raise ValueError(
            f"model.factory = {config.factory!r}: it made a {type(model).__name__}, and only the layers of an "
            f"nn.Sequential can be cut into stages: let it return one"
        )
    return model


def call_factory(setting: str, name: str, of_options: str, options: Mapping[str, Any]) -> Any:
    """What a function makes that a config names as "module:function".

    Args:   setting, of_options: the settings that hold the name and the options.
    Raises: ValueError: no such module or function, or options that it does not take.
    """
    module, _, function = name.partition(":")
    try:
        factory = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{setting} = {name!r}: {error}; give module:function of a model") from error
    try:
        return factory(**options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{of_options} = {options}: {name} does not take them: {error}") from error


def token_loss(logits_BTV: Tensor, target_BT: Tensor) -> Tensor:
    """Mean cross-entropy of a token in nats."""
    return F.cross_entropy(logits_BTV.flatten(0, 1).float(), target_BT.flatten())
