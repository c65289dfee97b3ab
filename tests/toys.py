"""Shared by the tests: toy targets, a tiny LlamaGen, decoding in one line, and a chi-square test without scipy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bozzetto.common.written import filled, split_spec
from bozzetto.decoding.loop import EagerBatch
from bozzetto.decoding.state import DecodeState
from bozzetto.drafters.base import Drafter, Start
from bozzetto.drafters.small_target import SmallTarget
from bozzetto.drafters.tree import TreeDrafter
from bozzetto.drafts import CODES
from bozzetto.laws.categorical import LawSettings
from bozzetto.laws.noise import GumbelField
from bozzetto.methods.shapes import read_shape
from bozzetto.methods.table import RULES, named, read_drafter
from bozzetto.rules.base import Rule
from bozzetto.targets.base import Target
from bozzetto.targets.llamagen import LlamaGen, LlamaGenConfig
from tabular import TabularTarget

PLAIN = LawSettings()
WINDOW_RULES = [name for name, rule in named(RULES, CODES).items() if rule.window and rule.exact]
EXACT_RULES = [name for name, rule in named(RULES, CODES).items() if rule.exact]
RELAXED_RULES = [name for name, rule in named(RULES, CODES).items() if not rule.exact]


def make_rule(text: str, tokens: str = CODES) -> Any:
    """A rule as written."""
    name, options = split_spec(text)
    return filled(RULES[tokens, name], text, options)


def make_drafter(text: str, window: int = 1) -> Drafter:
    """A drafter of codes as written, without the resources of a model."""
    return read_drafter(text).make(window, None, None, None)


def start_of(noise: GumbelField, with_laws: bool = True, settings: LawSettings = PLAIN) -> Start:
    """What a drafter is told when a batch of the field's images begins."""
    labels = torch.zeros_like(noise.keys)
    return Start(labels, noise.length, settings, noise, noise.keys, with_laws=with_laws)


def sketched(target: Target, tree: str) -> TreeDrafter:
    """A tree drafter that sketches with `target`; `TREE stop=S`: it stops where drafts are not likely to be reached."""
    shape, _, stop = tree.partition(" stop=")
    return TreeDrafter("model", SmallTarget(target), read_shape(shape), float(stop or 0))


def decode(
    target: Target,
    rule: str | Rule,
    drafter: str | Drafter = "jacobi",
    window: int = 4,
    settings: LawSettings = PLAIN,
    index: Tensor | list[int] | range = range(8),
    labels: Tensor | list[int] | int = 1,
    seed: int = 0,
) -> DecodeState:
    """Decode images `index` to the end; names are looked up in the registry."""
    index = torch.as_tensor(index if isinstance(index, Tensor) else list(index))
    labels = torch.as_tensor(labels).expand(len(index))
    rule = make_rule(rule) if isinstance(rule, str) else rule
    drafter = make_drafter(drafter, window) if isinstance(drafter, str) else drafter
    return EagerBatch(target, drafter, rule, settings).run(labels, seed, index)


def alternating_target(vocab: int = 4, length: int = 5) -> TabularTarget:
    """Even tokens are followed by odd ones and odd by even: a one-pass-stale draft is never in the support."""
    target = TabularTarget(vocab, length, seed=3)
    for n in range(length):
        rows = torch.arange(int(target.offsets[n]), int(target.offsets[n + 1]))
        last = (rows - target.offsets[n]) % vocab if n else torch.ones_like(rows)
        wrong = (torch.arange(vocab) % 2) == (last % 2)[:, None]
        target.tables[:, rows] = target.tables[:, rows].masked_fill(wrong, -1e9)
    return target


def constant_target(vocab: int = 4, length: int = 5) -> TabularTarget:
    """One law for every prefix and position, so that every draft law equals the target's."""
    target = TabularTarget(vocab, length, seed=4)
    target.tables[:] = target.tables[:, :1].clone()
    return target


def cells(tokens: Tensor, vocab: int) -> Tensor:
    """Lexicographic number of each sequence [B, N] -> [B]."""
    return (tokens * vocab ** torch.arange(tokens.shape[1] - 1, -1, -1)).sum(-1)


def fit_p_value(observed: Tensor, law: Tensor) -> float:
    """p-value of Pearson's chi-square test of counts [K] against probabilities [K]; rare cells are pooled."""
    observed, order = observed.double(), law.argsort()
    expected = observed.sum() * law.double()[order]
    observed = observed[order]
    pool = max(int((expected < 5).sum()), int((expected.cumsum(0) < 5).sum()) + 1)
    expected = torch.cat([expected[:pool].sum()[None], expected[pool:]])
    observed = torch.cat([observed[:pool].sum()[None], observed[pool:]])
    if len(expected) == 1:
        return 1.0
    chi2 = ((observed - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((len(expected) - 1) / 2.0).double(), chi2 / 2))


def p_value(tokens: Tensor, law: Tensor, vocab: int = 4) -> float:
    """Fit of decoded sequences to a joint law; a sequence of zero probability is an error at once."""
    counts = torch.bincount(cells(tokens, vocab), minlength=len(law))
    assert counts[law == 0].sum() == 0, "a sequence of zero probability was produced"
    return fit_p_value(counts, law)


def tiny_llamagen(seed: int = 0, **changes: int) -> LlamaGen:
    """A random network with weights large enough for every part to matter (the head is not zero)."""
    shape = {"dim": 32, "layers": 2, "heads": 2, "vocab": 11, "grid": 4, "classes": 3, "ffn_multiple": 16}
    model = LlamaGen(LlamaGenConfig(**{**shape, **changes}))
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        weight.data = 1 + 0.2 * noise if "norm" in name else 0.25 * noise
    return model.eval().requires_grad_(False)
