"""The old name of `bozzetto.decoding.scheduler`, for one release."""

from __future__ import annotations

import warnings

from bozzetto.decoding.scheduler import CANCELLED, DONE, DRAWING, FAILED, WAITING, QueueFull
from bozzetto.decoding.scheduler import Scheduler as Admission

__all__ = ["CANCELLED", "DONE", "DRAWING", "FAILED", "WAITING", "Admission", "QueueFull"]

_NEW = "bozzetto.admission.Admission is bozzetto.decoding.scheduler.Scheduler now: the old name will go"
warnings.warn(_NEW, DeprecationWarning, stacklevel=2)
