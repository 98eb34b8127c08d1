"""Test errors, per cent, of Jaderberg et al. 2016, fully connected networks.

GIVEN stand in the text of the paper. REMEMBERED are its tables from memory, for want of a copy to read: never cite
them.
"""

from __future__ import annotations

Place = tuple[str, int, str, int | None]  # dataset, layers, method, position

GIVEN: dict[Place, float] = {
    **{("mnist", n, "cdni", None): e for n, e in zip((3, 4, 5, 6), (2.2, 1.9, 1.7, 1.6), strict=True)},
    **{("mnist", n, "stale", None): e for n, e in zip((3, 4, 5, 6), (9.1, 11.8, 15.4, 19.0), strict=True)},
    ("mnist", 6, "bprop", None): 1.6,
    ("mnist", 21, "cdni", None): 2.0,
    ("mnist", 21, "bprop", None): 2.0,
    ("mnist", 6, "no_bprop", 1): 2.9,
    ("mnist", 6, "no_bprop", 5): 23.7,
    ("cifar10", 5, "bprop", None): 42.0,
    ("cifar10", 5, "dni", None): 47.0,
    ("cifar10", 5, "cdni", None): 44.0,
}

_MNIST = {"no_bprop": (9.3, 12.6, 16.2, 21.4), "bprop": (2.0, 1.8, 1.8, 1.8), "dni": (1.9, 2.2, 3.4, 4.3)}
_CIFAR10 = {
    "no_bprop": (54.9, 57.2, 59.6, 61.9),
    "bprop": (43.5, 43.0, 41.7, 42.0),
    "dni": (42.5, 45.0, 46.9, 49.7),
    "cdni": (48.5, 45.1, 43.5, 46.8),
}
REMEMBERED: dict[Place, float] = {
    (dataset, layers, method, None): error
    for dataset, table in (("mnist", _MNIST), ("cifar10", _CIFAR10))
    for method, errors in table.items()
    for layers, error in zip((3, 4, 5, 6), errors, strict=True)
    if (dataset, layers, method, None) not in GIVEN
}
