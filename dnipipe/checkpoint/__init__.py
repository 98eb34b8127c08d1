"""What every stage needs to go on: as plain data, in a row that no kill breaks, and for another number of stages."""

from .data import load_checkpoint as load_checkpoint
from .data import save_checkpoint as save_checkpoint
from .folder import CheckpointFolder as CheckpointFolder
from .folder import newest_step as newest_step
from .folder import step_folder as step_folder
from .reshard import load_stage as load_stage
from .reshard import reshard as reshard
