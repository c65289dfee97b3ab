"""The shipped continuous model: complete, alive, and with a vanishing epsilon the sequential picture."""

from __future__ import annotations

import json

import numpy as np
import pytest

import bozzetto
from bozzetto import GenerateSettings
from bozzetto.pipeline.pipeline import Pipeline, model_folder, shipped_models

FOLDER = model_folder("flowers-flow")


@pytest.fixture(scope="module")
def flow() -> Pipeline:
    return bozzetto.load("flowers-flow", dtype="float32")


@pytest.fixture(scope="module")
def plain(flow: Pipeline) -> list[np.ndarray]:
    return pixels(flow, drafter="none")


def pixels(pipe: Pipeline, **options: str) -> list[np.ndarray]:
    result = pipe.generate(["daisy", "tulip"], seed=7, batch=2, **options)
    return [np.asarray(image.image).astype(int) for image in result.images]


def test_the_model_is_shipped_with_a_card_and_its_classes(flow: Pipeline) -> None:
    assert "flowers-flow" in shipped_models()
    assert (FOLDER / "MODEL_CARD.md").is_file()
    assert flow.classes == ["daisy", "dandelion", "rose", "sunflower", "tulip"]
    assert json.loads((FOLDER / "config.json").read_text())["family"] == "flow"


def test_pictures_are_not_flat_and_classes_differ(plain: list[np.ndarray]) -> None:
    assert all(20 < image.std() < 120 for image in plain)
    assert np.abs(plain[0] - plain[1]).mean() > 10


@pytest.mark.parametrize("rule", ["pathwise:epsilon=1e-5", "pathwise:epsilon=1e-4:over=run"])
def test_pathwise_at_float_rounding_gives_the_sequential_pixels_with_fewer_passes(
    rule: str, flow: Pipeline, plain: list[np.ndarray]
) -> None:
    result = flow.generate(["daisy", "tulip"], seed=7, batch=2, drafter="jacobi", rule=rule, window=16)
    for image, wanted in zip(result.images, plain, strict=True):
        apart = np.abs(np.asarray(image.image).astype(int) - wanted)
        assert apart.max() <= 1 and (apart > 0).mean() <= 1e-3
        assert image.target_passes < 256 and image.farthest <= 1e-4


def test_the_default_method_is_exact_and_saves_passes_where_they_are_torchs(flow: Pipeline) -> None:
    result = flow.generate(["rose"], seed=1, window=8, compile="off")
    assert result.settings.method == "jacobi/chains"
    assert result.tokens_per_pass > 1.2
    assert flow.resolve(GenerateSettings(compile="max")).method == "none/plain"  # as fast as any exact one there
