"""Reports of every kind of model, and of files that nobody of ours wrote: bounded, named, never a traceback."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import bozzetto
from bozzetto.cli import main as cli
from bozzetto.decoding.images import PassTrace
from bozzetto.errors import UsageError
from bozzetto.evaluate.sampling import SampleRun, method_settings, sample
from bozzetto.evaluate.shards import RUN, read_run
from bozzetto.pipeline.pipeline import GenerateSettings
from conftest import write_tiny_vectors
from test_hosted import SIZES, WRITERS

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

from bozzetto.evaluate.report import build_report
from bozzetto.evaluate.report import figures as draw
from bozzetto.evaluate.report.runs import read_any


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, tiny_flow: Path, tiny_mar: Path) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    for family in ("emu3", "lumina"):
        WRITERS[family](root / family)
    return {"flow": tiny_flow, "mar": tiny_mar, **{family: root / family for family in ("emu3", "lumina")}}


@pytest.mark.parametrize(
    ("family", "method"),
    [
        ("flow", "jacobi/chains"),
        ("flow", "none/plain"),
        ("mar", "none/coupled"),
        ("emu3", "jacobi/seed-exact"),
        ("lumina", "jacobi/seed-exact"),
    ],
)
def test_runs_of_generate_of_every_kind_of_model_are_read(family, method, models, tmp_path):
    """Continuous tokens lie in a file of their own; the tokens of Emu3 and Lumina-mGPT hold an end of each line."""
    drafter, rule = method.split("/")
    options = ["--model", str(models[family]), "--drafter", drafter, "--rule", rule, "--count", "2"]
    size = ["--image-size", str(SIZES[family])] if family in SIZES else []
    asked = ["a red tulip", "a dog"] if family in SIZES else []
    assert cli.main(["generate", *asked, *options, *size, "--out", str(tmp_path / "gen")]) == 0
    (run,) = read_any(tmp_path / "gen")
    (drawn,) = run.drawn
    trace = drawn.traces[0]
    assert drawn.method == method.replace("none/plain", "none") and len(drawn.index) == 2
    assert drawn.length == len(trace.offsets()) and draw.cells(trace, drawn.grid).shape == drawn.grid
    build_report([tmp_path / "gen"], tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert (f"{drawn.grid[1]} × {drawn.grid[0]} tokens each" in page) == (drafter == "jacobi")
    rate = json.loads((tmp_path / "gen" / "manifest.json").read_text())["tokens_per_pass"]
    assert drawn.tokens_per_pass == pytest.approx(rate)


def test_ends_of_lines_have_no_place_on_a_map():
    trace = PassTrace([2, 3, 1], [1, 2, 0], [1, 2, 0])  # two lines of two codes and an end each
    assert draw.cells(trace, (2, 2)).tolist() == [[1, 0], [2, 0]] and trace.offsets().tolist() == [1, 0, 1, 2, 0, 0]


def test_a_preview_before_the_picture_has_no_place_on_a_map():
    trace = PassTrace([2, 3, 1], [1, 2, 0], [1, 2, 0])  # two tokens, then two lines of two codes
    assert draw.cells(trace, (1, 4)).tolist() == [[1, 2, 0, 0]]


def test_drafts_of_a_masked_model_have_traces_and_no_maps(models, tmp_path):
    """Its images are ragged: passes that drew others only stood in an image's trace, and cut it short."""
    draft = tmp_path / "draft"
    write_tiny_vectors(draft, "mar")
    method = f"model:length=4:folder={draft}/pathwise:epsilon=1.0"
    from safetensors.torch import load_file, save_file

    state = load_file(draft / "model.safetensors")
    rng = np.random.default_rng(0)
    for name, weight in state.items():
        if weight.is_floating_point():
            weight += weight.new_tensor(0.002 * rng.standard_normal(weight.shape)).to(weight.dtype)
            state[name] = weight
    save_file(state, draft / "model.safetensors")
    pipe = bozzetto.load(models["mar"])
    run = SampleRun(tmp_path / "run", pipe, method_settings(method, GenerateSettings(batch=3)))
    sample(run, 6)
    assert sample(run, 6) == 0
    (drawn,) = read_any(tmp_path / "run")[0].drawn
    assert {sum(t.committed) for t in drawn.traces} == {16} and len({len(t.committed) for t in drawn.traces}) > 1
    build_report([tmp_path / "run"], tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "in an order of their own" in page and 'id="maps"' not in page and 'id="offsets"' not in page


def test_a_run_with_a_gap_shows_what_is_there_before_it(tiny_model, tmp_path):
    run = SampleRun(tmp_path / "run", bozzetto.load(tiny_model), method_settings("none", GenerateSettings(batch=2)))
    sample(run, 8)
    (tmp_path / "run" / "shard-000004.npz").unlink()
    (drawn,) = read_any(tmp_path / "run")[0].drawn
    assert drawn.index == [0, 1, 2, 3] and drawn.total == 6


@pytest.fixture(scope="module")
def whole(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of sample, one of generate, a file of an evaluation and one of a benchmark."""
    root, pipe = tmp_path_factory.mktemp("runs"), bozzetto.load(tiny_model)
    sample(SampleRun(root / "samples", pipe, method_settings("jacobi/exact", GenerateSettings(batch=2, window=3))), 2)
    words = ["generate", "--model", str(tiny_model), "--count", "2", "--window", "4", "--out", str(root / "generate")]
    assert cli.main(words) == 0
    figure = {"value": 1.0, "low": 0.5, "high": 2.0}
    row = {
        "method": "none",
        "reference": "test",
        "count": 8,
        "reference_count": 9,
        "frechet": figure,
        "speedup": figure,
    }
    content: dict[str, Any] = {
        "kind": "evaluation",
        "settings": {"model": "tiny", "methods": ["none"]},
        "results": [row],
    }
    (root / "evaluation").mkdir()
    (root / "evaluation" / "evaluation.json").write_text(json.dumps(content))
    rate = {"tokens_per_pass": 2.0, "speedup": 1.5, "speedup_low": 1.2, "speedup_high": 1.7}
    bench = {"kind": None, "settings": {"model": "tiny"}, "results": [{"method": "none", "batch": 1, **rate}]}
    (root / "bench.json").write_text(json.dumps(bench))
    return {name: root / name for name in ("samples", "generate", "evaluation", "bench.json")}


FILES = {"samples": RUN, "generate": "manifest.json", "evaluation": "evaluation.json", "bench.json": ""}
DEEP = "[" * 100_000 + "]" * 100_000
HUGE = "9" * 5000
TEXTS = {
    "nothing": "",
    "deep": DEEP,
    "deep inside": '{"kind": "samples", "settings": ' + DEEP + "}",
    "a number of 5,000 digits": '{"kind": "samples", "settings": {"method": "none", "seed": ' + HUGE + "}}",
    "settings that are a list": '{"kind": "samples", "settings": [1], "results": [1], "images": [1]}',
    "settings that are a text": '{"kind": "evaluation", "settings": "none", "results": [], "images": "x"}',
    "no settings": '{"kind": "samples", "images": [{}], "results": {}}',
    "a list": "[]",
    "not a number": '{"kind": "evaluation", "settings": {}, "results": [{"method": "none", "frechet": NaN}]}',
    "half a character": '{"kind": "evaluation", "settings": {}, "results": [{"method": "\\ud800"}]}',
    "UTF-16": "{}",
}


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("text", TEXTS)
def test_hostile_files_are_named_and_nothing_is_written(kind, text, whole, tmp_path, capsys):
    path = tmp_path / "run"
    shutil.copytree(whole[kind], path) if whole[kind].is_dir() else shutil.copy(whole[kind], path)
    file = path / FILES[kind] if FILES[kind] else path
    file.write_text(TEXTS[text], encoding="utf-16" if text == "UTF-16" else "utf-8")
    assert cli.main(["report", str(path), "--out", str(tmp_path / "r.html")]) == 2
    error = capsys.readouterr().err
    assert "run" in error and error.count("\n") == 1 and not (tmp_path / "r.html").exists()


CHANGES = {
    "generate": [
        r'"committed": \[[^]]*\]//"committed": [1000000000000]',
        r'"drafted": \[[^]]*\]//"drafted": [1000000000000]',
        r'"accepted": \[[^]]*\]//"accepted": [-1, 16]',
        r'"tokens": \[[^]]*\]//"tokens": [1, 2]',
        r'"tokens": \[[^]]*\]//"tokens": 7',
        r'"index": \d+//"index": "x"',
        r'"seconds": \{[^}]*\}//"seconds": [1]',
        r'"drafter": "\w+"//"drafter": {"a": 1}',
        r'"drafter": "\w+"//"drafter": "%s"' % ("x" * 100_000),
        r'"tv_budget": null//"tv_budget": "much"',
        r'"tv_budget": null//"tv_budget": 1%s' % ("0" * 400),
        r'"file": "[^"]+"//"file": "../../etc/passwd"',
        r'"file": "[^"]+"//"file": null',
    ],
    "evaluation": [
        r'"value": 1.0//"value": 1e300',
        r'"value": 1.0//"value": 1%s' % ("0" * 400),
        r'"value": 1.0//"value": "1"',
        r'"method": "none"//"method": ["none"]',
        r'"method": "none"//"method": "a\u0000b"',
        r'"reference": "test"//"reference": {"a": []}',
        r'"methods": \["none"\]//"methods": 5',
        r'"model": "tiny"//"count": "many"',
    ],
    "samples": [
        r'"method": "jacobi/exact"//"method": 5',
        r'"class_names": \[[^]]*\]//"class_names": 5',
        r'"image_size": 32//"image_size": 64',
        r'"tv_budget": null//"tv_budget": []',
        r'"classes": \[[^]]*\]//"classes": [2, 2, 2]',
    ],
    "bench.json": [r'"speedup": 1.5//"speedup": 1e308', r'"batch": 1//"batch": {"a": 1}, "method": 5'],
}


@pytest.mark.parametrize(("kind", "change"), [(kind, change) for kind, some in CHANGES.items() for change in some])
def test_values_that_no_run_has_are_refused(kind, change, whole, tmp_path, capsys):
    path = tmp_path / "run"
    shutil.copytree(whole[kind], path) if whole[kind].is_dir() else shutil.copy(whole[kind], path)
    file = path / FILES[kind] if FILES[kind] else path
    pattern, _, new = change.partition("//")
    text, count = re.subn(pattern, lambda match: new, file.read_text(encoding="utf-8"))
    assert count
    file.write_text(text, encoding="utf-8")
    code = cli.main(["report", str(path), "--out", str(tmp_path / "r.html")])
    error = capsys.readouterr().err
    assert (code, (tmp_path / "r.html").exists()) in {(2, False), (0, True)}
    assert code == 0 or ("run" in error and error.count("\n") == 1)
    assert code == 2 or any(harmless in change for harmless in ("reference", "methods", "count", "class_names"))


def test_a_picture_of_too_many_pixels_is_refused(whole, tmp_path):
    path = Path(shutil.copytree(whole["generate"], tmp_path / "run"))
    name = json.loads((path / "manifest.json").read_text())["images"][0]["file"]
    Image.new("L", (20_000, 10_000)).save(path / name)
    with pytest.raises(UsageError, match="pixels"):
        build_report([path], tmp_path / "r.html")


@pytest.mark.parametrize("text", ["deep", "a number of 5,000 digits", "settings that are a list", "a list", "nothing"])
def test_sample_refuses_a_folder_with_a_hostile_run(text, whole, tiny_model, tmp_path, capsys):
    path = Path(shutil.copytree(whole["samples"], tmp_path / "run"))
    (path / RUN).write_text(TEXTS[text])
    with pytest.raises(UsageError):
        read_run(path)
    assert cli.main(["sample", "--model", str(tiny_model), "--count", "2", "--out", str(path)]) == 2
    assert RUN in capsys.readouterr().err and (path / RUN).read_text() == TEXTS[text]
