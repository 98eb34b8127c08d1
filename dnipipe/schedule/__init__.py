"""How a stage's microbatches run: ScheduleDNI, its policies and its oracle."""

from . import torch_names
from .dni import ScheduleDNI as ScheduleDNI
from .forward_unlocked import ForwardUnlocked as ForwardUnlocked
from .tied import TiedWeights as TiedWeights


def register(name: str = "DNI") -> None:
    """Makes torch's `get_schedule_class(name)` return ScheduleDNI, for trainers that choose a schedule by its name.

    Call it after those trainers are imported, or before: both find it.
    """
    torch_names.register(name, ScheduleDNI)
