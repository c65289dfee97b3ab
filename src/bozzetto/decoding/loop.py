"""The decode loop: propose, score, verify, commit, for a batch of images of ragged progress.

Plain sequential decoding is the same loop with an empty draft. There is one host synchronisation per pass.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bozzetto.decoding.kinds import along, kind_of
from bozzetto.decoding.state import BatchResult, DecodeState
from bozzetto.drafters.base import Drafter, Observation, Start
from bozzetto.drafts import Draft
from bozzetto.laws.categorical import LawSettings
from bozzetto.laws.noise import STREAM_DRAFT, NoiseField, image_keys
from bozzetto.rules.base import Rule
from bozzetto.targets.base import Scores, Session, Target
from bozzetto.targets.flow_cache import FlowTarget


@dataclass
class PassEvent:
    """After one target pass. tokens: int64 [B, N] or float32 [B, N, D] of the caller's whole batch (zeros beyond what
    is committed); count: int64 [B], committed tokens per image; accepted, drafted: int64 [B], drafts kept and positions
    drafted so far (a tree drafts as many positions as it is deep); spent: float32 [B], bias bound so far; number:
    passes so far; width: places scored in this pass; seconds: wall time of this pass; known: bool [B, N], which places
    are committed (masked models; None: the first `count`); margin: float32 [B], see DecodeState (None: not known)."""

    tokens: Tensor
    count: Tensor
    accepted: Tensor
    drafted: Tensor
    spent: Tensor
    number: int
    width: int
    seconds: float
    known: Tensor | None = None
    margin: Tensor | None = None


class Clock:
    """Wall time by part. On a GPU each reading waits for the device, so a pass is timed as the user feels it."""

    def __init__(self, device: torch.device):
        self.device, self.parts = device, {"target": 0.0, "draft": 0.0}
        self.last = self._now()

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def resume(self) -> None:
        """Start counting again after time that is somebody else's (a consumer of the stream)."""
        self.last = self._now()

    def lap(self, part: str) -> None:
        now = self._now()
        self.parts[part] += now - self.last
        self.last = now

    def seconds(self) -> dict[str, float]:
        return {"total": sum(self.parts.values()), **self.parts}


class Decoder:
    """Decodes batches of images with one target, drafter, rule and law.

    target, rule: of the same kind of tokens. budget: most bias (total
    variation, summed over the tokens of an image) that a relaxed rule may spend; it decides exactly from then on. None:
    no limit.
    """

    def __init__(
        self,
        target: Target | FlowTarget,
        drafter: Drafter,
        rule: Rule,
        settings: LawSettings,
        budget: float | None = None,
    ):
        self.target, self.drafter, self.rule, self.settings = target, drafter, rule, settings
        self.kind = kind_of(target, rule, settings, budget)

    def run(self, labels: Tensor, seed: int, index: Tensor) -> BatchResult:
        """Decode to the end. labels, index: int64 [B] (index: the images' numbers, which with the seed fix them)."""
        for _ in self.stream(labels, seed, index):
            pass
        return self.result

    def _begin(self, labels: Tensor, seed: int, index: Tensor, noise: NoiseField) -> Session:
        keys = image_keys(seed, STREAM_DRAFT, index)
        rule = self.rule
        asked = {"with_laws": rule.needs_law, "fixed_noise": rule.fixed_noise, "with_hidden": rule.needs_hidden}
        self.drafter.begin(Start(labels, self.target.length, self.settings, noise, keys, **asked))
        return self.target.begin(labels, self.settings.guided, self.drafter.max_nodes + 1)

    @torch.no_grad()
    def stream(self, labels: Tensor, seed: int, index: Tensor) -> Iterator[PassEvent]:
        """Decode and yield one event per target pass; afterwards `self.result` holds the batch's result."""
        target, drafter, kind = self.target, self.drafter, self.kind
        state = DecodeState.new(seed, index, kind.blank(len(index), index.device))
        final, noise = state, kind.begin(seed, index)
        session = self._begin(labels, seed, index, noise)
        counts, number, clock = [0] * len(index), 0, Clock(target.device)
        head_calls = head_rows = 0
        while counts:
            began = time.perf_counter()
            kind.fill(noise, max(counts) + 2 * (drafter.max_depth + 1))
            # Every draft inside the image is scored: cutting one that batch mates would keep would make an image depend
            # on its batch under rules with fresh randomness.
            draft = drafter.propose(len(counts), target.length - min(counts))
            clock.lap("draft")
            layout = None if draft.tree is None else draft.tree.layout()
            inputs = torch.cat([state.last(), draft.tokens], 1)
            scores = session.score(inputs, state.count, max(counts), layout)
            law = kind.law(scores, max(counts))
            clock.lap("target")
            given = kind.given(noise, state, draft)
            verdict = kind.rule.verify(draft, law, given)
            committed = torch.minimum(verdict.accepted + 1, target.length - state.count)
            before, counts = counts, (state.count + committed).tolist()  # the one synchronisation
            longest = max(now - then for now, then in zip(counts, before, strict=True))
            if verdict.path is not None:
                session.compact(verdict.path[:, :longest], state.count)
            features = _features(verdict.path, scores, longest) if drafter.wants_features else None
            log_p = law if isinstance(law, Tensor) else None
            seen = Observation(log_p, verdict, committed, longest, state.count, features)
            state = self._commit(state, draft, seen, given)
            drafter.observe(seen)
            final = state if len(counts) == len(index) else final.merge(state)
            clock.lap("draft")
            number, (calls, rows) = number + 1, kind.head_work(law, draft)
            head_calls, head_rows = head_calls + calls, head_rows + rows
            whole = (final.tokens, final.count, final.accepted, final.drafted, final.spent)
            seconds = time.perf_counter() - began
            yield PassEvent(*whole, number, draft.length + 1, seconds, margin=final.margin)
            clock.resume()
            if max(counts) == target.length:
                state = self._drop_finished(state, session, noise, counts)
                counts = state.count.tolist()
        names = ("tokens", "passes", "drafted", "accepted", "margin", "spent", "moved", "farthest")
        figures = {name: getattr(final, name) for name in names}
        self.result = BatchResult(**figures, head_calls=head_calls, head_rows=head_rows, seconds=clock.seconds())

    def _commit(self, state: DecodeState, draft: Draft, seen: Observation, given: Any) -> DecodeState:
        """Append the accepted drafts and the rule's own token, never past the end of the image."""
        left = self.target.length - state.count
        fresh = torch.arange(seen.longest, device=left.device) < seen.committed[:, None]
        return state.append(
            seen.verdict.tokens[:, : seen.longest],
            fresh,
            count=state.count + seen.committed,
            passes=state.passes + 1,
            drafted=state.drafted + left.clamp_max(draft.depth),
            accepted=state.accepted + torch.minimum(seen.verdict.accepted, left),
            **self.kind.record(state, draft, seen, given, fresh),
        )

    def _drop_finished(self, state: DecodeState, session: Session, noise: NoiseField, counts: list[int]) -> DecodeState:
        going = [i for i, n in enumerate(counts) if n < self.target.length]
        rows = torch.tensor(going, dtype=torch.int64, device=state.count.device)
        if going:
            session.keep(rows)
            noise.keep(rows)
            self.drafter.keep(rows)
        return state.keep(rows)


def _features(path: Tensor | None, scores: Scores, count: int) -> Tensor:
    """The target's hidden states along the first `count` places of the accepted path."""
    if scores.features is None:
        raise ValueError("the target gives no features, which this drafter needs")
    return along(path, scores.features, count)
