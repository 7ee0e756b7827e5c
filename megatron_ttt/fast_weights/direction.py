"""Which way a scan runs along the sequence."""

from enum import Enum


class Direction(Enum):
    """``FORWARD``: carries come from the left. ``REVERSE``: from the right, as gradients do."""

    FORWARD = "forward"
    REVERSE = "reverse"
