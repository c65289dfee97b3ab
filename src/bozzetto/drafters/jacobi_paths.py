"""Continuous Jacobi: the target's own tokens under a one-pass-stale context are the draft (no training, no model).

One pass gives every place of a window a path of the target's law given the drafts before it; under the next pass's
contexts the rule couples these paths to new ones or runs them again with the same noise. This is the continuous form of
speculative Jacobi decoding (arXiv 2410.01699) with coupled redraws (arXiv 2510.24211).

A place that enters the window has no path of the target's yet. Its first draft is a Gaussian around the drafted or
committed tokens beside and above it, whose chain has a closed form (laws/gaussian.py); it costs no call of the head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bozzetto.drafters.base import Observation, Start
from bozzetto.drafts import PathDraft, PathVerdict
from bozzetto.laws.chain import Ancestry, Path
from bozzetto.laws.gaussian import GaussianChain

_ABOVE = 0.47  # how a latent follows the one above it, measured on photographs


class JacobiPaths:
    """window: scored places per pass W (1 is sequential decoding); W - 1 of them are drafted.

    grid: tokens per side; ancestry, std [T]: the target's sampler; spread: deviation of a token around what the one
    above it says, which the first drafts assume, in token units.
    """

    name = "jacobi"
    wants_features = False

    def __init__(self, window: int, grid: int, dim: int, ancestry: Ancestry, std: Tensor, spread: float = 1.0):
        self.window, self.grid, self.dim = window, grid, dim
        self.ancestry, self.std, self.spread = ancestry, std, spread

    @property
    def max_nodes(self) -> int:
        return self.window - 1

    @property
    def max_depth(self) -> int:
        return self.window - 1

    def begin(self, start: Start) -> None:
        self.noise, self.with_laws = start.noise, start.with_laws
        self.tempered = self.std * start.settings.temperature
        self.seen: Observation | None = None
        batch, device = len(start.labels), start.labels.device
        # Committed and drafted tokens after one row of zeros, so that every place has one above it.
        self.tokens = torch.zeros(batch, start.length + 2 * self.window + self.grid, self.dim, device=device)

    def propose(self, batch: int, limit: int) -> PathDraft:
        # Up to the image's last place, so that what happens there does not depend on batch mates that are behind.
        length = min(limit, self.window - 1)
        if length < 1:
            return PathDraft(self.tokens[:, :0])
        device = self.tokens.device
        offset = torch.arange(length, device=device)
        if self.seen is None:
            count = torch.zeros(batch, dtype=torch.int64, device=device)
            path = self._first(count[:, None] + offset)
        else:
            seen = self.seen
            count, old = seen.start + seen.committed, _path(seen)
            width = seen.verdict.tokens.shape[1]
            # Slot s of this window stood at column committed + s of the last one; columns past its end are new.
            new = max(0, seen.longest + length - width)
            entering = self._first(seen.start[:, None] + torch.arange(width, width + new, device=device))
            rows = torch.arange(batch, device=device)[:, None]
            column = seen.committed[:, None] + offset
            both = zip(old, entering, strict=True)
            path = Path(*(torch.cat([kept, added], 1)[rows, column] for kept, added in both))
        self._write(count, path.token)
        return PathDraft(path.token, path) if self.with_laws else PathDraft(path.token)

    def _write(self, start: Tensor, tokens: Tensor) -> None:
        place = self.grid + start[:, None] + torch.arange(tokens.shape[1], device=start.device)
        self.tokens[torch.arange(len(start), device=start.device)[:, None], place] = tokens

    def _first(self, position: Tensor) -> Path:
        """First drafts at positions int64 [B, L]: paths [B, L, ...], with the positions' own noise."""
        rows = torch.arange(len(position), device=position.device)[:, None]
        centre = _ABOVE * self.tokens[rows, position].flatten(0, 1)  # the token above
        law = GaussianChain(
            centre,
            torch.full_like(centre, self.spread),
            self.ancestry,
            self.tempered,
            (len(position), position.shape[1]),
        )
        path = law.sample(self.noise.rows(position).flatten(0, 1))
        path = Path(*(part.unflatten(0, position.shape) for part in path))
        return path if self.with_laws else _only_tokens(path.token)

    def observe(self, seen: Observation) -> None:
        self._write(seen.start, seen.verdict.tokens)
        self.seen = seen

    def keep(self, rows: Tensor) -> None:
        self.tokens = self.tokens[rows]
        if self.seen is not None:
            self.seen = self.seen.keep(rows)


def _path(seen: Observation) -> Path:
    """The target's paths of the last window, as far as the rule left any."""
    verdict = seen.verdict
    if isinstance(verdict, PathVerdict) and verdict.path is not None:
        return verdict.path
    return _only_tokens(verdict.tokens)


def _only_tokens(tokens: Tensor) -> Path:
    """Tokens [B, L, D] as paths of one state."""
    return Path(tokens[:, :, None], tokens[:, :, None, :0], tokens[:, :, None, :0])
