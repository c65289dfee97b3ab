"""What the README, the pages of docs/, the examples and the recipes show is what works."""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bozzetto.autoencoders.vq import VQConfig, VQTokenizer
from bozzetto.checkpoints.folders import save_drafter, save_llamagen
from bozzetto.cli import main as cli
from bozzetto.drafters.eagle import EagleNet, eagle_config
from bozzetto.drafters.glance import GlanceConfig, GlanceNet
from bozzetto.pipeline.pipeline import shipped_models
from bozzetto.targets.llamagen import LlamaGen, LlamaGenConfig
from bozzetto.train.families import TRAINABLE, read_recipe

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = ["README.md", "ARCHITECTURE.md", "CHANGELOG.md"]
PAGES += sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))


# Blocks of these are run; those of serve.md by tests/test_serve_api.py.
_SHOWN = ("python", "command-line", "figures", "quality", "training", "models", "continuous", "methods", "which")
TEXTS = [README, *((ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8") for name in _SHOWN)]


def blocks(language: str) -> list[str]:
    found = (re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.M | re.S) for text in TEXTS)
    return list(dict.fromkeys(block for blocks in found for block in blocks))


PYTHON = blocks("python")
_LINES = (line.split("  #")[0].strip() for block in blocks("bash") for line in block.splitlines())
BASH = [line for line in dict.fromkeys(_LINES) if line]
COMMANDS = [line for line in BASH if line.startswith("bozzetto ")]
ENDLESS = ("bozzetto train ", "bozzetto serve ")  # tried by tests of their own
RUN = [c for c in COMMANDS if not c.startswith(ENDLESS) and "flowers-drift" not in c]
TORCHRUN = [line for line in BASH if line.startswith("torchrun ")]
MAKE = [line for line in BASH if line.startswith("make ")]


@pytest.fixture(scope="session")
def small_model(tmp_path_factory) -> Path:
    """A folder with a random model of 4x4 tokens, 32x32 pixels and the classes daisy, rose, tulip."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("small-model")
    network = LlamaGen(LlamaGenConfig(dim=32, layers=1, heads=2, vocab=24, grid=4, classes=3, ffn_multiple=32))
    torch.nn.init.normal_(network.output.weight, std=0.3)
    tokenizer = VQTokenizer(VQConfig(codes=24, code_dim=4, width=16, pre_blocks=1, post_blocks=1, image_size=32))
    save_llamagen(folder, network, tokenizer, {"name": "small", "class_names": ["daisy", "rose", "tulip"]})
    save_drafter(folder / "eagle", EagleNet(eagle_config(network.config)), folder, {"target_name": "small"})
    save_drafter(folder / "glance", GlanceNet(GlanceConfig(32, 24, 4, places=4)), folder, {"target_name": "small"})
    return folder


@pytest.fixture
def shown_model(small_model) -> str:
    """`flowers` as the README says; the small model where it is not shipped."""
    return "flowers" if "flowers" in shipped_models() else str(small_model)


@pytest.fixture(scope="session")
def photographs(tmp_path_factory) -> Path:
    """A folder of coloured noise with train/ and test/ and the small model's classes."""
    root, rng = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    for split in ("train", "test"):
        for label, name in enumerate(("daisy", "rose", "tulip")):
            (root / split / name).mkdir(parents=True)
            for i in range(5):
                noise = rng.integers(0, 90, (32, 32, 3)) + 60 * label
                Image.fromarray(noise.astype(np.uint8)).save(root / split / name / f"{i}.png")
    return root


def test_the_readme_is_short_and_has_blocks_of_each_kind():
    assert len(README.splitlines()) <= 180
    assert len(PYTHON) >= 2 and len(COMMANDS) >= 5
    assert MAKE == ["make demo", "make test"]
    verbs = {tuple(command.split()[1:3]) if " train " in command else command.split()[1] for command in COMMANDS}
    trained = {("train", "tokenizer"), ("train", "target")}
    assert verbs >= {"generate", "bench", "models", "sample", "evaluate", "report"} | trained


@pytest.mark.parametrize("code", PYTHON, ids=range(len(PYTHON)))
def test_python_blocks_run(code, shown_model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert 'bozzetto.load("flowers")' in code
    exec(compile(code.replace('"flowers"', repr(shown_model)), "README.md", "exec"), {"__name__": "readme"})
    if "sha256 ==" in code:
        assert capsys.readouterr().out.strip() == "[True, True]"
    elif ".save(" in code:
        assert list(tmp_path.glob("*.png"))


@pytest.mark.parametrize("command", TORCHRUN)
def test_torchrun_commands_parse(command):
    """Running one takes ten seconds; tests/test_sampling.py does."""
    head, _, tail = command.partition(" -m bozzetto ")
    assert re.fullmatch(r"torchrun --nproc-per-node \d+", head)
    assert isinstance(cli._parse(shlex.split(tail)), cli.verb.Sample)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_parse(command):
    parsed = cli._parse(shlex.split(command)[1:])
    assert type(parsed) in cli.HANDLERS
    if isinstance(parsed, cli.verb.Train):
        kinds = tuple(kind for kind, _ in TRAINABLE[parsed.what].values())
        assert isinstance(read_recipe(ROOT / parsed.recipe, parsed.what), kinds)


@pytest.mark.parametrize("command", RUN)
def test_commands_run(command, small_model, tiny_flow, photographs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if " --model flowers-flow" in command:
        command, small_model = command.replace(" --model flowers-flow", "").replace(" tulip", " rose"), tiny_flow
    arguments = shlex.split(command.replace(" --model flowers", "").replace(":k=1000", ":k=9"))[1:]
    if arguments[0] not in ("models", "report") and "--model" not in arguments:
        arguments += ["--model", str(small_model)]
    if arguments[0] == "evaluate":
        arguments += ["--count", "8", "--batch", "4"]
        arguments += [] if "--compare" in arguments else ["--bootstrap", "4", "--data", str(photographs)]
    parsed = cli._parse(arguments)
    if isinstance(parsed, cli.verb.Report):
        for run in parsed.runs:
            made = ["sample", "--model", str(small_model), "--count", "3", "--batch", "3", "--out", str(run)]
            assert cli.main(made) == 0
    assert cli.main(arguments) == 0, capsys.readouterr().err
    if isinstance(parsed, cli.verb.Sample):
        assert (parsed.out / "samples.npz").is_file() == parsed.npz
    elif isinstance(parsed, cli.verb.Evaluate):
        assert list(parsed.out.glob("*.json")) and (parsed.json is None or parsed.json.is_file())
    elif isinstance(parsed, cli.verb.Report):
        assert "<!doctype html>" in parsed.out.read_text(encoding="utf-8")[:100]
    elif isinstance(parsed, cli.verb.Generate):
        listed = json.loads((parsed.out / "manifest.json").read_text(encoding="utf-8"))["images"]
        pictures = [p for p in parsed.out.glob("*.png") if p.name != "sheet.png"]
        assert len(listed) == len(pictures) == parsed.count or parsed.count is None
        assert (parsed.out / "sheet.png").is_file()
    elif isinstance(parsed, cli.verb.Bench):
        assert json.loads(parsed.json.read_text(encoding="utf-8"))["results"]


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z][\w-]*):", makefile, flags=re.M))
    asked = {word for line in MAKE for word in line.split()[1:]} | set(re.findall(r"`make ([\w-]+)`", README))
    assert asked <= targets
    shown = re.findall(r"bozzetto generate (.*)$", makefile, flags=re.M)
    assert len(shown) == 1
    demo = cli._parse(["generate", *shlex.split(shown[0].replace("$(OUT)", "out/demo"))])
    assert (demo.count, demo.seed, demo.classes, demo.model) == (10, 7, (), "flowers")


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda p: p.stem)
def test_recipes_are_valid(path):
    kinds = {
        "tokenizer": "tokenizer",
        "eagle": "drafter",
        "drift": "drift",
        **dict.fromkeys(("sketch", "plane", "block", "glance"), "drafter"),
    }
    recipe = read_recipe(path, kinds.get(path.stem.rpartition("-")[2], "target"))
    assert recipe.out == f"runs/{path.stem}"


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    path = ROOT / page
    text = path.read_text(encoding="utf-8")
    headings = {
        re.sub(r"[^\w -]", "", h).strip().lower().replace(" ", "-") for h in re.findall(r"^#+ (.*)$", text, re.M)
    }
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if target.startswith("#"):
            assert target[1:] in headings, f"{page}: no heading {target}"
        elif not target.startswith("https://"):
            assert (path.parent / target.partition("#")[0]).exists(), f"{page}: {target}"


def test_the_site_is_built_strictly_and_asks_no_network(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "-q", "-f", str(ROOT / "mkdocs.yml"), "-d", str(tmp_path)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    )
    assert done.returncode == 0, done.stderr
    pages = {path.parent.name: path.read_text(encoding="utf-8") for path in tmp_path.rglob("index.html")}
    assert {p.stem for p in (ROOT / "docs").glob("*.md")} - {"index"} <= set(pages)
    assert "bozzetto.load" in pages["api"] and "Everything is one loop" in pages["architecture"]
    for name, page in pages.items():
        fetched = re.findall(r"<(?:script|link|img)[^>]*?(?:src|href)=\"?(https?:[^\"> ]+)", page)
        assert not fetched, f"{name}: {fetched}"


def test_the_site_lists_every_page():
    listed = re.findall(r"(\S+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.M)
    assert sorted(listed) == sorted(path.name for path in (ROOT / "docs").glob("*.md"))


def run_example(name: str, monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    try:
        runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
    except SystemExit as end:
        assert not end.code


def test_every_example_is_tested():
    assert {p.name for p in (ROOT / "examples").glob("*.py")} == {
        "assisted_guidance.py",
        "same_bytes.py",
        "watch_it_draw.py",
    }


def test_example_assisted_guidance_shows_the_gap(monkeypatch, capsys):
    """transformers' assisted decoding changes guided pictures, ours does not; if the first ever changes, say so."""
    run_example("assisted_guidance.py", monkeypatch)
    theirs, ours = capsys.readouterr().out.splitlines()
    assert not theirs.endswith(": 0 of 10 pictures differ from plain decoding") and theirs.startswith("transformers")
    assert ours == "bozzetto, jacobi: 0 of 10 pictures differ from plain decoding"


def test_example_same_bytes(shown_model, tmp_path, monkeypatch, capsys):
    run_example("same_bytes.py", monkeypatch, "--model", shown_model, "--out", str(tmp_path), "--count", "2")
    assert capsys.readouterr().out.count(" equal") == 2
    assert len(list(tmp_path.glob("*-sequential.png"))) == len(list(tmp_path.glob("*-speculative.png"))) == 2


def test_example_watch_it_draw(shown_model, tmp_path, monkeypatch):
    run_example("watch_it_draw.py", monkeypatch, "--model", shown_model, "--out", str(tmp_path), "--every", "2")
    (path,) = tmp_path.glob("*.gif")
    with Image.open(path) as picture:
        assert picture.format == "GIF" and picture.n_frames >= 2
