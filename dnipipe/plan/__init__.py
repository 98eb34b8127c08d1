"""Schedules as data: built, checked, timed and drawn without a model, a process or torch.

action.py                    what a schedule is
gpipe.py one_f_one_b.py
zb_h1.py dni.py              one schedule each: a pure function that returns data
phases.py late_weights.py    which of a run's steps go by which policy, and late microbatches through which weights
traffic.py                   what crosses the boundaries, and who waits for it
check.py simulate.py         whether it is right, and how long it takes
memory.py draw.py panels.py  what it holds, how it looks
in_flight.py dial.py         how many microbatches a stage holds, and how many are worth it
theory.py compare.py         formulas for a step; all schedules side by side, and more stages than were simulated
"""

from .action import Action as Action
from .action import Op as Op
from .action import Schedule as Schedule
from .action import ScheduleError as ScheduleError
from .check import check as check
from .compare import ASSUMPTIONS as ASSUMPTIONS
from .compare import Row as Row
from .compare import compare as compare
from .compare import row_of as row_of
from .compare import scale as scale
from .memory import activation_bytes as activation_bytes
from .memory import peak_in_flight as peak_in_flight
from .simulate import Run as Run
from .simulate import Times as Times
from .simulate import simulate as simulate
