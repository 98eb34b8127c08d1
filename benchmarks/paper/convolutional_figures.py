"""Test errors, per cent, of the convolutional networks in Jaderberg et al. 2016: from memory, never cite them."""

from __future__ import annotations

from .figures import Place

_MNIST = {"no_bprop": (0.9, 2.8), "bprop": (0.8, 0.6), "dni": (0.9, 0.7), "cdni": (1.0, 0.8)}
_CIFAR10 = {"no_bprop": (28.7, 38.1), "bprop": (17.9, 15.7), "dni": (19.5, 19.5), "cdni": (19.0, 16.4)}
REMEMBERED_CONVOLUTIONAL: dict[Place, float] = {
    (dataset, layers, method, None): error
    for dataset, table in (("mnist", _MNIST), ("cifar10", _CIFAR10))
    for method, errors in table.items()
    for layers, error in zip((3, 4), errors, strict=True)
}
