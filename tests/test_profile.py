"""The profile: work counted exactly, parts of a pass, advice by explicit rules, files whole or not at all."""

from __future__ import annotations

import errno
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import bozzetto
from bozzetto import UsageError
from bozzetto.checkpoints.folders import load_target
from bozzetto.cli.main import main
from bozzetto.evaluate import passes
from bozzetto.evaluate.passes import (
    AROUND,
    ATTENTION,
    DISPATCH,
    EMBEDDING,
    KERNELS,
    NARROW,
    PRODUCTS,
    BarePass,
    by_part,
    pass_work,
    product_names,
    roof,
)
from bozzetto.evaluate.profile import ProfileSettings, advise, profile, profile_table
from bozzetto.pipeline.pipeline import GenerateSettings, Pipeline
from bozzetto.targets.llamagen import published_config

MACHINE = {"processor": "a processor", "device": "cpu", "threads": 2, "dtype": "float32", "read": 10e9, "copy": 8e9} | {
    "float32": 100e9,
    "bfloat16": 800e9,
    "own": 0.0,
}
QUICK = {"seconds": 0.005, "window": 4}
SECTIONS = {"settings", "machine", "passes", "parts", "decoding", "advice"}


@pytest.fixture(autouse=True)
def small_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Real figures of the machine would take a second per test."""
    monkeypatch.setattr(passes, "LARGE", 1 << 20)
    monkeypatch.setattr(passes, "SIDE", 64)
    monkeypatch.setattr(passes, "_ROUNDS", 2)


@pytest.fixture(scope="module")
def codes(tiny_model: Path) -> Pipeline:
    return bozzetto.load(tiny_model)


@pytest.fixture(scope="module")
def vectors(tiny_flow: Path) -> Pipeline:
    return bozzetto.load(tiny_flow)


def run(*arguments: object) -> int:
    return main([str(a) for a in arguments])


def network_of(folder: Path, kind: str) -> torch.nn.Module:
    return load_target(folder, "llamagen") if kind == "codes" else load_target(folder, "flow", "mar")


def bare(pipe: Pipeline, batch: int, guidance: float, width: int) -> BarePass:
    labels = torch.arange(batch) % len(pipe.classes)
    return BarePass(pipe, pipe.resolve(GenerateSettings("none", guidance=guidance, compile="off")), labels, width)


@pytest.mark.parametrize("kind", ["codes", "vectors"])
@pytest.mark.parametrize(("batch", "guidance", "width"), [(1, 1.0, 1), (1, 2.0, 4), (3, 2.0, 5)])
def test_bytes_are_the_weights_the_embeddings_used_and_the_cache_before(kind, batch, guidance, width, request):
    pipe: Any = request.getfixturevalue(kind)
    alone = bare(pipe, batch, guidance, width)
    tables = ("tok_embeddings.", "cls_embedding.", "positions", "head.")  # looked up, or no part of a pass
    weights = [w for name, w in network_of(pipe.folder, kind).named_parameters() if not name.startswith(tables)]
    cache = alone.session.cache
    whole_rows = [part.unflatten(0, (cache.places.rows, -1))[:, :8] for part in cache.parts]
    expected = sum(part.numel() * 4 for part in [*weights, *whole_rows]) + batch * width * 32 * 4
    assert pass_work(pipe.target, batch, int(guidance), width, 8)["bytes"] == expected


@pytest.mark.parametrize("kind", ["codes", "vectors"])
@pytest.mark.parametrize(("batch", "guidance", "width"), [(1, 1.0, 1), (1, 2.0, 4), (3, 2.0, 5)])
def test_operations_are_those_of_the_products_and_of_attention_to_what_was_before(
    kind, batch, guidance, width, request
):
    pipe: Any = request.getfixturevalue(kind)
    alone = bare(pipe, batch, guidance, width)
    with FlopCounterMode(display=False) as counter:
        alone.run()
    counted = counter.get_flop_counts()["Global"]
    products = sum(n for op, n in counted.items() if "mm" in str(op))
    pairs = sum(1 for place in range(width) for column in range(64) if column <= 8 + place)
    heads, head_dim, layers, rows = 2, 16, 2, batch * int(guidance)
    attention = rows * layers * pairs * heads * (2 * head_dim + 2 * head_dim)  # q k^T, and the mix of values
    assert pass_work(pipe.target, batch, int(guidance), width, 8)["flops"] == products + attention


def test_a_caption_is_part_of_the_cache_and_bfloat16_halves_the_bytes():
    def work(dtype: torch.dtype, **changed: int) -> dict[str, int]:
        config = replace(published_config("B", captioned=True), **changed)
        target: Any = SimpleNamespace(config=config, vocab=16384, dtype=dtype)
        return pass_work(target, 1, 1, 1, 100)

    long, short = work(torch.float32), work(torch.float32, condition_tokens=1)
    assert long["bytes"] - short["bytes"] == 119 * 12 * 2 * 768 * 4
    assert long["flops"] - short["flops"] == 119 * 12 * 4 * 768
    assert work(torch.bfloat16) == {"bytes": long["bytes"] // 2, "flops": long["flops"]}


def test_the_roofline_is_the_slower_of_memory_and_products():
    light, heavy = ({"bytes": 10**9, "flops": flops} for flops in (10**9, 10**11))
    assert roof(MACHINE, light) == pytest.approx(0.1)
    assert roof(MACHINE, heavy) == pytest.approx(1.0)
    assert roof(MACHINE, light, "bfloat16") == pytest.approx(0.05)
    assert roof(MACHINE, heavy, "bfloat16") == pytest.approx(0.125)


def test_operators_are_grouped_and_products_named_by_their_weights(codes: Pipeline):
    def event(key: str, seconds: float, *shapes: list[int]) -> SimpleNamespace:
        return SimpleNamespace(key=key, self_cpu_time_total=1e6 * seconds, input_shapes=list(shapes))

    names = product_names(codes.target)
    assert names == {(96, 32): "wqkv", (32, 32): "wo", (512, 32): "w1 w3", (32, 256): "w2", (16, 32): "head"}
    events = [
        event("aten::mm", 1, [2, 32], [32, 96]),
        event("aten::mm", 2, [8, 32], [32, 96]),
        event("mkldnn::_linear_pointwise", 3, [2, 1, 256], [32, 256], []),
        event("aten::addmm", 4, [32], [2, 32], [32, 32]),
        event("aten::mm", 5, [2, 7], [7, 9]),
        event("aten::_scaled_dot_product_flash_attention_for_cpu", 6),
        event("aten::index_copy_", 7),
        event("aten::silu", 8),
        event("aten::_fused_rms_norm", 9),
        event("aten::masked_fill_", 10),
        event("aten::view", 11),
        event("aten::empty_strided", 12),
    ]
    assert by_part(events, names) == {
        (PRODUCTS, "wqkv"): 3,
        (PRODUCTS, "w2"): 3,
        (PRODUCTS, "wo"): 4,
        (PRODUCTS, "others"): 5,
        (ATTENTION, ATTENTION): 13,
        (NARROW, NARROW): 17,
        (EMBEDDING, EMBEDDING): 10,
    }


@pytest.mark.parametrize("kind", ["codes", "vectors"])
def test_maps_of_one_shape_share_their_names(kind, request):
    pipe = request.getfixturevalue(kind)
    shared = {"codes": "wo", "vectors": "wo, tokens in"}[kind]
    assert product_names(pipe.target)[32, 32] == shared


@pytest.mark.parametrize("kind", ["codes", "vectors"])
def test_parts_of_an_eager_pass_are_complete(kind, request):
    pipe = request.getfixturevalue(kind)
    parts = bare(pipe, 1, 2.0, 3).parts(0.005)
    products = {p["name"] for p in parts if p["group"] == PRODUCTS}
    assert products == set(product_names(pipe.target).values())
    assert {p["group"] for p in parts} == {PRODUCTS, ATTENTION, NARROW, EMBEDDING, DISPATCH}
    assert all(p["width"] == 3 and p["seconds"] >= 0 for p in parts)
    assert [p["seconds"] for p in parts] == sorted((p["seconds"] for p in parts), reverse=True)


def test_a_pass_of_our_kernels_is_their_call_and_what_is_around_it(codes: Pipeline) -> None:
    settings = codes.resolve(GenerateSettings("none", compile="max", guidance=2.0))
    passing = BarePass(codes, settings, torch.tensor([0]), 3)
    found = passing.parts(0.001)
    assert [p["group"] for p in found] == [KERNELS, AROUND] and min(p["seconds"] for p in found) >= 0
    assert "run" not in vars(passing.session.cache)  # the measurement is gone again


@pytest.mark.parametrize(
    ("kind", "options", "methods", "widths"),
    [
        ("codes", {"window": 4}, ["none", "jacobi/seed-exact"], [1, 4]),
        ("codes", {"method": "jacobi/exact@window=3", "batch": 2}, ["none", "jacobi/exact"], [1, 3]),
        ("codes", {"method": "none", "guidance": 1.0}, ["none"], [1]),
        ("vectors", {"window": 4}, ["none", "jacobi/chains"], [1, 4]),
        ("vectors", {"method": "none/reflection:depth=3"}, ["none", "none/reflection:depth=3"], [1]),
    ],
)
def test_a_profile_has_all_its_parts(kind, options, methods, widths, request):
    pipe = request.getfixturevalue(kind)
    report = profile(pipe, ProfileSettings(seconds=0.005, compile="off", **options))
    assert set(report) == SECTIONS
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert [d["method"] for d in report["decoding"]] == methods
    assert [p["width"] for p in report["passes"]] == widths
    assert {p["width"] for p in report["parts"]} == set(widths)
    sequential, used = report["decoding"][0], report["decoding"][-1]
    assert (sequential["tokens_per_pass"], sequential["speedup"]) == (1, 1)
    assert used["tokens_per_pass"] >= 1 and used["window"] == widths[-1]
    assert (used["head_calls"] > 0) == (kind == "vectors")
    for entry in report["passes"]:
        assert 0 < entry["fastest"] <= entry["median"]
        assert entry["share"] == entry["roofline"] / entry["fastest"]
        rows = options.get("batch", 1) * (1 if options.get("guidance") == 1 else 2)
        work = pass_work(pipe.target, options.get("batch", 1), rows // options.get("batch", 1), entry["width"], 8)
        assert entry["work"] == work
    assert {"model", "method", "dtype", "compile", "machine", "versions", "command"} <= set(report["settings"])
    text = profile_table(report)
    for name in [*methods, report["machine"]["processor"], "GB/s", DISPATCH, "of the roofline", "tok/pass"]:
        assert name in text


def test_tokens_per_pass_are_those_of_generate(codes: Pipeline):
    report = profile(codes, ProfileSettings(batch=3, **QUICK))
    result = codes.generate(seed=0, count=3, batch=3, window=4)
    assert report["decoding"][1]["tokens_per_pass"] == pytest.approx(result.tokens_per_pass)


def test_the_threads_are_put_back(codes: Pipeline, monkeypatch: pytest.MonkeyPatch):
    before, given = torch.get_num_threads(), list[int]()
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    profile(codes, ProfileSettings(method="none", threads=before + 1, seconds=0.005))
    assert given == [before + 1, before]


def figures(compile: str = "off", **changed: Any) -> dict[str, Any]:
    """A good profile: no rule has anything to say."""
    work = {"bytes": 10**8, "flops": 10**6}  # 10 ms
    alone = [pass_of(1, 0.0120, 0.0125, work), pass_of(16, 0.0125, 0.0130, work)]
    shares = {PRODUCTS: 0.8, ATTENTION: 0.1, NARROW: 0.05, DISPATCH: 0.05}
    parts = [part_of(width, group, 0.0125 * share) for width in (1, 16) for group, share in shares.items()]
    machine = {**MACHINE, "dtype": "bfloat16"}
    good = {"machine": machine, "passes": alone, "parts": parts, "decoding": used_with()}
    return {"settings": {"compile": compile}, **good, **changed}


def pass_of(width: int, fastest: float, median: float, work: dict[str, int]) -> dict[str, Any]:
    times = {"fastest": fastest, "median": median, "roofline": 0.01}
    return {"width": width, **times, "work": work, "share": 0.01 / fastest}


def part_of(width: int, group: str, seconds: float) -> dict[str, Any]:
    return {"width": width, "group": group, "name": group, "seconds": seconds}


def parts_with(dispatch: float, width: int = 16) -> list[dict[str, Any]]:
    shares = {PRODUCTS: 0.9 - dispatch, ATTENTION: 0.1, DISPATCH: dispatch}
    return [part_of(width, group, share) for group, share in shares.items()]


def used_with(**changed: Any) -> list[dict[str, Any]]:
    """Sequential decoding, and by a method of these figures."""
    none = {"method": "none", "window": 1, "tokens_per_pass": 1.0, "seconds": 0.014, "drafting": 0.05, "speedup": 1.0}
    used = {"method": "jacobi/exact", "window": 16, "tokens_per_pass": 4.0, "seconds": 0.015, "drafting": 0.1}
    rest = {"head_calls": 0.0, "adaptive": False}
    return [{**none, **rest, "jacobi": False}, {**used, "speedup": 3.7, **rest, "jacobi": True, **changed}]


def test_a_good_profile_gets_no_advice():
    assert advise(figures()) == []


def test_dispatch_calls_for_compiling():
    (hint,) = advise(figures(parts=parts_with(0.6)))
    assert hint["gain"] == pytest.approx(1 / (1 - 0.9 * 0.6))
    assert hint["text"].startswith("--compile max: ") and "dispatch are 60%" in hint["text"]
    assert advise(figures(parts=parts_with(0.6), compile="max")) == []


@pytest.mark.parametrize(("mode", "what"), [("off", "--compile max"), ("default", "--compile max"), ("max", "faster")])
def test_a_pass_far_below_its_roofline_is_named(mode, what):
    one, last = figures()["passes"]
    slow = [{**each, "fastest": 0.04, "median": 0.04, "share": 0.25} for each in (one, last)]
    (hint,) = advise(figures(passes=slow, compile=mode))
    assert hint["gain"] == pytest.approx(1 / (1 - 0.9 * 0.75))
    assert hint["text"].startswith(what) and "25% of its roofline" in hint["text"]


def test_a_pass_that_costs_its_width_calls_for_a_narrower_window():
    one, last = figures()["passes"]
    dear = [one, {**last, "median": 16 * one["median"]}]
    (hint,) = advise(figures(passes=dear))
    # Tokens grow as the square root of the window, what it costs but a sixteenth of 90% of a pass is even in its width.
    best = max((2, 4, 8), key=lambda w: w**0.5 / (0.1 + 0.9 * w / 16))
    expected = (best**0.5 / (0.1 + 0.9 * best / 16)) / 4.0
    assert hint["gain"] == pytest.approx(expected)
    assert hint["text"].startswith(f"--window {best}: ") and "16.0x" in hint["text"]
    assert advise(figures(passes=dear, decoding=used_with(jacobi=False))) == []
    assert advise(figures(passes=dear, decoding=used_with(adaptive=True))) == []


def test_drafts_that_are_not_kept_call_for_none_or_for_a_better_drafter():
    found = advise(figures(decoding=used_with(tokens_per_pass=1.25, speedup=0.8, jacobi=False)))
    assert [h["gain"] for h in found] == pytest.approx([1.8, 1.25])
    assert found[0]["text"].startswith("a better drafter: 1.25 tokens per pass")
    assert found[1]["text"].startswith("--method none: jacobi/exact is slower")


def test_drafting_is_named_with_the_head_where_there_is_one():
    (hint,) = advise(figures(decoding=used_with(drafting=0.5)))
    assert hint["gain"] == pytest.approx(2.0) and hint["text"].startswith("a cheaper drafter or rule")
    (hint,) = advise(figures(decoding=used_with(drafting=0.5, head_calls=16.0)))
    assert "16.0 serial calls" in hint["text"] and "--compile max" in hint["text"]


def test_a_matrix_unit_for_bfloat16_is_named_in_float32_only():
    (hint,) = advise(figures(machine=MACHINE))
    assert hint["gain"] == pytest.approx(1 / (1 - 0.9 * 0.8 / 2))  # products are 80%, and read half the bytes
    assert hint["text"].startswith("--dtype bfloat16: matrix products run 8.0x faster")
    assert advise(figures(machine={**MACHINE, "bfloat16": MACHINE["float32"]})) == []


def test_advice_is_sorted_by_its_gain():
    found = advise(figures(machine=MACHINE, parts=parts_with(0.3), decoding=used_with(drafting=0.4)))
    assert len(found) == 3
    assert [h["gain"] for h in found] == sorted((h["gain"] for h in found), reverse=True)


def test_a_share_above_the_roofline_is_explained(codes: Pipeline):
    report = profile(codes, ProfileSettings(**QUICK))
    for entry, share in zip(report["passes"], (0.5, 1.4), strict=True):
        entry["share"] = share
    assert "140%" in profile_table(report) and "stay in the processor's cache" in profile_table(report)
    report["passes"][1]["share"] = 0.9
    assert "cache" not in profile_table(report)


def test_the_command_prints_the_table_and_writes_json_whole(tiny_model, tmp_path, capfd):
    out = tmp_path / "deep" / "p.json"
    assert run("profile", "--model", tiny_model, "--window", 4, "--seconds", 0.005, "--json", out) == 0
    report = json.loads(out.read_text())
    assert set(report) == SECTIONS and [p.name for p in out.parent.iterdir()] == ["p.json"]
    shown = capfd.readouterr()
    assert shown.out.strip() == profile_table(report)
    assert shown.err == ""


def test_the_command_knows_continuous_tokens_and_bfloat16(tiny_flow, capsys):
    words = ("--dtype", "bfloat16", "--seconds", 0.005, "--batch", 2, "--method", "jacobi/chains")
    assert run("profile", "--model", tiny_flow, *words) == 0
    shown = capsys.readouterr().out
    assert "jacobi/chains" in shown and "head calls/pass" in shown and ", bfloat16\n" in shown


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--seconds", 0), "seconds = 0.0 is not allowed"),
        (("--seconds", "nan"), "seconds = nan is not allowed"),
        (("--threads", -1), "threads = -1 is not allowed"),
        (("--batch", 0), "batch = 0 is not allowed"),
        (("--window", -2), "window = -2 is not allowed"),
        (("--guidance", 0.5), "guidance = 0.5"),
        (("--compile", "fast"), "compile = 'fast' is not allowed: auto, off, default, max"),
        (("--deterministic", "--compile", "off"), "deterministic is not allowed with compile = 'off'"),
        (("--method", "oracle/exact"), "unknown drafter 'oracle'"),
        (("--method", "jacobi/chains"), "is for continuous tokens"),
        (("--dtype", "float8"), "unknown dtype 'float8' (allowed: auto, float32, bfloat16, float16)"),
        (("--model", "no-such"), "no-such"),
    ],
)
def test_bad_values_are_named_and_nothing_is_written(options, named, tiny_model, tmp_path, capsys):
    arguments = ("--seconds", 0.005, "--json", tmp_path / "p.json", *options)
    assert run("profile", *(() if "--model" in options else ("--model", tiny_model)), *arguments) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("bozzetto: error: ") and named in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("options", [(), ("--compile", "max"), ("--method", "none")])
def test_masked_models_are_refused(options, tiny_mar, tmp_path, capsys):
    assert run("profile", "--model", tiny_mar, "--json", tmp_path / "p.json", *options) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "it is masked, its passes are all different (causal models" in line and list(tmp_path.iterdir()) == []
    with pytest.raises(UsageError, match="tiny-mar"):
        profile(bozzetto.load(tiny_mar), ProfileSettings(**QUICK))


def test_a_full_disk_and_a_folder_in_the_way_leave_nothing(tiny_model, tmp_path, capsys, monkeypatch):
    assert run("profile", "--model", tiny_model, "--json", tmp_path) == 2
    assert "is a folder" in capsys.readouterr().err

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("bozzetto.common.files.os.fsync", full)
    out = tmp_path / "p.json"
    assert run("profile", "--model", tiny_model, "--seconds", 0.005, "--json", out) == 2
    assert "No space left on device" in capsys.readouterr().err and list(tmp_path.iterdir()) == []


def test_help_explains_the_verb(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["profile", "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    for option in ("model", "method", "dtype", "batch", "guidance", "window", "compile", "seconds", "threads", "json"):
        assert f"--{option}" in shown


@pytest.mark.parametrize(("speed", "largest"), [(1e12, 2048), (2e9, 512), (1e6, 256)])
def test_products_that_a_processor_is_slow_at_are_measured_on_smaller_matrices(
    speed: float, largest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the instructions for bfloat16 those of 2,048 rows took a minute."""
    sides: list[int] = []

    def timed(call: Any, seconds: float, device: torch.device) -> list[float]:
        sides.append(len(call.args[0]))
        return [2 * sides[-1] ** 3 / speed]

    monkeypatch.setattr(passes, "SIDE", 2048)
    monkeypatch.setattr(passes, "timed", timed)
    assert passes._rate("bfloat16", torch.device("cpu"), 0.5) == pytest.approx(speed)
    assert sides[-1] == largest
