"""The shipped model `emoji`: any prompt, the same bytes with and without speculation, clear errors."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import torch
from PIL import Image
from pyarrow import parquet

import bozzetto
from bozzetto.cli.main import main
from bozzetto.evaluate.evaluation import EvaluateSettings, evaluate, evaluation_table
from bozzetto.evaluate.photographs import prompts_for
from bozzetto.evaluate.shards import read_run
from bozzetto.pipeline.pipeline import GenerateSettings, Pipeline, model_folder, shipped_models

pytestmark = pytest.mark.skipif("emoji" not in shipped_models(), reason="not shipped yet")
PROMPTS = ["a penguin, 3d", "red apple, noto", "smiling face, flat", "car"]


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return bozzetto.load("emoji")


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_prompts_are_drawn_alike_alone_in_a_batch_and_with_speculation(pipe: Pipeline, guidance: float) -> None:
    settings = {"seed": 5, "guidance": guidance}
    plain = pipe.generate(PROMPTS, drafter="none", batch=4, **settings).images
    fast = pipe.generate(PROMPTS, drafter="jacobi", rule="seed-exact", batch=4, **settings).images
    alone = pipe.generate(PROMPTS, drafter="jacobi", rule="seed-exact", batch=1, window=16, **settings).images
    for ours in (fast, alone):
        for a, b in zip(ours, plain, strict=True):
            assert a.sha256 == b.sha256 and not a.near_tie
    assert sum(i.target_passes for i in alone) < 0.4 * sum(i.target_passes for i in plain)


def test_pictures_are_drawings_on_white(pipe: Pipeline) -> None:
    for image in pipe.generate(PROMPTS, seed=1, guidance=3.0, batch=4).images:
        pixels = np.asarray(image.image).astype(int)
        assert pixels.shape == (128, 128, 3) and pixels.std() > 10
        assert (pixels[[0, 0, -1, -1], [0, -1, 0, -1]].min(1) > 200).sum() >= 3  # corners


class Means:
    """Mean colours of a 4 x 4 grid: an extractor that costs nothing."""

    name, dim = "mean colours", 48

    def __call__(self, images: np.ndarray) -> torch.Tensor:
        x = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 255
        return torch.nn.functional.adaptive_avg_pool2d(x, 4).flatten(1)


@pytest.fixture(scope="module")
def drawings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Coloured noise with captions, as a parquet file of two splits."""
    rng, rows = np.random.default_rng(0), []
    for i in range(24):
        out = io.BytesIO()
        Image.fromarray(rng.integers(0, 255, (128, 128, 3)).astype(np.uint8)).save(out, "png")
        rows.append({"image": {"bytes": out.getvalue()}, "caption": f"face {i}", "style": "3d"})
        rows[-1]["split"] = "train" if i % 2 else "test"
    path = tmp_path_factory.mktemp("data") / "drawings.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def test_evaluation_asks_for_the_captions_of_the_test_split(pipe: Pipeline, drawings: Path, tmp_path: Path) -> None:
    settings = EvaluateSettings(
        ("none",), count=8, bootstrap=4, base=GenerateSettings(batch=8), data=drawings, recitation=False
    )
    report = evaluate(pipe, settings, Means(), tmp_path)
    asked = read_run(tmp_path / "samples" / "none")["settings"]["classes"]
    assert len(set(asked)) == 8 and set(asked) <= {f"face {i}, 3d" for i in range(0, 24, 2)}
    assert asked == prompts_for(pipe, drawings)[:8] != sorted(asked)
    rows = {row["method"]: row for row in report["results"]}
    assert rows.keys() == {"photographs", "reconstructions", "none"}
    assert all(row["consistency"] is None and row["frechet"]["value"] > 0 for row in rows.values())
    assert report["memorisation"] == [] and "nothing, without classes" in evaluation_table(report)


def test_the_command_line_takes_any_prompt(tmp_path: Path) -> None:
    assert main(["generate", "--model", "emoji", "a penguin, 3d", "--out", str(tmp_path / "out")]) == 0
    listed = json.loads((tmp_path / "out" / "manifest.json").read_text(encoding="utf-8"))["images"]
    assert [image["class"] for image in listed] == ["a penguin, 3d"]


@pytest.mark.parametrize(
    ("prompt", "named"), [("", "say what to draw"), ("penguin " * 60, "word pieces"), ("   ", "say what to draw")]
)
def test_prompts_that_do_not_fit_are_refused(
    prompt: str, named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "--model", "emoji", prompt, "--out", str(tmp_path / "out")]) == 2
    assert named in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_the_asset_is_complete_and_credits_its_drawings() -> None:
    folder = model_folder("emoji")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert len(config["prompts"]) >= 8 and config["encoder"] == "all-MiniLM-L6-v2"
    card = (folder / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert all(name in card for name in ("Noto", "Fluent", "Twemoji", "FxEmoji"))
    assert sum(path.stat().st_size for path in folder.iterdir()) < 26e6
