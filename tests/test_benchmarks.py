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
