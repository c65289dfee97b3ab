"""Training of continuous targets: resuming is exact, the loss falls, and what is written can be drawn from."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

import bozzetto
from bozzetto import UsageError
from bozzetto.laws.schedules import noised_tables
from bozzetto.targets.flow import FlowConfig, FlowModel
from bozzetto.targets.mar import MAR, MARConfig
from bozzetto.train.continuous import LatentFit, flow_loss, mar_loss
from bozzetto.train.families import read_recipe, train
from bozzetto.train.recipes import DataSource, FlowRecipe, MARRecipe

pytestmark = pytest.mark.usefixtures("small_sheets")
SHARED = {
    "image_size": 32, "views": 2, "heads": 2, "head_width": 16, "head_depth": 1, "batch": 4, "warmup": 2,
    "evaluate_every": 2, "steps": 4, "lr": 1e-3,
}  # fmt: skip


def recipe(kind: type, out: Path, pictures: Path, tiny_weights: Path, **changes: object):  # type: ignore[no-untyped-def]
    data = DataSource(str(pictures))
    shape = (
        {"family": "flow", "dim": 16, "layers": 1} if kind is FlowRecipe else {"family": "mar", "dim": 16, "depth": 1}
    )
    fields = {"out": str(out), "tiny": str(tiny_weights), "train": data, "test": data, "name": "toy"}
    return kind(**{**fields, **SHARED, **shape, **changes})


@pytest.mark.parametrize("kind", [FlowRecipe, MARRecipe])
def test_an_interrupted_run_ends_where_an_uninterrupted_one_does(
    kind: type, tmp_path: Path, pictures: Path, tiny_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = train(recipe(kind, tmp_path / "straight", pictures, tiny_weights))
    stopped = recipe(kind, tmp_path / "stopped", pictures, tiny_weights)
    original, calls = LatentFit.train_step, []

    def step(self):  # type: ignore[no-untyped-def]
        calls.append(1)
        if len(calls) > 3:
            raise KeyboardInterrupt
        return original(self)

    monkeypatch.setattr(LatentFit, "train_step", step)
    with pytest.raises(KeyboardInterrupt):
        train(stopped)
    monkeypatch.undo()
    resumed = train(stopped)
    assert (resumed / "model.safetensors").read_bytes() == (straight / "model.safetensors").read_bytes()
    image = bozzetto.load(resumed).generate(["red"], seed=1, steps=3).images[0]
    assert image.tokens.shape == (16, 32) and image.image.size == (32, 32)
    assert (tmp_path / "stopped" / "samples.png").is_file()


@pytest.mark.parametrize("kind", [FlowRecipe, MARRecipe])
def test_the_held_out_loss_falls(kind: type, tmp_path: Path, pictures: Path, tiny_weights: Path) -> None:
    changes = {"steps": 40, "evaluate_every": 20, "lr": 3e-3}
    train(recipe(kind, tmp_path / "run", pictures, tiny_weights, **changes))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["best"] < lines[0]["held_out"] + 1e-9
    assert lines[-1]["best"] < (2.0 if kind is FlowRecipe else 1.4)


def test_the_flow_loss_is_that_of_the_velocity_written_out() -> None:
    torch.manual_seed(0)
    model = FlowModel(FlowConfig(16, 1, 2, token_dim=3, grid=2, classes=2, head_width=8, head_depth=1, ffn_multiple=8))
    for weight in model.parameters():
        weight.data.normal_(std=0.3)
    model.eval()
    labels, tokens, context = torch.tensor([0, 2]), torch.randn(2, 4, 3), torch.randn(2, 4, 3)
    times, noise = torch.rand(2, 2, 4), torch.randn(2, 2, 4, 3)
    z, total = model.features(labels, context[:, :-1]), 0.0
    for k in range(2):
        for b in range(2):
            for n in range(4):
                t = times[k, b, n]
                x = t * tokens[b, n] + (1 - t) * noise[k, b, n]
                v = model.velocity(x[None], t[None], z[b, n][None])[0].detach()
                total += float((v - (tokens[b, n] - noise[k, b, n])).square().mean()) / 16
    found = flow_loss(model, labels, tokens, context, times, noise)
    assert float(found.detach()) == pytest.approx(total, rel=1e-4)


def test_the_bound_trains_the_variance_only_and_is_least_at_the_true_one() -> None:
    torch.manual_seed(0)
    model = MAR(MARConfig(16, 1, 2, 8, 1, token_dim=3, grid=2, classes=2, buffer=2))
    labels, tokens = torch.tensor([0, 1]), torch.randn(2, 4, 3)
    order, times = torch.stack([torch.randperm(4) for _ in range(2)]), torch.randint(1, 1000, (1, 2, 3))
    noise = torch.randn(1, 2, 3, 3)

    def loss(mix: float, error: float) -> float:
        """Of a head that predicts the true noise plus `error`, and this mix of the bounds."""
        model.predict = lambda x, t, z: (noise.flatten(0, 2) + error, torch.full((6, 3), mix))  # type: ignore[method-assign]
        return float(mar_loss(model, labels, tokens, order, 1, times, noise))

    assert loss(-1.0, 0.0) == pytest.approx(0.0, abs=1e-5)  # the posterior's own variance
    assert loss(1.0, 0.0) > 0
    assert loss(-1.0, 0.1) > 0.01
    predicted = torch.zeros(6, 3, requires_grad=True)
    model.predict = lambda x, t, z: (predicted, torch.zeros(6, 3))  # type: ignore[method-assign]
    mar_loss(model, labels, tokens, order, 1, times, noise).backward()
    assert predicted.grad is not None
    expected = 2 * (predicted.detach() - noise.flatten(0, 2)) / predicted.numel()
    torch.testing.assert_close(predicted.grad, expected)


def test_the_tables_of_noising_keep_the_variance() -> None:
    signal, noise, _, low, high = noised_tables()
    torch.testing.assert_close(signal.square() + noise.square(), torch.ones(1000))
    assert bool((low <= high + 1e-6).all())


def test_a_recipes_family_decides_what_is_trained(tmp_path: Path, pictures: Path, tiny_weights: Path) -> None:
    made = recipe(FlowRecipe, tmp_path / "run", pictures, tiny_weights)
    content = {k: v for k, v in vars(made).items() if k not in ("train", "test")}
    content |= {"train": {"path": str(pictures)}, "test": {"path": str(pictures)}}
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(content))
    assert read_recipe(path, "target") == replace(made)
    path.write_text(yaml.safe_dump({**content, "family": "rnn"}))
    with pytest.raises(UsageError, match="family = 'rnn' is not allowed: caption, flow, mar"):
        read_recipe(path, "target")
    path.write_text(yaml.safe_dump({**content, "depth": 3}))
    with pytest.raises(UsageError, match="unknown key 'depth'"):
        read_recipe(path, "target")
