"""Hugging Face decoders as a row of layers, embedding, blocks, head, which any cut splits into stages; and back again.

transformers is imported when it is needed, and never asked to reach for the network.
"""

from __future__ import annotations

import copy
import importlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .families import HEAD, Block, Embedding, Head, Part, family_of, row_of
from .sequential import cut_sequential, named_layers, split_sequential
from .ties import part_ties

WEIGHTS = "model.safetensors"


def decoder_as_sequential(source: Any, *, untie: bool = False, dtype: torch.dtype | str | None = None) -> nn.Sequential:
    """A causal decoder as a row: (B, T) int64 -> embedding -> (B, T, D) -> blocks -> (B, T, D) -> head -> (B, T, V).

    Attention is causal (torch's scaled_dot_product_attention), sliding windows and dropout are as the config says, and
    there is no cache. The row is in training mode.

    Args:
        source: a transformers config; or its options with model_type, as from YAML; or a local folder with config.json
            and, if it is to start from them, weights in safetensors. Else it starts from torch's random numbers.
        untie: gives the head a weight of its own where the config ties it to the embedding's; a copy at the start.
        dtype: of the weights; None: float32, whatever the source says.

    Raises: ImportError: transformers is not installed. ValueError: a model_type or an option that is not known.
            FileNotFoundError: no such folder, or weights in another format or not all of them.
    """
    model = _load(source, _dtype(dtype))
    row = row_of(model).train()
    if untie and model.config.tie_word_embeddings:
        _part_ends(row)
        model.config.tie_word_embeddings = False
    return row


def split_decoder(
    source: Any,
    num_stages: int,
    *,
    weights: Sequence[float] | None = None,
    untie: bool = False,
    dtype: torch.dtype | str | None = None,
) -> list[nn.Sequential]:
    """Splits a decoder into contiguous stages; no other contiguous split has a cheaper dearest stage.

    Where the config ties the head to the embedding, the first and the last of several stages each get a copy of that
    one weight: tied_weight() finds it, and dnipipe.schedule.TiedWeights keeps the copies equal. With untie=True they
    go their own ways.

    Args:
        source, untie, dtype: as of decoder_as_sequential().
        num_stages: how many stages, each of at least one of the num_hidden_layers + 2 layers.
        weights: the cost of each layer in any one unit, as seconds or bytes, embedding first, head last; by default
            its number of parameters. The embedding and the head, tied or not, count with all of theirs, though an
            embedding takes hardly any time: measure_layers() knows better.

    Raises: as decoder_as_sequential() and split_sequential().
    """
    row = decoder_as_sequential(source, untie=untie, dtype=dtype)
    if num_stages > 1:
        _part_ends(row)
    return split_sequential(row, num_stages, weights=weights)


def tied_weight(stage: nn.Sequential) -> nn.Parameter | None:
    """The copy (V, D) of a tied weight that a first or last stage of split_decoder() holds; None: it holds none.

    None, too, for the whole decoder, whose two ends share one weight.
    """
    parts = _parts(stage)
    ends = [part for part in parts if isinstance(part, (Embedding, Head)) and part.config.tie_word_embeddings]
    return _end_weight(ends[0]) if len(ends) == 1 else None


def hf_names(model: nn.Sequential) -> dict[str, str]:
    """The name of each parameter in a row or a stage of it -> its name in the Hugging Face model.

    A weight that both ends share is there twice, under the name of each.
    """
    return {
        f"{name}.{ours}": theirs
        for name, part in zip((name for name, _ in named_layers(model)), _parts(model), strict=True)
        for ours, theirs in part.hf_names()
    }


def export_hf(stages: nn.Sequential | Sequence[nn.Sequential], folder: str | Path) -> None:
    """Writes config.json and weights in safetensors, which transformers and decoder_as_sequential() load.

    Args:
        stages: a whole decoder, or all its stages in order. From a run of several processes: a decoder made anew, with
            the state_dicts of all stages loaded, for their names are those of the decoder.
        folder: made if it is not there. Where the config ties both ends but they have come to differ, both are written
            and the config no longer ties them.

    Raises: ValueError: some layers are missing.
    """
    safetensors = _installed("safetensors.torch")
    rows = [stages] if isinstance(stages, nn.Sequential) else list(stages)
    parts = [part for row in rows for part in _parts(row)]
    depth = parts[0].config.num_hidden_layers if parts else 0
    if [type(part) for part in parts] != [Embedding, *[Block] * depth, Head]:
        given = ", ".join(type(part).__name__ for part in parts) or "nothing"
        raise ValueError(f"{given} is no whole decoder of {depth} blocks: give all stages in order")
    config = copy.deepcopy(parts[0].config)
    tensors = {theirs: part.get_parameter(ours).detach() for part in parts for ours, theirs in part.hf_names()}
    if config.tie_word_embeddings:
        config.tie_word_embeddings = torch.equal(_end_weight(parts[0]).cpu(), _end_weight(parts[-1]).cpu())
        if config.tie_word_embeddings:  # the file may hold it once only
            del tensors[f"{HEAD}.weight"]
    config.dtype = next(iter(tensors.values())).dtype
    Path(folder).mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    safetensors.save_file(contiguous, Path(folder) / WEIGHTS, metadata={"format": "pt"})


def _load(source: Any, dtype: torch.dtype) -> Any:
    """The Hugging Face model, with its weights."""
    transformers = _installed("transformers")
    folder = _folder(source) if isinstance(source, (str, Path)) else None
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": "sdpa"}
    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    if folder is None:
        config = _config(source, transformers)
    else:
        config = transformers.AutoConfig.from_pretrained(folder, **local)
    if folder is None or not any(folder.glob("*.safetensors")):
        model = transformers.AutoModelForCausalLM.from_config(config, **options)
    else:
        model, found = transformers.AutoModelForCausalLM.from_pretrained(
            folder, config=config, use_safetensors=True, output_loading_info=True, **local, **options
        )
        missing = sorted(found["missing_keys"])
        if missing:  # they would start from random numbers
            raise FileNotFoundError(
                f"{folder} lacks {len(missing)} weights of its model, such as {missing[0]}: it is incomplete, or its "
                f"config is of another model"
            )
    model.config.architectures = [type(model).__name__]
    return model


def _config(source: Any, transformers: Any) -> Any:
    if not isinstance(source, Mapping):
        family_of(getattr(source, "model_type", None))
        return copy.deepcopy(source)
    options = {name: value for name, value in source.items() if name != "model_type"}
    family_of(source.get("model_type"))
    known = transformers.AutoConfig.for_model(source["model_type"])
    for name in options:
        # a config takes any option, also a misspelt one, and goes by its default; rope_theta is part of another by now
        if not hasattr(known, name) and not (name == "rope_theta" and hasattr(known, "rope_parameters")):
            raise ValueError(f"{name!r} is no option of a {source['model_type']} config: see {type(known).__name__}")
    return transformers.AutoConfig.for_model(source["model_type"], **options)


def _folder(source: str | Path) -> Path:
    """The folder, once it is known to hold a decoder of a known family, and no weights that would be passed over."""
    folder = Path(source)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{folder} is no folder with a config.json: models are not downloaded here; give the folder of one that is"
        )
    family_of(json.loads((folder / "config.json").read_text()).get("model_type"))
    pickles = sorted(path.name for pattern in ("pytorch_model*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickles and not any(folder.glob("*.safetensors")):
        raise FileNotFoundError(
            f"{folder} has its weights in {pickles[0]}, a pickle, which may run any code: convert them to safetensors, "
            f"or move them away to start from random numbers"
        )
    return folder


def _installed(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"Hugging Face decoders need {module}: pip install 'dnipipe[hf]' ({error})") from error


def _dtype(wanted: torch.dtype | str | None) -> torch.dtype:
    dtype = getattr(torch, wanted, None) if isinstance(wanted, str) else wanted or torch.float32
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype = {wanted!r} must be a floating-point type of torch, such as float32 or bfloat16")
    return dtype


def _parts(row: nn.Sequential) -> list[Part]:
    parts = [layer for _, layer in named_layers(row)]
    for part in parts:
        if not isinstance(part, Part):
            raise TypeError(f"a {type(part).__name__} is no layer of a decoder: take those of decoder_as_sequential()")
    return [part for part in parts if isinstance(part, Part)]


def _end_weight(part: Part) -> nn.Parameter:
    return part.get_parameter("tokens.weight" if isinstance(part, Embedding) else "project.weight")


def _part_ends(row: nn.Sequential) -> None:
    """Gives the head a weight of its own, if it has none."""
    part_ties(cut_sequential(row, [1, len(row) - 1]))
