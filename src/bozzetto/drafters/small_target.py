"""A smaller target with the same tokenizer as draft model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bozzetto.drafters.base import DraftModel, Observation, gather_rows
from bozzetto.drafts import Layout
from bozzetto.targets.base import Session, Target


class SmallTarget(DraftModel):
    """A smaller target with the same tokenizer. Input i of it carries token i - 1, as in any target."""

    def __init__(self, target: Target):
        self.target = target

    def begin(self, labels: Tensor, guided: bool, max_nodes: int) -> None:
        # The next pass scores the last committed input again and starts up to two inputs past the image.
        self.session: Session = self.target.begin(labels, guided, max_nodes + 4)
        self.last = torch.zeros_like(labels)  # token carried by the input at which the next pass starts
        self.guided = guided

    def extend(self, seen: Observation) -> tuple[Tensor, Tensor]:
        tokens = seen.verdict.tokens[:, : seen.longest]
        scores = self.session.score(torch.cat([self.last[:, None], tokens], 1), seen.start)
        assert scores.logits is not None
        at = seen.committed[:, None]
        self.last = tokens.gather(1, at - 1)[:, 0]
        self.next = seen.start + seen.committed + 1  # the input that carries the first drafted token
        logits = gather_rows(scores.logits, at)
        return logits, gather_rows(scores.features, at) if scores.features is not None else logits

    def grow(self, tokens: Tensor, parent: Tensor, first: int, layout: Layout) -> tuple[Tensor, Tensor]:
        scores = self.session.score(tokens, self.next, layout=layout)
        assert scores.logits is not None
        return scores.logits, scores.logits if scores.features is None else scores.features

    def keep(self, rows: Tensor) -> None:
        self.session.keep(rows)
        self.last = self.last[rows]

    def join(self, other: Any) -> None:
        self.session.join(other.session)
        self.last = torch.cat([self.last, other.last])
