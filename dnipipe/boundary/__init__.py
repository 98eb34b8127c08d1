"""What crosses between two neighbouring stages, and when. Knows nothing of models."""

from .agree import reduce_within as reduce_within
from .arrival import comes_true as comes_true
from .base import Boundary as Boundary
from .base import BoundaryError as BoundaryError
from .base import Exchange as Exchange
from .direct import DirectBoundary as DirectBoundary
from .groups import boundary_groups as boundary_groups
from .groups import in_meeting_order as in_meeting_order
from .local import local_pair as local_pair
from .paired import PairedBoundary as PairedBoundary
from .transport import TRANSPORTS as TRANSPORTS
from .transport import choose_transport as choose_transport
from .transport import where_am_i as where_am_i
