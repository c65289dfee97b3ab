"""The cached flow decoder against the whole-sequence network, decoding against a slow loop, model folders."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bozzetto.checkpoints.folders import load_target, read_config, write_model
from bozzetto.decoding.loop import EagerBatch
from bozzetto.decoding.state import DecodeState
from bozzetto.drafters.base import Drafter
from bozzetto.errors import UsageError
from bozzetto.laws.categorical import LawSettings
from bozzetto.laws.noise import NormalField
from bozzetto.rules.reflection import PlainSteps
from bozzetto.targets.flow import FlowConfig, FlowModel
from bozzetto.targets.flow_cache import FlowSampler, FlowTarget

CONFIG = FlowConfig(16, 2, 2, token_dim=3, grid=4, classes=3, head_width=16, head_depth=2, ffn_multiple=8)
N, D, NONE = CONFIG.length, CONFIG.token_dim, CONFIG.classes
SAMPLER = FlowSampler(steps=4, last_std=0.1, shift=1.5)
LABELS, INDEX = torch.tensor([2, 0]), torch.tensor([5, 9])


def notes_of(folder: Path) -> dict[str, Any]:
    """Everything in config.json besides family and config."""
    return {k: v for k, v in read_config(folder).items() if k not in ("family", "config")}


def random_flow(config: FlowConfig = CONFIG, seed: int = 0) -> FlowModel:
    """Weights large enough for every part to matter."""
    model, generator = FlowModel(config), torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if "norm" in name or name.endswith("in_ln.weight"):
            weight.data = 1 + 0.2 * noise
        elif weight.ndim > 1 and "positions" not in name and "cls_embedding" not in name:
            weight.data = noise / math.sqrt(weight.shape[1])
        else:
            weight.data = 0.3 * noise
    return model.eval().requires_grad_(False)


MODEL = random_flow()
TARGET = FlowTarget(MODEL, SAMPLER)
TOKENS = torch.randn(2, N, D, generator=torch.Generator().manual_seed(1))


def whole(guided: bool, labels: Tensor = LABELS, tokens: Tensor = TOKENS) -> Tensor:
    """Conditions of all N tokens by the whole network: [B, N, dim], or [2 B, N, dim] under guidance."""
    if guided:
        labels, tokens = torch.cat([labels, torch.full_like(labels, NONE)]), torch.cat([tokens, tokens])
    return MODEL.features(labels, tokens[:, :-1])


def inputs_at(start: Tensor, width: int, tokens: Tensor = TOKENS) -> Tensor:
    """What a pass of that width is given: input i carries token i - 1; numbers beyond the image do not matter."""
    place = start[:, None] - 1 + torch.arange(width)
    found = tokens[torch.arange(len(start))[:, None], place.clamp(0, N - 1)]
    return found.masked_fill(((place < 0) | (place >= N))[..., None], 7.0)


def check_pass(found: Tensor, wanted: Tensor, start: Tensor) -> None:
    """Features [R, W, d] of a pass against the whole network's, where the pass is inside the image."""
    for row, (features, truth) in enumerate(zip(found, wanted, strict=True)):
        first = int(start[row % len(start)])
        count = min(found.shape[1], N - first)
        torch.testing.assert_close(features[:count], truth[first : first + count], atol=1e-5, rtol=1e-5)


# The cache.


@pytest.mark.parametrize("width", [1, 3, N])
@pytest.mark.parametrize("guided", [False, True])
def test_passes_of_any_width_equal_the_whole_network(guided: bool, width: int) -> None:
    wanted, session = whole(guided), TARGET.begin(LABELS, guided, width)
    for first in range(0, N, width):
        start = torch.full((2,), first)
        scores = session.score(inputs_at(start, width), start, first)
        assert scores.logits is None and scores.features is not None
        assert scores.features.shape == (4 if guided else 2, width, CONFIG.dim)
        check_pass(scores.features, wanted, start)


@pytest.mark.parametrize("guided", [False, True])
def test_ragged_passes_equal_the_whole_network_and_rejected_drafts_leave_no_trace(guided: bool) -> None:
    wanted, session = whole(guided), TARGET.begin(LABELS, guided, 3)
    generator, start, steps = torch.Generator().manual_seed(2), torch.zeros(2, dtype=torch.int64), 0
    while int(start.min()) < N:
        kept = torch.randint(1, 4, (2,), generator=generator)
        inputs = inputs_at(start, 3)
        wrong = torch.arange(3) >= kept[:, None]
        inputs[wrong] = 9 * torch.randn(int(wrong.sum()), D, generator=generator)
        scores = session.score(inputs, start, int(start.max()) if steps % 2 else None)
        assert scores.features is not None
        for row, features in enumerate(scores.features):
            check_pass(features[None, : int(kept[row % 2])], wanted[row : row + 1], start[row % 2, None])
        start, steps = (start + kept).clamp_max(N), steps + 1
    assert steps < N


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("guided", [False, True])
def test_images_that_are_kept_go_on_as_before(guided: bool, begun: bool) -> None:
    wanted, session, start = whole(guided), TARGET.begin(LABELS, guided, 3), torch.tensor([0, 0])
    if begun:
        session.score(inputs_at(start, 3), start)
    session.keep(torch.tensor([1]))
    start = torch.tensor([3 if begun else 0])
    scores = session.score(inputs_at(start, 3, TOKENS[1:]), start)
    assert scores.features is not None and len(scores.features) == (2 if guided else 1)
    check_pass(scores.features, wanted[1::2], start)


def test_class_position_and_every_token_before_matter() -> None:
    plain = whole(False)
    assert float((whole(False, torch.tensor([1, 1])) - plain).abs().amax(2).min()) > 1e-3
    for n in range(N - 1):
        changed = TOKENS.clone()
        changed[:, n] += 1
        apart = (whole(False, tokens=changed) - plain).abs().amax((0, 2))
        assert not bool(apart[: n + 1].any()) and float(apart[n + 1 :].min()) > 1e-4
    bare = random_flow()
    bare.positions.zero_()
    assert float((bare.features(LABELS, TOKENS[:, :-1]) - plain).abs().amax((0, 2)).min()) > 1e-3


@pytest.mark.parametrize("guided", [False, True])
def test_bfloat16_features_are_near(guided: bool) -> None:
    session = FlowTarget(MODEL, SAMPLER, torch.bfloat16).begin(LABELS, guided, N)
    features = session.score(inputs_at(torch.tensor([0, 0]), N), torch.tensor([0, 0])).features
    assert features is not None and features.dtype == torch.bfloat16
    wanted = whole(guided)
    assert float((features.float() - wanted).norm() / wanted.norm()) < 0.03


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_laws_of_scored_places_are_those_of_the_head(guidance: float) -> None:
    """Places are numbered b W + w; times are told on the scale of training."""
    features = whole(guidance != 1)[:, 4:7]
    law, schedule = TARGET.law(features, guidance, 0.8), SAMPLER.schedule
    assert (law.steps, law.dim, law.shape) == (4, D, (2, 3))
    x, step = torch.randn(6, D, generator=torch.Generator().manual_seed(3)), 2
    kernel, time = law.all_places(x, step), schedule.time[step].float().expand(6)
    velocity = MODEL.velocity(x, time, features[:2].flatten(0, 1))
    if guidance != 1:
        without = MODEL.velocity(x, time, features[2:].flatten(0, 1))
        velocity = without + guidance * (velocity - without)
    mean = schedule.of_state[step].float() * x + schedule.of_velocity[step].float() * velocity
    torch.testing.assert_close(kernel.mean, mean, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(kernel.std, torch.full((6, 1), 0.8 * float(schedule.std[step])))


# Sequential decoding.


def slow_loop(guidance: float, temperature: float, seed: int) -> Tensor:
    """One image, token and step at a time: features, velocity, schedule, noise."""
    schedule, images = SAMPLER.schedule, []
    field = NormalField(seed, INDEX, N, schedule.steps, D)
    field.fill(N)
    noise = field.rows(torch.arange(N).expand(2, -1))
    for label, image in zip(LABELS, noise, strict=True):
        tokens = torch.zeros(1, 0, D)
        for n in range(N):
            cond, uncond = (MODEL.features(torch.tensor([c]), tokens)[:, -1] for c in (int(label), NONE))
            x = image[n, :1]
            for k, time in enumerate(schedule.time.float()):
                v = MODEL.velocity(x, time[None], cond)
                if guidance != 1:
                    v = guidance * v + (1 - guidance) * MODEL.velocity(x, time[None], uncond)
                mean = float(schedule.of_state[k]) * x + float(schedule.of_velocity[k]) * v
                x = mean + temperature * float(schedule.std[k]) * image[n, k + 1]
            tokens = torch.cat([tokens, x[:, None]], 1)
        images.append(tokens[0])
    return torch.stack(images)


def batch_of(guidance: float = 1.0, temperature: float = 1.0) -> EagerBatch:
    return EagerBatch(TARGET, Drafter(D), PlainSteps(), LawSettings(guidance=guidance, temperature=temperature))


def decoded(guidance: float = 1.0, temperature: float = 1.0, seed: int = 7) -> DecodeState:
    return batch_of(guidance, temperature).run(LABELS, seed, INDEX)


@pytest.mark.parametrize(("guidance", "temperature"), [(1.0, 1.0), (2.0, 1.0), (1.5, 0.8)])
def test_sequential_decoding_equals_the_slow_loop(guidance: float, temperature: float) -> None:
    batch = batch_of(guidance, temperature)
    result, wanted = batch.run(LABELS, 7, INDEX), slow_loop(guidance, temperature, 7)
    assert 0.3 < float(wanted.std()) < 30
    torch.testing.assert_close(result.tokens, wanted, atol=5e-4 * float(wanted.abs().max()), rtol=0)
    assert result.passes.tolist() == [N, N] and not bool(result.drafted.any())
    copies = 1 if guidance == 1 else 2
    assert (batch.meter.head_calls, batch.meter.head_rows) == (4 * N, 4 * N * 2 * copies)


def test_seed_guidance_and_temperature_matter() -> None:
    plain = decoded().tokens
    for other in (decoded(seed=8), decoded(2.0), decoded(temperature=0.8)):
        assert float((other.tokens - plain).abs().amax((1, 2)).min()) > 0.05


# Folders.


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_model(tmp_path, "flow", CONFIG, MODEL.state_dict(), {"name": "toy"})
    return tmp_path


def test_a_written_flow_model_comes_back_rounded_to_float16(folder: Path) -> None:
    found = load_target(folder, "flow", "mar")
    assert isinstance(found, FlowModel) and found.config == CONFIG and notes_of(folder) == {"name": "toy"}
    assert not found.training and not any(part.requires_grad for part in found.parameters())
    state = found.state_dict()
    assert state.keys() == MODEL.state_dict().keys()
    for name, value in MODEL.state_dict().items():
        assert torch.equal(state[name], value.half().float()), name
    assert not any(part.is_meta for part in [*found.parameters(), *found.buffers()])


def test_a_model_that_was_read_decodes_like_the_one_that_was_written(folder: Path) -> None:
    found = load_target(folder, "flow", "mar")
    assert isinstance(found, FlowModel)
    wanted = whole(True)
    torch.testing.assert_close(
        found.features(torch.cat([LABELS, torch.full_like(LABELS, NONE)]), TOKENS[:, :-1].repeat(2, 1, 1)),
        wanted,
        atol=0.01 * float(wanted.abs().max()),
        rtol=0,
    )
    session = FlowTarget(found, SAMPLER).begin(LABELS, False, N)
    features = session.score(inputs_at(torch.tensor([0, 0]), N), torch.tensor([0, 0])).features
    torch.testing.assert_close(features, found.features(LABELS, TOKENS[:, :-1]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["missing key", "unexpected key", "shape", "non-finite"])
@pytest.mark.parametrize("key", ["token_embedding.weight", "head.res_blocks.1.mlp.0.bias"])
def test_weights_that_do_not_fit_are_refused_by_key(folder: Path, key: str, kind: str) -> None:
    path = folder / "model.safetensors"
    state = load_file(path)
    if kind == "missing key":
        del state[key]
    elif kind == "unexpected key":
        key = f"more.{key}"
        state[key] = torch.ones(3)
    elif kind == "shape":
        state[key] = state[key][1:].contiguous()
    else:
        state[key].view(-1)[1] = torch.nan
    save_file(state, path)
    with pytest.raises(UsageError, match=kind) as caught:
        load_target(folder, "flow", "mar")
    assert f"'{key}'" in str(caught.value)


def test_a_weight_that_is_not_finite_is_not_written(tmp_path: Path) -> None:
    state = MODEL.state_dict() | {"positions": torch.full((N, CONFIG.dim), 1e6)}
    with pytest.raises(UsageError, match="'positions'"):
        write_model(tmp_path, "flow", CONFIG, state, {})
    assert not list(tmp_path.iterdir())


def test_an_unknown_family_is_refused_with_its_name(tmp_path: Path) -> None:
    write_model(tmp_path, "unicorn", CONFIG, MODEL.state_dict(), {})
    with pytest.raises(UsageError, match=r"'unicorn' .*'flow', 'mar'"):
        load_target(tmp_path, "flow", "mar")
