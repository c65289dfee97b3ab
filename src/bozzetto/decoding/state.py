"""What changes while a batch is decoded: tensors with a row per image."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bozzetto.drafts import Draft, Verdict
from bozzetto.laws.noise import STREAM_VERIFY, image_keys
from bozzetto.runtime.native import ADDRESS, NUMBER, address_of, call, structure

# `Committed` of walk.h.
_Committed = structure(
    (NUMBER, "batch length columns margins depth bytes"),
    (ADDRESS, "out accepted near drawn cost count passes drafted kept margin spent tokens sums figures"),
)


@dataclass
class DecodeState:
    """Everything that changes while a batch is decoded; rows are the images still in progress.

    tokens: int64 [B, N] or float32 [B, N, D], committed raster tokens, zeros beyond; count: int64 [B], how many are
    committed; row: int64 [B], where the image stands in the whole batch; keys: int64 [B], noise keys of the
    verifier; passes, drafted, accepted: int64 [B].

    Statistics, float32 [B]: margin, how near any draw or coin came to falling otherwise; spent, bias bound summed over
    tokens (relaxed rules); moved, farthest: distance of continuous tokens from the target's own samples, sum and
    largest.
    """

    tokens: Tensor
    count: Tensor
    row: Tensor
    keys: Tensor
    passes: Tensor
    drafted: Tensor
    accepted: Tensor
    margin: Tensor
    spent: Tensor
    moved: Tensor
    farthest: Tensor

    @staticmethod
    def new(seed: int | Tensor, index: Tensor, tokens: Tensor) -> DecodeState:
        """seed, index: see `image_keys`; tokens: the blank ones."""
        batch, device = len(index), index.device
        zeros = torch.zeros(batch, dtype=torch.int64, device=device)
        nothing = torch.zeros(batch, device=device)
        return DecodeState(
            tokens=tokens,
            count=zeros,
            row=torch.arange(batch, device=device),
            keys=image_keys(seed, STREAM_VERIFY, index),
            passes=zeros,
            drafted=zeros,
            accepted=zeros,
            margin=torch.full((batch,), float("inf"), device=device),
            spent=nothing,
            moved=nothing,
            farthest=nothing,
        )

    @property
    def length(self) -> int:
        """Tokens of an image, N."""
        return self.tokens.shape[1]

    def keep(self, rows: Tensor) -> DecodeState:
        """The given rows int64 [B']."""
        return DecodeState(**{name: value[rows] for name, value in vars(self).items()})

    def join(self, other: DecodeState) -> DecodeState:
        """With other images behind."""
        return DecodeState(**{name: torch.cat([part, vars(other)[name]]) for name, part in vars(self).items()})

    def told(self, spends: bool) -> list[list[float]]:
        """count, passes, accepted, drafted, and where wanted spent, of every row; waits for the device once."""
        whole = torch.stack([self.count, self.passes, self.accepted, self.drafted])
        return (torch.cat([whole.double(), self.spent[None].double()]) if spends else whole).tolist()

    def last(self) -> Tensor:
        """The last committed token of each image (anything, before the first), [B, 1, ...]."""
        at = (self.count - 1).clamp_min(0).view(-1, *[1] * (self.tokens.dim() - 1))
        return self.tokens.gather(1, at.expand(-1, 1, *self.tokens.shape[2:]))

    def append(self, draft: Draft, verdict: Verdict, **others: Tensor) -> tuple[DecodeState, Tensor]:
        """With the accepted drafts and the rule's own token, never past the end of the image, and how many tokens that
        are, int64 [B]. others: new values of other fields."""
        tokens, left = verdict.tokens, self.length - self.count
        committed = torch.minimum(verdict.accepted + 1, left)
        offset = torch.arange(tokens.shape[1], device=left.device)
        # Columns past the committed ones are sent to a spare column that is cut off again.
        column = torch.where(offset < committed[:, None], self.count[:, None] + offset, self.length)
        column = column.view(*column.shape, *[1] * (tokens.dim() - 2)).expand_as(tokens)
        padded = torch.cat([self.tokens, torch.zeros_like(self.tokens[:, :1])], 1)
        sums = {
            "count": self.count + committed,
            "passes": self.passes + 1,
            "drafted": self.drafted + left.clamp_max(draft.depth),
            "accepted": self.accepted + torch.minimum(verdict.accepted, left),
        }
        padded.scatter_(1, column, tokens)
        return replace(self, tokens=padded[:, : self.length], **sums, **others), committed

    def merge(self, part: DecodeState) -> DecodeState:
        """The whole batch with the rows still in progress brought up to date."""
        merged = {}
        for name, value in vars(self).items():
            merged[name] = value.clone()
            merged[name][part.row] = getattr(part, name)
        return DecodeState(**merged)


def own_commit(
    state: DecodeState, depth: int, verdict: Verdict, near: Tensor | None, drawn: Tensor | None
) -> tuple[DecodeState, Tensor]:
    """`DecodeState.append`, and the statistics of codes, by our kernels (runtime/walk.h), in the place of the tokens.
    near: margins float32 [B, K] of the places behind what is committed; drawn: [B], of a draft of at most `depth`."""
    batch = len(state.count)
    given = (verdict.tokens, verdict.accepted, near, drawn, verdict.spent)
    held = [None if part is None else part.contiguous() for part in given]
    before = (state.count, state.passes, state.drafted, state.accepted, state.margin, state.spent)
    tokens, sums, figures = state.tokens.contiguous(), torch.empty(5, batch, dtype=torch.int64), torch.empty(2, batch)
    places, nears = verdict.tokens.shape[1], 0 if near is None else near.shape[1]
    sizes = (batch, state.length, places, nears, depth, tokens[0, 0].nbytes)
    call("bozzetto_commit", _Committed(*sizes, *map(address_of, (*held, *before, tokens, sums, figures))))
    count, passes, drafted, accepted, committed = sums.unbind()
    margin, spent = figures.unbind()
    found = {"count": count, "passes": passes, "drafted": drafted, "accepted": accepted, "spent": spent}
    return replace(state, tokens=tokens, margin=margin, **found), committed
