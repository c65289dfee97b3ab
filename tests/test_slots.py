"""Continuous batching: an image is what it would be alone, whoever shares its passes."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bozzetto.decoding.fused import FusedBatch
from bozzetto.decoding.images import ImageRequest
from bozzetto.decoding.loop import EagerBatch
from bozzetto.decoding.state import DecodeState
from bozzetto.drafters.glance import CachedGlance, GlanceConfig, GlanceFill, GlanceNet
from bozzetto.drafters.jacobi import FilledJacobi
from bozzetto.laws.categorical import LawSettings
from bozzetto.targets.llamagen_cache import CausalSession, LlamaGenTarget
from toys import PLAIN, make_drafter, make_rule, tiny_llamagen

LENGTH = 16


@pytest.fixture(scope="module")
def target() -> LlamaGenTarget:
    return LlamaGenTarget(tiny_llamagen())


def lane_of(
    target: LlamaGenTarget,
    rule: str = "seed-exact",
    window: int = 4,
    slots: int = 4,
    width: Callable[[int], int] | None = None,
    guided: bool = True,
    filtered: bool = True,
    filler: GlanceFill | None = None,
) -> FusedBatch:
    width = width or (lambda images: window)
    return FusedBatch(target, make_rule(rule), slots, width, window, guided, filtered, filler)


def glance_of(target: LlamaGenTarget, places: int = 3) -> GlanceNet:
    """A glance with weights large enough for every part to matter."""
    c = target.config
    net = GlanceNet(GlanceConfig(c.dim, c.vocab, c.grid, places, narrow=10, ffn=24, rank=6))
    generator = torch.Generator().manual_seed(0)
    for name, weight in net.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        weight.data = 1 + 0.2 * noise if "norm" in name else 0.2 * noise
    return net.eval().requires_grad_(False)


def fill_of(target: LlamaGenTarget, fresh: int = 0) -> GlanceFill:
    return GlanceFill(glance_of(target), target.embedding, target.output, fresh)


def mixed(count: int, seed: int = 0, guided: bool = True, filtered: bool = True) -> list[ImageRequest]:
    """Images of all labels with all kinds of laws."""
    draw = random.Random(seed)
    found = []
    for index in range(count):
        scale = draw.choice([1.0, 1.5, 3.0]) if guided else 1.0
        heat = draw.choice([0.0, 0.7, 1.0] if filtered else [0.7, 1.0])
        law = LawSettings(scale, heat, *((draw.choice([0, 3]), draw.choice([1.0, 0.8])) if filtered else ()))
        found.append(ImageRequest(draw.randrange(3), draw.randrange(3), index, law))
    return found


def plain(count: int) -> list[ImageRequest]:
    return [ImageRequest(index % 3, 0, index, PLAIN) for index in range(count)]


def decode_all(
    lane: FusedBatch, requests: list[ImageRequest], seed: int = 0, shrink: bool = True
) -> list[ImageRequest]:
    """All images through the lane, which come in at random moments; in the order of the requests."""
    draw, waiting, done = random.Random(seed), list(requests), []
    while waiting or lane.active:
        count = min(lane.free, draw.randrange(3), len(waiting))
        lane.admit(waiting[:count])
        waiting = waiting[count:]
        done += lane.step()
        if shrink:
            lane.shrink()
    assert lane.free == lane.slots and lane.step() == []
    return sorted(done, key=requests.index)


def alone(
    target: LlamaGenTarget, r: ImageRequest, rule: str = "seed-exact", window: int = 4, fresh: int | None = None
) -> DecodeState:
    """The image by the readable twin. fresh: with windows that a glance fills."""
    drafter = make_drafter("jacobi", window) if window > 1 else make_drafter("none")
    if fresh is not None:
        drafter = FilledJacobi(window, CachedGlance(glance_of(target), target.embedding, target.output), fresh)
    decoder = EagerBatch(target, drafter, make_rule(rule), r.law)
    return decoder.run(torch.tensor([r.label]), r.seed, torch.tensor([r.index]))


def tokens_of(image: ImageRequest) -> Tensor:
    assert image.tokens is not None
    return image.tokens


def agree(
    target: LlamaGenTarget, image: ImageRequest, rule: str = "seed-exact", window: int = 4, fresh: int | None = None
) -> None:
    wanted = alone(target, image, rule, window, fresh)
    assert torch.equal(tokens_of(image), wanted.tokens[0]), image
    for name in ("passes", "accepted", "drafted"):
        assert getattr(image, name) == int(getattr(wanted, name)[0]), (name, image)
    assert image.count == sum(image.trace.committed) == LENGTH and len(image.trace.committed) == image.passes
    assert image.margin == pytest.approx(float(wanted.margin[0]), abs=1e-4)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("window", [1, 4, 6])
@pytest.mark.parametrize("rule", ["seed-exact", "exact"])
def test_an_image_does_not_depend_on_who_shares_the_batch(
    target: LlamaGenTarget, rule: str, window: int, seed: int
) -> None:
    done = decode_all(lane_of(target, rule, window), mixed(12, seed), seed)
    assert len(done) == 12
    for image in done:
        agree(target, image, rule, window)


@pytest.mark.parametrize(("window", "fresh"), [(2, 0), (2, 1), (4, 0), (4, 2), (6, 1)])
@pytest.mark.parametrize("rule", ["seed-exact", "exact"])
def test_windows_that_a_glance_fills_are_those_of_the_readable_twin(
    target: LlamaGenTarget, rule: str, window: int, fresh: int
) -> None:
    """Windows of 6 have more drafts than the glance has places."""
    done = decode_all(lane_of(target, rule, window, filler=fill_of(target, fresh)), mixed(10, window), window)
    assert len(done) == 10
    for image in done:
        agree(target, image, rule, window, fresh)


@pytest.mark.parametrize(("guided", "filtered"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("rule", ["seed-exact", "exact"])
def test_images_of_a_lane_for_fewer_laws_are_the_same(
    target: LlamaGenTarget, rule: str, guided: bool, filtered: bool
) -> None:
    lane = lane_of(target, rule, guided=guided, filtered=filtered)
    for image in decode_all(lane, mixed(6, 2, guided, filtered)):
        agree(target, image, rule)


@pytest.mark.parametrize(("rule", "window"), [("seed-exact", 1), ("seed-exact", 4), ("exact", 4)])
def test_images_of_compiled_steps_are_the_same(target: LlamaGenTarget, rule: str, window: int) -> None:
    network = tiny_llamagen()
    compiled = LlamaGenTarget(network).owned(network)
    for image in decode_all(lane_of(compiled, rule, window), mixed(8, 3)):
        agree(target, image, rule, window)


def test_a_compiled_step_with_a_glance_draws_the_images_of_the_readable_twin(target: LlamaGenTarget) -> None:
    network = tiny_llamagen()
    compiled = LlamaGenTarget(network).owned(network)
    filler = GlanceFill(glance_of(target), target.embedding, compiled.output, 1)
    lane, done = lane_of(compiled, "exact", slots=2, filtered=False, filler=filler), []
    lane.admit(mixed(2, 6, filtered=False))
    while lane.active:
        done += lane.step()
    for image in done:
        agree(target, image, "exact", fresh=1)


@pytest.mark.parametrize("compiled", [False, True])
def test_tokens_do_not_depend_on_widths_that_change_with_the_images(target: LlamaGenTarget, compiled: bool) -> None:
    network = tiny_llamagen()
    own = LlamaGenTarget(network)
    own = own.owned(network) if compiled else own
    lane = lane_of(own, window=6, width=lambda images: {1: 6, 2: 4, 3: 2}.get(images, 1))
    for image in decode_all(lane, mixed(12, 4)):
        assert torch.equal(tokens_of(image), alone(target, image).tokens[0])
        assert image.accepted <= image.drafted


@pytest.mark.parametrize("window", [1, 4])
@pytest.mark.parametrize("rule", ["seed-exact", "exact"])
def test_a_slot_that_nobody_takes_may_wait_for_longer_than_an_image(
    target: LlamaGenTarget, rule: str, window: int
) -> None:
    lane, waiting, done = lane_of(target, rule, window), plain(9), []
    while waiting or lane.active:
        count = min(3 - lane.active, len(waiting))
        lane.admit(waiting[:count])
        waiting = waiting[count:]
        done += lane.step()
    assert len(done) == 9
    for image in done:
        agree(target, image, rule, window)


def test_a_cancelled_image_frees_its_slot_and_changes_no_other(target: LlamaGenTarget) -> None:
    lane, requests = lane_of(target), mixed(5, 5)
    images = requests[:4]
    lane.admit(images)
    lane.step()
    lane.cancel(images[1])
    assert (lane.active, lane.free) == (3, 1)
    done = lane.step()
    lane.admit(requests[4:])
    assert lane.free == 0
    while lane.active:
        done += lane.step()
    assert images[1] not in done and images[1].tokens is None
    assert len(done) == 4
    for image in done:
        agree(target, image)


def test_cancelling_what_is_finished_or_cancelled_changes_nothing(target: LlamaGenTarget) -> None:
    lane = lane_of(target)
    first, second, third = plain(3)
    lane.admit([first, second])
    lane.cancel(first)
    lane.cancel(first)
    assert lane.active == 1
    done: list[ImageRequest] = []
    while lane.active:
        done += lane.step()
    lane.admit([third])
    lane.cancel(second)  # its slot is somebody else's now
    while lane.active:
        done += lane.step()
    assert done == [second, third]
    for image in done:
        agree(target, image)


def test_more_images_than_free_slots_are_refused(target: LlamaGenTarget) -> None:
    lane = lane_of(target, slots=3)
    lane.admit(plain(1))
    with pytest.raises(ValueError, match="3 images for 2 free slots"):
        lane.admit(plain(3))
    assert (lane.active, lane.free) == (1, 2)
    lane.admit([])


@pytest.mark.parametrize(
    ("law", "message"),
    [
        (LawSettings(guidance=1.5), "without guidance"),
        (LawSettings(temperature=0), "without top-k, top-p and greedy choices"),
        (LawSettings(top_k=4), "without top-k"),
        (LawSettings(top_p=0.9), "without top-k"),
    ],
)
def test_a_lane_refuses_laws_that_it_is_not_for(target: LlamaGenTarget, law: LawSettings, message: str) -> None:
    lane = lane_of(target, guided=False, filtered=False)
    with pytest.raises(ValueError, match=message):
        lane.admit([*plain(1), ImageRequest(0, 0, 1, law)])
    assert lane.active == 0  # none of them came in


def test_a_batch_shrinks_when_images_leave(target: LlamaGenTarget, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, score = [], CausalSession.score

    def counted(self: CausalSession, inputs: Tensor, *given: int) -> object:
        rows.append(len(inputs))
        return score(self, inputs, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(CausalSession, "score", counted)
    lane = lane_of(target, slots=8)
    images, done = mixed(8, 6), []
    lane.admit(images)
    for left in (7, 5, 4, 2, 1):
        for image in images[left:]:
            lane.cancel(image)
        images = images[:left]
        lane.shrink()
        done += lane.step()
    assert rows == [8, 8, 4, 2, 1]
    while lane.active:
        done += lane.step()
    assert done == images
    agree(target, done[0])


def test_a_lane_that_had_to_grow_or_ran_empty_goes_on(target: LlamaGenTarget) -> None:
    lane, requests, done = lane_of(target, slots=6), mixed(10, 7), []
    for begin, end in ((0, 1), (1, 3), (3, 6)):  # a larger batch each time
        lane.admit(requests[begin:end])
        done += lane.step()
    for begin, end in ((6, 8), (8, 10)):
        while lane.active:
            done += lane.step()
            lane.shrink()
        lane.admit(requests[begin:end])
    while lane.active:
        done += lane.step()
    assert len(done) == 10
    for image in done:
        agree(target, image)
