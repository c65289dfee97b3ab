"""The empty drafter: plain sequential decoding as a case of the same loop."""

from __future__ import annotations

import torch
from torch import Tensor

from bozzetto.drafters.base import Observation
from bozzetto.drafts import Draft
from bozzetto.laws.noise import GumbelField


class NoDrafter:
    """Proposes nothing, ever."""

    name = "none"
    max_draft = 0

    def begin(self, batch: int, noise: GumbelField, with_laws: bool) -> None:
        self.device = noise.keys.device

    def propose(self, batch: int, limit: int) -> Draft:
        return Draft(torch.empty(batch, 0, dtype=torch.int64, device=self.device))

    def observe(self, seen: Observation) -> None:
        pass

    def keep(self, rows: Tensor) -> None:
        pass
