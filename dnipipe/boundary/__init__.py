"""What crosses between two neighbouring stages, and when. Knows nothing of models."""

from .agree import reduce_within as reduce_within
from .base import Boundary as Boundary
from .base import BoundaryError as BoundaryError
from .base import Exchange as Exchange
from .groups import boundary_groups as boundary_groups
from .local import local_pair as local_pair
from .paired import PairedBoundary as PairedBoundary
