"""Classes of one name are told apart by their numbers, on every way from the checkpoint to the report."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import bozzetto
from bozzetto.checkpoints.convert import read_class_names
from bozzetto.cli import main as cli
from bozzetto.common.classes import class_named, distinct, labels_of, note_on_doubles
from bozzetto.errors import UsageError
from bozzetto.evaluate.photographs import photographs
from bozzetto.evaluate.sampling import SampleRun, method_settings, sample
from bozzetto.evaluate.shards import RUN, read_run, read_samples
from bozzetto.pipeline.pipeline import GenerateSettings

CRANES = ["crane", "tulip", "crane"]


@pytest.fixture(scope="module")
def cranes(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with two classes of one name, as ImageNet has them."""
    folder = tmp_path_factory.mktemp("models") / "cranes"
    shutil.copytree(tiny_model, folder)
    rename(folder, CRANES)
    return folder


def rename(folder: Path, names: list[str]) -> None:
    content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**content, "class_names": names}), encoding="utf-8")


def test_a_name_as_it_is_written_wins_over_other_capitals():
    names = ["Cardigan", "cardigan", "rose"]
    assert [class_named(names, text) for text in ("cardigan", "Cardigan", " ROSE ", "lily")] == [1, 0, 2, None]
    with pytest.raises(UsageError, match=r"'CARDIGAN' is 0 and 1: give the number, or 'Cardigan' or 'cardigan'"):
        labels_of(names, ["CARDIGAN"])


def test_double_names_carry_their_numbers_and_asking_for_one_names_both():
    names = distinct(CRANES)
    assert names == ["crane (0)", "tulip", "crane (2)"]
    assert labels_of(names, ["crane (2)", 0, "2", "Tulip", "Crane (0)"]) == [2, 0, 2, 1, 0]
    for known in (names, CRANES):
        with pytest.raises(UsageError, match=r"'crane' is 0 and 2: give the number, or 'crane \(0\)' or 'crane \(2\)'"):
            labels_of(known, ["crane"])
    assert "'crane' is classes 0 and 2" in note_on_doubles(CRANES) and note_on_doubles(["crane", "Crane"]) == ""


def test_a_number_is_a_number_and_a_text_is_a_name_first():
    names = ["7", "1", "0"]
    assert labels_of(names, [0, "0", 1, "7", "2"]) == [0, 2, 1, 0, 2]
    for bad in (3, -1, "9" * 5000, "١" * 30):
        with pytest.raises(UsageError, match="unknown class"):
            labels_of(names, [bad])


def test_samples_of_classes_of_one_name_keep_their_numbers(cranes, tmp_path):
    pipe = bozzetto.load(cranes)
    run = SampleRun(tmp_path / "run", pipe, method_settings("none", GenerateSettings(batch=4)))
    sample(run, 6)
    assert read_samples(run.folder).label.tolist() == [0, 1, 2, 0, 1, 2]
    assert read_run(run.folder)["settings"]["classes"] == [0, 1, 2]
    drawn = pipe.generate(count=6, batch=4, drafter="none").images
    assert [image.class_name for image in drawn[:3]] == ["crane (0)", "tulip", "crane (2)"]
    assert np.array_equal(read_samples(run.folder).pixels[5], np.asarray(drawn[5].image))
    again = SampleRun(tmp_path / "run", pipe, method_settings("none", GenerateSettings(batch=4)), classes=[0, 1, 2])
    assert sample(again, 8) == 2


def test_the_verbs_tell_them_apart(cranes, tmp_path, capsys):
    options = ["--model", str(cranes), "--out", str(tmp_path / "out")]
    assert cli.main(["sample", "crane", *options]) == 2
    assert "'crane' is 0 and 2" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert cli.main(["generate", "crane", *options]) == 2
    assert "'crane' is 0 and 2" in capsys.readouterr().err
    assert cli.main(["generate", "2", "crane (0)", *options]) == 0
    content = json.loads((tmp_path / "out" / "manifest.json").read_text(encoding="utf-8"))
    assert [image["class"] for image in content["images"]] == ["crane (2)", "crane (0)"]
    pytest.importorskip("jinja2")
    assert cli.main(["report", str(tmp_path / "out"), "--out", str(tmp_path / "r.html")]) == 0
    assert "crane (2)" in (tmp_path / "r.html").read_text(encoding="utf-8")


def test_photographs_of_a_double_name_are_refused_and_of_a_full_one_found(cranes, pictures, tmp_path):
    pipe = bozzetto.load(cranes)
    shutil.copytree(pictures / "red", tmp_path / "test" / "crane (2)")
    shutil.copytree(pictures / "blue", tmp_path / "test" / "TULIP")
    assert set(photographs(pipe, tmp_path, "test").labels.tolist()) == {1, 2}
    (tmp_path / "test" / "crane (2)").rename(tmp_path / "test" / "crane")
    with pytest.raises(UsageError, match="'crane' is 0 and 2"):
        photographs(pipe, tmp_path, "test")


def test_a_folder_of_an_earlier_version_goes_on_and_one_with_merged_classes_does_not(tiny_model, cranes, tmp_path):
    """run.json named classes, without capitals."""
    for model, names, merged in ((tiny_model, ["daisy", "rose", "tulip"], False), (cranes, CRANES, True)):
        folder = tmp_path / model.name
        run = SampleRun(folder, bozzetto.load(model), method_settings("none", GenerateSettings(batch=2)))
        sample(run, 2)
        content = read_run(folder)
        content["settings"] |= {"classes": names, "class_names": names}
        (folder / RUN).write_text(json.dumps(content), encoding="utf-8")
        if merged:
            with pytest.raises(UsageError, match="samples of another run"):
                sample(run, 3)
        else:
            assert sample(run, 3) == 1


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_files_of_names_are_read_with_a_byte_order_mark_and_without(encoding, tmp_path):
    (tmp_path / "names.txt").write_text("Rose\r\ntulip\r\n\r\n", encoding=encoding)
    assert read_class_names(tmp_path / "names.txt", 2) == ["Rose", "tulip"]
    (tmp_path / "names.txt").write_text("Rose\ntulip\n", encoding="utf-16")
    with pytest.raises(UsageError, match=r"names\.txt: class names are not UTF-8"):
        read_class_names(tmp_path / "names.txt", 2)
