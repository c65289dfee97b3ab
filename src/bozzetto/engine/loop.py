"""The decode loop: propose, score, verify, commit, for a batch of images of ragged progress.

Plain sequential decoding is the same loop with an empty draft. There is one host synchronisation per pass.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bozzetto.drafters.base import Drafter, Observation, Start
from bozzetto.drafts import Draft
from bozzetto.laws.categorical import LawSettings, gumbel_margin, law_of
from bozzetto.laws.noise import STREAM_DRAFT, STREAM_VERIFY, GumbelField, fold, image_keys, uniform
from bozzetto.models.base import Session, Target
from bozzetto.rules.base import Rule, RuleNoise


@dataclass
class DecodeState:
    """Everything that changes while a batch is decoded; rows are the images still in progress.

    tokens: int64 [B, N], committed raster tokens, zeros beyond; count: int64 [B], how many are committed;
    slot: int64 [B], where the image stands in the caller's batch; keys: int64 [B], noise keys of the verifier;
    passes, drafted, accepted: int64 [B]; margin: float32 [B], smallest Gumbel margin of a committed token; spent:
    float32 [B], bias bound summed over tokens (relaxed rules).
    """

    tokens: Tensor
    count: Tensor
    slot: Tensor
    keys: Tensor
    passes: Tensor
    drafted: Tensor
    accepted: Tensor
    margin: Tensor
    spent: Tensor

    @staticmethod
    def new(seed: int, index: Tensor, length: int) -> DecodeState:
        batch, device = len(index), index.device
        zeros = torch.zeros(batch, dtype=torch.int64, device=device)
        return DecodeState(
            tokens=torch.zeros(batch, length, dtype=torch.int64, device=device),
            count=zeros,
            slot=torch.arange(batch, device=device),
            keys=image_keys(seed, STREAM_VERIFY, index),
            passes=zeros,
            drafted=zeros,
            accepted=zeros,
            margin=torch.full((batch,), float("inf"), device=device),
            spent=torch.zeros(batch, device=device),
        )

    def keep(self, rows: Tensor) -> DecodeState:
        return DecodeState(**{name: value[rows] for name, value in vars(self).items()})


@dataclass
class PassEvent:
    """After one target pass. tokens: int64 [B, N] of the caller's whole batch (zeros beyond what is committed); count:
    int64 [B], committed tokens per image; accepted, drafted: int64 [B], drafts kept and positions drafted so far (a
    tree drafts as many positions as it is deep); spent: float32 [B], bias bound so far; number: passes so far; width:
    places scored in this pass; seconds: wall time of this pass."""

    tokens: Tensor
    count: Tensor
    accepted: Tensor
    drafted: Tensor
    spent: Tensor
    number: int
    width: int
    seconds: float


@dataclass
class BatchResult:
    """tokens int64 [B, N]; passes, drafted, accepted int64 [B]; margin, spent float32 [B]; seconds: `target` (passes),
    `draft` (drafting and verifying) and their sum `total`."""

    tokens: Tensor
    passes: Tensor
    drafted: Tensor
    accepted: Tensor
    margin: Tensor
    spent: Tensor
    seconds: dict[str, float] = field(default_factory=dict)


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

    budget: most bias (total variation, summed over the tokens of an image) that a relaxed rule may spend; it decides
    exactly from then on. None: no limit.
    """

    def __init__(
        self, target: Target, drafter: Drafter, rule: Rule, settings: LawSettings, budget: float | None = None
    ):
        self.target, self.drafter, self.rule, self.settings, self.budget = target, drafter, rule, settings, budget
        # A relaxed rule makes its greedy choice from the plain law.
        self.greedy = settings.temperature == 0 and bool(rule.bias)
        self.scored = LawSettings(guidance=settings.guidance) if self.greedy else settings

    def run(self, labels: Tensor, seed: int, index: Tensor) -> BatchResult:
        """Decode to the end. labels, index: int64 [B] (index: the images' numbers, which with the seed fix them)."""
        for _ in self.stream(labels, seed, index):
            pass
        return self.result

    def _begin(self, labels: Tensor, seed: int, index: Tensor, noise: GumbelField) -> Session:
        rule = self.rule
        start = Start(labels, self.target.length, self.settings, noise, image_keys(seed, STREAM_DRAFT, index))
        start.with_laws, start.fixed_noise, start.with_hidden = rule.needs_law, rule.seed_exact, rule.needs_hidden
        self.drafter.begin(start)
        return self.target.begin(labels, self.settings.guided, self.drafter.max_nodes + 1)

    @torch.no_grad()
    def stream(self, labels: Tensor, seed: int, index: Tensor) -> Iterator[PassEvent]:
        """Decode and yield one event per target pass; afterwards `self.result` holds the batch's result."""
        target, drafter = self.target, self.drafter
        state = DecodeState.new(seed, index, target.length)
        final = state
        noise = GumbelField(seed, index, target.length, target.vocab)
        session = self._begin(labels, seed, index, noise)
        counts, number, clock = [0] * len(index), 0, Clock(target.device)
        while counts:
            began = time.perf_counter()
            if self.rule.needs_gumbel:
                noise.fill(max(counts) + 2 * (drafter.max_depth + 1))
            # Every draft inside the image is scored: cutting one that batch mates would keep would make an image depend
            # on its batch under rules with fresh randomness.
            draft = drafter.propose(len(counts), target.length - min(counts))
            clock.lap("draft")
            layout = None if draft.tree is None else draft.tree.layout()
            scores = session.score(_inputs(state, draft), state.count, max(counts), layout)
            log_p = law_of(scores.logits, self.scored)
            clock.lap("target")
            given = self._noise(noise, state, draft)
            verdict = self.rule.verify(draft, log_p, given)
            committed = torch.minimum(verdict.accepted + 1, target.length - state.count)
            before, counts = counts, (state.count + committed).tolist()  # the one synchronisation
            longest = max(now - then for now, then in zip(counts, before, strict=True))
            if verdict.path is not None:
                session.compact(verdict.path[:, :longest], state.count)
            features = _along(verdict.path, scores.features, longest) if drafter.wants_features else None
            seen = Observation(log_p, verdict, committed, longest, state.count, features)
            state = self._commit(state, draft, seen, given)
            drafter.observe(seen)
            final = state if len(counts) == len(index) else _merge(final, state)
            clock.lap("draft")
            number += 1
            whole = (final.tokens, final.count, final.accepted, final.drafted, final.spent)
            yield PassEvent(*whole, number, draft.length + 1, time.perf_counter() - began)
            clock.resume()
            if max(counts) == target.length:
                state = self._drop_finished(state, session, noise, counts)
                counts = state.count.tolist()
        statistics = (final.passes, final.drafted, final.accepted, final.margin, final.spent)
        self.result = BatchResult(final.tokens, *statistics, clock.seconds())

    def _noise(self, noise: GumbelField, state: DecodeState, draft: Draft) -> RuleNoise:
        place = torch.arange(draft.length + 1, device=state.count.device)
        gumbel = uniforms = slack = None
        if self.rule.needs_gumbel:
            gumbel = noise.rows(state.count[:, None] + (place if draft.tree is None else draft.tree.depth))
        if self.rule.needs_uniforms:
            # One key per scored place, also where several stand at one position.
            keys = fold(fold(state.keys, state.passes)[:, None], state.count[:, None] + place)
            uniforms = uniform(fold(keys[..., None], torch.arange(2, device=keys.device)))
        if self.budget is not None:
            slack = (self.budget - state.spent).clamp_min(0)
        return RuleNoise(gumbel, uniforms, slack, self.greedy)

    def _commit(self, state: DecodeState, draft: Draft, seen: Observation, noise: RuleNoise) -> DecodeState:
        """Append the accepted drafts and the rule's own token, never past the end of the image."""
        length, left = self.target.length, self.target.length - state.count
        offset = torch.arange(seen.longest, device=left.device)
        position = state.count[:, None] + offset  # [B, longest]
        fresh = offset < seen.committed[:, None]
        # Columns past the committed ones are sent to a spare column that is cut off again.
        padded = torch.nn.functional.pad(state.tokens, (0, 1))
        padded.scatter_(1, position.masked_fill(~fresh, length), seen.verdict.tokens[:, : seen.longest])
        margin = state.margin
        if self.rule.seed_exact and noise.gumbel is not None:
            path = seen.verdict.path
            gaps = gumbel_margin(*(_along(path, part, seen.longest) for part in (seen.log_p, noise.gumbel)))
            margin = torch.minimum(margin, gaps.masked_fill(~fresh, float("inf")).amin(1))
        spent = state.spent if seen.verdict.spent is None else state.spent + seen.verdict.spent
        return DecodeState(
            tokens=padded[:, :length],
            count=state.count + seen.committed,
            slot=state.slot,
            keys=state.keys,
            passes=state.passes + 1,
            drafted=state.drafted + left.clamp_max(draft.depth),
            accepted=state.accepted + torch.minimum(seen.verdict.accepted, left),
            margin=margin,
            spent=spent,
        )

    def _drop_finished(
        self, state: DecodeState, session: Session, noise: GumbelField, counts: list[int]
    ) -> DecodeState:
        going = [i for i, n in enumerate(counts) if n < self.target.length]
        rows = torch.tensor(going, dtype=torch.int64, device=state.count.device)
        if going:
            session.keep(rows)
            noise.keep(rows)
            self.drafter.keep(rows)
        return state.keep(rows)


def _along(path: Tensor | None, values: Tensor | None, count: int) -> Tensor:
    """The first `count` places of the accepted path. values [R, M + 1, ...], R a multiple of B -> [R, count, ...]."""
    if values is None:
        raise ValueError("the target gives no features, which this drafter needs")
    if path is None:
        return values[:, :count]
    path = path[:, :count].repeat(len(values) // len(path), 1)
    return values.gather(1, path[..., None].expand(-1, -1, values.shape[-1]))


def _inputs(state: DecodeState, draft: Draft) -> Tensor:
    """The last committed token (anything, before the first) and the drafts: int64 [B, W]."""
    last = state.tokens.gather(1, (state.count - 1).clamp_min(0)[:, None])
    return torch.cat([last, draft.tokens], 1)


def _merge(whole: DecodeState, part: DecodeState) -> DecodeState:
    """The caller's whole batch with the rows still in progress brought up to date."""
    merged = {}
    for name, value in vars(whole).items():
        merged[name] = value.clone()
        merged[name][part.slot] = getattr(part, name)
    return DecodeState(**merged)
