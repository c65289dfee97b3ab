"""Parallel drafters: cached sketchers against whole-sequence networks, every rule with them, folders, training."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import bozzetto
from bozzetto.checkpoints.folders import load_drafter, load_target, save_drafter
from bozzetto.decoding.loop import EagerBatch
from bozzetto.drafters.glance import CachedGlance, GlanceConfig, GlanceNet
from bozzetto.drafters.jacobi import FilledJacobi
from bozzetto.drafters.parallel import (
    BlockConfig,
    BlockNet,
    CachedBlock,
    CachedParallel,
    CachedPlane,
    PlaneConfig,
    PlaneNet,
)
from bozzetto.drafters.tree import TreeDrafter
from bozzetto.drafts import Layout
from bozzetto.errors import UsageError
from bozzetto.laws.categorical import LawSettings
from bozzetto.methods.shapes import read_shape
from bozzetto.train.families import train
from bozzetto.train.recipes import DataSource, ParallelRecipe
from test_eagle import GUIDED, LABELS, MODEL, TARGET, TOKENS, C, seen, true_features
from test_eagle import sketcher as eagle_sketcher
from toys import PLAIN, decode, make_drafter, make_rule

PLACES = 4
KINDS = ("plane", "block", "glance")
SKETCHERS: dict[str, Any] = {"plane": CachedPlane, "block": CachedBlock, "glance": CachedGlance}
by_kind = pytest.mark.parametrize("kind", KINDS)


def tiny(kind: str, seed: int = 0) -> Any:
    """Weights large enough for every part to matter."""
    if kind == "plane":
        net: Any = PlaneNet(PlaneConfig(C.dim, C.vocab, C.grid, PLACES, ffn=24))
    elif kind == "glance":
        net = GlanceNet(GlanceConfig(C.dim, C.vocab, C.grid, PLACES, narrow=10, ffn=24, rank=6))
    else:
        net = BlockNet(BlockConfig(C.dim, C.heads, C.ffn, C.vocab, C.grid, PLACES, layers=2, rank=6))
    generator = torch.Generator().manual_seed(seed)
    for name, weight in net.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        weight.data = 1 + 0.2 * noise if "norm" in name else 0.2 * noise
    return net.eval().requires_grad_(False)


def sketcher(kind: str, net: Any = None) -> CachedParallel:
    net = tiny(kind) if net is None else net
    return SKETCHERS[kind](net, TARGET.embedding, TARGET.output)


def drafter(kind: str, tree: str) -> TreeDrafter:
    return TreeDrafter(kind, sketcher(kind), read_shape(tree))


# The networks.


@by_kind
@pytest.mark.parametrize("guided", [False, True])
def test_cached_drafting_over_ragged_passes_equals_the_whole_network(kind: str, guided: bool) -> None:
    net, features = tiny(kind), true_features(guided)
    embedded = MODEL.tok_embeddings(TOKENS).repeat(2 if guided else 1, 1, 1)
    every = torch.arange(C.length).expand(len(features), -1)
    slow, sketch = net.after(features, embedded, every), sketcher(kind, net)
    sketch.begin(LABELS, guided, 8)
    start, rows = torch.zeros(3, dtype=torch.int64), torch.arange(len(features))
    for committed in (torch.tensor([1, 1, 1]), torch.tensor([3, 1, 2]), torch.tensor([2, 4, 1])):
        logits, hidden = sketch.extend(seen(start, committed, features))
        start = start + committed
        pair = (start - 1).repeat(2 if guided else 1)
        torch.testing.assert_close(hidden[:, 0], slow[rows, pair, 0], atol=1e-4, rtol=1e-4)
        last, bias = TOKENS.gather(1, (start - 1)[:, None]), net.bias(TOKENS)
        for place in range(PLACES):
            wanted = slow[rows, pair, place] @ MODEL.output.weight.t()
            if bias is not None:
                wanted = wanted + net.bias(last[:, 0]).repeat(2 if guided else 1, 1)
            torch.testing.assert_close(logits[:, 0], wanted, atol=1e-4, rtol=1e-4)
            last = TOKENS.gather(1, (start + place)[:, None])
            at = torch.tensor([[place]])
            sees = torch.ones(1, 1, place + 1, dtype=torch.bool)
            logits, hidden = sketch.grow(last, torch.tensor([[place]]), place, Layout(at, at, sees))
    assert logits.shape[-1] == C.vocab


@by_kind
def test_rows_that_are_kept_go_on_as_if_alone(kind: str) -> None:
    features, sketch, alone = true_features(True), sketcher(kind), sketcher(kind)
    one = torch.tensor([1, 4])  # the second picture's rows
    sketch.begin(LABELS, True, 8)
    alone.begin(LABELS[1:2], True, 8)
    committed = torch.tensor([2, 1, 3])
    sketch.extend(seen(torch.zeros(3).long(), committed, features))
    alone.extend(seen(torch.zeros(1).long(), committed[1:2], features[one], TOKENS[1:2]))
    sketch.keep(torch.tensor([1]))
    start = committed[1:2]
    given = seen(start, torch.tensor([2]), features[one], TOKENS[1:2])
    torch.testing.assert_close(sketch.extend(given)[0], alone.extend(given)[0], atol=1e-5, rtol=1e-5)


def test_a_place_of_a_block_does_not_see_the_places_after_it() -> None:
    net, features = tiny("block"), true_features(False)
    embedded, anchors = MODEL.tok_embeddings(TOKENS), torch.tensor([[2, 5]] * 3)
    before = net.after(features, embedded, anchors)
    net.marks.data[2:] += 1
    after = net.after(features, embedded, anchors)
    assert torch.allclose(before[:, :, :2], after[:, :, :2]) and not torch.allclose(before[:, :, 2:], after[:, :, 2:])


@by_kind
def test_what_comes_after_the_anchor_changes_nothing(kind: str) -> None:
    net, features, embedded = tiny(kind), true_features(False), MODEL.tok_embeddings(TOKENS)
    anchors = torch.tensor([[3]] * 3)
    changed = [part.clone() for part in (features, embedded)]
    for part in changed:
        part[:, 4:] += 1
    assert torch.allclose(net.after(features, embedded, anchors), net.after(*changed, anchors), atol=1e-6)


def test_a_row_of_places_is_the_most_that_the_row_above_can_tell_of() -> None:
    with pytest.raises(UsageError, match="places = 5 is not allowed: at most a row of the grid, 4"):
        PlaneConfig(8, 8, 4, places=5)
    with pytest.raises(UsageError, match="rank = 0 is not allowed"):
        BlockConfig(8, 1, 8, 8, 4, rank=0)
    with pytest.raises(UsageError, match="places = 5 is not allowed: at most a row of the grid, 4"):
        GlanceConfig(8, 8, 4, places=5)
    with pytest.raises(UsageError, match="narrow = 0 is not allowed"):
        GlanceConfig(8, 8, 4, places=4, narrow=0)


# Every rule.


@by_kind
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("tree", ["chain-4", "3x2", "dynamic-12-3-4", "chain-7"])
def test_seed_exact_drafts_give_the_sequential_tokens(kind: str, tree: str, guided: bool) -> None:
    settings = GUIDED if guided else PLAIN
    plain = decode(TARGET, "seed-exact", "none", settings=settings, index=range(5), labels=1).tokens
    for batch in (1, 3):
        for index in torch.arange(5).split(batch):
            result = decode(TARGET, "seed-exact", drafter(kind, tree), settings=settings, index=index, labels=1)
            assert torch.equal(result.tokens, plain[index])


@by_kind
@pytest.mark.parametrize(
    ("rule", "tree"), [("exact", "chain-4"), ("block", "chain-4"), ("tree", "3x2"), ("traversal", "mc-sim-25")]
)
def test_images_do_not_depend_on_their_batch(kind: str, rule: str, tree: str) -> None:
    settings = LawSettings(guidance=2.0, top_k=6)
    whole = EagerBatch(TARGET, drafter(kind, tree), make_rule(rule), settings).run(LABELS, 0, torch.arange(3))
    alone = EagerBatch(TARGET, drafter(kind, tree), make_rule(rule), settings).run(LABELS[1:2], 0, torch.tensor([1]))
    assert torch.equal(whole.tokens[1:2], alone.tokens)


def first_tokens(made: Any, rule: str, seed: int, count: int = 4000) -> Tensor:
    """The first four tokens of `count` images; their passes are not done to the end."""
    batch = EagerBatch(TARGET, made, make_rule(rule), LawSettings(guidance=2.0))
    passes = batch.passes(torch.zeros(count, dtype=torch.int64), seed, torch.arange(count))
    return next(state.tokens[:, :4] for state in passes if state.count.min() >= 4)


@functools.cache
def sequential_tokens() -> Tensor:
    return first_tokens(make_drafter("none"), "seed-exact", seed=6)


@by_kind
@pytest.mark.parametrize("rule", ["exact", "block", "filled"])
def test_exact_rules_keep_the_law_of_the_first_tokens(kind: str, rule: str) -> None:
    """Tokens 1 and 3 given the class, over 4,000 images, against the sequential sampler's."""
    made: Any = filled(kind, 4) if rule == "filled" else drafter(kind, "chain-3")
    result = first_tokens(made, "exact" if rule == "filled" else rule, seed=5)
    for at in (1, 3):
        found, wanted = (torch.bincount(t[:, at], minlength=C.vocab).double() for t in (result, sequential_tokens()))
        both = found + wanted
        statistic = ((found - wanted) ** 2 / both.clamp_min(1)).sum()
        degrees = float((both > 0).sum() - 1)
        assert float(statistic) < degrees + 4 * (2 * degrees) ** 0.5


# Windows whose new slots are filled.


def filled(kind: str, window: int) -> FilledJacobi:
    return FilledJacobi(window, eagle_sketcher() if kind == "eagle" else sketcher(kind))


@pytest.mark.parametrize("kind", [*KINDS, "eagle"])
@pytest.mark.parametrize("guided", [False, True])
def test_filled_windows_give_the_sequential_tokens(kind: str, guided: bool) -> None:
    settings = GUIDED if guided else PLAIN
    plain = decode(TARGET, "seed-exact", "none", settings=settings, index=range(5), labels=1).tokens
    for batch in (1, 3):
        for index in torch.arange(5).split(batch):
            result = decode(TARGET, "seed-exact", filled(kind, 5), settings=settings, index=index, labels=1)
            assert torch.equal(result.tokens, plain[index])


def test_slots_that_enter_a_window_follow_the_drafters_law() -> None:
    """The laws that a filled window reports: the target's own where it has spoken, the drafter's behind."""
    settings, drafter_ = LawSettings(guidance=2.0), filled("plane", 4)
    asked: list[Any] = []
    inner = drafter_._window
    drafter_._window = lambda seen, column: asked.append((seen, column, inner(seen, column))) or asked[-1][2]  # type: ignore[func-returns-value, method-assign]
    EagerBatch(TARGET, drafter_, make_rule("exact"), settings).run(LABELS, 3, torch.arange(3))
    found = 0
    for seen_, column, (tokens, laws, _) in asked:
        width = seen_.laws.shape[1]
        for row, at in (column < width).nonzero().tolist():
            assert torch.equal(laws[row, at], seen_.laws[row, column[row, at]])
            assert tokens[row, at] == seen_.verdict.tokens[row, column[row, at]]
        found += int((column >= width).sum())
        assert torch.allclose(laws.exp().sum(-1), torch.ones(()), atol=1e-4)
    assert found > 10


# Folders and training.


@by_kind
def test_a_trained_drafter_is_written_read_and_drafts(
    kind: str, tmp_path: Path, blooms: Path, tiny_model: Path
) -> None:
    data = DataSource(str(blooms))
    recipe = ParallelRecipe(
        family=kind, out=str(tmp_path / "run"), model=str(tiny_model), train=data, test=data, places=PLACES, anchors=5,
        test_images=4, views=1, steps=2, batch=2, warmup=1, evaluate_every=2, layers=2, rank=8, feature_weight=0.1,
    )  # fmt: skip
    folder = train(recipe)
    config = json.loads((folder / "config.json").read_text())
    assert folder.name == kind == config["family"]
    for by_depth in config["acceptance_by_depth"].values():
        assert len(by_depth) == PLACES and all(0 < a <= 1 for a in by_depth)
    pipe = bozzetto.load(tiny_model)
    slow = pipe.generate(["rose"], seed=1, guidance=2.0, drafter="none").images[0]
    fast = pipe.generate(
        ["rose"], seed=1, guidance=2.0, drafter=f"{kind}:folder={folder}:tree=chain-3", rule="seed-exact"
    )
    assert fast.images[0].sha256 == slow.sha256
    window = pipe.generate(["rose"], seed=1, guidance=2.0, drafter=f"jacobi:fill={kind}:folder={folder}", window=5)
    assert window.images[0].sha256 == slow.sha256
    with pytest.raises(UsageError, match="comes without a trained drafter"):
        pipe.generate(["rose"], drafter=kind)
    with pytest.raises(UsageError, match="fill = 'model' is not allowed: eagle, plane, block, glance"):
        pipe.generate(["rose"], drafter="jacobi:fill=model")
    other = {"plane": "block", "block": "glance", "glance": "plane"}[kind]
    with pytest.raises(UsageError, match=f"family is '{kind}' .allowed: '{other}'"):
        pipe.generate(["rose"], drafter=f"{other}:folder={folder}")


@by_kind
def test_a_drafter_learns_to_be_accepted(kind: str, tmp_path: Path, blooms: Path, tiny_model: Path) -> None:
    data = DataSource(str(blooms))
    recipe = ParallelRecipe(
        family=kind, out=str(tmp_path / "run"), model=str(tiny_model), train=data, test=data, places=PLACES, anchors=16,
        test_images=4, views=1, steps=60, batch=4, warmup=2, lr=5e-3, ema=0.5, evaluate_every=20, layers=1, rank=8,
    )  # fmt: skip
    lines = [json.loads(line) for line in (train(recipe).parent / "metrics.jsonl").read_text().splitlines()]
    first, last = (sum(line["acceptance"]["guidance 2"]) for line in (lines[0], lines[-1]))
    assert last > first


def test_compact_folders_hold_the_same_drafter(tmp_path: Path, tiny_model: Path) -> None:
    target = load_target(tiny_model, "llamagen").config
    net = BlockNet(BlockConfig(target.dim, target.heads, target.ffn, target.vocab, target.grid, PLACES, rank=8))
    from bozzetto.checkpoints.folders import target_digest

    for compact in (False, True):
        save_drafter(tmp_path, net, tiny_model, {}, compact)
        read: Tensor = load_drafter(tmp_path, "block", target, target_digest(tiny_model)).fc.weight
        assert torch.allclose(read, net.fc.weight, atol=1e-3)
