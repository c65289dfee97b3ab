"""The benchmark: every method in every cell, ratios to our own sequential engine, honest units."""

from __future__ import annotations

import json
import math

import pytest
import torch

from bozzetto import UsageError, load
from bozzetto.evaluate.bench import BenchSettings, bench, bench_table
from bozzetto.evaluate.output import write_report
from bozzetto.pipeline.pipeline import Pipeline

FIELDS = {"method", "batch", "guidance", "window", "top_k", "tokens_per_pass", "passes", "draft_share", "rounds"}
FIELDS |= {f"{name}{end}" for name in ("ms_per_pass", "images_per_second", "speedup") for end in ("", "_low", "_high")}
FIELDS |= {"overhead_vs_bare", "ceiling", "ceiling_next", "head_calls", "head_rows"}


@pytest.fixture(scope="module")
def pipe(tiny_model) -> Pipeline:
    return load(tiny_model)


@pytest.fixture(scope="module")
def report(pipe: Pipeline) -> dict:
    return bench(pipe, BenchSettings(batches=(1, 2), guidances=(1.0, 2.0), windows=(3, 4), count=3, rounds=2))


def rows(report: dict, method: str) -> list[dict]:
    return [r for r in report["results"] if r["method"] == method]


def test_every_cell_has_every_method_and_every_row_every_field(report):
    cells = {(b, g) for b in (1, 2) for g in (1.0, 2.0)}
    for method, windows in [("bare", [1]), ("none", [1]), ("jacobi/seed-exact", [3, 4]), ("jacobi/exact", [3, 4])]:
        found = [(r["batch"], r["guidance"], r["window"]) for r in rows(report, method)]
        assert sorted(found) == sorted((*cell, window) for cell in cells for window in windows)
    for row in report["results"]:
        assert set(row) == FIELDS


def test_speedup_of_sequential_decoding_is_one(report):
    assert {r[k] for r in rows(report, "none") for k in ("speedup", "speedup_low", "speedup_high")} == {1.0}
    assert {r["tokens_per_pass"] for r in rows(report, "none")} == {1.0}


def test_overhead_over_the_bare_loop_stands_in_the_sequential_row_alone(report):
    for row in report["results"]:
        assert (row["overhead_vs_bare"] is not None) == (row["method"] == "none")


def test_figures_are_consistent(report):
    for row in report["results"]:
        assert row["rounds"] == max(2, math.ceil(3 / row["batch"]))
        assert row["speedup_low"] <= row["speedup"] <= row["speedup_high"]
        assert row["ms_per_pass_low"] <= row["ms_per_pass"] <= row["ms_per_pass_high"]
        assert 0 <= row["draft_share"] < 1
        assert row["tokens_per_pass"] >= 1
    for row in [*rows(report, "none"), *rows(report, "bare")]:
        assert row["passes"] == 16 * row["rounds"]


def test_tokens_per_pass_are_those_of_generate(pipe):
    report = bench(pipe, BenchSettings(methods=("jacobi/seed-exact",), windows=(4,), batches=(3,), count=3, rounds=1))
    result = pipe.generate(seed=0, count=3, batch=3, window=4)
    assert rows(report, "jacobi/seed-exact")[0]["tokens_per_pass"] == pytest.approx(result.tokens_per_pass)


def test_the_bare_loop_makes_one_pass_per_token_of_the_shape_of_sequential_decoding(pipe):
    cell = BenchSettings(guidances=(2.0,)).cells()[0]
    logits = [scores.logits for scores in pipe.bare_passes(torch.tensor([0, 1]), cell)]
    assert len(logits) == 16
    assert {tuple(x.shape) for x in logits} == {(4, 1, 16)}


def test_the_report_is_json_with_provenance_and_the_threads_are_put_back(pipe, report, tmp_path):
    write_report(tmp_path / "b.json", report)
    again = json.loads((tmp_path / "b.json").read_text())
    assert set(again) == {"settings", "results"}
    assert {"model", "methods", "count", "dtype", "threads", "machine", "versions"} <= set(again["settings"])
    before = torch.get_num_threads()
    found = bench(pipe, BenchSettings(methods=("none",), count=1, rounds=1, threads=2))
    assert found["settings"]["threads"] == 2
    assert torch.get_num_threads() == before


def test_the_ceiling_is_measured_for_windows_only(pipe):
    found = bench(pipe, BenchSettings(methods=("none", "jacobi/exact"), windows=(3,), count=1, rounds=1))
    for row in found["results"]:
        if row["method"] == "jacobi/exact":
            assert 0 < row["ceiling"] <= 1 and 0 < row["ceiling_next"] <= 1
        else:
            assert row["ceiling"] is None


def test_the_table_has_a_line_per_row(report):
    assert len(bench_table(report).splitlines()) == 1 + len(report["results"])


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"methods": ("oracle",)}, "oracle"),
        ({"methods": ("jacobi/lax",)}, "lax"),
        ({"batches": (0,)}, "batch = 0"),
        ({"guidances": (0.5,)}, "guidance = 0.5"),
        ({"windows": (-1,)}, "window = -1"),
        ({"count": 0}, "count = 0"),
        ({"methods": ()}, "methods is empty"),
    ],
)
def test_bad_settings_are_refused_before_measuring(options, named):
    with pytest.raises(UsageError, match=named):
        BenchSettings(**options)
