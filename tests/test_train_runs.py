"""Run folders of every trainer: killed at any time a run ends where an uninterrupted one does, and it goes on only with
the recipe, the pictures and the weights that it was begun with. Which class is which goes by name."""

from __future__ import annotations

import json
import random
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from bozzetto.autoencoders.vq import VQConfig, VQTokenizer
from bozzetto.checkpoints.folders import save_llamagen
from bozzetto.cli.main import main
from bozzetto.errors import UsageError
from bozzetto.train.continuous import LATENTS, LatentFit
from bozzetto.train.drafter import DrafterFit, ParallelFit
from bozzetto.train.drift import DriftFit
from bozzetto.train.families import train
from bozzetto.train.fit import Fit
from bozzetto.train.folder import CHECKPOINT, RUN, RunFolder, data_digest
from bozzetto.train.gaussian import GaussianFit
from bozzetto.train.pictures import DataSource, nothing
from bozzetto.train.recipes import (
    DrafterRecipe,
    DriftRecipe,
    FlowRecipe,
    MARRecipe,
    ParallelRecipe,
    SketchRecipe,
    TargetRecipe,
    TokenizerRecipe,
    TokenizerStage,
)
from bozzetto.train.target import CodeFit
from bozzetto.train.tokenizer import TokenizerFit
from toys import tiny_llamagen

OLD_RUNS = Path(__file__).parent / "old_runs"
SHORT: dict[str, Any] = {"views": 1, "steps": 2, "batch": 2, "warmup": 1, "evaluate_every": 2}
SMALL: dict[str, Any] = {**SHORT, "image_size": 32}
HEAD: dict[str, Any] = {**SMALL, "heads": 2, "head_width": 8, "head_depth": 1, "dim": 16, "name": "toy"}
Make = Callable[[str, Path, Path], Any]


@pytest.fixture(autouse=True)
def without_sheets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sample sheets take most of the time, and are looked at elsewhere."""
    monkeypatch.setattr(Fit, "shown", False)


@pytest.fixture(scope="module")
def make(tiny_model: Path, tiny_flow: Path, tiny_weights: Path) -> Make:
    """The recipe of a kind, by its run folder and its pictures."""

    def recipe(kind: str, out: Path, pictures: Path) -> Any:
        data = DataSource(str(pictures))
        shared: dict[str, Any] = {"out": str(out), "train": data, "test": data}
        tiny, model = {"tiny": str(tiny_weights)}, {"model": str(tiny_model), "test_images": 2}
        of_flow = {"model": str(tiny_flow), "test_images": 2}
        if kind == "tokenizer":
            stages = [TokenizerStage("latent", steps=2, lr=1e-3, batch=2)]
            shape = {"codes": 8, "width": 8, "pre_blocks": 1, "post_blocks": 1, "image_size": 32, "views": 1}
            return TokenizerRecipe(**{**shared, "train": [data]}, **tiny, stages=stages, save_every=2, **shape)
        if kind == "target":
            return TargetRecipe(**shared, tokenizer=str(tiny_model), name="toy", dim=16, layers=1, heads=2, **SHORT)
        if kind == "flow":
            return FlowRecipe(family="flow", layers=1, **shared, **tiny, **HEAD)
        if kind == "mar":
            return MARRecipe(family="mar", depth=1, **shared, **tiny, **HEAD)
        if kind == "drift":
            shape = {"decoder_width": 8, "decoder_depth": 1, "places": 2, "positives": 2, "generated": 2}
            return DriftRecipe(name="toy", **shape, **shared, **tiny, **of_flow, **SMALL)
        if kind == "sketch":
            return SketchRecipe(family="sketch", **shared, **tiny, **of_flow, **SMALL)
        if kind == "eagle":
            return DrafterRecipe(**shared, **model, **SHORT)
        return ParallelRecipe(family="plane", places=2, anchors=2, **shared, **model, **SHORT)

    return recipe


KINDS = ("tokenizer", "target", "flow", "mar", "drift", "sketch", "eagle", "plane")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def weights(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.glob("*.safetensors"))]


def killed(kind: str, recipe: Any, after: int, restart: bool = False) -> None:
    """Train, and be stopped in the step after so many."""
    owner = TokenizerFit if kind == "tokenizer" else Fit
    original, calls = owner.train_step, []

    def stopped(*arguments: object) -> object:
        calls.append(1)
        if len(calls) > after:
            raise KeyboardInterrupt
        return original(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, "train_step", stopped)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, restart)


@pytest.fixture(scope="module")
def albums(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two pictures each of daisy and rose."""
    folder, rng = tmp_path_factory.mktemp("albums"), np.random.default_rng(0)
    for name in ("daisy", "rose"):
        (folder / name).mkdir()
        for number in range(2):
            Image.fromarray(rng.integers(0, 255, (40, 40, 3), np.uint8)).save(folder / name / f"{number}.png")
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_killed_before_its_first_checkpoint_goes_on_and_only_as_what_it_was(
    kind: str, make: Make, tmp_path: Path, albums: Path
) -> None:
    pictures = Path(shutil.copytree(albums, tmp_path / "pictures"))
    straight = train(make(kind, tmp_path / "straight", pictures))
    recipe = make(kind, tmp_path / "run", pictures)
    killed(kind, recipe, 1)
    assert not (tmp_path / "run" / CHECKPOINT).exists()
    assert weights(train(recipe)) == weights(straight)

    made = json.loads((tmp_path / "run" / RUN).read_text())
    assert made["recipe"]["out"] == recipe.out and set(made["made_from"]) >= {"train", "test"}
    assert "generator" in torch.load(tmp_path / "run" / CHECKPOINT, weights_only=True)
    before = contents(tmp_path / "run")
    with pytest.raises(
        UsageError, match=r"run: this run was begun with something else: seed was 0, is 1\. .*--restart"
    ):
        train(replace(recipe, seed=1))
    shutil.copy(pictures / "rose" / "0.png", pictures / "daisy" / "another.png")
    with pytest.raises(UsageError, match="what train holds is not what it was; what test holds"):
        train(recipe)
    assert contents(tmp_path / "run") == before


def test_a_picture_that_changed_is_noticed_and_one_that_moved_is_not(
    make: Make, tmp_path: Path, albums: Path, capsys: Any
) -> None:
    pictures = Path(shutil.copytree(albums, tmp_path / "pictures"))
    recipe = make("target", tmp_path / "run", pictures)
    train(recipe)
    assert f"{pictures}: 4 pictures; 4 smaller than 160 x 160, enlarged" in capsys.readouterr().err
    moved = make("target", tmp_path / "run", Path(pictures.rename(tmp_path / "elsewhere")))
    train(replace(moved, steps=4, patience=1, evaluate_every=1))
    shutil.copy(tmp_path / "elsewhere" / "daisy" / "0.png", tmp_path / "elsewhere" / "daisy" / "1.png")
    with pytest.raises(UsageError, match="what train holds"):
        train(moved)


def test_other_weights_at_the_same_place_are_noticed(make: Make, tmp_path: Path, albums: Path, tiny_flow: Path) -> None:
    model = Path(shutil.copytree(tiny_flow, tmp_path / "model"))
    recipe = replace(make("sketch", tmp_path / "run", albums), model=str(model))
    train(recipe)
    state = load_file(model / "model.safetensors")
    save_file({key: value * 0.5 for key, value in state.items()}, model / "model.safetensors")
    with pytest.raises(UsageError, match="what model holds is not what it was"):
        train(recipe)


def test_a_drafter_of_any_family_goes_on_from_one_of_its_shape(make: Make, tmp_path: Path, albums: Path) -> None:
    begun = make("plane", tmp_path / "first", albums)
    first = train(begun)
    more = replace(begun, out=str(tmp_path / "more"), init=str(first))
    fit = ParallelFit(more)
    assert torch.equal(fit.model.below.fc.weight, load_file(first / "model.safetensors")["below.fc.weight"])
    with pytest.raises(UsageError, match=r"first.plane: checkpoint does not fit: 'mix' has shape \(2, 32\)"):
        ParallelFit(replace(more, places=3, out=str(tmp_path / "other")))


def test_before_anything_is_trained_a_recipe_may_change(make: Make, tmp_path: Path, albums: Path) -> None:
    """Encoded views are of the run that they were made for."""
    recipe = make("flow", tmp_path / "run", albums)
    killed("flow", recipe, 0)
    changed = replace(recipe, views=2, jitter=0.5, seed=3)
    straight = train(replace(changed, out=str(tmp_path / "straight")))
    assert weights(train(changed)) == weights(straight)


@pytest.mark.parametrize("damage", ["cut", "flipped", "missing"])
def test_damaged_latents_are_made_again(damage: str, make: Make, tmp_path: Path, albums: Path) -> None:
    straight = train(make("flow", tmp_path / "straight", albums))
    recipe = make("flow", tmp_path / "run", albums)
    killed("flow", recipe, 1)
    path = tmp_path / "run" / LATENTS
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(content[:1000] if damage == "cut" else content[:-7] + bytes([content[-7] ^ 1]) + content[-6:])
    assert weights(train(recipe)) == weights(straight)


def test_restart_puts_the_old_run_aside(make: Make, tmp_path: Path, albums: Path, capsys: Any) -> None:
    recipe = make("target", tmp_path / "run", albums)
    train(recipe)
    before = contents(tmp_path / "run")
    changed = replace(recipe, seed=1)
    straight = train(replace(changed, out=str(tmp_path / "straight")), restart=True)  # nothing to put aside
    killed("target", changed, 1, restart=True)
    assert f"put aside: {tmp_path / 'run.1'}" in capsys.readouterr().out
    assert contents(tmp_path / "run.1") == before and not (tmp_path / "run" / "model").exists()
    assert weights(train(changed)) == weights(straight)
    again = replace(recipe, init=str(tmp_path / "run" / "model"))
    with pytest.raises(UsageError, match="cannot be put aside: the recipe reads"):
        train(again, restart=True)
    with pytest.raises(UsageError, match="it holds a run of a TargetRecipe, not of a DrafterRecipe"):
        train(make("eagle", tmp_path / "run", albums))


def test_the_command_restarts_and_says_why_it_does_not_go_on(
    make: Make, tmp_path: Path, albums: Path, capsys: Any
) -> None:
    recipe = make("plane", tmp_path / "run", albums)
    content = {name: value for name, value in vars(recipe).items() if not name.startswith("_")}
    data, path = {"path": str(albums)}, tmp_path / "recipe.yaml"
    content |= {"train": data, "test": data, "guidance": [1.0, 3.0]}
    path.write_text(yaml.safe_dump(content))
    assert main(["train", "drafter", str(path)]) == 0
    path.write_text(yaml.safe_dump({**content, "places": 3}))
    assert main(["train", "drafter", str(path)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "places was 2, is 3" in error and "--restart" in error
    assert main(["train", "drafter", str(path), "--restart"]) == 0
    assert (tmp_path / "run.1" / CHECKPOINT).is_file()


def test_a_run_that_stopped_for_want_of_progress_stays_as_it_is(make: Make, tmp_path: Path, albums: Path) -> None:
    recipe = replace(
        make("target", tmp_path / "run", albums), lr=1e-12, steps=40, evaluate_every=1, patience=2, ema=0.0
    )
    out = train(recipe)
    metrics = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    before = weights(out)
    assert json.loads(metrics.splitlines()[-1])["step"] < 40
    assert weights(train(recipe)) == before
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == metrics


@pytest.mark.parametrize("kind", ["flow", "tokenizer"])
def test_a_loss_that_is_no_number_ends_the_run_and_keeps_what_was_saved(
    kind: str, make: Make, tmp_path: Path, albums: Path
) -> None:
    recipe = make(kind, tmp_path / "run", albums)
    if kind == "tokenizer":
        recipe = replace(recipe, stages=[replace(recipe.stages[0], lr=1e38, steps=9)])
    else:
        recipe = replace(recipe, lr=1e38, steps=9)
    with pytest.raises(UsageError, match=r"loss.* is (nan|inf) at step \d"):
        train(recipe)


# torch 2.13: torch.load takes a zip archive whose entries no longer have their checksums for good.
@pytest.mark.parametrize(
    "damage", ["empty", "cut", "text", "flipped", "another run's", "run.json missing", "run.json cut"]
)
def test_a_checkpoint_that_cannot_be_used_is_named_and_nothing_is_touched(
    damage: str, make: Make, tmp_path: Path, albums: Path
) -> None:
    recipe = make("target", tmp_path / "run", albums)
    train(recipe)
    path = tmp_path / "run" / CHECKPOINT
    content = path.read_bytes()
    if damage == "flipped":
        with zipfile.ZipFile(path) as parts:
            at = max(parts.infolist(), key=lambda part: part.file_size).header_offset + 2000
        path.write_bytes(content[:at] + bytes([content[at] ^ 64]) + content[at + 1 :])
    elif damage == "another run's":
        other = replace(recipe, out=str(tmp_path / "other"))
        train(other)
        shutil.copy(tmp_path / "other" / CHECKPOINT, path)
    elif damage == "run.json missing":
        (tmp_path / "run" / RUN).unlink()
    elif damage == "run.json cut":
        (tmp_path / "run" / RUN).write_text('{"id": "')
    else:
        path.write_bytes({"empty": b"", "cut": content[: len(content) // 2], "text": b"version https://lfs"}[damage])
    before = contents(tmp_path / "run")
    wanted = "its run.json is missing or damaged" if RUN in damage else f"{CHECKPOINT}: this checkpoint cannot be used"
    with pytest.raises(UsageError, match=wanted) as error:
        train(recipe)
    assert str(tmp_path / "run") in str(error.value) and "--restart" in str(error.value)
    assert contents(tmp_path / "run") == before


def test_no_mutation_of_a_checkpoint_passes_unnoticed(make: Make, tmp_path: Path, albums: Path) -> None:
    recipe, draw = make("target", tmp_path / "run", albums), random.Random(0)
    run = RunFolder(recipe, {})
    run.save({"weights": torch.arange(3000.0), "generator": torch.Generator().get_state(), "step": 3})
    content, noticed = run.checkpoint.read_bytes(), 0
    for number in range(150):
        changed, at = bytearray(content), draw.randrange(len(content))
        if number % 3 == 0:
            del changed[at:]
        elif number % 3 == 1:
            changed[at] ^= 1 << draw.randrange(8)
        else:
            changed[at : at + 40] = bytes(len(changed[at : at + 40]))
        run.checkpoint.write_bytes(changed)
        try:
            found = run.load()
        except UsageError as error:
            noticed += CHECKPOINT in str(error)
        else:
            assert found is not None and found["step"] == 3 and torch.equal(found["weights"], torch.arange(3000.0))
    assert noticed > 100


def test_a_run_of_the_version_before_goes_on_and_ends_as_it_did_there(tmp_path: Path) -> None:
    """old_runs/eagle: two of four steps, written before recipes shared their fields, for this target and pictures."""
    network = tiny_llamagen(dim=8, classes=2)
    torch.manual_seed(0)
    tokenizer = VQTokenizer(VQConfig(codes=network.config.vocab, width=8, pre_blocks=1, post_blocks=1, image_size=32))
    save_llamagen(tmp_path / "model", network, tokenizer, {"name": "toy", "class_names": ["daisy", "rose"]})
    for number, name in enumerate(("daisy", "rose")):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        picture = np.full((32, 32, 3), 90 * number + 60, np.uint8)
        Image.fromarray(picture).save(tmp_path / "pictures" / name / "0.png")
    data = DataSource(str(tmp_path / "pictures"))
    of_run = {"views": 1, "steps": 4, "batch": 2, "warmup": 1, "evaluate_every": 2, "test_images": 2}
    recipe = DrafterRecipe(out=str(tmp_path / "run"), model=str(tmp_path / "model"), train=data, test=data, **of_run)
    DrafterFit(replace(recipe, out=str(tmp_path / "new")))

    shutil.copytree(OLD_RUNS / "eagle", tmp_path / "run")
    begun = json.loads((tmp_path / "run" / RUN).read_text())
    made_here = json.loads((tmp_path / "new" / RUN).read_text())
    assert begun["recipe"].keys() == made_here["recipe"].keys() and begun["kind"] == made_here["kind"]
    begun["made_from"] = made_here["made_from"]  # weights of another torch may have other digests
    (tmp_path / "run" / RUN).write_text(json.dumps(begun))
    train(recipe)
    (line,) = (json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert line["step"] == 4
    # A processor without pairs of bfloat16 trains in float32.
    assert line["acceptance"]["guidance 1"][:2] == pytest.approx([0.74598, 0.74689], abs=1e-2)
    assert line["acceptance"]["guidance 2"][:2] == pytest.approx([0.58249, 0.57673], abs=1e-2)


def test_digests_of_pictures_see_pixels_labels_names_and_captions(albums: Path) -> None:
    data = DataSource(str(albums)).read()
    pixels = data.images.copy()
    pixels[1, 5, 5, 0] ^= 1
    others = [replace(data, images=pixels), replace(data, labels=1 - data.labels), replace(data, classes=["a", "b"])]
    digests = {data_digest(data), *map(data_digest, others), data_digest(data, captions=["x"]), data_digest(data, data)}
    assert len(digests) == 6


@pytest.fixture(scope="module")
def folders(albums: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pictures of these classes, by their initials."""
    made = {}
    for initials in ("drt", "rt", "drtz"):
        made[initials] = tmp_path_factory.mktemp(initials)
        for name in ("daisy", "rose", "tulip", "zinnia"):
            if name[0] in initials:
                shutil.copytree(albums / "rose", made[initials] / name)
    return made


FITS: dict[str, Any] = {"target": CodeFit, "flow": LatentFit, "mar": LatentFit}
OF_TARGETS: dict[str, Any] = {"drift": DriftFit, "sketch": GaussianFit, "eagle": DrafterFit, "plane": ParallelFit}


@pytest.mark.parametrize("kind", FITS)
def test_held_out_classes_are_those_of_training_by_name(
    kind: str, make: Any, tmp_path: Path, folders: dict[str, Path]
) -> None:  # fmt: skip
    recipe = make(kind, tmp_path / "run", folders["drt"])
    fit = FITS[kind](replace(recipe, test=replace(recipe.test, path=str(folders["rt"]))))
    labels = fit.test_given[0] if kind == "target" else fit.test_labels
    assert labels.tolist() == [1, 1, 2, 2]
    more = replace(recipe, test=replace(recipe.test, path=str(folders["drtz"])), out=str(tmp_path / "more"))
    with pytest.raises(UsageError, match="'zinnia': not among the classes that are trained: 'daisy', 'rose', 'tulip'"):
        FITS[kind](more)
    assert not (tmp_path / "more").exists()


@pytest.mark.parametrize("kind", OF_TARGETS)
def test_classes_of_a_drafter_are_its_targets_by_name(
    kind: str, make: Any, tmp_path: Path, folders: dict[str, Path]
) -> None:  # fmt: skip
    fit = OF_TARGETS[kind](make(kind, tmp_path / "run", folders["rt"]))
    assert fit.data.labels.tolist() == [1, 1, 2, 2] and fit.held.labels.tolist() == [1, 1, 2, 2]
    given = fit.test_given[0] if kind in ("eagle", "plane") else fit.test_labels
    assert set(given.tolist()) <= {1, 2}
    nobody = nothing(fit.test_given, fit.target)[0] if kind in ("eagle", "plane") else torch.tensor([fit.classes])
    assert set(nobody.tolist()) == {3}
    with pytest.raises(UsageError, match="'zinnia': not among the classes that are trained: 'daisy', 'rose', 'tulip'"):
        OF_TARGETS[kind](make(kind, tmp_path / "more", folders["drtz"]))
    assert not (tmp_path / "more").exists()


def test_pictures_are_not_enlarged_to_the_tokenizers_size(make: Any, tmp_path: Path, folders: Any) -> None:
    for kind, fit in (("target", CodeFit), ("eagle", DrafterFit)):
        recipe = make(kind, tmp_path / "run", folders["rt"])
        with pytest.raises(UsageError, match="size = 24 is not allowed: at least image_size = 32, the tokenizer's"):
            fit(replace(recipe, train=replace(recipe.train, size=24)))


def test_a_variants_pictures_have_its_targets_size(make: Any, tmp_path: Path, folders: Any) -> None:
    for kind in ("drift", "sketch"):
        recipe = make(kind, tmp_path / "run", folders["rt"])
        with pytest.raises(UsageError, match=r"image_size = 64 is not allowed: .* draws 32 pixels"):
            OF_TARGETS[kind](replace(recipe, image_size=64))
