"""One folder holds what every stage needs to go on, as tensors and JSON; to read it runs no code from it.

torch.distributed.checkpoint writes tensors as tensors, but pickles all else, and a pickle may run code when it is read.
So what is no tensor is packed into one more tensor, the bytes of a JSON text, and the only pickle left, the index, is
read by an unpickler that knows nothing but the index's own classes.
"""

from __future__ import annotations

import json
import pickle
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

REST = "rest"
INDEX_CLASSES = {
    "torch": {"Size", *(name for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype))},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.metadata": {
        "Metadata", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata", "MetadataIndex", "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "pathlib": {"PosixPath", "WindowsPath"},
    "pathlib._local": {"PosixPath", "WindowsPath"},  # where Python 3.13 has them
}  # fmt: skip


def save_checkpoint(
    folder: str | Path, stage: int, state: dict[str, Any], *, group: dist.ProcessGroup | None = None
) -> None:
    """Writes the state of one stage. Every rank of the group must call it at the same time, each with its own stage.

    Args:
        folder: one for all ranks, made if missing; a checkpoint in it is replaced.
        state: mappings, lists and tuples of tensors, numbers, texts and None, to any depth.
        group: over which ranks agree on the index; of CPU tensors, so gloo.

    Raises: TypeError: a value of another type; it names where.
    """
    tensors = pack(stage, state)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Detected an existing checkpoint")
        save(tensors, checkpoint_id=folder, process_group=group)


def pack(stage: int, state: dict[str, Any]) -> dict[str, Tensor]:
    """The state of one stage as named tensors alone; they share memory with it.

    Raises: TypeError: a value that is no data; it names where.
    """
    tensors: dict[str, Tensor] = {}
    rest = json.dumps(_pack(state, f"stage{stage}", tensors))
    tensors[f"stage{stage}/{REST}"] = torch.frombuffer(bytearray(rest.encode()), dtype=torch.uint8)
    return tensors


def load_checkpoint(folder: str | Path, stage: int) -> dict[str, Any]:
    """What save_checkpoint() was given for a stage, tensors on the CPU; needs no process group.

    Raises: ValueError: no such stage in the folder, or an index that names foreign classes.
            FileNotFoundError: no index.
    """
    reader = _DataOnlyReader(folder)
    sizes = reader.read_metadata().state_dict_metadata
    rest = f"stage{stage}/{REST}"
    if rest not in sizes:
        stages = ", ".join(f"stage{each}" for each in _stages(sizes))
        raise ValueError(f"{folder} holds no stage {stage}, it holds {stages}")
    tensors = {}
    for name, size in sizes.items():
        if name.startswith(f"stage{stage}/") and isinstance(size, TensorStorageMetadata):
            tensors[name] = torch.empty(size.size, dtype=size.properties.dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        load(tensors, storage_reader=reader, no_dist=True)
    state: dict[str, Any] = _unpack(json.loads(bytes(tensors[rest].numpy())), tensors)
    return state


def is_whole(folder: str | Path) -> bool:
    """Whether the index is there, and every file that it names is as long as it says.

    Raises: ValueError: an index that names foreign classes.
    """
    try:
        places = _DataOnlyReader(folder).read_metadata().storage_data.values()
        return all((Path(folder) / at.relative_path).stat().st_size >= at.offset + at.length for at in places)
    except (OSError, EOFError, pickle.UnpicklingError):
        return False


def _stages(names: Iterable[str]) -> list[int]:
    return sorted(int(name.removesuffix(f"/{REST}")[len("stage") :]) for name in names if name.endswith(f"/{REST}"))


def _pack(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """JSON, with a mark for what it has no form for; tensors go to `tensors`, named by where they were."""
    if isinstance(value, Tensor):
        tensors[name] = value.detach()
        return {"tensor": name}
    if isinstance(value, dict):
        # pairs, because an optimizer's keys are numbers
        return {"dict": [[key, _pack(item, f"{name}/{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_pack(item, f"{name}/{index}", tensors) for index, item in enumerate(value)]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(
        f"{name} is a {type(value).__name__}: a checkpoint holds tensors, numbers, texts and None in mappings and lists"
    )


def _unpack(packed: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(packed, dict):
        return packed
    ((kind, content),) = packed.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _unpack(item, tensors) for key, item in content}
    items = [_unpack(item, tensors) for item in content]
    return items if kind == "list" else tuple(items)


class _DataOnlyReader(FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with open(Path(self.path) / ".metadata", "rb") as file:
            metadata: Metadata = _DataOnlyUnpickler(file).load()
        return metadata


class _DataOnlyUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in INDEX_CLASSES.get(module, ()):
            raise ValueError(
                f"the checkpoint's index names {module}.{name}, which no checkpoint needs: do not trust it"
            )
        return super().find_class(module, name)
