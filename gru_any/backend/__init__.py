"""Devices: which array library, where, and how it runs a block of steps."""

from .run import environment, path, recorded, runner
from .select import NUMPY, Backend, BackendError, of, plain_name, refuse_masked, select
from .transfer import asarray, disjoint, overlap, to_numpy

__all__ = [
    "NUMPY",
    "Backend",
    "BackendError",
    "asarray",
    "disjoint",
    "environment",
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
