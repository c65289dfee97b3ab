"""Evaluations with few photographs, missing classes, constant features: refused before anything is drawn, or said."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import bozzetto
from bozzetto.cli import main as cli
from bozzetto.errors import UsageError
from bozzetto.evaluate.compare import CompareSettings, compare
from bozzetto.evaluate.evaluation import EVALUATION, EvaluateSettings, evaluate, evaluation_table
from bozzetto.evaluate.metrics import Comparison, Interval, interval
from bozzetto.evaluate.output import plain
from bozzetto.evaluate.quality import class_probe
from bozzetto.evaluate.sampling import SampleRun, method_settings, sample
from bozzetto.evaluate.shards import RUN, read_run, read_samples
from bozzetto.pipeline.pipeline import GenerateSettings, Pipeline

pytest.importorskip("torchmetrics")


class Means:
    """Mean colours of a 4 x 4 grid: an extractor that costs nothing."""

    name, dim = "mean colours", 48

    def __call__(self, images: np.ndarray) -> Tensor:
        x = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 255
        return torch.nn.functional.adaptive_avg_pool2d(x, 4).flatten(1)


class Constant(Means):
    """Sees nothing."""

    name = "nothing"

    def __call__(self, images: np.ndarray) -> Tensor:
        return torch.ones(len(images), self.dim)


@pytest.fixture(scope="module")
def pipe(tiny_model: Path) -> Pipeline:
    return bozzetto.load(tiny_model)


def write(root: Path, **splits: dict[str, int]) -> Path:
    """Photographs: how many of each class in each split."""
    rng = np.random.default_rng(0)
    for split, classes in splits.items():
        for label, (name, count) in enumerate(classes.items()):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 90, (32, 32, 3)) + 60 * label
                Image.fromarray(pixels.astype(np.uint8)).save(root / split / name / f"{i}.png")
    return root


def wanted(data: Path, **more: object) -> EvaluateSettings:
    base = GenerateSettings(batch=8)
    return EvaluateSettings(methods=("none",), count=8, bootstrap=4, base=base, data=data, **more)  # type: ignore[arg-type]


ALL = {"daisy": 6, "rose": 6, "tulip": 6}
REFUSED = {
    "one per class": {"train": ALL, "test": {"daisy": 1, "rose": 1, "tulip": 1}},
    "one photograph": {"train": ALL, "test": {"daisy": 1}},
    "seven": {"train": ALL, "test": {"daisy": 7}},
}
TAKEN = {
    "two of three classes": ({"train": {"daisy": 6, "rose": 6}, "test": {"daisy": 5, "rose": 5}}, 1.0),
    "a class without training photographs": ({"train": {"daisy": 6, "tulip": 6}, "test": ALL}, 1.0),
    "a class without test photographs": ({"train": ALL, "test": {"daisy": 4, "tulip": 4}}, 0.5),
    "one class": ({"train": {"rose": 9}, "test": {"rose": 9}}, None),
    "one class of others": ({"train": {"daisy": 6, "rose": 6}, "test": {"tulip": 9}}, None),
    "one training photograph a class": ({"train": {"daisy": 1, "rose": 1, "tulip": 1}, "test": ALL}, None),
    "one training photograph": ({"train": {"daisy": 1}, "test": ALL}, None),
    "unknown classes": ({"train": {"cat": 9}, "test": {"cat": 9}}, None),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_reference_that_gives_no_figures_is_refused_before_anything_is_drawn(case, pipe, tmp_path):
    data = write(tmp_path / "data", **REFUSED[case])
    with pytest.raises(UsageError, match=r"data holds \d test photographs that can be read: at least 8"):
        evaluate(pipe, wanted(data), Means(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("case", TAKEN)
def test_figures_of_what_there_is_come_with_notes(case, pipe, tmp_path):
    splits, accuracy = TAKEN[case]
    data = write(tmp_path / "data", **splits)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        report = evaluate(pipe, wanted(data), Means(), tmp_path / "out")
    text = (tmp_path / "out" / EVALUATION).read_text(encoding="utf-8")
    assert "NaN" not in text and json.loads(text) == report and len(read_samples(tmp_path / "out/samples/none")) == 8
    row = next(r for r in report["results"] if r["method"] == "none")
    assert all(math.isfinite(row[k][p]) for k in ("frechet", "kernel", "precision", "recall") for p in ("low", "high"))
    found = report["settings"]["class_probe_accuracy"]
    assert (found is None) == (accuracy is None and "training photograph a class" not in case)
    assert found is None or accuracy is None or found >= accuracy
    shown = evaluation_table(report)
    assert any("test photographs are few" in note for note in report["notes"])
    assert all(f"note: {note}" in shown for note in report["notes"])


def test_missing_classes_and_left_out_rows_are_named(pipe, tmp_path):
    data = write(tmp_path / "data", train={"daisy": 2, "rose": 1}, test=ALL)
    report = evaluate(pipe, wanted(data), Means(), tmp_path / "out")
    notes = " ".join(report["notes"])
    assert "no training photographs of tulip" in notes and "train has 2 photographs for the rows" in notes
    assert {r["method"] for r in report["results"]} == {"none"}
    assert report["settings"]["photographs"]["count"] == {"test": 18, "train": 3}


def test_photographs_of_other_classes_are_noted(pipe, tmp_path):
    data = write(tmp_path / "data", train={"cat": 8, "dog": 8}, test={"cat": 8, "dog": 8})
    notes = " ".join(evaluate(pipe, wanted(data), Means(), tmp_path / "out")["notes"])
    assert "no class of the photographs is one of the model's (daisy, rose, tulip" in notes


def test_features_that_are_all_the_same_give_figures(pipe, tmp_path):
    report = evaluate(pipe, wanted(write(tmp_path / "data", train=ALL, test=ALL)), Constant(), tmp_path / "out")
    row = next(r for r in report["results"] if r["method"] == "none")
    assert abs(row["frechet"]["value"]) < 1e-9 and abs(row["kernel"]["value"]) < 1e-9


def test_what_was_drawn_before_is_not_lost_where_features_fail(pipe, tmp_path):
    """An extractor that fails on samples only."""

    class Late(Means):
        def __call__(self, images: np.ndarray) -> Tensor:
            found = super().__call__(images)
            return found if len(images) != 8 else found * float("nan")

    data = write(tmp_path / "data", train=ALL, test=ALL)
    with pytest.raises(UsageError, match="not finite"):
        evaluate(pipe, wanted(data, recitation=False), Late(), tmp_path / "out")
    assert len(read_samples(tmp_path / "out/samples/none")) == 8


def test_a_smaller_count_than_the_folder_holds_is_measured(pipe, tmp_path):
    """Shards that are cut by the count had rounds of images that were not read."""
    data = write(tmp_path / "data", train=ALL, test=ALL)
    run = SampleRun(
        tmp_path / "out/samples/none", pipe, method_settings("none", GenerateSettings(batch=3)), method="none"
    )
    sample(run, 12)
    report = evaluate(pipe, wanted(data), Means(), tmp_path / "out")
    assert report["results"][-1]["count"] == 8


def test_numbers_that_are_none_are_null_and_resamples_of_one_image_do_not_count():
    assert plain({"a": [float("nan"), Interval(1.0, float("-inf"), 2.0)]}) == {
        "a": [None, {"value": 1.0, "low": None, "high": 2.0}]
    }
    found = interval(1.0, torch.tensor([0.5, float("nan"), 1.5]))
    assert found.low < 1.0 < found.high and interval(2.0, torch.tensor([float("nan")])) == Interval(2.0, 2.0, 2.0)


@pytest.mark.parametrize(("n", "m"), [(1, 3), (2, 2), (3, 1)])
def test_neighbours_beyond_the_number_of_images_are_those_there_are(n, m):
    generator = torch.Generator().manual_seed(0)
    pair = Comparison(torch.randn(n, 4, generator=generator), torch.randn(m, 4, generator=generator))
    assert pair.precision().shape == (n,) and pair.recall().shape == (m,)


def test_a_probe_knows_the_classes_that_it_has_seen():
    x = torch.tensor([[0.0, 1.0], [0.1, 1.0], [5.0, 1.0]]).double()
    classes, shown = class_probe(x, torch.tensor([7, 7, 2]))
    assert classes.tolist() == [2, 7] and shown(x).tolist() == [7, 7, 2]


@pytest.mark.parametrize("count", [7, 100_001, 10**12])
def test_numbers_of_images_have_limits(count, tiny_model, tmp_path, monkeypatch, capsys):
    for make in (lambda: EvaluateSettings(count=count), lambda: CompareSettings("none", "none", count)):
        with pytest.raises(UsageError, match=f"count = {count} is not allowed: a whole number from 8 to 100000"):
            make()
    monkeypatch.chdir(tmp_path)
    assert cli.main(["evaluate", "--model", str(tiny_model), "--count", str(count)]) == 2
    assert f"count = {count}" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("key", "value"), [("seed", "x"), ("seed", None), ("weights", 5), ("guidance", [1]), ("rule", {}), ("classes", "a")]
)
def test_a_comparison_with_a_folder_whose_run_is_no_run_is_refused(key, value, pipe, tmp_path):
    run = SampleRun(tmp_path / "run", pipe, method_settings("none", GenerateSettings(batch=8)), seed=3)
    sample(run, 8)
    content = read_run(run.folder)
    content["settings"][key] = value
    (run.folder / RUN).write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UsageError, match=rf"run\.json: settings lack {key}"):
        compare(pipe, CompareSettings("none", str(run.folder), 8), Means(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["count", "rounds", "waves", "threads", "batch"])
def test_a_benchmark_has_limits(name, capsys):
    assert cli.main(["bench", f"--{name}", "1000000000000"]) == 2
    assert f"{name} = 1000000000000 is not allowed: a whole number from" in capsys.readouterr().err
