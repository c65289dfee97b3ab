"""Passes of our kernels: the same numbers as torch's in any shape, for codes, captions, vectors and trees."""

from __future__ import annotations

import pytest
import torch

from bozzetto.decoding.loop import EagerBatch
from bozzetto.drafts import VECTORS, Layout
from bozzetto.errors import UsageError
from bozzetto.laws.categorical import LawSettings
from bozzetto.methods.table import read_drafter
from bozzetto.runtime.graphs import check_mode
from bozzetto.targets.flow import FlowConfig, FlowModel
from bozzetto.targets.flow_cache import FlowSampler, FlowTarget
from bozzetto.targets.llamagen import LlamaGen, LlamaGenConfig
from bozzetto.targets.llamagen_cache import LlamaGenTarget
from toys import make_drafter, make_rule

SMALL = LlamaGenConfig(dim=32, layers=2, heads=2, vocab=16, grid=4, classes=3)


def _network(seed: int = 0, **changes: int) -> LlamaGen:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = LlamaGen(LlamaGenConfig(**{**vars(SMALL), **changes}))
        torch.nn.init.normal_(network.output.weight, std=0.5)
    return network.eval().requires_grad_(False)


def _pair(network: LlamaGen | FlowModel) -> tuple[LlamaGenTarget, LlamaGenTarget]:
    """A target of a network, and the same with passes of our kernels."""
    make = LlamaGenTarget if isinstance(network, LlamaGen) else lambda n: FlowTarget(n, FlowSampler(steps=2))
    eager = make(network)
    return eager, eager.owned(network)  # type: ignore[return-value]


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_passes_of_any_width_are_those_of_the_eager_session(batch: int, guided: bool) -> None:
    eager, compiled = _pair(_network())
    sessions = [t.begin(torch.arange(batch) % 3, guided, 6) for t in (eager, compiled)]
    assert sessions[1].target.own and not sessions[0].target.own
    start, made = torch.zeros(batch, dtype=torch.int64), torch.Generator().manual_seed(1)
    for width in (1, 3, 5, 1, 6, 2):
        inputs = torch.randint(16, (batch, width), generator=made)
        a, b = (s.score(inputs, start, int(start.max())) for s in sessions)
        for ours, theirs in ((b.logits, a.logits), (b.features, a.features)):
            assert ours is not None and theirs is not None and ours.shape == theirs.shape
            assert torch.allclose(ours, theirs, atol=1e-5)
        start = start + torch.randint(1, width + 1, (batch,), generator=made)  # ragged


@pytest.mark.parametrize("width", [1, 4])
def test_a_row_that_nobody_reads_may_lie_behind_the_columns_of_a_pass(width: int) -> None:
    """A slot without an image runs ahead of the others; the pass reaches as far as theirs do."""
    target = _pair(_network(grid=24))[1]
    inputs, found = torch.arange(2 * width).reshape(2, width), []
    for other in (3, 570):
        session = target.begin(torch.arange(2), False, width)
        found += [session.score(inputs, torch.tensor([3, other]), 3).logits for _ in range(20)]
    assert all(torch.equal(one[0], found[0][0]) for one in found)


def test_dropping_finished_rows_keeps_the_others() -> None:
    eager, compiled = _pair(_network())
    sessions = [t.begin(torch.arange(5) % 3, True, 2) for t in (eager, compiled)]
    inputs, rows = torch.arange(10).reshape(5, 2), torch.tensor([3, 1])
    for s in sessions:
        s.score(inputs, torch.zeros(5, dtype=torch.int64), 0)
        s.keep(rows)
    a, b = (s.score(inputs[rows], torch.full((2,), 2), 2).logits for s in sessions)
    assert a is not None and b is not None
    assert torch.allclose(a, b, atol=1e-5)
    assert len(sessions[1].condition) == 4  # two copies of two rows


def test_trees_and_their_compaction() -> None:
    eager, compiled = _pair(_network())
    sees = torch.tensor([[[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]]], dtype=torch.bool)
    layout = Layout(torch.arange(4)[None], torch.tensor([[0, 1, 1, 2]]), sees)
    inputs, start = torch.arange(12).reshape(3, 4), torch.tensor([0, 2, 1])
    path, found = torch.tensor([[0, 2, 3], [0, 1, 1], [0, 2, 2]]), []
    for t in (eager, compiled):
        s = t.begin(torch.arange(3), True, 4)
        s.score(torch.arange(9).reshape(3, 3), torch.zeros(3, dtype=torch.int64), 0)
        first = s.score(inputs, start, 2, layout).logits
        s.compact(path, start)
        found.append((first, s.score(inputs[:, :1], start + 2, 4).logits))
    for a, b in zip(*found, strict=True):
        assert a is not None and b is not None
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("guided", [False, True])
def test_captions_of_several_condition_tokens(guided: bool) -> None:
    network = _network(classes=0, condition_tokens=4, caption_dim=6)
    features = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(2))
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 0, 0, 1]], dtype=torch.bool)
    found = []
    for t in _pair(network):
        s = t.with_captions(features, mask).begin(torch.arange(3), guided, 3)
        first = s.score(torch.tensor([[1, 2, 3]] * 3), torch.zeros(3, dtype=torch.int64), 0).logits
        found.append((first, s.score(torch.tensor([[4]] * 3), torch.tensor([1, 3, 2]), 3).logits))
    for a, b in zip(*found, strict=True):
        assert a is not None and b is not None
        assert torch.allclose(a, b, atol=1e-5)


def test_vectors() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = FlowModel(FlowConfig(dim=32, layers=2, heads=2, token_dim=4, grid=4, classes=3, head_width=16)).eval()
    tokens, start = torch.randn(3, 3, 4), torch.tensor([0, 1, 0])
    a, b = (t.begin(torch.arange(3), True, 4).score(tokens, start, 1) for t in _pair(network))
    assert a.logits is None and b.logits is None
    assert a.features is not None and b.features is not None
    assert torch.allclose(a.features, b.features, atol=1e-5)


@pytest.mark.parametrize(("drafter", "rule"), [("none", "seed-exact"), ("jacobi", "seed-exact"), ("jacobi", "exact")])
def test_images_are_those_of_the_eager_target(drafter: str, rule: str) -> None:
    drawn = []
    for target in _pair(_network()):
        decoder = EagerBatch(target, make_drafter(drafter, 4), make_rule(rule), LawSettings(guidance=2.0))
        drawn.append(decoder.run(torch.arange(5) % 3, 7, torch.arange(5)).tokens)
    assert torch.equal(*drawn)


def test_a_mode_that_there_is_not_is_named() -> None:
    with pytest.raises(UsageError, match="compile = 'fast' is not allowed: auto, off, default, max"):
        check_mode("fast")


@pytest.fixture(scope="module")
def flow_network() -> FlowModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = FlowModel(FlowConfig(dim=32, layers=1, heads=2, token_dim=4, grid=4, classes=3, head_width=16))
        for parameter in network.head.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    return network.eval().requires_grad_(False)


@pytest.mark.parametrize("guided", [False, True])
def test_compiled_heads_are_those_of_the_eager_one(flow_network: FlowModel, guided: bool) -> None:
    eager, compiled = _pair(flow_network)
    guidance = 2.0 if guided else 1.0
    for places in (1, 7, 3, 9, 2):
        features = torch.randn(2 if guided else 1, places, 32)
        x = torch.randn(places, 4)
        laws = [t.law(features, guidance, 1.0) for t in (eager, compiled)]  # type: ignore[attr-defined]
        for step in range(2):
            a, b = (law.all_places(x, step) for law in laws)
            assert torch.allclose(a.mean, b.mean, atol=1e-5) and torch.equal(a.std, b.std)
        assert laws[0].calls == laws[1].calls and laws[0].rows == laws[1].rows
        a, b = (law.run(torch.randn(places, 3, 4, generator=torch.Generator().manual_seed(places))) for law in laws)
        assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(a, b, strict=True))
        assert laws[0].calls == laws[1].calls and laws[0].rows == laws[1].rows


@pytest.mark.parametrize(("drafter", "rule"), [("none", "plain"), ("jacobi", "chains"), ("jacobi", "pathwise")])
def test_vectors_are_those_of_the_eager_target(flow_network: FlowModel, drafter: str, rule: str) -> None:
    drawn = []
    for target in _pair(flow_network):
        made = read_drafter(drafter, VECTORS).make(4, None, None, target)
        decoder = EagerBatch(target, made, make_rule(rule, VECTORS), LawSettings(guidance=2.0))
        drawn.append(decoder.run(torch.arange(3), 7, torch.arange(3)).tokens)
    assert torch.allclose(*drawn, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [32, 64])
def test_passes_of_any_width_and_batch_agree_to_the_last_bit(dim: int, dtype: torch.dtype) -> None:
    network, found = _network(dim=dim, ffn_multiple=32), []
    target = LlamaGenTarget(network, dtype).owned(network)
    tokens = torch.randint(16, (2, 9), generator=torch.Generator().manual_seed(3))
    for batch, width in ((1, 1), (1, 2), (2, 4), (1, 8)):
        session, laws = target.begin(torch.arange(batch), True, width), []
        for start in range(0, 8, width):
            inputs = tokens[:batch, start : start + width].contiguous()
            logits = session.score(inputs, torch.full((batch,), start), start).logits
            assert logits is not None
            laws.append(logits[[0, batch]])
        found.append(torch.cat(laws, 1))
    assert all(torch.equal(found[0], other) for other in found[1:])
