"""The trainer's settings, checked by their full names before anything runs.

pipeline.lag = 0: it must be at least 1
"""

from .explain import Setting as Setting
from .explain import explain as explain
from .load import load_config as load_config
from .sections import SECTIONS as SECTIONS
from .sections import Config as Config
from .sections import DataConfig as DataConfig
from .sections import ModelConfig as ModelConfig
from .sections import OptimConfig as OptimConfig
from .sections import PipelineConfig as PipelineConfig
from .sections import RunConfig as RunConfig
from .sections import ScheduleName as ScheduleName
from .unlocked import ForwardUnlockedConfig as ForwardUnlockedConfig
