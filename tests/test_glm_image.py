"""GLM-Image: its two stages, and what there is of it without the second."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, GlmImagePipeline, GlmImageTransformer2DModel
from PIL import Image
from transformers import ByT5Tokenizer, GlmImageConfig, GlmImageForConditionalGeneration, T5EncoderModel

import bozzetto
from bozzetto.adapters.glm_image import GlmImageDrawing
from bozzetto.cli.listing import list_models
from bozzetto.cli.main import main
from bozzetto.errors import UsageError
from bozzetto.evaluate.sampling import SampleRun
from bozzetto.laws.noise import STREAM_PICTURE, fold, image_keys, normal
from bozzetto.settings import GenerateSettings
from published.glm_image import PIXELS, PROMPTS, write
from serving import live

ENCODER = "vision_language_encoder"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("glm"))


def drawn(model: Path, **options: Any) -> Any:
    pipe = bozzetto.load(model, image_size=PIXELS, **options)
    return pipe, pipe.generate([PROMPTS[1]], seed=3, first_index=5, drafter="jacobi").images[0]


def test_the_second_stage_is_diffusers_own(whole: Path) -> None:
    """The picture's tokens twice as fine, the prompt, 50 steps, guidance 1.5, noise of (seed, image)."""
    pipe, image = drawn(whole)
    stage = GlmImagePipeline(
        tokenizer=ByT5Tokenizer.from_pretrained(whole / "tokenizer"),
        processor=None,
        text_encoder=T5EncoderModel.from_pretrained(whole / "text_encoder"),
        vision_language_encoder=None,
        vae=AutoencoderKL.from_pretrained(whole / "vae"),
        transformer=GlmImageTransformer2DModel.from_pretrained(whole / "transformer"),
        scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(whole / "scheduler"),
    )
    prior = GlmImagePipeline._upsample_token_ids(image.tokens[-1:], 1, 1)
    noise = normal(fold(image_keys(3, STREAM_PICTURE, torch.tensor([5])), torch.arange(64))).view(1, 4, 4, 4)
    asked = {"prior_token_ids": prior, "latents": noise, "num_inference_steps": 50, "guidance_scale": 1.5}
    wanted = stage(prompt=PROMPTS[1], height=PIXELS, width=PIXELS, **asked).images[0]
    assert np.array_equal(np.asarray(image.image), np.asarray(wanted)) and not pipe.undecoded
    assert pipe.preview(image.tokens, 100).size == (PIXELS, PIXELS)


def test_what_looks_at_pictures_is_not_loaded() -> None:
    """Of the published sizes, which are transformers' usual ones: 10.1 billion weights less 1.2."""
    with torch.device("meta"):
        whole, lean = (kind(GlmImageConfig()) for kind in (GlmImageForConditionalGeneration, GlmImageDrawing))
    counts = [sum(w.numel() for w in part.parameters()) for part in (whole, whole.model.visual, lean)]
    assert counts[2] == counts[0] - counts[1] and round(counts[2] / 1e9, 1) == 9.0


def test_pictures_that_are_not_square_have_a_preview_of_their_shape(whole: Path) -> None:
    pipe = bozzetto.load(whole, image_size="96x32")
    assert pipe.grid == (1, 3) and pipe.size == (96, 32)
    assert pipe.target.length == 9 * 27 + 3  # sqrt(1/3) and sqrt(3) times 16
    with pytest.raises(UsageError, match="image_size = 40x32 is not allowed: multiples of 32"):
        pipe.in_size((40, 32))


def test_the_first_stages_folder_draws_tokens_only(whole: Path, tmp_path: Path, capsys: Any) -> None:
    """Beside the processor's folder, and with the processor's files inside."""
    _, image = drawn(whole)
    copy = tmp_path / "alone"
    shutil.copytree(whole / ENCODER, copy)
    shutil.copytree(whole / "processor", copy, dirs_exist_ok=True)
    for model in (whole / ENCODER, copy):
        pipe, found = drawn(model)
        assert torch.equal(found.tokens, image.tokens) and "only the first stage" in pipe.undecoded
    out = tmp_path / "out"
    arguments = ["generate", *PROMPTS[:2], "--model", str(copy), "--image-size", str(PIXELS), "--out", str(out)]
    assert main(arguments) == 0
    assert "maps of tokens and no pictures (only the first stage" in capsys.readouterr().out
    told = json.loads((out / "manifest.json").read_text())
    assert "only the first stage" in told["settings"]["undecoded"]
    with np.load(out / "tokens.npz") as arrays:
        for entry in told["images"]:
            codes = arrays[entry["file"]]
            assert codes.shape == (1, 1) and codes.dtype == np.int64 and codes[0, 0] == entry["tokens"][-1]
            with Image.open(out / entry["file"]) as map_of_tokens:
                assert map_of_tokens.size == (PIXELS, PIXELS)


def test_tokens_are_neither_samples_nor_served(whole: Path, tmp_path: Path, capsys: Any) -> None:
    pipe = bozzetto.load(whole / ENCODER, image_size=PIXELS)
    with pytest.raises(UsageError, match="draws tokens and no pictures here"):
        SampleRun(tmp_path / "samples", pipe, GenerateSettings())
    arguments = ["--model", str(whole / ENCODER), "--image-size", str(PIXELS)]
    for verb in (["serve", "--port", "0"], ["sample", "--out", str(tmp_path / "out"), "--count", "1"]):
        assert main([*verb, *arguments]) == 2 and "draws tokens and no pictures here: only" in capsys.readouterr().err
    with live({"it": pipe}, slots=1) as server, pytest.raises(openai.BadRequestError, match="tokens and no pictures"):
        server.client().images.generate(model="it", prompt="a dog")


def test_a_lacking_part_is_named_and_a_broken_one_refused(whole: Path, tmp_path: Path) -> None:
    copy = tmp_path / "whole"
    shutil.copytree(whole, copy)
    shutil.rmtree(copy / "transformer")
    assert "lacks the parts of the second stage: transformer" in drawn(copy)[0].undecoded
    (copy / "transformer").mkdir()
    with pytest.raises(UsageError, match=r"not a model folder: .*transformer/config.json does not exist"):
        drawn(copy)
    (copy / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    with pytest.raises(UsageError, match="pipeline 'FluxPipeline' has no image tokens"):
        drawn(copy)


def test_the_whole_pipeline_is_listed_as_one_model(whole: Path) -> None:
    for folder in (whole, whole.parent):
        (row,) = [line for line in list_models(folder).splitlines() if line.startswith(whole.name)]
        assert "glm_image (of transformers)" in row and "guidance 1" in row and str(whole) in row
    assert len(list_models(whole).splitlines()) == 2


def test_a_prompt_with_the_models_own_words_is_refused(whole: Path) -> None:
    with pytest.raises(UsageError, match="'<sop>' in it is a special token"):
        bozzetto.load(whole, image_size=PIXELS).labels("a dog <sop>")
