"""Seed-exact decoding gives the very tokens of sequential Gumbel-max sampling."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bozzetto.laws.categorical import LawSettings, law_of
from bozzetto.laws.noise import STREAM_TOKEN, fold, gumbel, image_keys
from bozzetto.targets.llamagen_cache import LlamaGenTarget
from tabular import TabularTarget
from toys import PLAIN, WINDOW_RULES, decode, tiny_llamagen

TARGET = TabularTarget(5, 5, seed=11)
GUIDED = LawSettings(guidance=2.0, top_k=4)


def sequential(target: TabularTarget, label: int, settings: LawSettings, seed: int, index: int) -> Tensor:
    """The slow reference: one image, one token at a time, no engine."""
    key = image_keys(seed, STREAM_TOKEN, torch.tensor(index))
    rows = torch.tensor([label, target.labels] if settings.guided else [label])
    tokens = torch.zeros(0, dtype=torch.int64)
    for position in range(target.length):
        logits = target.logits(rows, tokens.expand(len(rows), -1))
        noise = gumbel(fold(fold(key, position), torch.arange(target.vocab)))
        token = (law_of(logits[:, None], settings)[0, 0] + noise).argmax()
        tokens = torch.cat([tokens, token[None]])
    return tokens


@pytest.mark.parametrize("settings", [PLAIN, GUIDED], ids=["plain", "guided"])
@pytest.mark.parametrize("window", [1, 2, 4, 5, 9])
def test_seed_exact_equals_sequential_decoding(window: int, settings: LawSettings) -> None:
    for seed in (0, 1, 2**40):
        for index in ([5], [3, 2, 1], list(range(100, 116))):
            got = decode(TARGET, "seed-exact", window=window, settings=settings, index=index, seed=seed)
            wanted = [sequential(TARGET, 1, settings, seed, i) for i in index]
            assert torch.equal(got.tokens, torch.stack(wanted))


@pytest.mark.parametrize("rule", WINDOW_RULES)
def test_without_drafts_every_exact_rule_is_sequential_decoding(rule: str) -> None:
    index = list(range(12))
    got = decode(TARGET, rule, "none", settings=GUIDED, index=index, labels=0, seed=9)
    assert torch.equal(got.tokens, torch.stack([sequential(TARGET, 0, GUIDED, 9, i) for i in index]))
    assert got.passes.tolist() == [TARGET.length] * len(index)
    assert int(got.drafted.sum()) == 0


@pytest.mark.parametrize("window", [2, 5, 16])
def test_seed_exact_equals_sequential_on_a_transformer(window: int) -> None:
    target = LlamaGenTarget(tiny_llamagen())
    labels, settings = [0, 1, 2, 0, 1], LawSettings(guidance=1.5, top_k=8)
    plain = decode(target, "seed-exact", "none", settings=settings, index=range(5), labels=labels)
    fast = decode(target, "seed-exact", window=window, settings=settings, index=range(5), labels=labels)
    assert torch.equal(plain.tokens, fast.tokens)
    assert torch.allclose(plain.margin, fast.margin, atol=1e-4)
    assert bool((fast.passes < plain.passes).any())
