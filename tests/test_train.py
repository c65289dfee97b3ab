"""Training verbs: an interrupted run ends where an uninterrupted one does, and what is written can be loaded."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import bozzetto
from bozzetto.autoencoders.vq import VQTokenizer
from bozzetto.checkpoints.folders import load_target, load_tokenizer, save_llamagen
from bozzetto.data import augment, evaluation_view, read_images
from bozzetto.errors import UsageError
from bozzetto.targets.llamagen import LlamaGen
from bozzetto.train import drafter as drafter_module
from bozzetto.train import target as target_module
from bozzetto.train import tokenizer as tokenizer_module
from bozzetto.train.families import train
from bozzetto.train.fit import WeightAverage, cosine, encoded
from bozzetto.train.recipes import DataSource, DrafterRecipe, TargetRecipe, TokenizerRecipe, TokenizerStage
from bozzetto.train.tokenizer import psnr

pytestmark = pytest.mark.usefixtures("small_sheets")


def tokenizer_recipe(out: Path, pictures: Path, tiny_weights: Path) -> TokenizerRecipe:
    data = DataSource(str(pictures))
    stages = [
        TokenizerStage("latent", steps=2, lr=1e-3, batch=4),
        TokenizerStage("pixel", steps=2, lr=1e-3, batch=4, feature_weight=0.1),
        TokenizerStage("decoder", steps=2, lr=1e-3, batch=4, adversarial_weight=0.1),
    ]
    return TokenizerRecipe(
        str(out), str(tiny_weights), [data], data, stages, codes=16, width=16, pre_blocks=1, post_blocks=1,
        image_size=32, views=1, save_every=1,
    )  # fmt: skip


def target_recipe(out: Path, pictures: Path, tokenizer: Path) -> TargetRecipe:
    data = DataSource(str(pictures))
    return TargetRecipe(
        out=str(out), tokenizer=str(tokenizer), train=data, test=data, name="toy", dim=32, layers=1, heads=2, views=2,
        refresh_every=2, steps=6, batch=4, warmup=2, evaluate_every=2,
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained_tokenizer(tmp_path_factory: pytest.TempPathFactory, pictures: Path, tiny_weights: Path) -> Path:
    return train(tokenizer_recipe(tmp_path_factory.mktemp("run"), pictures, tiny_weights))


def interrupt(monkeypatch: pytest.MonkeyPatch, owner: type, method: str, after: int) -> None:
    """Make the (after + 1)-th call of a method raise KeyboardInterrupt."""
    original, calls = getattr(owner, method), []

    def stopped(*args: object) -> object:
        calls.append(1)
        if len(calls) > after:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(owner, method, stopped)


def weights(path: Path) -> bytes:
    return path.read_bytes()


@pytest.mark.parametrize("after", [1, 2, 5])
def test_an_interrupted_tokenizer_run_ends_where_an_uninterrupted_one_does(
    tmp_path: Path, pictures: Path, tiny_weights: Path, trained_tokenizer: Path, after: int
) -> None:
    recipe = tokenizer_recipe(tmp_path / "run", pictures, tiny_weights)
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, tokenizer_module.TokenizerFit, "train_step", after)
        with pytest.raises(KeyboardInterrupt):
            train(recipe)
    out = train(recipe)
    assert weights(out / "tokenizer.safetensors") == weights(trained_tokenizer / "tokenizer.safetensors")


def test_a_finished_tokenizer_run_is_kept(trained_tokenizer: Path, pictures: Path, tiny_weights: Path) -> None:
    before = weights(trained_tokenizer / "tokenizer.safetensors")
    train(tokenizer_recipe(trained_tokenizer.parent, pictures, tiny_weights))
    assert weights(trained_tokenizer / "tokenizer.safetensors") == before


def test_a_tokenizer_run_leaves_metrics_and_a_sheet(trained_tokenizer: Path) -> None:
    lines = [json.loads(line) for line in (trained_tokenizer.parent / "metrics.jsonl").read_text().splitlines()]
    assert [line["stage"] for line in lines[:6]] == ["latent"] * 2 + ["pixel"] * 2 + ["decoder"] * 2
    assert all("psnr" in line for line in lines)
    assert Image.open(trained_tokenizer.parent / "reconstructions.png").size[0] > 0


def test_the_decoder_stage_changes_no_token(tmp_path: Path, pictures: Path, tiny_weights: Path) -> None:
    recipe = tokenizer_recipe(tmp_path / "all", pictures, tiny_weights)
    short = replace(recipe, out=str(tmp_path / "short"), stages=recipe.stages[:2])
    full, cut = load_tokenizer(train(recipe)), load_tokenizer(train(short))
    x = evaluation_view(read_images(pictures, None).images, 32)
    assert torch.equal(full.encode(x), cut.encode(x))
    assert not torch.equal(full.decode(full.encode(x)), cut.decode(cut.encode(x)))


def test_an_interrupted_target_run_ends_where_an_uninterrupted_one_does(
    tmp_path: Path, pictures: Path, trained_tokenizer: Path
) -> None:
    straight = train(target_recipe(tmp_path / "straight", pictures, trained_tokenizer))
    recipe = target_recipe(tmp_path / "stopped", pictures, trained_tokenizer)
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, target_module.CodeFit, "train_step", 5)
        with pytest.raises(KeyboardInterrupt):
            train(recipe)
    resumed = train(recipe)
    assert weights(resumed / "model.safetensors") == weights(straight / "model.safetensors")
    assert bozzetto.load(resumed).generate(["red"], seed=1).images[0].class_name == "red"
    assert (tmp_path / "stopped" / "samples.png").is_file()


def test_what_a_run_begins_from_is_the_seeds(tmp_path: Path, pictures: Path, trained_tokenizer: Path) -> None:
    """The numbers after those of a new tokenizer, however one is read: recipes of shipped models stay theirs."""
    fit = target_module.CodeFit(target_recipe(tmp_path / "run", pictures, trained_tokenizer))
    torch.manual_seed(0)
    VQTokenizer(fit.tokenizer.config)
    for ours, wanted in zip(fit.model.parameters(), LlamaGen(fit.model.config).parameters(), strict=True):
        assert torch.equal(ours, wanted)


def drafter_recipe(out: Path, pictures: Path, model: Path, **changes: object) -> DrafterRecipe:
    data = DataSource(str(pictures))
    recipe = DrafterRecipe(
        out=str(out), model=str(model), train=data, test=data, test_images=4, views=2, refresh_every=2, steps=4,
        batch=2, warmup=2, evaluate_every=2, feature_noise=0.1,
    )  # fmt: skip
    return replace(recipe, **changes)


@pytest.fixture(scope="module")
def trained_target(tmp_path_factory: pytest.TempPathFactory, pictures: Path, trained_tokenizer: Path) -> Path:
    return train(target_recipe(tmp_path_factory.mktemp("target"), pictures, trained_tokenizer))


def test_an_interrupted_drafter_run_ends_where_an_uninterrupted_one_does(
    tmp_path: Path, pictures: Path, trained_target: Path
) -> None:
    straight = train(drafter_recipe(tmp_path / "straight", pictures, trained_target))
    recipe = drafter_recipe(tmp_path / "stopped", pictures, trained_target)
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, drafter_module.DrafterFit, "train_step", 3)
        with pytest.raises(KeyboardInterrupt):
            train(recipe)
    resumed = train(recipe)
    assert weights(resumed / "model.safetensors") == weights(straight / "model.safetensors")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"guidance": (1.0, 1.0), "condition_dropout": 0.5},
        {"acceptance_weight": 0.0, "cross_entropy_weight": 0.1, "feature_weight": 1.0, "rollout": 1},
    ],
    ids=["guided acceptance", "unguided", "feature regression"],
)
def test_a_trained_drafter_names_its_target_reports_acceptance_by_depth_and_drafts(
    tmp_path: Path, pictures: Path, trained_target: Path, changes: dict[str, object]
) -> None:
    out = train(drafter_recipe(tmp_path / "run", pictures, trained_target, **changes))
    config = json.loads((out / "config.json").read_text())
    assert config["family"] == "eagle" and config["target_name"] == "toy"
    for by_depth in config["acceptance_by_depth"].values():
        assert len(by_depth) == 5 and all(0 < a <= 1 for a in by_depth)
    pipe = bozzetto.load(trained_target)
    drafter = f"eagle:folder={out}:tree=chain-3"
    image = pipe.generate(["red"], seed=1, drafter=drafter, rule="seed-exact").images[0]
    assert image.sha256 == pipe.generate(["red"], seed=1, drafter="none").images[0].sha256


def test_a_drafter_learns_to_be_accepted(tmp_path: Path, pictures: Path, trained_target: Path) -> None:
    """A target with sharp laws; forty steps of training."""
    folder = Path(shutil.copytree(trained_target, tmp_path / "sharp"))
    network = load_target(folder, "llamagen")
    torch.manual_seed(1)
    network.output.weight.data.normal_(std=0.6)
    save_llamagen(folder, network, load_tokenizer(folder), {"name": "sharp", "class_names": ["blue", "red"]})
    changes = {"steps": 60, "evaluate_every": 60, "lr": 5e-3, "batch": 8, "refresh_every": 0, "feature_noise": 0.0}
    before = drafter_module.DrafterFit(drafter_recipe(tmp_path / "none", pictures, folder)).held_out_acceptance(2.0)
    out = train(drafter_recipe(tmp_path / "run", pictures, folder, ema=0.5, **changes))
    after = json.loads((out / "config.json").read_text())["acceptance_by_depth"]["guidance 2"]
    assert all(a > b + 0.05 for a, b in zip(after, before, strict=True))


def test_a_missing_file_or_an_empty_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nowhere\.parquet"):
        read_images(tmp_path / "nowhere.parquet", "train")
    with pytest.raises(UsageError, match="no images"):
        read_images(tmp_path, None)


def test_parquet_and_folder_agree(tmp_path: Path, pictures: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    files = sorted(pictures.rglob("*.png"))
    rows = {
        "image": [{"bytes": f.read_bytes(), "path": f.name} for f in files],
        "label": [0 if f.parent.name == "blue" else 1 for f in files],
        "class_name": [f.parent.name for f in files],
        "split": ["train"] * len(files),
    }
    pq.write_table(pa.table(rows), tmp_path / "data.parquet")
    ours, theirs = read_images(tmp_path / "data.parquet", "train"), read_images(pictures, None)
    assert np.array_equal(ours.images, theirs.images)
    assert ours.classes == theirs.classes == ["blue", "red"]
    with pytest.raises(UsageError, match="unknown split 'test'"):
        read_images(tmp_path / "data.parquet", "test")


def test_without_labels_styles_are_the_classes_and_a_source_says_its_size(tmp_path: Path, pictures: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    files = sorted(pictures.rglob("*.png"))
    rows = {"image": [{"bytes": f.read_bytes(), "path": f.name} for f in files], "split": ["train"] * len(files)}
    pq.write_table(pa.table(rows), tmp_path / "plain.parquet")
    plain = DataSource(str(tmp_path / "plain.parquet"), "train", size=48).read()
    assert plain.images.shape == (len(files), 48, 48, 3)
    assert plain.classes == ["images"] and not plain.labels.any()
    rows["style"] = [f.parent.name for f in files]
    pq.write_table(pa.table(rows), tmp_path / "styled.parquet")
    styled = DataSource(str(tmp_path / "styled.parquet"), "train").read()
    assert styled.classes == ["blue", "red"]
    assert np.array_equal(styled.labels, read_images(pictures, None).labels)


def test_augmentation_is_a_function_of_its_generator(pictures: Path) -> None:
    images = read_images(pictures, None).images
    a, b = (augment(images, 32, torch.Generator().manual_seed(5), 0.1) for _ in range(2))
    assert torch.equal(a, b)
    assert a.shape == (10, 3, 32, 32)
    assert 0 <= float(a.min()) <= float(a.max()) <= 1


def test_without_flips_nothing_is_mirrored() -> None:
    image = np.zeros((1, 32, 32, 3), np.uint8)
    image[:, :, 16:] = 255
    for seed in range(8):
        assert augment(image, 32, torch.Generator().manual_seed(seed), flips=False)[0, :, :, 20:].min() == 1.0


def test_a_share_of_every_batch_is_taken_whole(tmp_path: Path, pictures: Path, trained_tokenizer: Path) -> None:
    fit = target_module.CodeFit(replace(target_recipe(tmp_path / "run", pictures, trained_tokenizer), whole=1.0))
    images = read_images(pictures, None).images
    whole = encoded(images, lambda x: evaluation_view(x, 32), fit.tokenizer.encode)
    _, tokens = fit.batch()
    assert all(any(torch.equal(row, one) for one in whole) for row in tokens)


def test_the_weight_average_lags_and_swaps_back() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    average = WeightAverage([parameter], decay=0.5)
    parameter.data.fill_(1.0)
    average.update()
    average.swap()
    assert 0 < parameter.item() < 1
    average.swap()
    assert parameter.item() == 1


def test_the_schedule_rises_then_falls() -> None:
    rates = [cosine(step, 100, 1.0, 10) for step in range(101)]
    assert rates[9] == 1.0 and rates[0] == 0.1
    assert all(a >= b for a, b in pairwise(rates[10:]))
    assert rates[100] == pytest.approx(0.05)


def test_psnr_of_a_tenth_off_is_twenty_decibel() -> None:
    a = torch.full((2, 3, 4, 4), 0.5)
    assert torch.allclose(psnr(a, a + 0.1), torch.full((2,), 20.0), atol=1e-4)
