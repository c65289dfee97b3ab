"""The decode loop: propose, score, verify, commit, for a batch of images of ragged progress.

Plain sequential decoding is the same loop with an empty draft. There is one host synchronisation per pass.

Images that enter later have a pass of their own first, which is without drafts for nearly all drafters, and then go on
with the others. What they draw does not depend on when that is: noise is keyed by image, position and the image's own
passes, and a row of a pass knows nothing of the others.
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

    @property
    def joins(self) -> bool:
        """Not where the steps of a head follow the known tokens: those of a pass are for one number of them."""
        return not getattr(getattr(self.target, "sampler", None), "last_steps", 0)

    @torch.no_grad()
    def begin(self, labels: Tensor, seed: int | Tensor, index: Tensor) -> None:
        self.state = DecodeState.new(seed, index, self.kind.blank(len(index), index.device))
        self.counts = [0] * len(index)
        self.noise = self.kind.begin(seed, index)
        keys = image_keys(seed, STREAM_DRAFT, index)
        rule = self.kind.rule
        asked = {"with_laws": rule.needs_law, "fixed_noise": rule.fixed_noise, "with_hidden": rule.needs_hidden}
        self.drafter.begin(Start(labels, self.target.length, self.settings, self.noise, keys, **asked))
        self.session: Session | None = self.target.begin(labels, self.settings.guided, self.drafter.max_nodes + 1)

    @torch.no_grad()
    def advance(self) -> None:
        target, drafter, kind, state, meter = self.target, self.drafter, self.kind, self.state, self.meter
        counts, session, noise = self.counts, self.session, self.noise
        assert session is not None
        meter.resume()
        kind.fill(noise, [count + 2 * (drafter.max_depth + 1) for count in counts])
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
        self.told = self.state.told(verdict.spent is not None)  # the one synchronisation
        self.counts = [int(count) for count in self.told[0]]
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
    def keep(self, going: list[int]) -> None:
        self.counts = [self.counts[i] for i in going]
        rows = torch.tensor(going, dtype=torch.int64, device=self.state.count.device)
        self.state = self.state.keep(rows)
        if not going:
            self.session = None
        elif self.session is not None:
            for part in (self.session, self.noise, self.drafter):
                part.keep(rows)

    def another(self) -> EagerBatch:
        other: EagerBatch = super().another()
        other.drafter = self.drafter.another()
        return other

    @torch.no_grad()
    def join(self, other: EagerBatch) -> None:
        assert self.session is not None
        self.state, self.counts = self.state.join(other.state), self.counts + other.counts
        self.session.join(other.session)
        self.noise.join(other.noise)
        self.drafter.join(other.drafter)


def _features(path: Tensor | None, scores: Scores, count: int) -> Tensor:
    """The target's hidden states along the first `count` places of the accepted path."""
    if scores.features is None:
        raise ValueError("the target gives no features, which this drafter needs")
    return along(path, scores.features, count)
