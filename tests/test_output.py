"""Runs are written image by image and lose nothing; tables line up; a listing survives a broken model."""

from __future__ import annotations

import json
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import bozzetto
from bozzetto.cli.main import main
from bozzetto.common.images import MOST_PIXELS, ContactSheet, contact_sheet
from bozzetto.decoding.images import PassTrace
from bozzetto.errors import UsageError
from bozzetto.evaluate.columns import table
from bozzetto.evaluate.output import RunWriter, check_free, check_writable, file_name
from bozzetto.evaluate.report.runs import read_any
from bozzetto.pipeline.results import GeneratedImage, GenerateResult
from bozzetto.settings import GenerateSettings

NAMES = [
    "word " * 48,
    "字" * 90,
    "a" * 300,
    "🐶" * 200,
    "é" * 99 + "x" * 100,
    'a/b\\c:d*e?f"g<h>i|j\n\0k',
    "..",
    "",
    "con",
    "a\udcffb",
]


def image_of(name: str, index: int = 0, tokens: torch.Tensor | None = None, **more: object) -> GeneratedImage:
    picture = Image.new("RGB", (32, 32), (index % 256, 0, 0))
    given = torch.zeros(4, dtype=torch.int64) if tokens is None else tokens
    made = GeneratedImage(
        picture, given, name, 0, 0, index, "", 2, 2, 3, 0.5, False, 0.0, PassTrace([2, 2], [1, 1], [1, 2])
    )
    for key, value in more.items():
        setattr(made, key, value)
    return made


def written(folder: Path, images: list[GeneratedImage]) -> dict:
    """A run of these images in a folder; its manifest."""
    result = GenerateResult([], GenerateSettings(), [4], {"total": 1.0})
    with RunWriter(folder, len(images), (32, 32)) as writer:
        for image in images:
            result.add(image)
            writer.add(image)
        writer.finish(result, {"model": "tiny"})
    return json.loads((folder / "manifest.json").read_text())


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_whatever_a_prompt_is_its_picture_has_a_name(name: str, tmp_path: Path) -> None:
    """File systems take names of 255 bytes, encrypted ones of 143, and a letter may need four."""
    content = written(tmp_path, [image_of(name, 0), image_of(name, 1)])
    files = [entry["file"] for entry in content["images"]]
    assert len(set(files)) == 2 and all(len(f.encode()) < 143 and (tmp_path / f).is_file() for f in files)
    assert not set('/\\:*?"<>|\n\0') & set("".join(files))
    assert [entry["class"] for entry in content["images"]] == [name, name]


def test_names_that_fit_are_not_changed() -> None:
    assert file_name(7, "a red tulip, in snow") == "000007-a-red-tulip-in-snow.png"
    assert file_name(1234567, "rose") == "1234567-rose.png"


def test_figures_that_json_has_not_are_null_and_lose_no_run(tmp_path: Path) -> None:
    nan, inf = float("nan"), float("inf")
    content = written(tmp_path, [image_of("rose", 0, margin=inf, spent=nan), image_of("rose", 1, margin=0.25)])
    assert [(i["margin"], i["tv_spent"]) for i in content["images"]] == [(None, None), (0.25, 0.0)]


def test_a_manifest_has_a_line_for_each_figure_and_changes_no_text(tmp_path: Path) -> None:
    content = written(tmp_path, [image_of("[1,   2]", 0)])
    assert content["images"][0]["class"] == "[1,   2]"
    lines = (tmp_path / "manifest.json").read_text().splitlines()
    assert '   "tokens": [0, 0, 0, 0]' in lines and '  "windows": [4],' in lines


def test_vectors_are_written_one_by_one_as_numpy_reads_them(tmp_path: Path) -> None:
    images = [image_of("rose", i, torch.full((4, 3), float(i))) for i in range(3)]
    content = written(tmp_path, images)
    with np.load(tmp_path / "tokens.npz") as arrays:
        for entry, image in zip(content["images"], images, strict=True):
            assert entry["tokens"] == "tokens.npz"
            assert np.array_equal(arrays[entry["file"]], image.tokens.numpy())


def test_images_are_let_go_as_soon_as_they_are_written(tiny_model: Path, tmp_path: Path) -> None:
    """A batch of them at most is there at any time, with its tokens."""
    pipe, alive, most = bozzetto.load(tiny_model), list[weakref.ref[GeneratedImage]](), 0
    with RunWriter(tmp_path, 40, (32, 32)) as writer:

        def take(image: GeneratedImage) -> None:
            nonlocal most
            writer.add(image)
            alive.append(weakref.ref(image))
            most = max(most, sum(ref() is not None for ref in alive))

        result = pipe.generate("rose", count=40, batch=2, take=take)
        writer.finish(result, {})
    assert most <= 2 and len(list(tmp_path.glob("0*-rose.png"))) == 40


@pytest.mark.parametrize("count", [1, 24, 900, 10_000, 10**12])
@pytest.mark.parametrize("size", [(32, 32), (160, 160), (1024, 1024), (2000, 100)])
def test_a_contact_sheet_is_bounded(count: int, size: tuple[int, int]) -> None:
    sheet = ContactSheet(count, size, 8, captions=True)
    assert sheet.picture.width * sheet.picture.height <= 1.2 * MOST_PIXELS
    assert sheet.shown == count or min(sheet.tile) <= 16
    assert sheet.columns * -(-sheet.shown // sheet.columns) >= sheet.shown
    assert sheet.tile == size or count > 1
    for number in range(3):
        sheet.add(Image.new("RGB", size, (200, 0, 0)), "a caption " * 50 if number else "")


def test_few_pictures_stand_on_a_sheet_as_they_are_and_captions_keep_to_their_own() -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (3, 32, 32, 3)).astype(np.uint8)
    plain, said = (np.asarray(contact_sheet(pixels, 2, ["", text, ""])) for text in ("", "a very long caption " * 9))
    assert np.array_equal(plain[4:36, 4:36], pixels[0]) and np.array_equal(plain[4:36, 40:72], pixels[1])
    changed = np.argwhere((plain != said).any(-1))
    assert changed.min(0)[1] >= 40 and changed.max(0)[1] < 76 and changed.max(0)[0] < 54


def test_what_we_did_not_write_is_never_replaced(tiny_model: Path, tmp_path: Path, capsys) -> None:
    """It is said before anything is drawn, and what is there stays as it is."""
    (tmp_path / "photo").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "photo" / "sheet.png")
    (tmp_path / "folder" / "sheet.png").mkdir(parents=True)
    (tmp_path / "folder" / "sheet.png" / "mine").write_text("mine")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "manifest.json").write_text('{"images": 3}')
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / "000000-rose.png").symlink_to(tmp_path / "photo" / "sheet.png")
    for folder, name in (
        ("photo", "sheet.png"),
        ("folder", "sheet.png"),
        ("other", "manifest.json"),
        ("link", "rose.png"),
    ):
        before = sorted((p, p.lstat().st_mtime_ns) for p in (tmp_path / folder).rglob("*"))
        arguments = ["generate", "rose", "--model", str(tiny_model), "--out", str(tmp_path / folder)]
        assert main(arguments) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and name in said and "was not written by generate" in said
        assert sorted((p, p.lstat().st_mtime_ns) for p in (tmp_path / folder).rglob("*")) == before


def test_only_names_that_a_run_needs_are_looked_at(tmp_path: Path) -> None:
    for name in ("000001-rose.png", "000000-tulip.png", "000009-rose.png", "rose.png"):
        (tmp_path / name).write_text("mine")
    check_free(tmp_path, 1, ["rose"])
    check_free(tmp_path, 10**12, ["rose", "lily"], first=2)
    with pytest.raises(UsageError, match=r"000001-rose\.png in it was not written by generate"):
        check_free(tmp_path, 2, ["rose"])


def test_what_earlier_runs_wrote_is_replaced_whatever_they_drew(
    tiny_model: Path, tiny_flow: Path, tmp_path: Path
) -> None:
    """Files that no manifest lists any more too; one of an earlier version that carries no mark is known by its own."""
    for model, name in ((tiny_flow, "rose"), (tiny_model, "tulip"), (tiny_flow, "rose"), (tiny_model, "tulip")):
        assert main(["generate", name, "--model", str(model), "--out", str(tmp_path)]) == 0
        Image.open(tmp_path / f"000000-{name}.png").save(tmp_path / f"000000-{name}.png")  # the mark is gone
        assert main(["generate", name, "--model", str(model), "--out", str(tmp_path)]) == 0
    assert read_any(tmp_path)[0].drawn[0].class_names == ["tulip"]


def test_check_writable_names_the_obstacle(tmp_path):
    (tmp_path / "file").touch()
    check_writable(tmp_path / "new" / "b.json")
    with pytest.raises(UsageError, match="is a folder"):
        check_writable(tmp_path)
    with pytest.raises(UsageError, match="file is not a folder"):
        check_writable(tmp_path / "file" / "b.json")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_table_columns_line_up_with_numbers_to_the_right():
    assert table(("name", "n"), [("a", "1"), ("bcdef", "10")]) == "name    n\na       1\nbcdef  10"
