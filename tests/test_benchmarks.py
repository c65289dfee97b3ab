"""Scripts in benchmarks/ run, at tiny sizes, and their figures fit together."""

from __future__ import annotations

import contextlib
import io
import json
import runpy
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import pytest

from bozzetto.checkpoints.folders import load_target, save_drafter
from bozzetto.drafters.eagle import EagleNet, eagle_config
from bozzetto.drafters.glance import GlanceConfig, GlanceNet

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "plot_windows.py"


def test_the_window_plot_is_a_readable_svg(tmp_path: Path) -> None:
    cell = {"method": "jacobi/seed-exact", "batch": 1, "guidance": 2.0, "top_k": 0}
    rows = [{**cell, "window": w, "tokens_per_pass": t, "speedup": s} for w, t, s in ((4, 2.0, 1.5), (16, 4.0, 2.5))]
    (tmp_path / "report.json").write_text(json.dumps({"results": rows}))
    out = tmp_path / "plot.svg"
    script(SCRIPT.name, tmp_path / "report.json", out)
    svg = ElementTree.fromstring(out.read_text())
    texts = [element.text for element in svg.iter() if element.tag.endswith("text")]
    assert {"tokens per target pass", "guidance 2", "16"} <= set(texts)


def script(name: str, *arguments: object) -> str:
    """What a script prints. It runs in this process: a new one takes longer to import torch than to do its work."""
    path, said = SCRIPT.parent / name, io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.setattr(sys, "argv", [str(path), *map(str, arguments)])
        patch.syspath_prepend(str(path.parent))
        try:
            runpy.run_path(str(path), run_name="__main__")
        except SystemExit as end:
            if end.code:
                raise
    return said.getvalue()


def test_the_head_of_a_published_shape_is_timed_with_and_without_speculation(tmp_path: Path) -> None:
    out = tmp_path / "head.json"
    script("mar_head.py", "--size", "tiny", "--steps", 12, "--rounds", 1, "--json", out)
    rows = json.loads(out.read_text())["results"]
    assert rows[0]["depth"] == 0 and rows[0]["calls"] == 12
    assert all(0 < row["calls"] <= 12 and row["ms"] > 0 for row in rows)
    assert min(row["calls"] for row in rows) < 12


def test_the_bound_of_a_window_is_its_tokens_at_the_price_of_its_bare_passes(tiny_flow: Path, tmp_path: Path) -> None:
    out = tmp_path / "bound.json"
    methods = "jacobi/pathwise:epsilon=9@window=4"
    text = script(
        "path_bound.py", "--model", tiny_flow, "--methods", methods, "--images", 2, "--rounds", 2, "--json", out
    )
    plain, drafted = json.loads(out.read_text())["results"]
    assert plain["tokens_per_pass"] == 1 and plain["speedup"] == 1 and plain["window"] == 1
    assert drafted["window"] == 4 and 1 < drafted["tokens_per_pass"] <= 4
    assert drafted["bare_ms"] < drafted["ms_per_pass"]
    assert "bound" in text and methods in text


QUICK = ("--shapes", "tiny", "--widths", 4, "--tokens", 8, "--rounds", 2, "--compile", "off")


def check_times(rows: list[dict[str, Any]]) -> None:
    """Times are positive, and ratios are those of the times."""
    of = {(row["part"], row["way"], row["width"]): row["rounds_ms"] for row in rows}
    for row in rows:
        ms = row["rounds_ms"]
        assert len(ms) == 2 and min(ms) > 0
        assert row["ms_per_pass"] == {"median": median(ms), "low": min(ms), "high": max(ms)}
        for name, other, up in (
            ("over_eager", ("eager", row["width"]), True),
            ("over_width_1", (row["way"], 1), False),
        ):
            below = of.get((row["part"], *other))
            ratios = None if below is None else [b / a if up else a / b for a, b in zip(ms, below, strict=True)]
            assert (row[name] is None) == (ratios is None)
            if ratios:
                wanted = {"median": median(ratios), "low": min(ratios), "high": max(ratios)}
                assert row[name] == pytest.approx(wanted)


def test_what_a_pass_costs(tmp_path: Path) -> None:
    out = tmp_path / "pass.json"
    text = script("pass_cost.py", *QUICK, "--batch", 1, 2, "--json", out)
    report = json.loads(out.read_text())
    assert report["settings"]["tokens"] == 8 and report["machine"]["threads"] >= 1
    for batch in (1, 2):
        rows = [row for row in report["results"] if row["batch"] == batch]
        assert [(row["way"], row["width"]) for row in rows] == [("eager", 1), ("slots", 1), ("slots", 4)]
        check_times(rows)
        assert [row["break_even_tokens_per_pass"] for row in rows[:2]] == [None, 1]
        price = rows[2]["over_width_1"]["median"]
        assert rows[2]["break_even_tokens_per_pass"] == price and rows[2]["speedup_at_most"] == pytest.approx(4 / price)
    assert "no acceptance is claimed" in text


def test_passes_that_do_not_fit_into_an_image_leave_no_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "pass.json"
    with pytest.raises(SystemExit):
        script("pass_cost.py", "--shapes", "tiny", "--tokens", 64, "--json", out)
    assert "64 passes of up to 16 places do not fit" in capsys.readouterr().err and not out.exists()


def test_the_suite_for_a_gpu_runs_small_on_a_cpu(tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "suite.json"
    text = script("gpu_suite.py", "--device", "cpu", *QUICK, "--batch", 1, "--model", tiny_model, "--json", out)
    report = json.loads(out.read_text())
    assert report["finished"] and not report["not_run"] and min(report["rates"].values()) > 0
    assert [cell["error"] for cell in report["cells"]] == [None] * 4
    first, model, windows, masked = (cell["rows"] for cell in report["cells"])
    for rows, ways in ((first, ["eager", "slots"]), (windows, ["eager", "slots", "slots"]), (masked, ["eager"] * 2)):
        assert [row["way"] for row in rows] == ways
        check_times(rows)
        assert all(row["share"] == pytest.approx(row["floor_ms"] / row["ms_per_pass"]["median"]) for row in rows)
    speed = {row["way"]: (row["tokens_per_pass"], row["speedup"]) for row in model}
    assert speed["none"] == (1, 1) and 1 < speed["jacobi/seed-exact"][0] <= 4 and speed["jacobi/seed-exact"][1] > 0
    assert "tokens/pass" in text and "no acceptance is claimed" in text


def test_the_suite_without_time_says_what_it_left_out(tmp_path: Path) -> None:
    out = tmp_path / "suite.json"
    text = script("gpu_suite.py", "--device", "cpu", *QUICK, "--minutes", 0, "--json", out)
    report = json.loads(out.read_text())
    assert report["cells"] == [] and not report["finished"]
    assert report["not_run"][:2] == ["LlamaGen-tiny 64 batch 1", "flowers batch 1"] and "not run: LlamaGen-tiny" in text


@pytest.fixture
def suite(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import gpu_suite  # type: ignore[import-not-found]

    return gpu_suite


def test_cells_end_at_the_deadline_and_a_failing_one_alone(suite: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite.gc, "collect", lambda: None)  # takes seconds in a process that holds this many modules
    row: dict[str, Any] = {"part": "pass", "way": "eager", "width": 1, "error": None}

    def fine() -> Iterator[dict[str, Any]]:
        yield row

    def failing() -> Iterator[dict[str, Any]]:
        yield row
        raise RuntimeError("out of\nluck")

    def long() -> Iterator[dict[str, Any]]:
        yield row
        time.sleep(60)

    work = {"a": fine, "b": failing, "c": long, "d": fine}
    cells = [suite.Cell(name, "sequential", rows) for name, rows in work.items()]
    report: dict[str, Any] = {"cells": [], "not_run": [], "finished": False}
    saved: list[int] = []
    began = time.monotonic()
    suite.run_cells(cells, began + 2, report, lambda: saved.append(len(report["cells"])), lambda: None)
    assert time.monotonic() - began < 30
    assert [cell["error"] for cell in report["cells"]] == [None, "RuntimeError: out of luck", "stopped at the deadline"]
    assert [cell["rows"] for cell in report["cells"]] == [[row]] * 3
    assert report["not_run"] == ["d"] and not report["finished"] and saved == [1, 2, 3, 3]


def test_a_way_that_fails_leaves_the_others(suite: ModuleType) -> None:
    def broken() -> Any:
        raise RuntimeError("no graph")

    ways = [suite.Way({"part": "pass", "way": "replay", "width": 1}, broken)]
    ways.append(suite.Way({"part": "pass", "way": "eager", "width": 1}, lambda: lambda: 2.0))
    failed, timed = suite.measure_ways(ways, 3, tolerant=True)
    assert failed["error"] == "RuntimeError: no graph" and "ms_per_pass" not in failed
    assert timed["rounds_ms"] == [2.0] * 3 and timed["error"] is None
    with pytest.raises(RuntimeError, match="no graph"):
        list(suite.measure_ways(ways, 3))


def test_a_row_that_takes_too_long_to_compile_leaves_the_others(suite: ModuleType) -> None:
    options = suite._options(["--json", "-", "--way-minutes", "0.002", "--rounds", "2"])
    made = suite.Suite(options, suite.Rates(1e9, 1e12), time.monotonic() + 600)
    common = {"part": "pass", "width": 1, "floor_ms": 1.0}
    ways = [suite.Way({**common, "way": "slots"}, lambda: time.sleep(60))]
    ways.append(suite.Way({**common, "way": "eager"}, lambda: lambda: 2.0))
    with suite.stopped_after(20):
        failed, timed = made._measure(ways)
        assert 1 < suite.signal.getitimer(suite.signal.ITIMER_REAL)[0] < 20
    assert suite.signal.getitimer(suite.signal.ITIMER_REAL)[0] == 0
    assert failed["error"] == "TimeoutError: not ready after 0.12 s" and timed["share"] == 0.5


def test_what_is_replayed_is_a_whole_pass(suite: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "Replay", lambda work: work)
    options = suite._options(["--json", "-", "--device", "cpu", *map(str, QUICK), "--batch", "2"])
    made = suite.Suite(options, suite.Rates(1e9, 1e12), time.monotonic() + 600)
    made.replays = True
    rows = list(made.passes("tiny", 16, 2, [1, 4]))
    ways = [("eager", 1), ("slots", 1), ("replay", 1), ("slots", 4), ("replay", 4)]
    assert [(row["way"], row["width"]) for row in rows] == ways
    check_times(rows)


def test_a_loaded_server_draws_every_image_right_and_loses_none(tiny_model: Path, tmp_path: Path) -> None:
    """Of every method that a model with drafters has, at once."""
    out, model = tmp_path / "load.json", Path(shutil.copytree(tiny_model, tmp_path / "tiny"))
    config = load_target(model, "llamagen").config
    nets = {"eagle": EagleNet(eagle_config(config)), "glance": GlanceNet(GlanceConfig(32, 16, 4, 4, 8, 16, 4))}
    for name, net in nets.items():
        save_drafter(model / name, net, model, {})
    sizes = ("--count", 24, "--concurrent", 6, "--alone", 4, "--disconnects", 0.1, "--slots", 4, "--bad", 0.2)
    text = script("serve_load.py", "--model", model, *sizes, "--json", out)
    found = json.loads(out.read_text())
    assert found["failed"] == found["wrong"] == 0 and found["equal"] > 12
    assert {"eagle/block", "glance/block", "jacobi:second=eagle/exact"} <= set(found["methods"])
    assert found["bad"] > 1 and found["bad_not_refused"] == 0
    assert found["overload"]["drawn"] and not found["overload"]["other"]
    assert found["sigterm"]["answered"] >= found["sigterm"]["accepted"] and found["sigterm"]["exit_status"] == 0
    assert 0 < found["p50"] <= found["p95"] and "images per second" in text


def test_the_headline_puts_a_row_and_a_bar_for_each_method(tmp_path: Path) -> None:
    spread = {"value": 120.0, "low": 110.0, "high": 130.0}
    row = {"model": "flowers", "tokens_per_pass": 1.0, "speedup": 1.0, "speedup_low": 1.0, "speedup_high": 1.0}
    rows = [
        {**row, "method": "none", "title": "sequential", "exact": True, "frechet": spread, "frechet_change": None},
        {**row, "method": "a/b", "title": "A & B", "exact": False, "frechet": spread, "frechet_change": spread}
        | {"tokens_per_pass": 3.5, "speedup": 2.25},
        {**row, "model": "variant", "method": "none", "title": "one step", "exact": True, "frechet": spread}
        | {"frechet_change": None, "base": "flowers", "over_base": 4.0, "frechet_over_base": spread},
        {**row, "method": "c/d", "title": "slow", "exact": False, "frechet": spread, "frechet_change": spread},
    ]
    (tmp_path / "suite.json").write_text(json.dumps({"kind": "suite", "results": rows}))
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- followers -->\nold\n<!-- followers, end -->\nafter\n")
    full = tmp_path / "all.md"
    full.write_text(readme.read_text())
    flags = ("--readme", readme, "--full", full, "--plot", tmp_path / "plot.svg")
    script("headline.py", tmp_path / "suite.json", *flags)
    lines = readme.read_text().splitlines()
    assert lines[0] == "before" and lines[-1] == "after" and "old" not in lines
    assert lines[4].startswith("| `flowers` | `a/b` | A & B | no | 3.50 | 2.25x") and "`none`" in lines[5]
    svg = ElementTree.fromstring((tmp_path / "plot.svg").read_text())
    texts = [element.text for element in svg.iter() if element.tag.endswith("text")]
    assert {"A & B", "sequential", "slow", "2.25x, 3.50 tokens per pass"} <= set(texts)
    assert "4.00x, 1.00 tokens per pass" in texts and "4.00x over sequential `flowers`" in readme.read_text()
    assert "slow" not in readme.read_text()
    again = full.read_text()
    script("headline.py", tmp_path / "suite.json", *flags)
    assert full.read_text() == again
    assert markdown_of(tmp_path / "suite.json") in again


def markdown_of(report: Path) -> str:
    """As printed."""
    return script("headline.py", report).rstrip("\n")


def test_memory_is_measured_in_fresh_processes(tmp_path):
    out = tmp_path / "memory.json"
    text = script("memory.py", "--shapes", "janus-tiny", "--dtypes", "bfloat16", "--json", out)
    rows = json.loads(out.read_text())["rows"]
    assert [row["shape"] for row in rows] == ["janus-tiny"]
    assert all(row["weights"] > 0 and row["peak"]["all"] >= row["stays"]["all"] for row in rows)
    assert "janus-tiny" in text


def test_whole_images_of_published_shapes_are_drawn_on_a_device(tmp_path):
    out, shapes = tmp_path / "device.json", ("llamagen-tiny", "janus-tiny")
    text = script("device_smoke.py", "--device", "cpu", "--shapes", *shapes, "--batch", 1, 3, "--json", out)
    rows = json.loads(out.read_text())["rows"]
    assert [(r["shape"], r["batch"], r["method"]) for r in rows] == [
        (shape, batch, method) for shape in shapes for batch in (1, 3) for method in ("none", "jacobi")
    ]
    assert all(r["tokens_per_second"] > 0 and r["memory"] > 0 and r["tokens_per_pass"] >= 1 for r in rows)
    assert "tokens/pass" in text


def test_the_engine_is_measured_beside_another_build(tiny_model: Path, tmp_path: Path) -> None:
    words = [
        "--models",
        tiny_model,
        "--methods",
        "none/seed-exact,jacobi/exact",
        "--batches",
        "2",
        "--rounds",
        "1",
    ]
    here = Path(__file__).parent.parent
    shown = script("engine.py", *words, "--against", here, "--skip-start", "--json", tmp_path / "engine.json")
    rows = json.loads((tmp_path / "engine.json").read_text())["rows"]
    assert [row["method"] for row in rows] == ["none/seed-exact", "jacobi/exact"] and "over_before" in shown
    assert rows[0]["over_sequential"] == rows[0]["tokens_per_pass"] == 1 < rows[1]["tokens_per_pass"]
    assert all(row["seconds"] > 0 and row["before"] > 0 for row in rows)


def test_a_race_is_between_the_same_pictures(tiny_model: Path) -> None:
    """And the fastest method stands last."""
    methods = ("jacobi/seed-exact", "jacobi/exact")
    head, *rows = script("race.py", "--model", tiny_model, "--images", 2, "--methods", *methods).splitlines()
    assert "our kernels" in head and len(rows) == 2
    ends = {row.split("sequential, ")[1].split()[2].rstrip(":"): row.rpartition(": ")[2] for row in rows}
    assert ends == {"jacobi/seed-exact": "yes", "jacobi/exact": "NO"}
    assert float(rows[0].split()[3]) >= float(rows[1].split()[3])
