"""Compiled passes: the same numbers as eager ones in any shape, for codes, captions, vectors and trees."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bozzetto.decoding.loop import EagerBatch
from bozzetto.drafts import VECTORS, Layout
from bozzetto.errors import UsageError
from bozzetto.laws.categorical import LawSettings
from bozzetto.methods.table import read_drafter
from bozzetto.runtime.graphs import check_mode
from bozzetto.targets.compiled import bucket
from bozzetto.targets.compiled_cache import CompiledSession, compile_target
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


def _pair(network: LlamaGen | FlowModel, mode: str = "default") -> tuple[LlamaGenTarget, LlamaGenTarget]:
    """(eager, compiled) targets of a network."""
    make = LlamaGenTarget if isinstance(network, LlamaGen) else lambda n: FlowTarget(n, FlowSampler(steps=2))
    eager, compiled = make(network), make(network)
    compile_target(compiled, network, mode)  # type: ignore[arg-type]
    return eager, compiled  # type: ignore[return-value]


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_passes_of_any_width_are_those_of_the_eager_session(uncompiled: list[str], batch: int, guided: bool) -> None:
    eager, compiled = _pair(_network())
    sessions = [t.begin(torch.arange(batch) % 3, guided, 6) for t in (eager, compiled)]
    assert isinstance(sessions[1], CompiledSession)
    start, made = torch.zeros(batch, dtype=torch.int64), torch.Generator().manual_seed(1)
    for width in (1, 3, 5, 1, 6, 2):
        inputs = torch.randint(16, (batch, width), generator=made)
        a, b = (s.score(inputs, start, int(start.max())) for s in sessions)
        for ours, theirs in ((b.logits, a.logits), (b.features, a.features)):
            assert ours is not None and theirs is not None and ours.shape == theirs.shape
            assert torch.allclose(ours, theirs, atol=1e-5)
        start = start + torch.randint(1, width + 1, (batch,), generator=made)  # ragged


def test_images_with_guidance_and_twice_as_many_without_are_two_shapes(uncompiled: list[str]) -> None:
    network = _network()
    target = LlamaGenTarget(network)
    compile_target(target, network, "default")
    for batch, guided in ((4, False), (2, True)):
        session = target.begin(torch.arange(batch) % 3, guided, 1)
        session.score(torch.zeros(batch, 1, dtype=torch.int64), torch.zeros(batch, dtype=torch.int64), 0)
    assert len(uncompiled) == 2


def test_dropping_finished_rows_keeps_the_others(uncompiled: list[str]) -> None:
    eager, compiled = _pair(_network())
    sessions = [t.begin(torch.arange(5) % 3, True, 2) for t in (eager, compiled)]
    inputs, rows = torch.arange(10).reshape(5, 2), torch.tensor([3, 1])
    for s in sessions:
        s.score(inputs, torch.zeros(5, dtype=torch.int64), 0)
        s.keep(rows)
    a, b = (s.score(inputs[rows], torch.full((2,), 2), 2).logits for s in sessions)
    assert a is not None and b is not None
    assert torch.allclose(a, b, atol=1e-5)
    assert len(sessions[1].condition) == 4  # two copies of two rows: the batch went down to a smaller size


def test_trees_and_their_compaction(uncompiled: list[str]) -> None:
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
def test_captions_of_several_condition_tokens(uncompiled: list[str], guided: bool) -> None:
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


def test_vectors(uncompiled: list[str]) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = FlowModel(FlowConfig(dim=32, layers=2, heads=2, token_dim=4, grid=4, classes=3, head_width=16)).eval()
    tokens, start = torch.randn(3, 3, 4), torch.tensor([0, 1, 0])
    a, b = (t.begin(torch.arange(3), True, 4).score(tokens, start, 1) for t in _pair(network))
    assert a.logits is None and b.logits is None
    assert a.features is not None and b.features is not None
    assert torch.allclose(a.features, b.features, atol=1e-5)


def test_a_session_has_two_widths_and_each_graph_is_made_once(uncompiled: list[str]) -> None:
    network = _network()
    target = LlamaGenTarget(network)
    compile_target(target, network, "default")
    session = target.begin(torch.arange(3), False, 8)
    for width in (1, 5, 7, 8, 4, 1):
        session.score(torch.zeros(3, width, dtype=torch.int64), torch.zeros(3, dtype=torch.int64), 0)
    assert uncompiled == ["a pass of 4 sequences with 4 places", "a pass of 4 sequences with 8 places"]


@pytest.mark.parametrize(("drafter", "rule"), [("none", "seed-exact"), ("jacobi", "seed-exact"), ("jacobi", "exact")])
def test_images_are_those_of_the_eager_target(uncompiled: list[str], drafter: str, rule: str) -> None:
    drawn = []
    for target in _pair(_network()):
        decoder = EagerBatch(target, make_drafter(drafter, 4), make_rule(rule), LawSettings(guidance=2.0))
        drawn.append(decoder.run(torch.arange(5) % 3, 7, torch.arange(5)).tokens)
    assert torch.equal(*drawn)


def test_the_compiled_graph_itself_agrees() -> None:
    eager, compiled = _pair(_network())
    tokens: list[Tensor] = []
    for target in (eager, compiled):
        decoder = EagerBatch(target, make_drafter("jacobi", 4), make_rule("seed-exact"), LawSettings(guidance=2.0))
        tokens.append(decoder.run(torch.tensor([0]), 7, torch.tensor([0])).tokens)
    assert torch.equal(*tokens)


@pytest.mark.parametrize(("count", "wanted"), [(1, 1), (2, 2), (3, 4), (8, 8), (9, 16), (33, 64)])
def test_buckets_are_powers_of_two(count: int, wanted: int) -> None:
    assert bucket(count) == wanted


def test_a_mode_that_there_is_not_is_named() -> None:
    with pytest.raises(UsageError, match="compile = 'fast' is not allowed: off, default, max"):
        check_mode("fast")
    network = _network()
    target = LlamaGenTarget(network)
    compile_target(target, network, "off")
    assert target.step is None


@pytest.fixture(scope="module")
def flow_network() -> FlowModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = FlowModel(FlowConfig(dim=32, layers=1, heads=2, token_dim=4, grid=4, classes=3, head_width=16))
        for parameter in network.head.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    return network.eval().requires_grad_(False)


@pytest.mark.parametrize("guided", [False, True])
def test_compiled_heads_are_those_of_the_eager_one(
    uncompiled: list[str], flow_network: FlowModel, guided: bool
) -> None:
    eager, compiled = _pair(flow_network, "max")
    guidance = 2.0 if guided else 1.0
    for places in (1, 7, 3, 9, 2):
        features = torch.randn(2 if guided else 1, places, 32)
        x = torch.randn(places, 4)
        laws = [t.law(features, guidance, 1.0) for t in (eager, compiled)]  # type: ignore[attr-defined]
        for step in range(2):
            a, b = (law.all_places(x, step) for law in laws)
            assert torch.allclose(a.mean, b.mean, atol=1e-5) and torch.equal(a.std, b.std)
        assert laws[0].calls == laws[1].calls and laws[0].rows == laws[1].rows
    assert len(uncompiled) == 4  # 1, 8 (for 7), 4 (for 3, then 2), 12 (for 9)


def test_another_number_of_steps_keeps_the_compiled_head(uncompiled: list[str], flow_network: FlowModel) -> None:
    _, compiled = _pair(flow_network, "max")
    before = compiled.head.compiled  # type: ignore[union-attr]
    compiled.sample_with(FlowSampler(steps=3))  # type: ignore[attr-defined]
    assert before is not None and compiled.head.compiled is before  # type: ignore[union-attr]


@pytest.mark.parametrize(("drafter", "rule"), [("none", "plain"), ("jacobi", "chains"), ("jacobi", "pathwise")])
def test_vectors_are_those_of_the_eager_target(
    uncompiled: list[str], flow_network: FlowModel, drafter: str, rule: str
) -> None:
    drawn = []
    for target in _pair(flow_network, "max"):
        made = read_drafter(drafter, VECTORS).make(4, None, None, target)
        decoder = EagerBatch(target, made, make_rule(rule, VECTORS), LawSettings(guidance=2.0))
        drawn.append(decoder.run(torch.arange(3), 7, torch.arange(3)).tokens)
    assert torch.allclose(*drawn, atol=1e-3)


def test_deterministic_passes_of_any_width_and_batch_agree_to_the_last_bit_in_bfloat16() -> None:
    network, found = _network(dim=64, ffn_multiple=32), []
    target = LlamaGenTarget(network, torch.bfloat16)
    compile_target(target, network, "default", deterministic=True)
    tokens = torch.randint(16, (2, 9), generator=torch.Generator().manual_seed(3))
    for batch, width in ((1, 1), (2, 4)):  # each pair is a graph, which takes ten seconds to compile
        session, laws = target.begin(torch.arange(batch), True, width), []
        for start in range(0, 8, width):
            inputs = tokens[:batch, start : start + width].contiguous()
            logits = session.score(inputs, torch.full((batch,), start), start).logits
            assert logits is not None
            laws.append(logits[[0, batch]])
        found.append(torch.cat(laws, 1))
    assert all(torch.equal(found[0], other) for other in found[1:])
