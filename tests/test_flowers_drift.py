"""The shipped one-step variant: complete, alive, faster than its teacher, and near its own sequential picture."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import bozzetto
from bozzetto.pipeline.pipeline import Pipeline, model_folder, shipped_models

FOLDER = model_folder("flowers-drift")
pytestmark = pytest.mark.skipif("flowers-drift" not in shipped_models(), reason="not shipped yet")


@pytest.fixture(scope="module")
def drift() -> Pipeline:
    return bozzetto.load("flowers-drift", dtype="float32")


def test_the_variant_is_shipped_with_a_card_and_names_its_base(drift: Pipeline) -> None:
    card = (FOLDER / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert "another sampler" in card and "flowers160-photographers.txt" in card
    content = json.loads((FOLDER / "config.json").read_text())
    assert (content["family"], content["base"]) == ("drift", "flowers-flow")
    assert drift.classes == bozzetto.load("flowers-flow").classes


def test_pictures_are_not_flat_and_a_token_costs_one_call(drift: Pipeline) -> None:
    result = drift.generate(["daisy", "tulip"], seed=7, batch=2, drafter="none", guidance=2.0)
    assert result.head_calls == 256
    pixels = [np.asarray(image.image).astype(int) for image in result.images]
    assert all(15 < p.std() < 120 for p in pixels) and np.abs(pixels[0] - pixels[1]).mean() > 10


@pytest.mark.parametrize(("drafter", "saved"), [("jacobi", 0.5), ("sketch:length=3:stop=0.3", 0.99)])
def test_kept_tokens_are_near_the_targets_own_and_save_passes(drift: Pipeline, drafter: str, saved: float) -> None:
    options = {"seed": 7, "guidance": 2.0, "batch": 2}
    result = drift.generate(["daisy", "tulip"], drafter=drafter, rule="pathwise:epsilon=0.5", window=16, **options)
    for image in result.images:
        assert image.target_passes < 256 * saved and image.farthest <= 0.5


def test_a_vanishing_epsilon_gives_the_sequential_picture(drift: Pipeline) -> None:
    options = {"seed": 3, "guidance": 2.0}
    (slow,) = drift.generate(["rose"], drafter="none", **options).images
    (fast,) = drift.generate(["rose"], drafter="jacobi", rule="pathwise:epsilon=1e-4:over=run", **options).images
    torch.testing.assert_close(slow.tokens, fast.tokens, atol=2e-2, rtol=0)
    assert fast.target_passes < slow.target_passes
