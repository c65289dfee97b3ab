"""How far a method's tokens are from the target's law, measured on its own samples.

The surprisal of a token is -log p under the target's law given the tokens before it. For an exact method its mean over
tokens is the entropy of the law, whatever the method; a rule that prefers likely tokens lowers it, one that lets
unlikely ones through raises it. The change against sequential decoding is zero up to noise for every exact rule.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from bozzetto.drafts import CODES
from bozzetto.evaluate.columns import Column
from bozzetto.evaluate.metrics import mean_interval
from bozzetto.evaluate.shards import Samples
from bozzetto.laws.categorical import LawSettings, law_of
from bozzetto.pipeline.pipeline import Pipeline

SURPRISAL = Column("surprisal_change", "bias", digits=3, sign=True)
_IMPOSSIBLE = 30.0  # nats that a token outside the support of the law counts


@torch.no_grad()
def surprisal(pipe: Pipeline, samples: Samples, law: LawSettings, batch: int, progress: bool = False) -> Tensor:
    """-log p of every token under the target's law given those before it: float64 [n, N] in nats, inf outside the
    support. One pass over a whole image."""
    parts = []
    rows = torch.arange(len(samples)).split(batch)
    for row in tqdm(rows, desc="surprisal", unit="batch", disable=not progress):
        tokens = torch.from_numpy(samples.tokens[row.numpy()]).long().to(pipe.target.device)
        labels = torch.from_numpy(samples.label[row.numpy()]).to(pipe.target.device)
        session = pipe.target.begin(labels, law.guided, tokens.shape[1])
        inputs = torch.cat([torch.zeros_like(tokens[:, :1]), tokens[:, :-1]], 1)
        logits = session.score(inputs, torch.zeros_like(labels), 0).logits
        assert logits is not None
        log_p = law_of(logits, law)
        parts.append(-log_p.gather(-1, tokens[..., None]).squeeze(-1).double().cpu())
    return torch.cat(parts)


def bias_figures(
    pipe: Pipeline, samples: dict[str, Samples], law: LawSettings, base: str, counts: Tensor, progress: bool = False
) -> dict[str, dict[str, Any]]:
    """By method: `surprisal_change` in nats per token against method `base` (images of one index have one class; the
    resamples counts float64 [R, n] pair them), `tv_spent`, the bias bound that the rule itself summed, per token, and
    `impossible`, the share of tokens outside the support of the law."""
    means: dict[str, Tensor] = {}
    found: dict[str, dict[str, Any]] = {}
    if pipe.target.tokens != CODES:
        return distance_figures(samples, counts)
    for method, drawn in samples.items():
        nats = surprisal(pipe, drawn, law, batch=8, progress=progress)
        means[method] = nats.clamp_max(_IMPOSSIBLE).mean(1)  # [n]
        found[method] = {"impossible": float(nats.isinf().double().mean())}
    for method, drawn in samples.items():
        change = means[method] - means[base]
        spent = torch.tensor([sum(t.spent) / drawn.tokens.shape[1] for t in drawn.traces], dtype=torch.float64)
        for name, values in (("surprisal_change", change), ("tv_spent", spent)):
            found[method][name] = mean_interval(values, counts, share=False)
    return found


def distance_figures(samples: dict[str, Samples], counts: Tensor) -> dict[str, dict[str, Any]]:
    """By method of a model of continuous tokens: `moved`, the mean over tokens of the distance from the target's own
    samples with the same noise (largest of a token's D numbers, in token units; 0 where the rule does not measure it),
    and `farthest`, the largest of all."""
    found = {}
    for method, drawn in samples.items():
        moved = mean_interval(torch.from_numpy(drawn.moved).double(), counts, share=False)
        found[method] = {"moved": moved, "farthest": float(drawn.farthest.max())}
    return found
