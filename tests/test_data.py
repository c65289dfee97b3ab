"""Data sets as people have them: parquet of the Hugging Face hub, folders of every layout, captions, splits."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bozzetto.data import read_captions, read_images
from bozzetto.errors import UsageError
from bozzetto.train.pictures import DataSource, note_overlap

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def png(value: int = 0, size: int = 8) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (size, size), (value, value, value)).save(out, "png")
    return out.getvalue()


def struct(values: Any) -> list[dict[str, Any]]:
    """What `datasets` (5.2) writes for a feature Image; without the bytes if the pictures came from files."""
    return [{"bytes": png(v), "path": f"{v}.png"} for v in values]


def save(path: Path, columns: dict[str, Any], features: dict[str, Any] | None = None) -> Path:
    """A parquet file, with the schema metadata of `datasets` where features are given."""
    table = pa.table(columns)
    if features is not None:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)
    return path


def draw(root: Path, *names: str) -> Path:
    """Pictures of a folder; the i-th is grey of value i."""
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (i, i, i)).save(root / name)
    return root


def found(path: Path, split: str | None = None) -> list[tuple[int, str]]:
    """Value and class of every picture."""
    data = read_images(path, split, 8)
    return [(int(image[0, 0, 0]), data.classes[label]) for image, label in zip(data.images, data.labels, strict=True)]


CLASS_LABEL = {"image": {"_type": "Image"}, "label": {"names": ["daisy", "rose", "tulip"], "_type": "ClassLabel"}}


@pytest.mark.parametrize(
    ("columns", "features", "classes"),
    [
        ({"label": [2, 0, 1]}, CLASS_LABEL, ["tulip", "daisy", "rose"]),
        ({"label": [2, 0, 1]}, None, ["2", "0", "1"]),
        ({"label": [2.0, 0.0, 0.0]}, None, ["2", "0", "0"]),
        ({"labels": [1, 0, 1]}, None, ["1", "0", "1"]),
        ({"label": ["rose", "daisy", "rose"]}, None, ["rose", "daisy", "rose"]),
        ({"label": [7, 3, 7], "class_name": ["crane"] * 3}, None, ["crane (7)", "crane (3)", "crane (7)"]),
        ({"class_name": ["rose", "daisy", "rose"]}, None, ["rose", "daisy", "rose"]),
        ({"label": [10**9, 4, 10**9]}, None, ["1000000000", "4", "1000000000"]),
        ({"label": [None, None, None]}, None, ["images"] * 3),
        ({}, None, ["images"] * 3),
    ],
)
@pytest.mark.parametrize("kind", ["struct", "binary", "large_binary"])
def test_labels_of_every_type_are_kept_and_named(tmp_path, kind, columns, features, classes):
    values = struct(range(3)) if kind == "struct" else pa.array([png(i) for i in range(3)], getattr(pa, kind)())
    path = save(tmp_path / "data.parquet", {"image": values, **columns}, features)
    assert found(path) == list(enumerate(classes))
    assert len(read_images(path, None, 8).classes) == (3 if features else len(set(columns.get("label", classes))))


def test_two_classes_of_one_name_stay_two(tmp_path):
    columns = {"image": struct(range(3)), "label": [1, 0, 1], "class_name": ["crane"] * 3}
    data = read_images(save(tmp_path / "data.parquet", columns), None, 8)
    assert data.labels.tolist() == [1, 0, 1] and data.classes == ["crane", "crane"]


def test_declared_images_and_classes_are_found_by_their_type(tmp_path):
    features = {"photo": {"_type": "Image"}, "species": {"names": ["elm", "oak"], "_type": "ClassLabel"}}
    columns = {"photo": struct(range(2)), "species": [1, 0]}
    assert found(save(tmp_path / "data.parquet", columns, features)) == [(0, "oak"), (1, "elm")]
    two = {**features, "genus": {"names": ["a"], "_type": "ClassLabel"}}
    with pytest.raises(UsageError, match=r"\['genus', 'species'\] are all classes"):
        found(save(tmp_path / "two.parquet", {**columns, "genus": [0, 0]}, two))


def test_rows_without_picture_or_class_are_left_out_and_counted(tmp_path, capsys):
    columns = {
        "image": [*struct(range(4)), None, {"bytes": None, "path": None}],
        "label": [1, -1, None, 0, 0, 1],
        "text": list("abcdef"),
    }
    path = save(tmp_path / "data.parquet", columns, CLASS_LABEL)
    assert found(path) == [(0, "rose"), (3, "daisy")]
    assert "2 pictures; left out: pictures without a class (2), rows without a picture (2)" in capsys.readouterr().err
    assert read_captions(path, None) == [("a", ""), ("d", "")]  # the same rows


@pytest.mark.parametrize(
    ("columns", "features", "said"),
    [
        ({"image": struct(range(2)), "label": [0, 3]}, CLASS_LABEL, "row 1: label 3 has no name (allowed: 0 to 2)"),
        ({"image": struct(range(2)), "label": [0, -2]}, None, "row 1: label -2 is not allowed"),
        ({"image": struct(range(2)), "label": [0.5, 1.0]}, None, "row 0: label 0.5 is not allowed"),
        ({"image": struct(range(2)), "label": [[0], [1]]}, None, "row 0: label [0] is not allowed"),
        ({"image": struct(range(2)), "label": [0, 0], "class_name": ["a", "b"]}, None, "is called 'a' and 'b'"),
        ({"image": struct(range(1)), "label": [float("inf")]}, None, "row 0: label inf is not allowed"),
        ({"image": struct(range(1)), "split": [3]}, None, "row 0: split '3' is not allowed: a text"),
        ({"image": [{"bytes": None, "path": "/data/x.png"}]}, None, "row 0 has only the path of a picture, '/data/x.p"),
        ({"image": ["x.png"]}, None, "column 'image' is string"),
        ({"image": [b"abc"]}, None, "row 0: not a picture"),
        ({"picture": [b"abc"]}, None, "missing column 'image'; found ['picture']"),
        ({"image": pa.array([None], pa.binary())}, None, "no pictures"),
    ],
)
def test_parquet_that_does_not_fit_is_named_with_its_row(tmp_path, columns, features, said):
    path = save(tmp_path / "data.parquet", columns, features)
    with pytest.raises(UsageError) as error:
        read_images(path, None, 8)
    assert said in str(error.value) and "data.parquet" in str(error.value)


@pytest.mark.parametrize("damage", [lambda b: b"hello", lambda b: b"", lambda b: b[:-20], lambda b: b[:4] + b[200:]])
def test_a_file_that_is_no_parquet_is_named(tmp_path, damage):
    whole = save(tmp_path / "data.parquet", {"image": struct(range(3))}).read_bytes()
    (tmp_path / "data.parquet").write_bytes(damage(whole))
    for read in (read_images, read_captions):
        with pytest.raises(UsageError, match=r"data\.parquet"):
            read(tmp_path / "data.parquet", None)


def test_damaged_parquet_is_read_or_named(tmp_path):
    columns = {"image": struct(range(6)), "label": [i % 3 for i in range(6)], "caption": list("abcdef")}
    path = save(tmp_path / "train.parquet", columns, CLASS_LABEL)
    whole, rng = path.read_bytes(), random.Random(0)
    footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    for _ in range(150):
        raw = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            raw[rng.randrange(rng.choice([0, footer]), len(raw))] = rng.randrange(256)
        path.write_bytes(raw)
        for read in (read_images, read_captions):
            try:
                assert len(read(path, "train")) <= 6
            except UsageError as error:
                assert "train.parquet" in str(error)


def test_a_column_of_splits_is_read_with_and_without_names(tmp_path):
    columns = {"image": struct(range(3)), "split": ["train", "validation", "train"], "caption": list("abc")}
    path = save(tmp_path / "data.parquet", columns)
    assert [v for v, _ in found(path, "train")] == [0, 2] and [v for v, _ in found(path, "val")] == [1]
    assert read_captions(path, "val") == [("b", "")] and len(found(path)) == 3
    for read in (read_images, read_captions):
        with pytest.raises(UsageError, match=r"unknown split 'test'; found \['train', 'validation'\]"):
            read(path, "test")


@pytest.mark.parametrize(
    ("train", "test"),
    [
        (
            ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"],
            "data/test-00000-of-00001.parquet",
        ),
        (["default/train/0000.parquet", "default/train/0001.parquet"], "default/test/0000.parquet"),
        (["split=train/a.parquet", "split=train/b.parquet"], "split=test/a.parquet"),
    ],
)
def test_shards_have_their_split_by_file_or_by_folder(tmp_path, capsys, train, test):
    """The layouts of `datasets` (5.2) `push_to_hub`, of the hub's own conversion, and of Hive partitions."""
    for i, name in enumerate([*train, test]):
        save(tmp_path / name, {"image": struct([i]), "label": [i % 2], "text": [str(i)]}, CLASS_LABEL)
    assert found(tmp_path, "train") == [(0, "daisy"), (1, "rose")] and found(tmp_path, "test") == [(2, "daisy")]
    assert len(found(tmp_path)) == 3 and read_captions(tmp_path, "test") == [("2", "")]
    assert capsys.readouterr().err == ""
    with pytest.raises(UsageError, match=r"unknown split 'validation'; found \['test', 'train'\]"):
        found(tmp_path, "validation")


def test_a_file_named_after_its_split_and_one_that_is_not(tmp_path):
    path = save(tmp_path / "train-00000-of-00002.parquet", {"image": struct([5])})
    assert found(path, "train") == found(path) == [(5, "images")]
    with pytest.raises(UsageError, match=r"unknown split 'test'; found \['train'\]"):
        found(path, "test")
    with pytest.raises(UsageError, match=r"has no splits, split = 'train'"):
        found(save(tmp_path / "all.parquet", {"image": struct([5])}), "train")


def test_missing_shards_are_counted(tmp_path, capsys):
    save(tmp_path / "train-00001-of-00003.parquet", {"image": struct([5])})
    found(tmp_path, "train")
    assert "shards that are not there (2)" in capsys.readouterr().err


def test_the_split_of_a_recipe_holds_for_folders(tmp_path):
    draw(
        tmp_path, *[f"{split}/{name}/{i}.png" for split in ("train", "val") for name in ("rose", "tulip") for i in "ab"]
    )
    held = [DataSource(str(tmp_path), split, 8).read() for split in ("train", "validation")]
    assert [s.images[:, 0, 0, 0].tolist() for s in held] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert all(s.classes == ["rose", "tulip"] and s.labels.tolist() == [0, 0, 1, 1] for s in held)
    assert len(found(tmp_path)) == 8
    with pytest.raises(UsageError, match=r"unknown split 'nonsense'; found \['train', 'val'\]"):
        found(tmp_path, "nonsense")
    with pytest.raises(UsageError, match="has no splits"):  # never the same pictures for both
        found(tmp_path / "train", "test")


@pytest.mark.parametrize(
    ("files", "split", "classes"),
    [
        (("rose/train/a.png", "rose/test/a.png", "tulip/train/a.png"), "train", ["rose", "tulip"]),
        (("train/a.png", "plane/a.png", "boat/a.png"), None, ["train", "plane", "boat"]),  # a class, no split
        (("train/a.png", "test/a.png"), "train", ["images"]),
        (("a.png", "b.png"), None, ["images", "images"]),
        (("rose/a.png", "rose/b.png"), None, ["rose", "rose"]),
        (("images/rose/a.png", "images/tulip/a.png"), None, ["rose", "tulip"]),
        (("flowers/red/rose/a.png", "cars/red/rose/a.png"), None, ["flowers/red/rose", "cars/red/rose"]),
        (("train/red/rose/a.png", "train/pink/rose/a.png", "test/red/rose/a.png"), "test", ["red/rose"]),
    ],
)
def test_classes_are_the_folders_below_the_split(tmp_path, files, split, classes):
    draw(tmp_path, *files)
    assert sorted(name for _, name in found(tmp_path, split)) == sorted(classes)


def test_rows_without_a_split_are_counted(tmp_path, capsys):
    columns = {"image": struct(range(3)), "label": ["a", "b", "a"], "split": ["train", None, "train"]}
    assert found(save(tmp_path / "x.parquet", columns), "train") == [(0, "a"), (2, "a")]
    assert "left out: rows without a split (1)" in capsys.readouterr().err


def test_a_link_to_nothing_is_named(tmp_path):
    draw(tmp_path, "rose/a.png")
    (tmp_path / "rose" / "b.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(UsageError, match=r"b\.png cannot be read: No such file"):
        found(tmp_path)


def test_what_is_passed_over_is_said_with_its_number(tmp_path, capsys):
    draw(tmp_path, "rose/a.png", "rose/.ipynb_checkpoints/a.png", "tulip/b.png", "loose.png", "__MACOSX/c.png")
    (tmp_path / "rose" / "._a.png").write_bytes(b"\0\5\26\7")  # AppleDouble
    (tmp_path / "rose" / "c.heic").write_bytes(b"x")
    (tmp_path / "README.md").write_text("flowers", encoding="utf-8")
    assert found(tmp_path) == [(0, "rose"), (2, "tulip")]
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and str(tmp_path) in said
    assert ".heic files (1), hidden files (1), hidden folders (2), pictures beside the folders of classes (1)" in said


def test_every_suffix_of_pillows_is_read(tmp_path):
    names = ["a.gif", "b.bmp", "c.tif", "d.tiff", "e.jfif", "f.ppm", "g.webp", "h.JPG"]
    names += ["i.avif"] if ".avif" in Image.registered_extensions() else []
    for name in names:
        Image.new("RGB", (8, 8), (200, 0, 0)).save(tmp_path / name)
    data = read_images(tmp_path, None, 8)
    assert len(data) == len(names) and np.abs(data.images.astype(int) - [200, 0, 0]).max() < 8


@pytest.mark.parametrize(("image_size", "held"), [(32, 160), (128, 160), (256, 320), (512, 640)])
def test_training_holds_pictures_larger_than_the_models(tmp_path, image_size, held, capsys):
    draw(tmp_path, "a.png")
    assert DataSource(str(tmp_path)).read(image_size).images.shape[1] == held
    assert DataSource(str(tmp_path), size=image_size).read(image_size).images.shape[1] == image_size
    assert f"1 pictures; 1 smaller than {held} x {held}, enlarged" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("train", "test", "said"),
    [(None, None, True), (None, "test", True), ("test", "test", True), ("train", "test", False)],
)
def test_holding_out_what_is_trained_on_is_said(train, test, said, capsys):
    note_overlap([DataSource("x", "extra"), DataSource("data", train)], DataSource("data", test))
    assert ("trained on as well" in capsys.readouterr().err) == said
    note_overlap([DataSource("x", train)], DataSource("data", test))
    assert capsys.readouterr().err == ""


def test_links_to_folders_are_followed_but_not_upwards(tmp_path):
    draw(tmp_path / "real", "a.png")
    (tmp_path / "data" / "rose").mkdir(parents=True)
    draw(tmp_path / "data", "rose/a.png")
    (tmp_path / "data" / "tulip").symlink_to(tmp_path / "real")
    (tmp_path / "data" / "rose" / "up").symlink_to(tmp_path / "data")
    assert [name for _, name in found(tmp_path / "data")] == ["rose", "tulip"]


@pytest.mark.parametrize("layout", ["csv", "jsonl", "text files"])
def test_captions_of_a_folder(tmp_path, layout):
    """As `datasets` (5.2) reads image folders, and as training scripts for text to image write them."""
    draw(tmp_path, "train/b.png", "train/a.png", "test/c.png")
    for split, names in {"train": "ab", "test": "c"}.items():
        folder = tmp_path / split
        if layout == "csv":
            text = "\ufefffile_name,text,style\n" + "".join(f'{n}.png,"{n}, ""red""",3d\n' for n in names)
            (folder / "metadata.csv").write_text(text, encoding="utf-8")
        elif layout == "jsonl":
            lines = [{"file_name": f"{n}.png", "caption": f'{n}, "red"', "style": "3d"} for n in names]
            (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
        else:
            for n in names:
                (folder / f"{n}.txt").write_text(f'{n}, "red"\n', encoding="utf-8")
    style = "" if layout == "text files" else "3d"
    assert read_captions(tmp_path, "train") == [('a, "red"', style), ('b, "red"', style)]
    assert read_captions(tmp_path, "test") == [('c, "red"', style)] and found(tmp_path, "test") == [(2, "images")]


def test_metadata_may_hold_the_classes(tmp_path):
    draw(tmp_path, "a.png", "b.png")
    (tmp_path / "metadata.csv").write_text("file_name,label\na.png,tulip\nb.png,rose\n", encoding="utf-8")
    assert found(tmp_path) == [(0, "tulip"), (1, "rose")]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        (
            "metadata.csv",
            "file_name,text\nx.png,hello\n",
            "metadata.csv, row 1: file_name = 'x.png' is no picture there",
        ),
        ("metadata.csv", "name,text\na.png,hello\n", "file_name = None"),
        ("metadata.jsonl", '{"file_name": "a.png", "text": "hello"}\n{', "metadata.jsonl: not readable"),
        ("metadata.jsonl", "[" * 100_000, "metadata.jsonl: not readable"),
        ("metadata.csv", "file_name,text\na.png,\n", "a.png has no caption (allowed: a text in a column"),
        ("notes.md", "", "a.png has no caption (allowed: a text in a column"),
    ],
)
def test_captions_that_are_not_there_are_named(tmp_path, name, text, said):
    draw(tmp_path, "a.png")
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(UsageError) as error:
        read_captions(tmp_path, None)
    assert said in str(error.value)


def test_columns_that_nobody_asks_for_may_hold_anything(tmp_path):
    columns = {"image": struct(range(2)), "label": [1, 0], "caption": [["a", "b"], ["c"]], "style": [3, 4]}
    path = save(tmp_path / "data.parquet", columns)
    assert found(path) == [(0, "1"), (1, "0")]
    with pytest.raises(UsageError, match=r"row 0 has no caption \(allowed: a text"):
        read_captions(path, None)


def test_parquet_without_captions_is_named_with_its_row(tmp_path):
    path = save(tmp_path / "data.parquet", {"image": struct(range(2)), "caption": ["a", None]})
    with pytest.raises(UsageError, match=r"data\.parquet, row 1 has no caption"):
        read_captions(path, None)


def test_a_folder_of_both_kinds_and_too_many_pictures_are_refused(tmp_path, monkeypatch):
    draw(tmp_path, "a.png")
    with pytest.raises(UsageError, match="do not fit into memory"):
        read_images(tmp_path, None, 2**24)
    save(tmp_path / "b.parquet", {"image": struct(range(2))})
    with pytest.raises(UsageError, match=r"holds both b\.parquet and a\.png"):
        read_images(tmp_path, None)
