"""Drift variants: entropy and prior, the cached decoder against the whole network, the law, folders, training."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bozzetto import load
from bozzetto.checkpoints.folders import CONFIG, load_drift, load_target, save_drafter, save_drift, write_model
from bozzetto.checkpoints.weights import WEIGHTS
from bozzetto.drafters.base import Observation
from bozzetto.drafters.gaussian import gaussian_config
from bozzetto.drafts import Layout, Verdict
from bozzetto.errors import UsageError
from bozzetto.laws.noise import NormalField
from bozzetto.targets.drift import DriftConfig, DriftModel, DriftTarget, guided_features, one_step
from bozzetto.targets.layers import attention_entropy
from bozzetto.train.drift import anti_symmetric_force, drift_force, energy_distance, teacher_tokens
from test_flow_model import CONFIG as FLOW
from test_flow_model import INDEX, LABELS, TOKENS, N, inputs_at, random_flow
from test_path_sketch import random_sketch

SETTINGS = DriftConfig(width=16, depth=2, tuned=1)


def random_drift(config: DriftConfig = SETTINGS) -> DriftModel:
    model, generator = DriftModel(random_flow(), config), torch.Generator().manual_seed(3)
    for name, weight in model.named_parameters():
        if not name.startswith("flow."):
            weight.data = 0.4 * torch.randn(weight.shape, generator=generator)
    return model.eval().requires_grad_(False)


MODEL = random_drift()
TARGET = DriftTarget(MODEL)


# Entropy and prior.


def test_entropy_is_that_of_the_mean_attention_over_its_largest() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 3, 5, 4, generator=generator) for _ in range(2))
    found = attention_entropy(q, k, torch.ones(5, 5, dtype=torch.bool).tril()[None])
    for row in range(2):
        for at in range(5):
            shares = torch.stack([(q[row, h, at] @ k[row, h, : at + 1].T / 2).softmax(0) for h in range(3)]).mean(0)
            wanted = -(shares * shares.log()).sum() / math.log(at + 1) if at else 0.0
            assert float(found[row, at]) == pytest.approx(float(wanted), abs=1e-6)


def test_even_attention_has_entropy_1_and_a_single_key_0() -> None:
    seen = torch.tensor([[[True, False, False], [True, True, True]]])
    found = attention_entropy(torch.zeros(1, 2, 2, 4), torch.randn(1, 2, 3, 4), seen)
    torch.testing.assert_close(found, torch.tensor([[0.0, 1.0]]))


def test_the_spread_rises_from_0_to_its_largest() -> None:
    spread = DriftConfig(largest=0.5, heat=2.0).spread(torch.linspace(0, 1, 9))
    assert float(spread[0]) == 0 and float(spread[-1]) == pytest.approx(0.5)
    assert bool((spread.diff() > 0).all())
    assert float(spread[4]) == pytest.approx(0.5 * (math.exp(0.25) - 1) / (math.exp(0.5) - 1))


@pytest.mark.parametrize("wrong", [{"tuned": -1}, {"width": 0}, {"heat": 0.0}, {"largest": math.inf}])
def test_settings_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=f"{next(iter(wrong))} = .* is not allowed"):
        DriftConfig(**wrong)  # type: ignore[arg-type]


# The cached decoder.


def whole(guided: bool) -> tuple[Tensor, Tensor]:
    labels, tokens = LABELS, TOKENS
    if guided:
        labels, tokens = torch.cat([labels, torch.full_like(labels, FLOW.classes)]), torch.cat([tokens, tokens])
    return MODEL.features(labels, tokens[:, :-1])


@pytest.mark.parametrize("width", [1, 3, N])
@pytest.mark.parametrize("guided", [False, True])
def test_passes_give_features_and_entropies_of_the_whole_network(guided: bool, width: int) -> None:
    features, entropy = whole(guided)
    session = TARGET.begin(LABELS, guided, width)
    for first in range(0, N, width):
        found = session.score(inputs_at(torch.full((2,), first), width), torch.full((2,), first), first).features
        assert found is not None
        count = min(width, N - first)
        torch.testing.assert_close(found[:, :count, :-1], features[:, first : first + count], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found[:, :count, -1], entropy[:, first : first + count], atol=1e-5, rtol=1e-5)


def test_compiled_passes_give_the_same() -> None:
    compiled = TARGET.owned(MODEL.flow)
    sessions = [target.begin(LABELS, True, 4) for target in (TARGET, compiled)]
    for first in (0, 4):
        given = (inputs_at(torch.full((2,), first), 4), torch.full((2,), first), first)
        one, two = (session.score(*given).features for session in sessions)
        assert one is not None and two is not None
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)
    laws = [target.law(one, 2.0, 1.0) for target in (TARGET, compiled)]
    noise = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(*(law.all_places(noise, 0).mean for law in laws), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_the_law_is_the_whole_networks_map_from_noise_to_token(guidance: float) -> None:
    features, entropy = whole(guidance != 1)
    noise = torch.randn(2, N, 1, 3, generator=torch.Generator().manual_seed(4))
    hidden = guided_features(features, guidance) if guidance != 1 else features
    wanted = MODEL.decode(hidden, entropy[:2], noise)[:, :, 0].flatten(0, 1)
    law = TARGET.law(torch.cat([features, entropy[..., None]], -1), guidance, 1.0)
    found = law.all_places(noise.flatten(0, 2), 0)
    torch.testing.assert_close(found.mean, wanted, atol=1e-5, rtol=1e-5)
    assert bool((found.std == 0).all()) and law.calls == 1 and law.rows == 2 * N
    some = torch.tensor([3, N + 1])
    torch.testing.assert_close(law.kernel(noise.flatten(0, 2)[some], some * 0, some).mean, wanted[some])


def test_without_temperature_every_noise_gives_the_centre_s_token() -> None:
    features, entropy = whole(False)
    law = TARGET.law(torch.cat([features, entropy[..., None]], -1), 1.0, 0.0)
    one, two = (law.all_places(torch.full((2 * N, 3), value), 0).mean for value in (-1.0, 2.0))
    torch.testing.assert_close(one, two)


# Drifting.


def test_forces_cancel_where_both_laws_are_the_same() -> None:
    generator = torch.Generator().manual_seed(0)
    made, same, other = (torch.randn(1, 600, 2, generator=generator) for _ in range(3))
    still, moved = (anti_symmetric_force(made, real, 0.2).norm(dim=-1).mean() for real in (same, other + 1.5))
    assert float(still) < 0.15 * float(moved)


def test_forces_pull_generated_samples_to_the_real_ones() -> None:
    generator = torch.Generator().manual_seed(1)
    made, real = torch.randn(3, 16, 4, generator=generator), torch.randn(3, 24, 4, generator=generator) * 0.3 + 2
    before = energy_distance(made, real)
    for _ in range(200):
        made = made + 0.05 * drift_force(made, real, (0.02, 0.05, 0.2))
    assert float(energy_distance(made, real)) < 0.05 * float(before)


def test_the_teacher_draws_from_its_own_sampler() -> None:
    """Against the law that decoding uses, at the same noise, place by place."""
    from bozzetto.laws.chain import sample_trajectory
    from bozzetto.targets.flow_cache import FlowSampler, FlowTarget

    flow, sampler = random_flow(), FlowSampler(steps=4)
    target = FlowTarget(flow, sampler)
    features = torch.randn(4, 1, FLOW.dim, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(5, 2, 6, 3, generator=torch.Generator().manual_seed(1))
    found = teacher_tokens(target.head, sampler.schedule, features.flatten(0, 1), torch.tensor([2.0, 2.0]), noise)
    for sample in range(6):
        law = target.law(features, 2.0, 1.0)
        wanted = sample_trajectory(law, None, noise[:, :, sample].transpose(0, 1)).token
        torch.testing.assert_close(found[:, sample], wanted, atol=1e-5, rtol=1e-5)


# Decoding and folders.


def drift_folder(base: Path, at: Path) -> Path:
    at.mkdir()
    save_drift(at, MODEL, str(base), base, {"name": "tiny-drift"})
    return at


@pytest.fixture(scope="module")
def folder(tiny_flow: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = load(tiny_flow)
    at = tmp_path_factory.mktemp("drift") / "model"
    at.mkdir()
    model = DriftModel(load_target(base.folder, "flow", "mar"), DriftConfig(width=16, depth=1))
    torch.nn.init.normal_(model.decoder.final_layer.linear.weight, std=0.3)
    save_drift(at, model, str(tiny_flow), tiny_flow, {"name": "tiny-drift"})
    return at


def test_a_vanishing_epsilon_gives_the_sequential_picture(folder: Path) -> None:
    pipe = load(folder)
    slow = pipe.generate(count=4, seed=3, drafter="none", guidance=2.0)
    fast = pipe.generate(count=4, seed=3, drafter="jacobi", rule="pathwise:epsilon=1e-5", guidance=2.0, batch=4)
    for one, two in zip(slow.images, fast.images, strict=True):
        torch.testing.assert_close(one.tokens, two.tokens, atol=1e-3, rtol=1e-3)
    assert pipe.name == "tiny-drift"
    loose = pipe.generate(count=4, seed=3, drafter="jacobi", rule="pathwise:epsilon=2", guidance=2.0)
    assert loose.tokens_per_pass > 1


def test_samples_are_told_apart_by_the_weights_of_the_variant_and_of_its_base(folder: Path, tiny_flow: Path) -> None:
    assert load(folder).fingerprint() not in ("unknown", load(tiny_flow).fingerprint())


def test_one_call_of_the_decoder_draws_a_token(folder: Path) -> None:
    result = load(folder).generate(count=2, seed=0, drafter="none", batch=2)
    assert result.head_calls == result.images[0].target_passes


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"steps": 4}, "steps = 4 is not allowed here: tiny-drift draws a token in one step"),
        ({"drafter": "none", "rule": "reflection"}, "maps noise to a token and has no density"),
        ({"drafter": "jacobi", "rule": "chains"}, "maps noise to a token and has no density"),
        ({"drafter": "sketch", "rule": "cspd"}, "maps noise to a token and has no density"),
    ],
)
def test_what_needs_a_density_is_refused(folder: Path, options: dict, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        load(folder).generate(count=1, **options)


def test_a_folder_holds_what_is_the_variants_own(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    write_model(base, "flow", FLOW, random_flow().state_dict(), {})
    at = drift_folder(base, tmp_path / "drift")
    read = load_drift(at, base)
    for name, value in MODEL.own_state().items():  # rounded to int8 rows
        torch.testing.assert_close(read.state_dict()[name], value, atol=0.02 * float(value.abs().max()), rtol=0)
    assert {name.partition(".")[0] for name in MODEL.own_state()} == {"centre", "decoder", "flow"}


def test_another_base_and_missing_weights_are_named(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    write_model(base, "flow", FLOW, random_flow().state_dict(), {})
    at = drift_folder(base, tmp_path / "drift")
    other = tmp_path / "other"
    other.mkdir()
    write_model(other, "flow", FLOW, random_flow(seed=9).state_dict(), {})
    with pytest.raises(UsageError, match="made from other weights of"):
        load_drift(at, other)
    content = json.loads((at / CONFIG).read_text())
    (at / CONFIG).write_text(json.dumps({**content, "config": {**content["config"], "tuned": 2}}))
    with pytest.raises(UsageError, match=rf"{WEIGHTS}: .*missing key .flow.layers.0"):
        load_drift(at, base)


def test_the_schedule_is_one_step_that_says_nothing_before() -> None:
    ancestry = one_step().ancestry(torch.device("cpu"))
    assert one_step().steps == 1 and float(ancestry.signal[0]) == 0 and float(ancestry.of_token[0]) == 1
    assert NormalField(0, INDEX, N, 1, 3) is not None


# The draft model.


@pytest.fixture(scope="module")
def drafted(tiny_flow: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A variant whose base model has a random drafter; its body is the base's own."""
    base = Path(shutil.copytree(tiny_flow, tmp_path_factory.mktemp("base") / "flow"))
    pipe = load(base)
    net = random_sketch(gaussian_config(pipe.target.whole))
    save_drafter(base / "sketch", net, base, {"target_name": "tiny"}, compact=True)
    at = tmp_path_factory.mktemp("drafted") / "model"
    at.mkdir()
    model = DriftModel(load_target(pipe.folder, "flow", "mar"), DriftConfig(width=16, depth=1))
    torch.nn.init.normal_(model.decoder.final_layer.linear.weight, std=0.02)
    torch.nn.init.normal_(model.centre.weight, std=0.02)  # noise says most, so that drafts are right now and then
    save_drift(at, model, str(base), base, {"name": "tiny-drift"})
    return at


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("drafter", ["sketch:length=4", "sketch:length=4:stop=0.3"])
def test_drafts_that_are_checked_closely_give_the_sequential_picture(
    drafted: Path, drafter: str, guidance: float
) -> None:
    pipe = load(drafted)
    slow = pipe.generate(count=3, seed=3, drafter="none", guidance=guidance)
    fast = pipe.generate(count=3, seed=3, drafter=drafter, rule="pathwise:epsilon=1e-5", guidance=guidance, batch=3)
    for one, two in zip(slow.images, fast.images, strict=True):
        torch.testing.assert_close(one.tokens, two.tokens, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("stop", [0.0, 0.3])
def test_a_drafted_picture_is_the_same_in_any_batch_and_drafts_are_kept(drafted: Path, stop: float) -> None:
    pipe = load(drafted)
    options = {"seed": 5, "drafter": f"sketch:length=4:stop={stop}", "rule": "pathwise:epsilon=1.5", "guidance": 2.0}
    whole = pipe.generate(count=4, batch=4, **options).images
    assert sum(image.accepted for image in whole) > 0
    for image in pipe.generate(indices=[3, 1], batch=1, **options).images:
        torch.testing.assert_close(image.tokens, whole[image.index].tokens, atol=2e-3, rtol=0)
        assert image.target_passes == whole[image.index].target_passes


def test_a_stop_drafts_less_and_numbers_left_over_are_never_kept(drafted: Path) -> None:
    pipe = load(drafted)
    options = {"seed": 5, "count": 4, "batch": 4, "rule": "pathwise:epsilon=0.2"}
    whole = pipe.generate(drafter="sketch:length=6", **options)
    short = pipe.generate(drafter="sketch:length=6:stop=0.5", **options)
    assert short.head_rows < whole.head_rows
    assert max(float(image.tokens.abs().max()) for image in short.images) < 100


@torch.no_grad()
def test_the_draft_model_measures_its_own_attention_and_takes_over_the_targets_entropy(drafted: Path) -> None:
    pipe = load(drafted)
    sketcher = pipe.resources.trained("sketch", "")
    sketcher.begin(torch.tensor([0, 1]), True, 4)
    features = torch.randn(4, 3, pipe.target.whole.dim + 1)
    count = torch.tensor([3, 2])
    tokens = torch.randn(2, 3, pipe.target.token_dim)
    sketcher.take_in(Observation(None, Verdict(tokens, count - 1), count, 3, count * 0, features))
    torch.testing.assert_close(sketcher.measured[:, 0], features[[0, 1, 2, 3], [2, 1, 2, 1], -1])
    assert sketcher.entropy.shape == (4, 1) and bool(((sketcher.entropy >= 0) & (sketcher.entropy <= 1)).all())
    at = torch.zeros(1, 1, dtype=torch.int64)
    sketcher.put_out(tokens[:, :1], at, Layout(at, at, torch.ones(1, 1, 1, dtype=torch.bool)))
    assert sketcher.entropy.shape == (4, 1)


def test_a_stop_is_refused_where_drafts_have_to_be_whole(drafted: Path, tiny_flow: Path) -> None:
    with pytest.raises(UsageError, match=r"verifies drafts of one length: stop = 0.2 is not allowed"):
        load(tiny_flow).generate(count=1, drafter="sketch:stop=0.2", rule="joint")
    with pytest.raises(UsageError, match="stop = 1 is not allowed"):
        load(drafted).generate(count=1, drafter="sketch:stop=1", rule="pathwise")
