"""How the weights of one stage move, and by how much at most."""

from .clip import Clip as Clip
from .clip import StageClip as StageClip
from .clip import TravellingClip as TravellingClip
from .rate import RateSchedule as RateSchedule
from .rate import learning_rate_at as learning_rate_at
from .stage import OptimizerName as OptimizerName
from .stage import StageOptimizer as StageOptimizer
