"""What recipes may say, in which files; classes by name."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from bozzetto.autoencoders.tiny import load_tiny
from bozzetto.cli.main import main
from bozzetto.data import ImageSet
from bozzetto.errors import UsageError
from bozzetto.train.families import read_recipe
from bozzetto.train.pictures import by_name

RECIPE_FILES = Path(__file__).resolve().parent.parent / "recipes"
TOKENIZER, TARGET, CAPTION = ("tokenizer", "flowers-tokenizer"), ("target", "flowers"), ("target", "emoji")
FLOW, MAR, DRIFT = ("target", "flowers-flow"), ("target", "flowers-mar"), ("drift", "flowers-drift")
EAGLE, PLANE, SKETCH = ("drafter", "flowers-eagle"), ("drafter", "flowers-plane"), ("drafter", "flowers-flow-sketch")
ALL = (TOKENIZER, TARGET, CAPTION, FLOW, MAR, DRIFT, EAGLE, PLANE, SKETCH)
STAGE = {"kind": "latent", "steps": 9, "lr": 1e-3}
NAN, INF = float("nan"), float("inf")

SMALL = {"path": "x", "split": "test", "size": 160}
REFUSED: list[tuple[tuple[str, str], dict[str, Any], str]] = [
    (TOKENIZER, {"image_size": 36}, "image_size = 36 is not allowed: .* multiple of 8"),
    (TOKENIZER, {"image_size": 8}, "image_size = 8 is not allowed: .* 16"),
    (TOKENIZER, {"width": 20}, "width = 20 is not allowed: .* multiple of 8"),
    (TOKENIZER, {"train": []}, r"train = \[\] is not allowed: .* at least 1"),
    (TOKENIZER, {"stages": []}, r"stages = \[\] is not allowed: .* at least 1"),
    (TOKENIZER, {"stages": [{**STAGE, "steps": 0}]}, "stages.0.steps = 0 is not allowed"),
    (TOKENIZER, {"stages": [{**STAGE, "kind": "owl"}]}, "stages.0.kind = 'owl' is not allowed: .*'latent'"),
    (TOKENIZER, {"stages": [{**STAGE, "batch": -1}]}, "stages.0.batch = -1 is not allowed"),
    (TOKENIZER, {"codes": 40000}, "codes = 40000 is not allowed: .* 32768"),
    (TOKENIZER, {"image_size": 256, "test": SMALL}, r"x \(split test\): size = 160 is not allowed: .* 256"),
    (TOKENIZER, {"commitment": NAN}, "commitment = nan is not allowed: .* finite"),
    (TARGET, {"dim": 30, "heads": 4}, "dim = 30 with heads = 4 is not allowed: .* multiples of 4"),
    (TARGET, {"dim": 24, "heads": 4}, "dim = 24 with heads = 4"),
    (TARGET, {"dim": 10**9}, "dim = 1000000000 is not allowed"),
    (TARGET, {"lr": INF}, "lr = inf is not allowed"),
    (TARGET, {"dropout": 1.0}, "dropout = 1.0 is not allowed: .* less than 1"),
    (TARGET, {"train": {"path": "x", "size": 0}}, "train.size = 0 is not allowed"),
    (TARGET, {"train": {"path": ""}}, "train.path = '' is not allowed"),
    (TARGET, {"train": {"path": "a\0b"}}, "train.path = .* is not allowed"),
    (TARGET, {"train": None}, "train = None is not allowed"),
    (TARGET, {"seed": 2**64}, "seed = 18446744073709551616 is not allowed"),
    (TARGET, {"family": ["flow"]}, r"family = \['flow'\] is not allowed: caption, flow, mar"),
    (CAPTION, {"prompts": []}, r"prompts = \[\] is not allowed"),
    (CAPTION, {"prompts": ["{colour}"]}, "prompts: '{colour}' is not allowed: only {caption} and {style}"),
    (CAPTION, {"prompts": ["{caption"]}, "prompts: '{caption' is not allowed"),
    (CAPTION, {"dim": 30, "heads": 4}, "dim = 30 with heads = 4"),
    (FLOW, {"image_size": 36}, "image_size = 36 is not allowed"),
    (FLOW, {"dim": 30, "heads": 3}, "dim = 30 with heads = 3"),
    (MAR, {"dim": 30, "heads": 4}, "dim = 30 with heads = 4"),
    (MAR, {"least_masked": 1.0}, "least_masked = 1.0 is not allowed"),  # a share that is never drawn
    (MAR, {"least_masked": 0.0}, "least_masked = 0.0 is not allowed"),  # nothing would be masked
    (DRIFT, {"bandwidths": []}, r"bandwidths = \[\] is not allowed"),
    (DRIFT, {"guidance": [3.0, 1.0]}, r"guidance = \[3.0, 1.0\] is not allowed: \[lowest, highest\]"),
    (DRIFT, {"generated": 1}, "generated = 1 is not allowed"),
    (EAGLE, {"guidance": [3.0, 1.0]}, "guidance = "),
    (EAGLE, {"guidance": [1.0, INF]}, "guidance.1 = inf is not allowed"),
    (EAGLE, {"acceptance_weight": 0, "cross_entropy_weight": 0, "feature_weight": 0}, "acceptance_weight = .* > 0"),
    (PLANE, {"anchors": 0}, "anchors = 0 is not allowed"),
    (SKETCH, {"divergence_weight": 0}, "divergence_weight = feature_weight = 0 is not allowed"),
    (SKETCH, {"image_size": 256, "train": SMALL}, "size = 160 is not allowed: at least image_size = 256"),
]
REFUSED += [(kind, {"out": ""}, "out = '' is not allowed") for kind in ALL]
REFUSED += [(kind, {"seed": -1}, "seed = -1 is not allowed") for kind in ALL]
REFUSED += [(kind, {"views": 0}, "views = 0 is not allowed") for kind in ALL]
REFUSED += [(kind, {"colour": 1}, "unknown key 'colour'") for kind in ALL]
REFUSED += [(kind, {name: 0}, f"{name} = 0 is not allowed") for kind in ALL[1:] for name in ("steps", "batch", "lr")]
REFUSED += [(kind, {"ema": NAN}, "ema = nan is not allowed: .* finite") for kind in ALL[1:]]


@pytest.mark.parametrize(("kind", "change", "wanted"), REFUSED, ids=lambda v: str(v)[:60])
def test_values_that_cannot_be_are_refused_by_name(
    kind: tuple[str, str], change: dict[str, Any], wanted: str, tmp_path: Path
) -> None:
    what, name = kind
    content = yaml.safe_load((RECIPE_FILES / f"{name}.yaml").read_text())
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**content, **change}))
    with pytest.raises(UsageError, match=wanted) as error:
        read_recipe(path, what)
    assert str(error.value).startswith(f"{path}: ")


def test_the_command_says_so_in_a_line(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    content = yaml.safe_load((RECIPE_FILES / "flowers-tokenizer.yaml").read_text())
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**content, "stages": []}))
    assert main(["train", "tokenizer", str(path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"bozzetto: error: {path}: stages = [] is not allowed")
    assert list(tmp_path.iterdir()) == [path]


# PyYAML 6.0.4: of a key given twice the last counts; dates that are none and numbers of more than 4,300 digits raise
# ValueError, lists as keys ConstructorError, deep nesting RecursionError.
@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("lr: 1.0\nlr: 2.0\n", "key 'lr' stands there twice"),
        ("train: {path: a, path: b}\n", "key 'path' stands there twice"),
        ("1: 2\n", "key 1 is not allowed"),
        (f"steps: {'9' * 5000}\n", "not valid YAML"),
        ("name: 2026-13-45\n", "not valid YAML"),
        ("? [a]\n: 1\n", "not valid YAML"),
        ("[" * 2000, "nested too deep"),
        ("x" * 2**21, "bytes are no recipe"),
        ("", "not NoneType"),
        ("a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(f"{c}: &{c} [{','.join([f'*{b}'] * 9)}]\n" for b, c in
         zip("abcdefgh", "bcdefghi", strict=True)), "unknown key 'a'"),
        ("name: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(f"{c}: &{c} [{','.join([f'*{b}'] * 9)}]\n" for b, c in
         zip("abcdefgh", "bcdefghi", strict=True)) + "out: *i\n", r"out = \[\[\["),
    ],
    ids=["twice", "twice within", "number", "digits", "date", "list", "deep", "long", "empty", "bomb", "bomb value"],
)  # fmt: skip
def test_files_that_are_no_recipes_are_refused(text: str, wanted: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=wanted) as error:
        read_recipe(path, "target")
    assert len(str(error.value)) < 10_000


def test_merged_keys_may_be_said_again(tmp_path: Path) -> None:
    content = (RECIPE_FILES / "flowers.yaml").read_text().replace("train: {", "train: &all {")
    content = content.replace("test: {path: ../shared/data/flowers160.parquet, split: test}", "test: &b {<<: *all}")
    path = tmp_path / "recipe.yaml"
    path.write_text(content)
    recipe = read_recipe(path, "target")
    assert recipe.train == recipe.test and recipe.train.split == "train"


def named(labels: list[int], classes: list[str]) -> ImageSet:
    return ImageSet(np.zeros((len(labels), 2, 2, 3), np.uint8), np.array(labels), classes)


def test_classes_are_found_by_name() -> None:
    flowers = ["daisy", "rose", "tulip"]
    found = by_name(named([0, 1, 1], ["rose", "tulip"]), flowers, "test")
    assert found.labels.tolist() == [1, 2, 2] and found.classes == flowers
    spare = by_name(named([2, 0], ["tulip", "crane", "daisy", "crane"]), flowers, "test")  # no picture of a crane
    assert spare.labels.tolist() == [0, 2]
    cranes = ["crane", "tulip", "crane"]
    assert by_name(named([2, 0], cranes), cranes, "test").labels.tolist() == [2, 0]
    with pytest.raises(UsageError, match=r"test: 'lily': not among .*'daisy', 'rose', 'tulip'"):
        by_name(named([0, 1], ["rose", "lily"]), flowers, "test")
    with pytest.raises(UsageError, match="'crane': more than one class is called so"):
        by_name(named([0], ["crane"]), cranes, "test")
    for wrong in (-1, 3):
        with pytest.raises(UsageError, match=f"label {wrong} is not allowed: 0 to 2"):
            by_name(named([0, wrong], flowers), flowers, "test")


def test_a_cut_autoencoder_is_named(tiny_weights: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_weights, tmp_path / "tiny"))
    path = folder / "taef2_decoder.pth"
    for content in (b"", path.read_bytes()[:5000], b"version https://git-lfs.github.com/spec/v1"):
        path.write_bytes(content)
        with pytest.raises(UsageError, match=r"taef2_decoder\.pth: not the tiny autoencoder's decoder"):
            load_tiny(folder)
