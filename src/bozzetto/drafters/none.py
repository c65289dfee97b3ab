"""The empty drafter: plain sequential decoding as a case of the same loop."""

from __future__ import annotations

import torch
from torch import Tensor

from bozzetto.drafters.base import Observation, Start
from bozzetto.drafts import Draft, PathDraft


class NoDrafter:
    """Proposes nothing, ever."""

    name = "none"
    max_nodes = 0
    max_depth = 0
    wants_features = False

    def begin(self, start: Start) -> None:
        self.device = start.labels.device

    def propose(self, batch: int, limit: int) -> Draft:
        return Draft(torch.empty(batch, 0, dtype=torch.int64, device=self.device))

    def observe(self, seen: Observation) -> None:
        pass

    def keep(self, rows: Tensor) -> None:
        pass


class NoPaths(NoDrafter):
    """The same for continuous tokens of `dim` numbers."""

    def __init__(self, dim: int):
        self.dim = dim

    def propose(self, batch: int, limit: int) -> PathDraft:  # type: ignore[override]
        return PathDraft(torch.empty(batch, 0, self.dim, device=self.device))
