"""Pipeline-parallel training without a bubble: stages joined by Decoupled Neural Interfaces (Jaderberg et al. 2016)."""

from . import plan as plan
from .interface import build_interface as build_interface
from .partition.decoder import split_decoder as split_decoder
from .partition.sequential import split_sequential as split_sequential
from .schedule import ScheduleDNI as ScheduleDNI
from .schedule import register as register
