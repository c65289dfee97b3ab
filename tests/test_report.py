"""The report: one page that needs nothing else, says what the runs say, and refuses what is not a run."""

from __future__ import annotations

import base64
import html
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import bozzetto
from bozzetto.cli import main as cli
from bozzetto.decoding.images import PassTrace
from bozzetto.errors import UsageError
from bozzetto.evaluate.sampling import SampleRun, method_settings, sample
from bozzetto.evaluate.shards import read_samples
from bozzetto.pipeline.pipeline import GenerateSettings

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

from bozzetto.evaluate.metrics import Interval
from bozzetto.evaluate.report import build_report
from bozzetto.evaluate.report import figures as draw
from bozzetto.evaluate.report.runs import figure_of
from bozzetto.evaluate.report.tables import cell, number

METHODS = ("none", "jacobi/exact", "jacobi/seed-exact")


class Page(HTMLParser):
    """Addresses, texts and tags of a page."""

    def __init__(self, path: Path):
        super().__init__()
        self.addresses: list[str] = []
        self.images: list[dict[str, str]] = []
        self.tags: list[str] = []
        self.words: list[str] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        found = {k: v or "" for k, v in attrs}
        self.tags.append(tag)
        self.addresses += [v for k, v in found.items() if k in ("src", "href", "xlink:href", "srcset", "action")]
        if tag == "img":
            self.images.append(found)

    def handle_data(self, data):
        if self.tags and self.tags[-1] not in ("style", "script"):
            self.words.append(data)


def interval(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 0.3, "high": value + 0.4}


def evaluation_of(methods: tuple[str, ...]) -> dict:
    """What `bozzetto evaluate` writes, with made-up figures."""
    rows = []
    for reference in ("test", "train"):
        for i, method in enumerate(("photographs", "reconstructions", *methods)):
            row = {"method": method, "reference": reference, "count": 6, "reference_count": 24}
            row |= {name: interval(10.0 + i) for name in ("frechet", "kernel", "precision", "recall", "consistency")}
            row["frechet_change"] = interval(0.25) if method.startswith("jacobi") else None
            if i > 1:
                row |= {"tokens_per_pass": interval(1.5), "ms_per_pass": interval(4.0), "draft_share": 0.1}
                row |= {"speedup": interval(1.0 + i), "images_per_second": interval(2.0)}
            rows.append(row)
    nearest = {"distance": interval(5.0), "distance_unseen": 6.0, "close": interval(0.04), "nearer": interval(0.5)}
    settings = {"model": "tiny", "methods": list(methods), "count": 6, "extractor": "mean colours", "bootstrap": 9}
    settings |= {"command": "bozzetto evaluate --count 6", "commit": "0123abc", "time": "2026-01-02T03:04:05+0000"}
    recited = [{"method": m, **nearest} for m in methods]
    return {"kind": "evaluation", "settings": settings, "results": rows, "memorisation": recited}


@pytest.fixture(scope="module")
def run(tiny_model, tmp_path_factory) -> Path:
    """An evaluation's folder: samples of three methods and figures."""
    folder, pipe = tmp_path_factory.mktemp("runs") / "evaluation", bozzetto.load(tiny_model)
    for method in METHODS:
        settings = method_settings(method, GenerateSettings(batch=3, window=4))
        sample(SampleRun(folder / "samples" / method.replace("/", "-"), pipe, settings), 6)
    (folder / "evaluation.json").write_text(json.dumps(evaluation_of(METHODS)), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def page(run, tmp_path_factory) -> Page:
    return Page(build_report([run], tmp_path_factory.mktemp("page") / "report.html"))


@pytest.fixture
def generated(tiny_model, tmp_path) -> Path:
    options = ["--model", str(tiny_model), "--count", "3", "--window", "4", "--out", str(tmp_path / "gen")]
    assert cli.main(["generate", *options]) == 0
    return tmp_path / "gen"


def test_the_page_needs_no_network_and_no_other_file(page):
    outside = [a for a in page.addresses if not a.startswith(("data:", "#"))]
    assert not outside
    # What is left of addresses are names of XML namespaces, which nothing loads.
    assert set(re.findall(r"https?://[^\s\"'<>]+", page.source)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert "default-src 'none'" in page.source and "url(http" not in page.source and "@import" not in page.source


def test_every_method_and_every_section_is_there(page):
    for method in METHODS:
        assert method in page.text
    for heading in ("Images side by side", "Acceptance maps", "Acceptance by offset", "Target passes"):
        assert heading in page.text
    for heading in ("Speed against quality", "Quality", "Memorisation", "Provenance"):
        assert heading in page.text


def test_figures_carry_the_extractors_name_and_are_not_called_fid(page):
    assert "mean colours" in page.text and "FID" not in page.text


def test_the_page_says_where_the_run_came_from(page):
    for words in ("bozzetto evaluate --count 6", "0123abc", "2026-01-02T03:04:05+0000"):
        assert words in page.text


def test_photographs_and_reconstructions_stand_in_the_tables_and_the_scatter(page):
    assert page.text.count("photographs") > 2 and "reconstructions" in page.text
    scatter = page.source[page.source.index('id="scatter"') :]
    assert "photographs" in scatter[: scatter.index("</section>")]


def test_every_picture_has_a_text_or_is_marked_as_decoration(page):
    assert page.images and all("alt" in image for image in page.images)
    assert sum(bool(image["alt"]) for image in page.images) >= 6 * len(METHODS)


def test_ids_are_unique_although_figures_share_a_page(page):
    ids = re.findall(r'\bid="([^"]+)"', page.source)
    assert len(ids) == len(set(ids))


def test_the_same_runs_give_the_same_bytes(run, tmp_path):
    one, two = (build_report([run], tmp_path / name).read_bytes() for name in ("one.html", "two.html"))
    assert one == two


def test_map_cells_are_the_traces_offsets(run, page):
    """The overlays on the page, decoded again, are clear just where the target drew itself."""
    overlays = [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(i["src"].partition(",")[2]))).convert("RGBA"))
        for i in page.images
        if i["src"].startswith("data:image/png") and "mask" in i.get("class", "")
    ]
    wanted = []
    for method in ("jacobi-exact", "jacobi-seed-exact"):
        wanted += [t.offsets().reshape(4, 4) for t in read_samples(run / "samples" / method).traces]
    assert len(overlays) == len(wanted) == 12
    for found, offsets in zip(overlays, wanted, strict=True):
        assert np.array_equal(found[..., 3] > 0, offsets > 0)


def test_an_overlay_has_one_colour_for_each_offset():
    trace = PassTrace([1, 3, 5], [0, 2, 4], [0, 3, 4])
    colours = draw.offset_colours(3)
    found = draw.overlay(trace, (3, 3), colours).reshape(9, 4)
    assert found[:, 3].tolist() == [0, 255, 255, 0, 255, 255, 255, 255, 0]
    assert found[1, :3].tolist() == colours[0].tolist() and found[7, :3].tolist() == colours[2].tolist()


def test_hostile_names_stay_text(generated, tmp_path):
    path = generated / "manifest.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["images"][0]["class"] = "<script>alert(1)</script>"
    content["command"] = '"><img src=x onerror=alert(1)>'
    path.write_text(json.dumps(content), encoding="utf-8")
    page = Page(build_report([generated], tmp_path / "r.html"))
    assert "<script>alert(1)" not in page.source and "<script>alert(1)</script>" in page.text
    assert not [a for a in page.addresses if a == "x"]


def test_a_manifest_cannot_point_outside_its_folder(generated, tmp_path):
    (tmp_path / "secret.png").write_bytes((generated / "000000-daisy.png").read_bytes())
    (generated / "000000-daisy.png").unlink()
    path = generated / "manifest.json"
    path.write_text(path.read_text(encoding="utf-8").replace("000000-daisy.png", "../secret.png"), encoding="utf-8")
    with pytest.raises(UsageError, match="cannot be read as a picture"):
        build_report([generated], tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


def test_a_run_without_traces_has_pictures_and_says_what_is_missing(generated, tmp_path):
    path = generated / "manifest.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    for image in content["images"]:
        del image["trace"]
    path.write_text(json.dumps(content), encoding="utf-8")
    page = Page(build_report([generated], tmp_path / "r.html"))
    assert len(page.images) == 3 and "no traces" in page.text and "Acceptance maps" not in page.text


@pytest.mark.parametrize("kind", ["evaluation", "bench"])
def test_json_alone_gives_figures_and_no_pictures(kind, tiny_model, tmp_path):
    path = tmp_path / "x.json"
    if kind == "evaluation":
        path.write_text(json.dumps(evaluation_of(METHODS)), encoding="utf-8")
    else:
        options = ["--model", str(tiny_model), "--count", "1", "--rounds", "1", "--window", "2", "--json", str(path)]
        assert cli.main(["bench", *options]) == 0
    page = Page(build_report([path], tmp_path / "r.html"))
    assert not page.images and "jacobi/exact" in page.text and "svg" in page.tags


def test_the_file_of_a_suite_shows_every_model_of_it(tiny_model, tmp_path):
    path, options = tmp_path / "x.json", ["--count", "1", "--rounds", "1", "--window", "2"]
    assert cli.main(["bench", "--model", str(tiny_model), *options, "--json", str(path)]) == 0
    one = json.loads(path.read_text(encoding="utf-8"))
    other = {**one, "settings": {**one["settings"], "model": "another"}}
    path.write_text(json.dumps({"kind": "suite", "bench": [one, other]}), encoding="utf-8")
    page = Page(build_report([path], tmp_path / "r.html"))
    assert "tiny, another" in page.text and page.text.count("x.json, another") == page.text.count("x.json, tiny") > 0
    path.write_text(json.dumps({"kind": "suite", "bench": []}), encoding="utf-8")
    with pytest.raises(UsageError, match="a suite without benchmarks"):
        build_report([path], tmp_path / "r.html")


def test_two_runs_of_one_method_are_told_apart(generated, tmp_path):
    shutil.copytree(generated, tmp_path / "again")
    page = Page(build_report([generated, tmp_path / "again"], tmp_path / "r.html"))
    assert "jacobi/seed-exact (gen)" in page.text and "jacobi/seed-exact (again)" in page.text


@pytest.mark.parametrize(
    "make",
    [
        lambda p: p / "missing",
        lambda p: p,
        lambda p: (p / "a.json").write_text("{") and p / "a.json",
        lambda p: (p / "b.json").write_text("[1]") and p / "b.json",
        lambda p: (p / "c.json").write_text('{"kind": "comparison", "results": []}') and p / "c.json",
        lambda p: (
            (p / "d.json").write_text('{"kind":"evaluation","settings":{},"results":[{"method":"a","frechet":"x"}]}')
            and p / "d.json"
        ),
    ],
    ids=["missing", "no known file", "broken", "a list", "another kind", "words for figures"],
)
def test_what_is_not_a_run_is_named_and_nothing_is_written(make, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    path, out = make(tmp_path / "in"), tmp_path / "out" / "r.html"
    assert cli.main(["report", str(path), "--out", str(out)]) == 2
    assert path.name in capsys.readouterr().err
    assert not out.parent.exists()


def test_no_run_at_all_is_refused(tmp_path):
    with pytest.raises(UsageError, match="no run given"):
        build_report([], tmp_path / "r.html")


def test_figures_are_numbers_or_intervals():
    assert figure_of({"a": 2}, "a") == Interval(2.0) and figure_of({"a": None}, "a") is None
    assert figure_of({"a": {"value": 1, "low": 0, "high": 2}}, "a") == Interval(1.0, 0.0, 2.0)
    with pytest.raises(ValueError, match="neither a number"):
        figure_of({"a": "many"}, "a")


def test_digits_follow_the_interval():
    assert cell(Interval(61.4321, 58.2, 64.9)) == {"text": "61.4", "range": "58.2 to 64.9"}
    assert cell(Interval(0.0, 0.0, 0.0), sign=True) == {"text": "0", "range": ""}
    assert number(-0.04, 1) == "0.0" and number(-1.5, 1) == "−1.5"


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
FLAGS += " --disable-component-update --disable-sync --hide-scrollbars --virtual-time-budget=5000"
# Two frames around the page; what they find is written into the outer page, where --dump-dom shows it.
WRAPPER = """<!doctype html><body style="margin:0">{frames}<script>
window.addEventListener("load", function () {{
  document.querySelectorAll("iframe").forEach(function (f) {{
    var d = f.contentDocument, pictures = Array.from(d.images);
    f.dataset.wide = d.documentElement.scrollWidth - f.contentWindow.innerWidth;
    f.dataset.broken = pictures.filter(function (i) {{ return !i.complete || !i.naturalWidth; }}).length;
    f.dataset.pictures = pictures.length;
    f.dataset.control = d.getElementById("overlay-control").hidden ? "hidden" : "shown";
  }});
}});
</script></body>"""


@pytest.mark.skipif(BROWSER is None, reason="no browser (chromium, google-chrome) is installed")
def test_a_browser_shows_the_page_at_desk_and_phone_width_without_scrolling_sideways(page, tmp_path):
    inside = html.escape(page.source, quote=True)
    frames = "".join(
        f'<iframe style="border:0;width:{w}px;height:900px;display:block" srcdoc="{inside}"></iframe>'
        for w in (1280, 390)
    )
    (tmp_path / "wrapper.html").write_text(WRAPPER.format(frames=frames), encoding="utf-8")
    command = [str(BROWSER), *FLAGS.split(), f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1280,1800"]
    address = (tmp_path / "wrapper.html").as_uri()
    dumped = subprocess.run([*command, "--dump-dom", address], capture_output=True, text=True, timeout=120).stdout
    found = [dict(re.findall(r'data-(\w+)="([^"]*)"', tag)) for tag in re.findall(r"<iframe[^>]*>", dumped)]
    pictures = str(len(page.images))
    assert found == [{"wide": "0", "broken": "0", "pictures": pictures, "control": "shown"}] * 2
    subprocess.run([*command, f"--screenshot={tmp_path / 'shot.png'}", address], capture_output=True, timeout=120)
    with Image.open(tmp_path / "shot.png") as shot:
        assert shot.size == (1280, 1800) and len(shot.convert("RGB").getcolors(1 << 24) or []) > 50
