"""The fast engine in one run: methods over sequential decoding, this build and another beside it.

    python benchmarks/engine.py --against ../before --json engine.json

Every build is a process of its own that stays alive; builds and methods take turns, round by round. A row says the
least and the median seconds of decoding one batch of images (without their pictures), how many times faster than
sequential decoding of the same build, batch and guidance a method is by either, and how much faster than the other
build. `start` is a
command with an empty cache, first picture included, and the same again.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

METHODS = {
    "flowers": (
        "none/seed-exact",
        "jacobi/seed-exact",
        "jacobi/exact",
        "jacobi:fill=glance:fresh=1/exact",
        "eagle:tree=chain-3/block",
        "eagle:tree=chain-5/block",
        "glance:tree=chain-6/block",
        "eagle:tree=chain-6/annealed:delta=6:nu=0.1@tv_budget=10",
        "eagle:tree=chain-6/lantern++:lambda=4@tv_budget=10",
        "eagle:tree=4x2x1/tree",
        "eagle:tree=4x2x1/lantern++",
        "eagle:tree=dynamic/tree",
        "eagle:tree=dynamic/lantern",
    ),
    "flowers-flow": (
        "none/plain",
        "jacobi/chains",
        "jacobi/pathwise:epsilon=0.1",
        "sketch/cspd:variant=released",
        "sketch:length=15/cspd:variant=released",
    ),
    "flowers-mar": ("none/plain", "none/coupled", "model/cspd:variant=released", "model/pathwise:epsilon=0.1"),
}
HERE = Path(__file__).resolve().parent.parent
IMAGES = 2  # drawn one after another where a batch holds fewer
Row = dict[str, Any]


def work() -> None:
    """Answer lines of what to draw with the seconds that decoding took."""
    import bozzetto

    pipes: dict[str, Any] = {}
    for line in sys.stdin:
        asked = json.loads(line)
        model, dtype = asked.pop("model"), asked.pop("dtype")
        if model not in pipes:
            pipes[model] = bozzetto.load(model, dtype=dtype)
        found = pipes[model].generate(seed=5, **asked)
        seconds = found.seconds["target"] + found.seconds["draft"]
        tokens = sum(len(image.tokens) for image in found.images) / sum(i.target_passes for i in found.images)
        print(json.dumps({"seconds": seconds, "tokens_per_pass": tokens}), flush=True)


def environment(tree: Path, **more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(tree / "src"), **more}


class Build:
    """A process that draws with the sources of a tree."""

    def __init__(self, tree: Path):
        command = [sys.executable, str(HERE / "benchmarks" / "engine.py"), "--worker"]
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, text=True, env=environment(tree), **pipes)

    def draw(self, asked: Row) -> Row:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"a build ended while it drew {asked}")
        return dict(json.loads(answer))

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def start_up(tree: Path, model: str) -> tuple[float, float]:
    """Seconds of a command that draws one picture, with an empty cache and again."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "bozzetto", "generate", "--model", model, "--count", "1", "--compile", "max"]
        command += ["--dtype", "bfloat16", "--out", str(Path(folder) / "out")]
        for _ in range(2):
            began = time.perf_counter()
            given = environment(tree, BOZZETTO_CACHE=str(Path(folder) / "cache"))
            subprocess.run(command, check=True, env=given, capture_output=True)
            found.append(time.perf_counter() - began)
    return found[0], found[1]


def measure(options: argparse.Namespace) -> list[Row]:
    """A row for each model, method and batch. The methods of a model and a batch take turns, too."""
    trees = [HERE] if options.against is None else [options.against.resolve(), HERE]
    builds, rows = [Build(tree) for tree in trees], []
    groups = [(m, int(batch)) for m in options.models.split(",") for batch in options.batches.split(",")]
    try:
        for model, batch in groups:
            methods = options.methods.split(",") if options.methods else METHODS[model]
            seconds = {method: [[] for _ in builds] for method in methods}
            tokens: dict[str, float] = {}
            # The first round makes what is made once, and widths are learnt.
            turns = [(number, method) for number in range(options.rounds + 1) for method in methods]
            for number, method in tqdm(turns, desc=f"{model}, {batch} at a time", file=sys.stderr):
                for i in range(len(builds))[:: 1 if number % 2 else -1]:
                    answer = builds[i].draw(asked_of(model, method, batch, options))
                    tokens[method] = answer["tokens_per_pass"]
                    if number:
                        seconds[method][i].append(answer["seconds"])
            rows += rows_of(model, batch, seconds, tokens)
    finally:
        for build in builds:
            build.close()
    return rows


def asked_of(model: str, method: str, batch: int, options: argparse.Namespace) -> Row:
    """What a worker is asked to draw. method: DRAFTER/RULE, or DRAFTER/RULE@OPTION=NUMBER."""
    name, _, more = method.partition("@")
    drafter, _, rule = name.rpartition("/")
    law: Row = {"batch": batch, "count": max(batch, IMAGES), "guidance": options.guidance}
    if more:
        key, _, value = more.partition("=")
        law[key] = float(value)
    return {"model": model, "dtype": options.dtype, "compile": "max", "drafter": drafter, "rule": rule, **law}


def rows_of(model: str, batch: int, seconds: dict[str, list[list[float]]], tokens: dict[str, float]) -> list[Row]:
    """What was measured of a model and a batch: seconds by method and build. The first method is sequential."""
    rows: list[Row] = []
    for method, parts in seconds.items():
        share = batch / max(batch, IMAGES)
        least, middle = ([f(part) * share for part in parts] for f in (min, statistics.median))
        row: Row = {"model": model, "method": method, "batch": batch, "seconds": least[-1], "median": middle[-1]}
        base = rows[0] if rows else row
        row["over_sequential"] = base["seconds"] / row["seconds"]
        row["medians"] = base["median"] / row["median"]
        row["tokens_per_pass"] = tokens[method]
        if len(parts) > 1:
            row |= {"before": least[0], "over_before": least[0] / least[-1], "pairs": middle[0] / middle[-1]}
        rows.append(row)
    return rows


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--against", type=Path, help="a clone of an earlier commit")
    parser.add_argument("--models", default=",".join(METHODS), help="shipped models or folders, separated by commas")
    parser.add_argument("--methods", default="", help="in place of the usual ones; the first is sequential")
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--skip-start", action="store_true", help="leave out the start of a process")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(words)
    if options.worker:
        work()
        return 0
    from bozzetto.common.files import write_text  # workers run builds that may have no such modules
    from bozzetto.evaluate.columns import table
    from bozzetto.evaluate.provenance import provenance

    rows, report = measure(options), {"about": provenance()}
    cells = [[f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    print(table(list(rows[0]), cells))
    if not options.skip_start:
        report["start"] = start_up(HERE, options.models.split(",")[0])
        print("start: {:.1f} s with an empty cache, then {:.1f} s".format(*report["start"]))
    if options.json:
        write_text(options.json, json.dumps({**report, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
