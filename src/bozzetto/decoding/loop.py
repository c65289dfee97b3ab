"""The decode loop: propose, score, verify, commit, for a batch of images of ragged progress.

Plain sequential decoding is the same loop with an empty draft. There is one host synchronisation per pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bozzetto.decoding.batch import RowBatch
from bozzetto.decoding.kinds import along, kind_of
from bozzetto.decoding.state import DecodeState
from bozzetto.drafters.base import Drafter, Observation, Start
from bozzetto.laws.categorical import LawSettings
from bozzetto.laws.noise import STREAM_DRAFT, image_keys
from bozzetto.rules.base import Rule
from bozzetto.targets.base import Scores, Session, Target
from bozzetto.targets.flow_cache import FlowTarget


class EagerBatch(RowBatch):
    """Images decoded with one target, drafter, rule and law.

    target, rule: of the same kind of tokens. budget: most bias (total variation, summed over the tokens of an image)
    that a relaxed rule may spend; it decides exactly from then on. None: no limit. neighbours: the table of nearest
    codes that some rules read.
    """

    def __init__(
        self,
        target: Target | FlowTarget,
        drafter: Drafter,
        rule: Rule,
        settings: LawSettings,
        budget: float | None = None,
        slots: int = 1 << 30,
        window: int = 1,
        neighbours: Tensor | None = None,
    ):
        super().__init__(target, slots, window)
        self.drafter, self.settings = drafter, settings
        self.kind = kind_of(target, rule, settings, budget, neighbours, drafter.draws_fixed)

    @torch.no_grad()
    def begin(self, labels: Tensor, seed: int, index: Tensor) -> None:
        self.state = self.final = DecodeState.new(seed, index, self.kind.blank(len(index), index.device))
        self.rows, self.counts = list(range(len(index))), [0] * len(index)
        self.noise = self.kind.begin(seed, index)
        keys = image_keys(seed, STREAM_DRAFT, index)
        rule = self.kind.rule
        asked = {"with_laws": rule.needs_law, "fixed_noise": rule.fixed_noise, "with_hidden": rule.needs_hidden}
        self.drafter.begin(Start(labels, self.target.length, self.settings, self.noise, keys, **asked))
        self.session: Session | None = self.target.begin(labels, self.settings.guided, self.drafter.max_nodes + 1)

    @property
    def going(self) -> bool:
        return bool(self.rows)

    @torch.no_grad()
    def advance(self) -> None:
        target, drafter, kind, state, meter = self.target, self.drafter, self.kind, self.state, self.meter
        counts, session, noise = self.counts, self.session, self.noise
        assert session is not None
        meter.resume()
        kind.fill(noise, max(counts) + 2 * (drafter.max_depth + 1))
        # Every draft inside the image is scored: cutting one that batch mates would keep would make an image depend
        # on its batch under rules with fresh randomness.
        draft = drafter.propose(len(counts), target.length - min(counts))
        meter.lap("draft")
        layout = None if draft.tree is None else draft.tree.layout()
        inputs = torch.cat([state.last(), draft.tokens], 1)
        scores = session.score(inputs, state.count, max(counts), layout)
        law = kind.law(scores, max(counts))
        meter.lap("target")
        verdict = kind.rule.verify(draft, law, kind.given(noise, state, draft))
        self.state, committed = kind.commit(state, draft, verdict)
        self.counts = self.state.count.tolist()  # the one synchronisation
        longest = max(now - then for now, then in zip(self.counts, counts, strict=True))
        if verdict.path is not None:
            session.compact(verdict.path[:, :longest], state.count)
        features = _features(verdict.path, scores, longest) if drafter.wants_features else None
        log_p = law if isinstance(law, Tensor) else None
        if log_p is None:
            meter.count(law, draft.law)
        drafter.observe(Observation(log_p, verdict, committed, longest, state.count, features))
        self.over = [i for i, count in enumerate(self.counts) if count == target.length]
        self.places, meter.passes = draft.length + 1, meter.passes + 1
        meter.lap("draft")

    @torch.no_grad()
    def leave(self) -> None:
        if not self.over:
            return
        self.final, over = self.whole(), set(self.over)
        going = [i for i in range(len(self.rows)) if i not in over]
        self.rows, self.counts = [self.rows[i] for i in going], [self.counts[i] for i in going]
        rows = torch.tensor(going, dtype=torch.int64, device=self.state.count.device)
        self.state, self.past = self.state.keep(rows), [sums[rows] for sums in self.past]
        if going and self.session is not None:
            self.session.keep(rows)
            self.noise.keep(rows)
            self.drafter.keep(rows)

    def clear(self) -> None:
        super().clear()
        self.session = None


def _features(path: Tensor | None, scores: Scores, count: int) -> Tensor:
    """The target's hidden states along the first `count` places of the accepted path."""
    if scores.features is None:
        raise ValueError("the target gives no features, which this drafter needs")
    return along(path, scores.features, count)
