"""Scripts in benchmarks/ run on a report of `bozzetto bench`."""

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "plot_windows.py"


def test_the_window_plot_is_a_readable_svg(tmp_path: Path) -> None:
    cell = {"method": "jacobi/seed-exact", "batch": 1, "guidance": 2.0, "top_k": 0}
    rows = [{**cell, "window": w, "tokens_per_pass": t, "speedup": s} for w, t, s in ((4, 2.0, 1.5), (16, 4.0, 2.5))]
    (tmp_path / "report.json").write_text(json.dumps({"results": rows}))
    out = tmp_path / "plot.svg"
    subprocess.run([sys.executable, str(SCRIPT), str(tmp_path / "report.json"), str(out)], check=True)
    svg = ElementTree.fromstring(out.read_text())
    texts = [element.text for element in svg.iter() if element.tag.endswith("text")]
    assert {"tokens per target pass", "guidance 2", "16"} <= set(texts)


def script(name: str, *arguments: object) -> str:
    path = SCRIPT.parent / name
    run = [sys.executable, str(path), *map(str, arguments)]
    return subprocess.run(run, check=True, capture_output=True, text=True).stdout


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
