"""What a run leaves for people: sentences at its end, one page that shows all of it, and a folder that is its own.

folder.py says what lies in a run's folder, and keeps runs apart; result.py ends a run in the terminal. page.py makes
the page: facts.py and curves.py read what was written, tables.py and plots.py put it into rows and pictures.
"""

from pathlib import Path

from .curves import Track as Track
from .curves import read_tracks as read_tracks
from .facts import read_facts as read_facts
from .facts import write_facts as write_facts
from .folder import CHECKPOINTS as CHECKPOINTS
from .folder import CONFIG as CONFIG
from .folder import FACTS as FACTS
from .folder import FILES as FILES
from .folder import METRICS as METRICS
from .folder import PAGE as PAGE
from .folder import RUN_SETTINGS_THAT_COUNT as RUN_SETTINGS_THAT_COUNT
from .folder import TENSORBOARD as TENSORBOARD
from .folder import TIMELINE as TIMELINE
from .folder import clear as clear
from .folder import cut_back as cut_back
from .folder import refuse_another_run as refuse_another_run
from .folder import write_whole as write_whole
from .result import EVEN_BITS as EVEN_BITS
from .result import Result as Result
from .result import show as show
from .result import table as table
from .result import verdict as verdict
from .traces import write_traces as write_traces


def write_page(folder: Path) -> Path:
    """Makes report.html of what lies in a run's folder: its metrics, run.json, config.yaml and timeline.png.

    Any of them may be missing or incomplete, as while a run is under way or after it was killed: the page then shows
    less. It is one file, which needs neither a network nor a script.

    Raises: ValueError: run.json is no JSON object.
    """
    from .page import draw_page  # here: matplotlib takes every rank half a second to import, and one rank draws

    return draw_page(folder)
