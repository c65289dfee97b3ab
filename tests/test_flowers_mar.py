"""The shipped masked model: complete, alive, a draft model beside it, and fewer serial head calls without training."""

from __future__ import annotations

import json

import numpy as np
import pytest

import bozzetto
from bozzetto.pipeline.pipeline import Pipeline, model_folder, shipped_models
from bozzetto.targets.mar_target import MARTarget

FOLDER = model_folder("flowers-mar")
FAST = {"seed": 7, "batch": 2, "passes": 8}


@pytest.fixture(scope="module")
def masked() -> Pipeline:
    return bozzetto.load("flowers-mar")


def test_the_model_is_shipped_with_a_card_its_classes_and_a_smaller_one(masked: Pipeline) -> None:
    assert "flowers-mar" in shipped_models()
    assert (FOLDER / "MODEL_CARD.md").is_file() and (FOLDER / "draft" / "model.safetensors").is_file()
    assert masked.classes == ["daisy", "dandelion", "rose", "sunflower", "tulip"]
    assert json.loads((FOLDER / "config.json").read_text())["family"] == "mar"
    assert isinstance(masked.target, MARTarget)
    assert (masked.target.sampler.passes, masked.target.sampler.steps) == (256, 100)


def test_pictures_are_not_flat_and_classes_differ(masked: Pipeline) -> None:
    result = masked.generate(["daisy", "sunflower"], drafter="none", rule="plain", steps=25, **FAST)
    daisy, sunflower = (np.asarray(image.image).astype(int) for image in result.images)
    assert all(15 < image.std() < 120 for image in (daisy, sunflower))
    assert np.abs(daisy - sunflower).mean() > 10


def test_speculation_inside_the_head_saves_most_serial_calls_at_a_hundred_steps(masked: Pipeline) -> None:
    result = masked.generate(["rose"], drafter="none", rule="coupled", **FAST)
    assert 1.8 * result.head_calls < 8 * 100


def test_the_smaller_model_drafts_for_the_target(masked: Pipeline) -> None:
    rule = "cspd:variant=released"
    result = masked.generate(["tulip"], drafter="model:length=4:prefill=0", rule=rule, steps=25, **FAST)
    assert result.images[0].target_passes == 2
    assert np.isfinite(result.images[0].tokens.numpy()).all()
