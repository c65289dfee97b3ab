"""What target passes take."""

from __future__ import annotations

import time
from typing import Any

import torch


def now(device: torch.device) -> float:
    """Wall time in seconds. On a GPU this waits for the device, so that work is timed as the user feels it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class Meter:
    """Seconds by part: `target` (passes), `draft` (drafting and verifying, the head included). passes: of the target;
    head_calls, head_rows: serial calls of a denoising head, and rows in them (0 for codes)."""

    def __init__(self, device: torch.device):
        self.device, self.parts = device, {"target": 0.0, "draft": 0.0}
        self.passes = self.head_calls = self.head_rows = 0
        self.last = now(device)

    def resume(self) -> None:
        """Start counting again after time that is somebody else's."""
        self.last = now(self.device)

    def lap(self, part: str) -> float:
        """What has passed since the last lap, in seconds, belongs to a part."""
        before, self.last = self.last, now(self.device)
        self.parts[part] += self.last - before
        return self.last - before

    def count(self, *laws: Any) -> None:
        """Add the work of the head behind laws of continuous tokens."""
        for law in (law for law in laws if law is not None):
            self.head_calls, self.head_rows = self.head_calls + law.calls, self.head_rows + law.rows

    @property
    def total(self) -> float:
        """Seconds of all parts."""
        return sum(self.parts.values())
