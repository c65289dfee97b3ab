"""Masked continuous models: schedule, backbone pass, decode loop, exact head-level speculation, drafted windows."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bozzetto import load
from bozzetto.decoding.masked import MaskedBatch, place_order
from bozzetto.decoding.state import DecodeState
from bozzetto.errors import UsageError
from bozzetto.laws.categorical import LawSettings
from bozzetto.laws.noise import STREAM_TOKEN, NormalField, image_keys, normal_rows
from bozzetto.methods.options import SmallerMasked
from bozzetto.rules.chains import Chains
from bozzetto.rules.cspd import Cspd
from bozzetto.rules.pathwise import Pathwise
from bozzetto.rules.reflection import Coupled, PlainSteps, Reflection
from bozzetto.targets.mar import MAR, MARConfig
from bozzetto.targets.mar_target import MARSampler, MARTarget
from path_toys import compare

CONFIG = MARConfig(dim=16, depth=2, heads=2, head_width=16, head_depth=1, token_dim=4, grid=4, classes=3, buffer=2)
SAMPLER = MARSampler(steps=6, passes=8, noisiest=600)  # a random head is no denoiser: later starts keep tokens small
GUIDED, UNGUIDED = LawSettings(guidance=2.0), LawSettings()
N, D = 16, 4


def random_mar(config: MARConfig = CONFIG, moved: float = 0.0) -> MAR:
    """Every weight random: the head is a nonlinear function of state, time and condition. moved: deviation of what is
    added to every weight, for a draft model."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MAR(config).eval().requires_grad_(False)
        for name, value in model.named_parameters():
            if value.ndim == 1 and "norm" not in name:
                torch.nn.init.normal_(value, std=0.3)
            elif value.ndim > 1:
                torch.nn.init.normal_(value, std=1.2 / math.sqrt(value.shape[-1]))
        for value in model.diffloss.net.final_layer.linear.parameters():
            value *= 0.3
        for value in model.parameters():
            value += moved * torch.randn_like(value)
    return model


MODEL = random_mar()
TARGET, DRAFTER = MARTarget(MODEL, SAMPLER), MARTarget(random_mar(moved=0.02), SAMPLER)
LABELS, INDEX = torch.tensor([2, 0, 1]), torch.tensor([5, 0, 9])


def with_passes(passes: int, model: MAR = MODEL) -> MARTarget:
    return MARTarget(model, replace(SAMPLER, passes=passes))


class Spy(MARTarget):
    """Remembers what every backbone pass was given."""

    def __init__(self):
        super().__init__(MODEL, SAMPLER)
        self.seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def features(self, labels: Tensor, tokens: Tensor, known: Tensor, places: Tensor, guided: bool) -> Tensor:
        self.seen.append((tokens.clone(), known, places))
        return super().features(labels, tokens, known, places, guided)


# The schedule.

BIG = MARTarget(
    random_mar(MARConfig(dim=8, depth=1, heads=1, head_width=8, head_depth=1, token_dim=2, classes=2, buffer=1)),
    MARSampler(steps=2),
)


@pytest.mark.parametrize("passes", [1, 2, 3, 7, 32, 64, 100, 255, 256])
def test_counts_are_positive_and_sum_to_the_image(passes):
    counts = BIG.counts(passes)
    assert len(counts) == passes and sum(counts) == 256 and min(counts) >= 1
    assert passes < 256 or counts == [1] * 256


def test_64_passes_follow_the_cosine():
    masked = [256 - sum(BIG.counts(64)[: s + 1]) for s in range(64)]
    assert masked[:3] == [255, 254, 253]  # floor(256 cos) = 255, 255, 255, 254: at least one token each
    assert masked[31] == math.floor(256 * math.cos(math.pi / 4)) == 181
    assert masked[62] == math.floor(256 * math.cos(math.pi / 2 * 63 / 64)) == 6
    assert masked[63] == 0 and max(BIG.counts(64)) == 7


def test_guidance_of_each_step():
    linear = BIG.guidances(3.0, 64)
    assert linear[0] == pytest.approx(1 + 2 * 1 / 256)
    assert linear[31] == pytest.approx(1 + 2 * (256 - 181) / 256)
    assert linear[63] == pytest.approx(1 + 2 * 255 / 256)  # the published loop keeps "one masked" after the last step
    constant = MARTarget(MODEL, replace(SAMPLER, guidance_schedule="constant"))
    assert constant.guidances(3.0, 8) == [3.0] * 8
    assert BIG.guidances(1.0, 4) == [1.0] * 4


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        (MARSampler, "steps", 0),
        (MARSampler, "passes", 0),
        (MARSampler, "noisiest", 1000),
        (MARSampler, "guidance_schedule", "cosine"),
        (SmallerMasked, "length", 0),
        (SmallerMasked, "prefill", 1.5),
        (SmallerMasked, "prefill", -0.1),
    ],
)
def test_settings_name_the_bad_value(kind, field, value):
    with pytest.raises(UsageError, match=f"{field} = {value!r} "):
        kind(**{field: value})


def test_more_passes_than_tokens_are_refused():
    with pytest.raises(UsageError, match=r"passes = 17 .* 1 to 16"):
        with_passes(17)
    with pytest.raises(UsageError, match="passes = 0"):
        TARGET.counts(0)


# One backbone pass.


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("count", [0, 1, 9])
def test_a_pass_equals_the_whole_network_at_the_places(count, guided):
    order = place_order(3, INDEX, N)
    tokens = torch.randn(3, N, D, generator=torch.Generator().manual_seed(0))
    known, places = order[:, :count], order[:, count : count + 4]
    fast = TARGET.features(LABELS, tokens, known, places, guided)
    copies = [LABELS, torch.full_like(LABELS, CONFIG.classes)][: 1 + guided]
    slow = [MODEL.features(labels, tokens, known).gather(1, places[..., None].expand(-1, -1, 16)) for labels in copies]
    torch.testing.assert_close(fast, torch.cat(slow).flatten(0, 1), atol=1e-5, rtol=0)


ODD = MARConfig(dim=64, depth=2, heads=2, head_width=16, head_depth=1, token_dim=5, grid=9, classes=3, buffer=3)


@pytest.mark.parametrize("config", [CONFIG, ODD])
@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
def test_a_pass_of_our_kernels_is_torchs_and_rows_have_the_same_bits_in_any_batch(config, dtype, within):
    model = random_mar(config)
    target = MARTarget(model, SAMPLER, dtype)
    own, order = target.owned(model), place_order(3, INDEX, config.length)
    tokens = torch.randn(3, config.length, config.token_dim, generator=torch.Generator().manual_seed(0))
    for count, guided in ((0, True), (1, False), (9, True)):
        known, places = order[:, :count], order[:, count : count + 4]
        given = (LABELS, tokens, known, places)
        found = own.features(*given, guided)
        torch.testing.assert_close(found, target.features(*given, guided), atol=within, rtol=0)
        assert torch.equal(own.features(*(part[1:2] for part in given), False), found[4:8])


def test_bfloat16_is_near():
    low = MARTarget(MODEL, SAMPLER, torch.bfloat16)
    order, tokens = place_order(3, INDEX, N), torch.zeros(3, N, D)
    features = low.features(LABELS, tokens, order[:, :5], order[:, 5:7], True)
    assert features.dtype == torch.bfloat16
    slow = TARGET.features(LABELS, tokens, order[:, :5], order[:, 5:7], True)
    assert (features.float() - slow).abs().max() < 0.2
    assert MaskedBatch(low, PlainSteps(), GUIDED).run(LABELS, 0, INDEX).tokens.isfinite().all()


# Noise and order.


def test_noise_of_places_is_that_of_the_field():
    field = NormalField(4, INDEX, N, 6, D)
    field.fill(N)
    places = torch.tensor([[3, 15], [0, 7], [7, 7]])
    made = normal_rows(image_keys(4, STREAM_TOKEN, INDEX), places, 6, D)
    torch.testing.assert_close(made, field.rows(places), atol=0, rtol=0)


def test_order_is_a_permutation_of_the_image_alone():
    order = place_order(0, torch.arange(200), N)
    assert (order.sort(1).values == torch.arange(N)).all()
    assert torch.equal(place_order(0, torch.tensor([7]), N)[0], order[7])
    first = torch.bincount(place_order(0, torch.arange(16_000), N)[:, 0], minlength=N)
    assert (first - 1000).abs().max() < 5 * math.sqrt(1000)


# Decoding.


def slow_image(model: MAR, label: int, seed: int, index: int, passes: int, guidance: float) -> Tensor:
    """One image by the definition: the whole network, the head at every step, tables by hand. float32 [N, D]."""
    field = NormalField(seed, torch.tensor([index]), N, 6, D)
    field.fill(N)
    order = place_order(seed, torch.tensor([index]), N)[0].tolist()
    alpha = [math.cos((i / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(1001)]
    products = torch.tensor([1 - min(0.999, 1 - b / a) for a, b in pairwise(alpha)]).double().cumprod(0)
    times = [120 * i for i in range(6)]
    tokens, known, masked = torch.zeros(1, N, D), torch.zeros(1, 0, dtype=torch.int64), N
    for s in range(passes):
        left = max(1, min(masked - 1, math.floor(N * math.cos(math.pi / 2 * (s + 1) / passes))))
        scale = 1 + (guidance - 1) * (N - left) / N
        left = left if s < passes - 1 else 0
        z, void = (model.features(torch.tensor([k]), tokens, known)[0] for k in (label, CONFIG.classes))
        drawn = tokens.clone()
        for place in order[N - masked : N - left]:
            noise = field.table[0, place].view(7, D)
            x = noise[0]
            for k in range(6):
                i = 5 - k
                p, before = products[times[i]], products[times[i - 1]] if i else torch.tensor(1.0).double()
                beta = 1 - p / before
                small = beta * (1 - before) / (1 - p) if i else beta  # the last step adds no noise
                t = torch.tensor([times[i]])
                eps, mix = model.predict(x[None], t, z[None, place])
                other, _ = model.predict(x[None], t, void[None, place])
                eps = other + scale * (eps - other)
                token = (x - (1 - p).sqrt() * eps[0]) / p.sqrt()
                mean = (beta * before.sqrt() * token + (1 - before) * (1 - beta).sqrt() * x) / (1 - p)
                share = (mix[0] + 1) / 2
                std = (0.5 * (share * beta.log() + (1 - share) * small.log())).exp()
                x = (mean + std * noise[k + 1] * (i > 0)).float()
            drawn[0, place] = x
        tokens = drawn
        known, masked = torch.tensor([order[: N - left]]), left
    return tokens[0]


@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize("passes", [16, 5])
def test_plain_equals_the_slow_loop(guidance, passes):
    batch = MaskedBatch(with_passes(passes), PlainSteps(), LawSettings(guidance=guidance))
    fast = batch.run(LABELS[:1], 3, INDEX[:1])
    slow = slow_image(MODEL, int(LABELS[0]), 3, int(INDEX[0]), passes, guidance)
    assert slow.std() > 0.1 and slow.abs().max() < 100
    torch.testing.assert_close(fast.tokens[0], slow, atol=1e-4, rtol=1e-4)
    assert fast.passes.tolist() == [passes] and batch.meter.head_calls == 6 * passes
    assert batch.meter.head_rows == 6 * N * (1 + (guidance != 1))


@dataclass(frozen=True)
class Way:
    """A way to decode."""

    rule: PlainSteps | Coupled | Cspd | Pathwise
    settings: LawSettings = GUIDED
    drafted: bool = False

    def decoder(self, target: MARTarget = TARGET, **window: float) -> MaskedBatch:
        made = SmallerMasked(**{"length": 3, "prefill": 0.25, **window})  # type: ignore[arg-type]
        return MaskedBatch(target, self.rule, self.settings, DRAFTER if self.drafted else None, made)


def known_in(state: DecodeState, index: Tensor = INDEX) -> Tensor:
    """Which places of images of seed 0 are committed, bool [B, N]."""
    return place_order(0, index, state.length).argsort(1) < state.count[:, None]


WAYS = [
    Way(PlainSteps()),
    Way(PlainSteps(), UNGUIDED),
    Way(Coupled(depth=3)),
    Way(Cspd("released"), drafted=True),
    Way(Cspd("paper", inner_temperature=42.0), drafted=True),
    Way(Pathwise(0.3), UNGUIDED, drafted=True),
]


@pytest.mark.parametrize("way", WAYS, ids=lambda w: f"{w.rule.name}-{w.settings.guidance:g}")
def test_an_image_does_not_depend_on_its_batch(way):
    decoder = way.decoder()
    whole = decoder.run(LABELS, 0, INDEX)
    for b in range(3):
        alone = decoder.run(LABELS[b : b + 1], 0, INDEX[b : b + 1])
        # Matrix libraries may sum in another order for another number of rows: equal up to rounding, not to the byte.
        torch.testing.assert_close(alone.tokens[0], whole.tokens[b], atol=1e-4, rtol=1e-4)
        assert alone.passes[0] == whole.passes[b] and alone.accepted[0] == whole.accepted[b]
    assert not torch.equal(decoder.run(LABELS, 1, INDEX).tokens, whole.tokens)


def test_events_tell_what_is_known():
    decoder = Way(PlainSteps()).decoder()
    events = [(state, decoder.meter.passes, decoder.places) for state in decoder.passes(LABELS, 0, INDEX)]
    assert [number for _, number, _ in events] == list(range(1, 9))
    assert [places for *_, places in events] == TARGET.counts(8)
    states = [state for state, *_ in events]
    for state in states:
        assert torch.equal((state.tokens != 0).any(-1), known_in(state))
    assert states[-1].count.tolist() == [N] * 3
    for earlier, later in pairwise(states):
        known = known_in(earlier)
        assert torch.equal(earlier.tokens[known], later.tokens[known])
    assert decoder.meter.total == pytest.approx(sum(decoder.meter.parts.values())) and decoder.meter.parts["target"] > 0


def test_guidance_and_its_schedule_matter():
    def run(target: MARTarget, settings: LawSettings) -> Tensor:
        return MaskedBatch(target, PlainSteps(), settings).run(LABELS, 0, INDEX).tokens

    constant = MARTarget(MODEL, replace(SAMPLER, guidance_schedule="constant"))
    linear, flat, off = run(TARGET, GUIDED), run(constant, GUIDED), run(TARGET, UNGUIDED)
    assert not torch.allclose(linear, off, atol=1e-2) and not torch.allclose(linear, flat, atol=1e-2)


# Speculation inside the head.


FEW = random_mar(replace(CONFIG, grid=2, depth=1, buffer=1))


def first_tokens(rule: PlainSteps | Coupled, index: Tensor, settings: LawSettings) -> Tensor:
    """What the first of 4 passes draws, [B, D]."""
    batch = MaskedBatch(with_passes(4, FEW), rule, settings)
    state = next(batch.passes(torch.full_like(index, 1), 0, index))
    return state.tokens[known_in(state, index)]


@pytest.mark.parametrize("settings", [GUIDED, LawSettings(temperature=0.9)], ids=["guided", "cooler"])
def test_coupled_has_the_law_of_plain(settings):
    """20,000 images of a class each, different images: coordinates, projections and norm of the first token."""
    here, there = torch.arange(20_000), torch.arange(20_000, 40_000)
    one = first_tokens(PlainSteps(), here, settings)
    assert compare(one, first_tokens(Coupled(depth=3), there, settings)).p_value > 1e-3
    warmer = replace(settings, temperature=settings.temperature + 0.2)
    assert compare(one, first_tokens(PlainSteps(), there, warmer)).p_value < 1e-6  # what the test can see


def test_coupled_calls_the_head_less_often():
    target = MARTarget(MODEL, replace(SAMPLER, steps=60))
    batches = [MaskedBatch(target, rule, GUIDED) for rule in (PlainSteps(), Coupled())]
    passes = [batch.run(LABELS, 0, INDEX).passes for batch in batches]
    plain, coupled = (batch.meter for batch in batches)
    assert plain.head_calls == 8 * 60 and coupled.head_calls < 0.9 * plain.head_calls
    assert coupled.head_rows > plain.head_rows
    assert torch.equal(*passes)


# Windows of a draft model.


def test_windows_with_the_target_as_its_own_drafter_are_the_plain_image():
    plain = Way(PlainSteps()).decoder().run(LABELS, 0, INDEX)
    for rule in (Cspd("paper"), Pathwise(1e-3)):
        decoder = MaskedBatch(TARGET, rule, GUIDED, TARGET, SmallerMasked(length=3, prefill=0.25))
        result = decoder.run(LABELS, 0, INDEX)
        torch.testing.assert_close(result.tokens, plain.tokens, atol=1e-3, rtol=1e-3)
        assert torch.equal(result.accepted, result.drafted)
        assert result.passes.tolist() == [8] * 3


def test_pathwise_without_slack_and_full_prefill_are_the_plain_image():
    plain = Way(PlainSteps()).decoder().run(LABELS, 0, INDEX)
    result = Way(Pathwise(0.0), drafted=True).decoder().run(LABELS, 0, INDEX)
    torch.testing.assert_close(result.tokens, plain.tokens, atol=1e-4, rtol=1e-4)
    assert int(result.accepted.sum()) == 0 and (result.farthest == 0).all()
    result = Way(Cspd("paper"), drafted=True).decoder(prefill=1.0).run(LABELS, 0, INDEX)
    assert torch.equal(result.tokens, plain.tokens) and int(result.drafted.sum()) == 0


def test_released_windows_are_always_committed_in_one_pass():
    """Prefill 2 of 8 steps, windows of 4, the last one shorter: passes 1 + 1 + 1 + 1."""
    spy = Spy()
    decoder = Way(Cspd("released"), drafted=True).decoder(spy, length=4, prefill=0.2)
    events = list(decoder.passes(LABELS, 0, INDEX))
    starts = [sum(TARGET.counts(8)[:s]) for s in (0, 1, 2, 6, 8)]
    assert [e.count.tolist() for e in events] == [[n] * 3 for n in starts[1:]]
    assert events[-1].passes.tolist() == [4] * 3 and len(spy.seen) == 4
    assert [known.shape[1] for _, known, _ in spy.seen] == starts[:-1]
    assert [places.shape[1] for *_, places in spy.seen] == [b - a for a, b in pairwise(starts)]
    order = place_order(0, INDEX, N)
    for (tokens, known, places), event in zip(spy.seen[1:], events, strict=False):
        assert (tokens[~known_in(event)] == 0).all()  # none of the drafts
        assert torch.equal(torch.cat([known, places], 1), order[:, : known.shape[1] + places.shape[1]])
    assert (events[-1].drafted == N - starts[2]).all() and (events[-1].accepted <= events[-1].drafted).all()


def test_paper_windows_see_the_drafts_and_end_at_the_first_rejection():
    spy = Spy()
    decoder = Way(Cspd("paper"), drafted=True).decoder(spy, length=3, prefill=0.25)
    events = list(decoder.passes(LABELS[:1], 0, INDEX[:1]))
    counts = TARGET.counts(8)
    starts = [sum(counts[:s]) for s in range(9)]
    seen, step = list(spy.seen), 0
    for event in events:
        window = 1 if step < 2 else min(3, 8 - step)
        passes, seen = seen[:window], seen[window:]
        assert [known.shape[1] for _, known, _ in passes] == starts[step : step + window]
        for tokens, known, _ in passes[1:]:  # drafts of the steps before are there
            assert (tokens.gather(1, known[..., None].expand(-1, -1, D)) != 0).any(-1).all()
        done = starts.index(int(event.count[0])) - step
        assert 1 <= done <= window
        step += done
    assert not seen and step == 8
    assert events[-1].passes.tolist() == [len(spy.seen)]
    assert len(spy.seen) > 8 > len(events) - 1  # these models are far apart: dropped drafts cost passes


def test_context_of_a_window_matters():
    """The second step of a window is the target's own given the drafts before it (paper), or given none (released)."""
    target, label, index = with_passes(2), LABELS[:1], INDEX[:1]
    plain = MaskedBatch(target, PlainSteps(), GUIDED).run(label, 0, index).tokens
    results = {}
    for variant in ("paper", "released"):
        decoder = MaskedBatch(target, Cspd(variant, tries=0), GUIDED, target, SmallerMasked(length=2, prefill=0.0))
        results[variant] = decoder.run(label, 0, index)
    torch.testing.assert_close(results["paper"].tokens, plain, atol=1e-3, rtol=1e-3)
    assert results["paper"].passes.item() == 2 and results["released"].passes.item() == 1
    assert int(results["released"].accepted) < N  # the drafts saw the first half, the target did not


def test_what_does_not_go_together_is_refused():
    small = MARTarget(random_mar(replace(CONFIG, grid=2)), replace(SAMPLER, passes=4))
    cases = [
        (PlainSteps(), LawSettings(temperature=0), None, "temperature > 0"),
        (PlainSteps(), LawSettings(top_k=3), None, "top_k = 0"),
        (Reflection(), UNGUIDED, None, "'reflection' is not allowed"),
        (Chains(), UNGUIDED, DRAFTER, "'chains' is not allowed"),
        (PlainSteps(), UNGUIDED, DRAFTER, "needs no draft model"),
        (Cspd(), UNGUIDED, None, "needs a draft model"),
        (Cspd(), UNGUIDED, small, "grid = 2, the target 4"),
        (Cspd(), UNGUIDED, MARTarget(MODEL, replace(SAMPLER, steps=7)), "steps = 7, the target 6"),
    ]
    for rule, settings, drafter, named in cases:
        with pytest.raises(UsageError, match=named):
            MaskedBatch(TARGET, rule, settings, drafter)


def test_a_compiled_head_draws_the_images_of_the_eager_one(tiny_mar: Path) -> None:
    pipe = load(tiny_mar)
    for rule in ("plain", "coupled"):
        eager, compiled = (
            pipe.generate(count=2, batch=2, drafter="none", rule=rule, compile=mode) for mode in ("off", "max")
        )
        assert [len(i.trace.committed) for i in eager.images] == [len(i.trace.committed) for i in compiled.images]
        for a, b in zip(eager.images, compiled.images, strict=True):
            assert torch.allclose(a.tokens, b.tokens, atol=1e-3)


def test_passes_of_a_masked_model_are_not_called_deterministic(tiny_mar: Path) -> None:
    with pytest.raises(UsageError, match="deterministic is not allowed here: tiny-mar is masked"):
        load(tiny_mar).generate(count=1, compile="max", deterministic=True)
