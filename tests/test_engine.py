"""The decode loop: ragged progress, accounting, events, and independence of batch mates."""

from __future__ import annotations

import pytest
import torch

from bozzetto.decoding.loop import EagerBatch
from bozzetto.decoding.state import DecodeState
from bozzetto.drafters.base import Start
from bozzetto.drafts import CODES, Draft, Verdict
from bozzetto.errors import UsageError
from bozzetto.laws.categorical import LawSettings
from bozzetto.methods.table import DRAFTERS, RULES, named, read_drafter, read_method
from bozzetto.targets.llamagen_cache import LlamaGenTarget
from tabular import TabularTarget
from toys import PLAIN, WINDOW_RULES, decode, make_drafter, make_rule, sketched, tiny_llamagen

TARGET = TabularTarget(4, 5, spread=1.0, seed=2)
N = TARGET.length
every_rule = pytest.mark.parametrize("rule", WINDOW_RULES)


def states(rule: str, window: int, images: int) -> tuple[list[tuple[DecodeState, int]], DecodeState]:
    """The batch after every pass, with the places of the pass; and what `run` ends with."""
    batch = EagerBatch(TARGET, make_drafter("jacobi", window), make_rule(rule), PLAIN)
    index = torch.arange(images)
    seen = [(state, batch.places) for state in batch.passes(index % 2, 0, index)]
    assert batch.meter.passes == len(seen)
    return seen, batch.run(index % 2, 0, index)


@every_rule
def test_images_of_a_batch_progress_raggedly(rule: str) -> None:
    assert len(set(decode(TARGET, rule, index=range(64)).passes.tolist())) > 1


@every_rule
@pytest.mark.parametrize("window", [1, 2, 4, 5, 8])
def test_accepted_tokens_and_passes_add_up_to_the_image(rule: str, window: int) -> None:
    """Every pass gives its accepted drafts and one token more, except a last pass that ends on an accepted draft."""
    result = decode(TARGET, rule, window=window, index=range(200))
    surplus = result.accepted + result.passes - N
    assert bool(((surplus == 0) | (surplus == 1)).all())
    assert bool((result.accepted <= result.drafted).all())
    assert bool((result.drafted <= (window - 1) * (result.passes - 1)).all())
    assert bool((result.passes >= 1 + -(-(N - 1) // window)).all())
    assert bool((result.passes <= N).all())


@every_rule
@pytest.mark.parametrize("window", [1, 3, 5])
def test_events_are_monotone_and_the_last_one_is_the_result(rule: str, window: int) -> None:
    seen, result = states(rule, window, 40)
    tokens, count = torch.zeros(40, N, dtype=torch.int64), torch.zeros(40, dtype=torch.int64)
    for event, width in seen:
        committed = torch.arange(N) < count[:, None]
        assert 1 <= width <= window
        assert bool((event.count > count)[count < N].all())  # at least one token per pass
        assert bool((event.count == count)[count == N].all())
        assert torch.equal(event.tokens[committed], tokens[committed])
        assert int(event.tokens[torch.arange(N) >= event.count[:, None]].abs().sum()) == 0
        tokens, count = event.tokens.clone(), event.count.clone()
    assert count.tolist() == [N] * 40
    assert torch.equal(tokens, result.tokens)
    assert len(seen) == int(result.passes.max())  # nothing after the end


@every_rule
def test_earlier_events_are_not_overwritten_by_later_passes(rule: str) -> None:
    decoder = EagerBatch(TARGET, make_drafter("jacobi", 3), make_rule(rule), PLAIN)
    copies = [(e, e.tokens.clone(), e.count.clone()) for e in decoder.passes(torch.zeros(9).long(), 0, torch.arange(9))]
    assert all(torch.equal(e.tokens, t) and torch.equal(e.count, c) for e, t, c in copies)


@every_rule
@pytest.mark.parametrize("window", [2, 4, 8])
def test_an_image_and_its_statistics_do_not_depend_on_batch_mates(rule: str, window: int) -> None:
    labels = torch.arange(60) % 2
    settings = LawSettings(guidance=1.5)
    whole = decode(TARGET, rule, window=window, settings=settings, index=range(60), labels=labels)
    for some in ([7], [3, 59, 20], [20, 3], list(range(30, 45))):
        part = decode(TARGET, rule, window=window, settings=settings, index=some, labels=labels[some])
        for name in ("tokens", "passes", "drafted", "accepted", "margin"):
            assert torch.equal(getattr(part, name), getattr(whole, name)[some]), name


@every_rule
def test_the_same_image_twice_in_a_batch_is_the_same_image(rule: str) -> None:
    result = decode(TARGET, rule, index=[4, 9, 4])
    assert torch.equal(result.tokens[0], result.tokens[2])


@every_rule
def test_seeds_and_images_differ(rule: str) -> None:
    one, two = (decode(TARGET, rule, index=range(50), seed=s).tokens for s in (0, 1))
    assert float((one == two).all(1).double().mean()) < 0.2
    assert len(one.unique(dim=0)) > 10


@every_rule
def test_dropping_finished_images_keeps_the_others_right_on_a_transformer(rule: str) -> None:
    target = LlamaGenTarget(tiny_llamagen(grid=3))
    settings, labels = LawSettings(guidance=1.5), torch.tensor([0, 1, 2, 0, 1, 2])
    together = decode(target, rule, window=5, settings=settings, index=range(6), labels=labels)
    assert len(set(together.passes.tolist())) > 1
    for i in range(6):
        alone = decode(target, rule, window=5, settings=settings, index=[i], labels=[int(labels[i])])
        assert torch.equal(alone.tokens[0], together.tokens[i])


class Oracle:
    """A drafter that knows the answer: every pass is accepted whole."""

    name, max_nodes, max_depth, wants_features = "oracle", 2, 2, False
    draws_fixed = False

    def __init__(self, answer: torch.Tensor):
        self.answer = answer

    def begin(self, start: Start) -> None:
        self.at = torch.zeros_like(start.labels)

    def propose(self, batch: int, limit: int) -> Draft:
        length = min(self.max_nodes, limit)
        return Draft(self.answer.gather(1, (self.at[:, None] + torch.arange(length)).clamp_max(N - 1)))

    def observe(self, seen: object) -> None:
        self.at = seen.start + seen.committed

    def keep(self, rows: torch.Tensor) -> None:
        self.answer, self.at = self.answer[rows], self.at[rows]


def test_a_perfect_drafter_gives_full_windows_and_changes_no_token() -> None:
    answer = decode(TARGET, "seed-exact", "none", index=range(10)).tokens
    result = decode(TARGET, "seed-exact", Oracle(answer), index=range(10))
    assert torch.equal(result.tokens, answer)
    assert set(result.passes.tolist()) == {-(-N // 3)}


def test_a_rule_that_claims_too_much_never_writes_past_the_end() -> None:
    class Greedy(type(make_rule("seed-exact"))):
        def verify(self, draft: Draft, log_p: torch.Tensor, noise: object) -> Verdict:
            right = super().verify(draft, log_p, noise)
            return Verdict(right.tokens, torch.full_like(right.accepted, draft.length))

    result = decode(TARGET, Greedy(), window=9, index=range(5))
    assert result.tokens.shape == (5, N)
    assert bool((result.tokens < TARGET.vocab).all())


def test_an_empty_batch_has_no_events() -> None:
    seen, result = states("exact", 3, 0)
    assert seen == []
    assert result.tokens.shape == (0, N)


def test_the_registry_is_immutable_and_names_what_it_allows() -> None:
    with pytest.raises(TypeError):
        RULES[CODES, "new"] = RULES[CODES, "exact"]
    for read, table in ((lambda name: read_method("none", name), RULES), (read_drafter, DRAFTERS)):
        with pytest.raises(UsageError, match="nonsense") as caught:
            read("nonsense")
        assert all(name in str(caught.value) for name in named(table, CODES))


@pytest.mark.parametrize(
    ("drafter", "rule", "filled"),
    [("tree", "grouped", False), ("tree", "tree", False), ("tree", "seed-exact", True), ("window", "grouped", True)],
)
def test_fixed_noise_is_made_for_methods_that_read_it_only(drafter: str, rule: str, filled: bool) -> None:
    made = sketched(TARGET, "2x2") if drafter == "tree" else make_drafter("jacobi", 3)
    batch = EagerBatch(TARGET, made, make_rule(rule), LawSettings())
    batch.run(torch.zeros(2, dtype=torch.int64), 0, torch.arange(2))
    assert any(batch.noise.filled) == filled


def test_seconds_are_reported_by_part() -> None:
    batch = EagerBatch(TARGET, make_drafter("jacobi", 4), make_rule("exact"), PLAIN)
    batch.run(torch.arange(4) % 2, 0, torch.arange(4))
    assert set(batch.meter.parts) == {"target", "draft"}
    assert 0 < batch.meter.parts["target"] <= batch.meter.total
