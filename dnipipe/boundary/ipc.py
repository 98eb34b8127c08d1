"""Memory of a neighbour's GPU, mapped into this process, and copies by the copy engine: the four calls of CUDA's driver
that torch does not show.

Source: CUDA Driver API, memory management (cuIpc*). Both processes run on one host.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

HANDLE_BYTES = 64
_LAZY_PEER_ACCESS = 1


class _Handle(ctypes.Structure):
    _fields_ = [("bytes", ctypes.c_ubyte * HANDLE_BYTES)]


class Place(NamedTuple):
    """Where a tensor lies, for another process: the handle of the allocation that it is in, and the bytes before it."""

    handle: bytes
    offset: int


def place_of(tensor: Tensor) -> Place:
    """Raises: RuntimeError: the allocation cannot be shared (expandable segments cannot)."""
    base, size, handle = ctypes.c_uint64(), ctypes.c_size_t(), _Handle()
    _call("cuMemGetAddressRange_v2", ctypes.byref(base), ctypes.byref(size), ctypes.c_uint64(tensor.data_ptr()))
    _call("cuIpcGetMemHandle", ctypes.byref(handle), base)
    return Place(bytes(handle.bytes), tensor.data_ptr() - base.value)


@cache
def _mapped(handle: bytes) -> int:
    """An allocation is mapped once and for the life of the process: CUDA refuses a second time."""
    address = ctypes.c_uint64()
    by_value = _Handle((ctypes.c_ubyte * HANDLE_BYTES).from_buffer_copy(handle))
    _call("cuIpcOpenMemHandle_v2", ctypes.byref(address), by_value, ctypes.c_uint(_LAZY_PEER_ACCESS))
    return address.value


def address_of(place: Place) -> int:
    """The address in this process. Raises: RuntimeError: not to be reached from the current device."""
    return _mapped(place.handle) + place.offset


def copy(target: int, source: int, num_bytes: int) -> None:
    """On the current stream; addresses of any device that can be reached."""
    if num_bytes:
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        _call("cuMemcpyAsync", ctypes.c_uint64(target), ctypes.c_uint64(source), ctypes.c_size_t(num_bytes), stream)


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _call(name: str, *arguments: object) -> None:
    code = getattr(_driver(), name)(*arguments)
    if code:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(code, ctypes.byref(text))
        raise RuntimeError(f"{name}: {(text.value or b'unknown error').decode()} ({code})")
