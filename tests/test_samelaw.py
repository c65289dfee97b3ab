"""The same-law test: its p-values are honest, exact rules pass it, planted biases do not."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

import bozzetto
from bozzetto.decoding.loop import EagerBatch
from bozzetto.drafters.base import Observation, Start
from bozzetto.drafts import Draft
from bozzetto.evaluate.compare import surprisal
from bozzetto.evaluate.samelaw import (
    by_position,
    code_differences,
    frequency_groups,
    kernel_differences,
    neighbour_pairs,
    rejected,
    surprisal_test,
    swap_test,
    token_tests,
)
from bozzetto.evaluate.shards import Samples
from bozzetto.laws.categorical import LawSettings, law_of
from bozzetto.rules.exact import Exact
from toys import make_drafter, make_rule

N = 500
LAW = LawSettings(guidance=2.0, top_k=5)


class Careless:
    """Drafts from a fixed flat law. `declared_k`: the law that it claims is cut to its K likeliest tokens; the drafts
    are not (0: it tells the truth)."""

    name, max_nodes, max_depth, wants_features = "careless", 3, 3, False
    draws_fixed = False

    def __init__(self, vocab: int, declared_k: int):
        logits = torch.randn(vocab, generator=torch.Generator().manual_seed(1))
        self.law = law_of(logits, LawSettings())
        self.declared = law_of(logits, LawSettings(top_k=declared_k))
        self.generator = torch.Generator().manual_seed(2)

    def begin(self, start: Start) -> None:
        pass

    def propose(self, batch: int, limit: int) -> Draft:
        length = min(limit, self.max_nodes)
        drawn = torch.multinomial(self.law.exp(), batch * length, replacement=True, generator=self.generator)
        return Draft(drawn.view(batch, length), self.declared.expand(batch, length, -1))

    def observe(self, seen: Observation) -> None:
        pass

    def keep(self, rows: Tensor) -> None:
        pass


@dataclass(frozen=True)
class Hot(Exact):
    """Rule `exact` that verifies with a law whose temperature is off by 10%."""

    def verify(self, draft, log_p, noise):
        return make_rule("exact").verify(draft, law_of(log_p, LawSettings(temperature=1.1)), noise)


@pytest.fixture(scope="module")
def pipe(tiny_model):
    return bozzetto.load(tiny_model)


def drawn(pipe, drafter, rule, seed: int, law: LawSettings = LAW) -> Tensor:
    """Tokens of N images, all classes in turn."""
    rule = make_rule(rule) if isinstance(rule, str) else rule
    index = torch.arange(N)
    return EagerBatch(pipe.target, drafter, rule, law).run(index % 3, seed, index).tokens


def surprisals(pipe, tokens: Tensor) -> Tensor:
    labels = (torch.arange(len(tokens)) % 3).numpy()
    empty = torch.zeros(0).numpy()
    samples = Samples(labels, labels, tokens.int().numpy(), empty, empty, empty, empty, [], {}, [])
    return surprisal(pipe, samples, LAW, 100)


def all_tests(pipe, tokens: Tensor, sequential: Tensor):
    surprise = surprisal_test(surprisals(pipe, sequential), surprisals(pipe, tokens), 999)
    pictures = [pipe.tokenizer.codebook[t].flatten(1) for t in (sequential, tokens)]
    features = swap_test("features", kernel_differences(*pictures), 999)
    return [surprise, features, *token_tests(sequential, tokens, pipe.target.vocab, 999)]


@pytest.fixture(scope="module")
def sequential(pipe):
    return drawn(pipe, make_drafter("none", 1), "seed-exact", seed=0)


@pytest.mark.parametrize(
    ("drafter", "rule"),
    [
        (lambda v: make_drafter("none", 1), "seed-exact"),
        (lambda v: make_drafter("jacobi", 4), "seed-exact"),
        (lambda v: make_drafter("jacobi", 4), "exact"),
        (lambda v: Careless(v, 0), "exact"),
    ],
    ids=["sequential", "jacobi/seed-exact", "jacobi/exact", "fixed-law/exact"],
)
def test_an_exact_method_is_not_rejected(pipe, sequential, drafter, rule):
    found = all_tests(pipe, drawn(pipe, drafter(pipe.target.vocab), rule, seed=1), sequential)
    assert not rejected(found), found


@pytest.mark.parametrize(
    ("drafter", "rule", "law"),
    [
        (lambda v: make_drafter("none", 1), "seed-exact", replace(LAW, temperature=1.1)),
        (lambda v: make_drafter("none", 1), "seed-exact", replace(LAW, temperature=0.9)),
        (lambda v: make_drafter("jacobi", 4), Hot(), LAW),
        (lambda v: Careless(v, 5), "exact", LAW),
        (lambda v: make_drafter("none", 1), "seed-exact", replace(LAW, top_k=0)),
    ],
    ids=["hot", "cold", "verified too hot", "top-k left out in the draft", "no top-k at all"],
)
def test_a_planted_bias_is_rejected(pipe, sequential, drafter, rule, law):
    found = all_tests(pipe, drawn(pipe, drafter(pipe.target.vocab), rule, 1, law), sequential)
    assert rejected(found), found


def test_tokens_outside_the_support_are_infinitely_surprising(pipe, sequential):
    free = drawn(pipe, make_drafter("none", 1), "seed-exact", 1, replace(LAW, top_k=0))
    assert surprisals(pipe, sequential).isfinite().all()
    assert not surprisals(pipe, free).isfinite().all()


def test_surprisal_is_that_of_the_decode_loop(pipe):
    """Scored in one pass over the image or token by token: the same laws."""
    tokens = pipe.generate(count=4, batch=4, drafter="none", top_k=5).images
    whole = surprisals(pipe, torch.stack([i.tokens for i in tokens]))
    session = pipe.target.begin(torch.tensor([0, 1, 2, 0]), True, 1)
    grid = torch.stack([i.tokens for i in tokens])
    for n in range(grid.shape[1]):
        previous = grid[:, max(0, n - 1), None]
        log_p = law_of(session.score(previous, torch.full((4,), n), n).logits, LAW)[:, 0]
        assert torch.allclose(-log_p.gather(1, grid[:, n, None])[:, 0].double(), whole[:, n], atol=1e-4)


def test_p_values_of_equal_laws_are_uniform():
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(7, generator=generator)
    values = []
    for _ in range(120):
        a, b = torch.multinomial(weights, 2 * 40 * 16, True, generator=generator).view(2, 40, 16)
        values.append([t["p_value"] for t in token_tests(a, b, 7, 199)])
    found = torch.tensor(values)
    assert (found.mean(0) - 0.5).abs().max() < 0.12
    assert ((found < 0.1).double().mean(0) - 0.1).abs().max() < 0.11


def test_a_sample_compared_with_itself_has_p_value_one():
    tokens = torch.randint(0, 5, (30, 9), generator=torch.Generator().manual_seed(0))
    assert [t["p_value"] for t in token_tests(tokens, tokens, 5, 99)] == [1.0, 1.0, 1.0]
    assert surprisal_test(tokens.double(), tokens.double(), 99)["p_value"] == 1.0


def test_swapping_a_pair_flips_its_row_and_column():
    """The quadratic form under signs is the statistic of the swapped samples."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randint(0, 4, (2, 12, 6), generator=generator)
    signs = torch.randint(0, 2, (12,), generator=generator) * 2 - 1
    c, d = torch.where(signs[:, None] > 0, a, b), torch.where(signs[:, None] > 0, b, a)
    outer = signs[:, None].double() * signs[None]
    assert torch.allclose(code_differences(a, b) * outer, code_differences(c, d))
    assert torch.allclose(
        kernel_differences(a.double(), b.double()) * outer, kernel_differences(c.double(), d.double())
    )


def test_code_differences_are_those_of_weighted_one_hot_counts():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randint(0, 6, (2, 10, 5), generator=generator)
    counts = [torch.nn.functional.one_hot(x, 6).sum(1).double() for x in (a, b)]
    pooled = (counts[0] + counts[1]).sum(0)
    difference = (counts[0] - counts[1]) / pooled.sqrt()
    assert torch.allclose(code_differences(a, b), difference @ difference.T)


def test_codes_tell_positions_and_directions_apart():
    tokens = torch.tensor([[0, 1, 1, 0]])
    assert by_position(tokens, 2).tolist() == [[0, 3, 5, 6]]
    pairs = neighbour_pairs(tokens, 2)
    assert pairs.shape == (1, 4) and len(set(pairs[0, :2].tolist()) & set(pairs[0, 2:].tolist())) == 0


def test_groups_hold_about_equal_shares():
    tokens = torch.randint(0, 100, (2, 50, 64), generator=torch.Generator().manual_seed(0))
    a, b = frequency_groups(tokens[0], tokens[1], 100, 10)
    share = torch.bincount(torch.cat([a, b]).flatten(), minlength=10) / a.numel() / 2
    assert (share - 0.1).abs().max() < 0.03


def test_settings_of_the_fixture_leave_room_for_a_bias(pipe):
    assert pipe.own.guidance == LAW.guidance and LAW.top_k < pipe.target.vocab
