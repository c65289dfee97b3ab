"""Images that enter while others are drawn by drafts: whoever comes, goes or gives up, an image is what it is alone."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import hf_toys
import test_masked as masked
from bozzetto.adapters.eagle import PromptedEagle
from bozzetto.adapters.prompted import Prompt
from bozzetto.decoding.batch import RowBatch
from bozzetto.decoding.images import ImageRequest
from bozzetto.decoding.loop import EagerBatch
from bozzetto.drafters.base import Drafter
from bozzetto.drafters.eagle import CachedEagle, EagleConfig, EagleNet
from bozzetto.drafters.gaussian import CachedGaussian, GaussianConfig, GaussianDrafter
from bozzetto.drafters.jacobi import FilledJacobi, JacobiVectors, SecondGuess
from bozzetto.drafters.small_target import SmallTarget
from bozzetto.drafters.tree import TreeDrafter
from bozzetto.drafts import VECTORS
from bozzetto.laws.categorical import LawSettings
from bozzetto.methods.shapes import read_shape
from bozzetto.rules.neighbours import nearest_codes
from bozzetto.targets.flow import FlowConfig, FlowModel
from bozzetto.targets.flow_cache import FlowSampler, FlowTarget
from bozzetto.targets.llamagen_cache import LlamaGenTarget
from test_eagle import MODEL, tiny_eagle
from test_parallel import SKETCHERS, tiny
from test_path_sketch import random_sketch
from toys import make_drafter, make_rule

GUIDED = LawSettings(guidance=2.0, temperature=0.9)
BOTH = pytest.mark.parametrize("own", [False, True], ids=["torch", "ours"])


def requests(count: int, law: LawSettings, classes: int = 3) -> list[ImageRequest]:
    """Of several seeds."""
    return [ImageRequest(i % classes, i % 2, i, law) for i in range(count)]


def come_and_go(batch: RowBatch, asked: Sequence[ImageRequest], gone: Sequence[int] = (), seed: int = 0) -> None:
    """Images enter at random moments; those numbered `gone` are given up on the way."""
    draw, waiting, steps = random.Random(seed), list(asked), 0
    while waiting or batch.active:
        count = min(batch.free, draw.randrange(3), len(waiting))
        batch.admit(waiting[:count])
        waiting = waiting[count:]
        finished = batch.step()
        assert all(image.tokens is not None for image in finished)
        steps += 1
        for image in (asked[i] for i in gone):
            if image.count > 2 and image.status != "cancelled":
                batch.cancel(image)
    assert batch.free == batch.slots and batch.step() == [] and steps > max(image.passes for image in asked)


def check(batch: RowBatch, alone: RowBatch, law: LawSettings, same: Callable[[Tensor, Tensor], bool]) -> None:
    """Ten images through three slots, one of them given up, against each alone."""
    asked = requests(10, law)
    come_and_go(batch, asked, gone=[4])
    for image in asked:
        wanted = alone.run(torch.tensor([image.label]), image.seed, torch.tensor([image.index]))
        if image.index == 4:
            assert image.tokens is None and image.status == "cancelled"
            continue
        assert image.tokens is not None and same(image.tokens, wanted.tokens[0]), image
        for name in ("passes", "accepted"):
            assert getattr(image, name) == int(getattr(wanted, name)[0]), (name, image)
        for name in ("margin", "moved", "farthest"):
            assert getattr(image, name) == pytest.approx(float(getattr(wanted, name)[0]), abs=1e-3), name
        assert sum(image.trace.committed) == image.count == len(image.tokens)
        assert sum(image.trace.accepted) == image.accepted and sum(image.trace.drafted) == image.drafted


def near(one: Tensor, other: Tensor) -> bool:
    """torch sums in another order in another batch."""
    return torch.allclose(one, other, atol=1e-3)


Make = Callable[[Any], Drafter]


def tree(shape: str, kind: str = "eagle", stop: float = 0.0) -> Make:
    def made(target: Any) -> Drafter:
        if kind == "model":
            model: Any = SmallTarget(target)
        elif kind == "eagle":
            model = CachedEagle(tiny_eagle(), target.embedding, target.output)
        else:
            model = SKETCHERS[kind](tiny(kind), target.embedding, target.output)
        return TreeDrafter(kind, model, read_shape(shape), stop)

    return made


def window(kind: str = "") -> Make:
    """Windows, those that a drafter fills, or those with second guesses."""
    if not kind:
        return lambda target: make_drafter("jacobi", 4)

    def made(target: Any) -> Drafter:
        how, _, model = kind.partition(":")
        helper: Any = tree("chain-1", model)(target).model
        return FilledJacobi(4, helper, 1) if how == "fill" else SecondGuess(4, helper, 2, 2)

    return made


CODES = [
    ("none", lambda target: make_drafter("none"), "seed-exact"),
    ("window", window(), "exact"),
    ("window", window(), "seed-exact"),
    ("window", window(), "grouped"),
    ("fill=glance", window("fill:glance"), "exact"),
    ("fill=eagle", window("fill:eagle"), "exact"),
    ("second=eagle", window("second:eagle"), "exact"),
    ("second=block", window("second:block"), "seed-exact"),
    ("chain", tree("chain-3"), "block"),
    ("chain", tree("chain-3"), "cascade"),
    ("chain", tree("chain-3"), "seed-exact"),
    ("static", tree("2x2x1"), "tree"),
    ("static", tree("2x2x1"), "traversal"),
    ("static", tree("2x2x1"), "seed-exact"),
    ("static", tree("2x2x1"), "lantern++"),
    ("stopping", tree("2x2x1", stop=0.3), "tree"),
    ("stopping", tree("chain-3", stop=0.3), "block"),
    ("dynamic", tree("dynamic-7-3-2"), "tree"),
    ("dynamic", tree("dynamic-7-3-2"), "lantern:k=4"),
    ("glance", tree("chain-3", "glance"), "block"),
    ("plane", tree("2x1x1", "plane"), "tree"),
    ("block", tree("chain-3", "block"), "exact"),
    ("model", tree("chain-2", "model"), "block"),
    ("model", tree("2x2", "model"), "annealed"),
]


@BOTH
@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize(("name", "make", "rule"), CODES, ids=lambda part: part if isinstance(part, str) else "")
def test_codes(name: str, make: Make, rule: str, guidance: float, own: bool) -> None:
    target, law = target_of_codes(own), LawSettings(guidance=guidance, temperature=0.9)
    judge = make_rule(rule)
    table = nearest_codes(torch.arange(target.vocab).float()[:, None], judge.columns) if judge.columns else None
    batches = [EagerBatch(target, make(target), judge, law, None, 3, neighbours=table) for _ in range(2)]
    check(*batches, law, torch.equal)


def target_of_codes(own: bool) -> Any:
    target = LlamaGenTarget(MODEL)
    return target.owned(MODEL) if own else target


def flow_network() -> FlowModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = FlowModel(FlowConfig(dim=32, layers=1, heads=2, token_dim=4, grid=4, classes=3, head_width=16))
        for parameter in network.head.parameters():
            torch.nn.init.normal_(parameter, std=0.08)
    return network.eval().requires_grad_(False)


FLOW = flow_network()


def flow_target(own: bool) -> FlowTarget:
    target = FlowTarget(FLOW, FlowSampler(steps=3, last_std=0.6))
    return target.owned(FLOW) if own else target


def sketch(stop: float = 0.0) -> Make:
    def made(target: Any) -> Drafter:
        c = target.config
        net = random_sketch(GaussianConfig(c.dim, c.heads, c.ffn, target.token_dim, c.grid, 16))
        ancestry, std = target.schedule.ancestry(target.device), target.schedule.std
        return GaussianDrafter(CachedGaussian(net, target.embedding), 3, ancestry, std, target.token_dim, stop)

    return made


def vector_window(target: Any) -> Drafter:
    ancestry, std = target.schedule.ancestry(target.device), target.schedule.std
    return JacobiVectors(3, target.config.grid, target.token_dim, ancestry, std, own=target.own)


VECTOR = [
    ("none", lambda target: Drafter(target.token_dim), "plain"),
    ("none", lambda target: Drafter(target.token_dim), "reflection"),
    ("window", vector_window, "chains"),
    ("window", vector_window, "pathwise:epsilon=2"),
    ("sketch", sketch(), "joint"),
    ("sketch", sketch(), "block"),
    ("sketch", sketch(), "chains"),
    ("sketch", sketch(), "cspd"),
    ("sketch", sketch(), "pathwise:epsilon=2"),
    ("stopping", sketch(0.4), "pathwise:epsilon=2"),
]


@BOTH
@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize(("name", "make", "rule"), VECTOR, ids=lambda part: part if isinstance(part, str) else "")
def test_vectors(name: str, make: Make, rule: str, guidance: float, own: bool) -> None:
    target, law = flow_target(own), LawSettings(guidance=guidance, temperature=0.9)
    batches = [EagerBatch(target, make(target), make_rule(rule, VECTORS), law, None, 3) for _ in range(2)]
    check(*batches, law, torch.equal if own and name != "stopping" else near)  # whose drafts torch draws


@BOTH
@pytest.mark.parametrize("way", masked.WAYS, ids=lambda w: f"{w.rule.name}-{w.settings.guidance:g}")
def test_masked(way: masked.Way, own: bool) -> None:
    target = masked.TARGET.owned(masked.MODEL) if own else masked.TARGET
    batches = [way.decoder(target) for _ in range(2)]
    batches[0].slots = 3
    check(*batches, way.settings, near)


@pytest.mark.parametrize("enters", [1, 7], ids=["before its first pass", "while it is drawn"])
def test_memory_is_that_of_the_images_that_are_there(enters: int) -> None:
    target, law = target_of_codes(True), LawSettings(guidance=2.0)
    batch = EagerBatch(target, tree("chain-3")(target), make_rule("block"), law, None, 4)
    asked = requests(5, law)
    batch.admit(asked[:2])
    for _ in range(4):
        batch.step()
    batch.admit(asked[2:4])
    for _ in range(enters - 1):
        batch.step()
    batch.cancel(asked[3])
    batch.cancel(asked[0])
    batch.cancel(asked[0])  # again: nothing
    assert batch.active == 2 and batch.free == 2 and batch.tokens_of(asked[2]).shape == (target.length,)
    batch.step()
    assert batch.session is not None and len(batch.session.condition) == 2 * len(batch.images) == 4
    assert len(batch.noise.table) == len(batch.noise.filled) == len(batch.drafter.keys) == 2
    batch.cancel(asked[1])
    batch.cancel(asked[2])
    assert batch.active == 0 and batch.session is None and batch.step() == []
    batch.admit(asked[4:])
    while batch.active:
        batch.step()
    alone = EagerBatch(target, tree("chain-3")(target), make_rule("block"), law)
    assert torch.equal(asked[4].result, alone.run(torch.tensor([1]), 0, torch.tensor([4])).tokens[0])
    with pytest.raises(ValueError, match="5 images for 4 free places"):
        batch.admit(requests(5, law))


@BOTH
@pytest.mark.parametrize("rule", ["seed-exact", "block"])
@pytest.mark.parametrize("drafter", ["none", "nothing", "words"])
@pytest.mark.parametrize("family", ["janus", "chameleon"])
def test_hosted_prompts(family: str, drafter: str, rule: str, own: bool) -> None:
    """Prompts of one word to thirty, so that what stands before the images of a batch grows while they are drawn."""
    target: Any = hf_toys.TARGETS[family]()
    if own:
        target = target.owned()
    for label, length in enumerate((2, 30, 11)):
        target.add(Prompt((1, *(3 + i % 9 for i in range(length - 1))), (1, 2)), label)
    law, shape = LawSettings(guidance=2.0, temperature=0.9), target.config

    def batch() -> EagerBatch:
        made: Any = Drafter()
        if drafter != "none":
            with torch.random.fork_rng():
                torch.manual_seed(5)
                net = EagleNet(EagleConfig(shape.dim, 4, 48, shape.vocab, shape.grid, before=drafter)).eval()  # type: ignore[arg-type]
            made = TreeDrafter("eagle", PromptedEagle(net, target), read_shape("chain-3"))
        return EagerBatch(target, made, make_rule(rule), law, None, 3)

    check(batch(), batch(), law, torch.equal)


def test_images_of_a_masked_model_take_turns_and_share_the_passes_of_equal_steps() -> None:
    batch, asked = masked.Way(masked.PlainSteps()).decoder(), requests(4, masked.GUIDED)
    batch.admit(asked[:2])
    for _ in range(4):
        batch.step()
    batch.admit(asked[2:])
    steps, order = 0, list[int]()
    while batch.active:
        order += [image.index for image in batch.step()]
        steps += 1
    assert order == [0, 1, 2, 3] and steps == 4 + 8  # half of the first two are left
    assert asked[0].passes == asked[3].passes == 8
    for image in requests(2, masked.GUIDED):
        batch.admit([image])
    for _ in range(2):  # the second one's first pass, then the first one's
        batch.step()
    assert [image.count for image in batch.images] == [batch.starts[1]] * 2
    batch.step()
    assert [image.count for image in batch.images] == [batch.starts[2]] * 2
