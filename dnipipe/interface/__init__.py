"""Synthetic gradients: what a stage guesses its loss gradient to be, and how the guess learns from the true one.

Knows nothing of processes, schedules or torch.distributed. Read base.py first, then any predictor, then learner.py.
"""

from .base import Custom as Custom
from .base import Interface as Interface
from .base import Regressed as Regressed
from .choose import TensorMeta as TensorMeta
from .choose import build_interface as build_interface
from .choose import check_interface as check_interface
from .choose import choose_interface as choose_interface
from .conditional import is_integer as is_integer
from .conv import Conv as Conv
from .learner import Learner as Learner
from .linear import Linear as Linear
from .local_head import LocalHead as LocalHead
from .mlp import MLP as MLP
from .potential import Potential as Potential
from .scaled import Scaled as Scaled
from .synthetic_input import SyntheticInput as SyntheticInput
from .synthetic_input import build_synthetic_input as build_synthetic_input
from .synthetic_input import check_layout as check_layout
from .synthetic_input import check_predictable as check_predictable
from .transformer import Transformer as Transformer
