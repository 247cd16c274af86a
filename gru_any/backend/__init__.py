"""Devices: which array library, where, and how it runs a block of steps."""

from .bridge import by_place
from .contract import Mode
from .libraries import (
    NUMPY,
    Backend,
    BackendError,
    is_traced,
    of,
    plain_name,
    refuse_masked,
    select,
)
from .modes import bridged, environment, path, recorded, runner
from .transfer import asarray, disjoint, overlap, to_numpy

__all__ = [
    "NUMPY",
    "Backend",
    "BackendError",
    "Mode",
    "asarray",
    "bridged",
    "by_place",
    "disjoint",
    "environment",
    "is_traced",
    "of",
    "overlap",
    "path",
    "plain_name",
    "recorded",
    "refuse_masked",
    "runner",
    "select",
    "to_numpy",
]
