"""The recipes of ARCHITECTURE.md, each followed on a toy: in a copy of the package, with the files that it names and no
others, and then used as a user would."""

from __future__ import annotations

import filecmp
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
PACKAGE = TESTS.parent / "src" / "bozzetto"


class House:
    """A copy of the package without its models, in `root`."""

    def __init__(self, root: Path):
        self.root = root / "bozzetto"
        shutil.copytree(PACKAGE, self.root, ignore=shutil.ignore_patterns("assets", "__pycache__"))

    def file(self, name: str, text: str) -> None:
        """A new file."""
        path = self.root / name
        assert not path.exists()
        path.write_text(text, encoding="utf-8")

    def row(self, name: str, behind: str, row: str, imported: str = "") -> None:
        """A row of a table, behind another one, and what it needs to be imported."""
        path = self.root / name
        text = path.read_text(encoding="utf-8")
        assert text.count(behind) == 1, f"{name} has not one {behind!r}"
        future = "from __future__ import annotations\n"
        path.write_text(text.replace(behind, behind + row).replace(future, future + imported), encoding="utf-8")

    def touched(self) -> list[str]:
        """Files that are new or changed."""
        ours = sorted(path.relative_to(self.root) for path in self.root.rglob("*.py"))
        same = [(PACKAGE / p).exists() and filecmp.cmp(PACKAGE / p, self.root / p, shallow=False) for p in ours]
        return [p.as_posix() for p, equal in zip(ours, same, strict=True) if not equal]

    def run(self, script: str, *arguments: object) -> str:
        """What a script prints that uses the copy and the toys of the tests."""
        folders = os.pathsep.join(map(str, (self.root.parent, TESTS)))
        result = subprocess.run(
            [sys.executable, "-c", script, *map(str, arguments)],
            env={**os.environ, "PYTHONPATH": folders},
            capture_output=True,
            text=True,
            cwd=self.root.parent,
        )
        assert result.returncode == 0, result.stderr[-3000:]
        return result.stdout


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path)


SHIFT = '''
"""A toy: the next features are one linear map of the last pair."""

from dataclasses import dataclass

import torch
from torch import nn

from bozzetto.common.checks import Grid, Layers, Size
from bozzetto.drafters.base import gather_rows
from bozzetto.drafters.parallel import CachedParallel


@dataclass(frozen=True)
class ShiftConfig:
    dim: Size
    vocab: Size
    grid: Grid
    places: Layers = 2


class ShiftNet(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.map = nn.Linear(2 * config.dim, config.places * config.dim)

    def of(self, features, embedded):
        return self.map(torch.cat([embedded, features], -1)).unflatten(-1, (self.config.places, -1))

    def after(self, features, embedded, anchors):
        each = anchors[..., None].expand(-1, -1, features.shape[-1])
        return self.of(features.gather(1, each), embedded.gather(1, each))

    def bias(self, tokens):
        return None


class CachedShift(CachedParallel):
    def shape(self, length):
        return self.rows, 1

    def places(self, features, tokens, start, at):
        return self.net.of(*(gather_rows(part, at)[:, 0] for part in (features, self.embedding[tokens])))
'''
TRAIN_AND_DRAFT = """
import sys
from pathlib import Path
from bozzetto import load
from bozzetto.cli.main import main

model, pictures = sys.argv[1:]
Path("recipe.yaml").write_text(f'''
family: shift
out: run
model: {model}
train: {{path: {pictures}}}
test: {{path: {pictures}}}
places: 3
anchors: 4
views: 1
steps: 2
batch: 2
warmup: 1
evaluate_every: 2
test_images: 2
''')
assert main(["train", "drafter", "recipe.yaml"]) == 0
asked = {"seed": 1, "guidance": 2.0}
plain = load(model).generate(["rose"], drafter="none", **asked).images[0]
for drafter in ("shift:folder=run/shift:tree=chain-3", "jacobi:fill=shift:folder=run/shift"):
    drawn = load(model).generate(["rose"], drafter=drafter, rule="seed-exact", **asked).images[0]
    assert drawn.sha256 == plain.sha256
"""


def test_a_trained_drafter_is_a_file_a_row_and_a_row_of_training(house: House, tiny_model: Path, blooms: Path) -> None:
    house.file("drafters/shift.py", SHIFT)
    house.row(
        "drafters/trained.py",
        "MappingProxyType(\n    {\n",
        '        "shift": TrainedKind(ShiftConfig, ShiftNet, CachedShift.of, _TOKENS),\n',
        "from bozzetto.drafters.shift import CachedShift, ShiftConfig, ShiftNet\n",
    )
    house.row("train/families.py", '    "drafter": {\n', '        "shift": _PARALLEL,\n')
    assert house.touched() == ["drafters/shift.py", "drafters/trained.py", "train/families.py"]
    house.run(TRAIN_AND_DRAFT, tiny_model, blooms)


METRIC = '''
"""A toy: how far features of the pictures spread, as a share of that of the photographs."""

from __future__ import annotations

from bozzetto.evaluate.metrics import Comparison, Interval, interval, replicate


def spread(found: Comparison) -> Interval:
    """Of resamples as well."""
    pictures, photographs = found.x, found.y

    def share(w, v):
        return float((w @ pictures.var(1)) / w.sum() / ((v @ photographs.var(1)) / v.sum()))

    every = found.w.new_ones(len(pictures)), found.v.new_ones(len(photographs))
    return interval(share(*every), replicate(share, found.w, found.v))
'''
EVALUATE_AND_REPORT = """
import sys
from pathlib import Path

from bozzetto import load
from bozzetto.evaluate.evaluation import evaluate, evaluation_table
from bozzetto.evaluate.report.page import build_report
from test_evaluate_few import ALL, Means, wanted, write

out = Path("out")
report = evaluate(load(sys.argv[1]), wanted(write(Path("data"), train=ALL, test=ALL)), Means(), out)
row = next(row for row in report["results"] if row["method"] == "none")
assert 0 < row["spread"]["low"] <= row["spread"]["high"]
heading = next(line for line in evaluation_table(report).splitlines() if line.startswith("method"))
assert "spread" in heading
assert "spread of features" in build_report([out], Path("page.html")).read_text()
"""


def test_a_metric_is_a_file_and_a_row(house: House, tiny_model: Path) -> None:
    pytest.importorskip("torchmetrics")
    pytest.importorskip("jinja2")
    house.file("evaluate/spread.py", METRIC)
    row = '    Column("spread", "spread", "spread of features", measure=spread),\n'
    house.row("evaluate/quality.py", "QUALITY = (\n", row, "from bozzetto.evaluate.spread import spread\n")
    assert house.touched() == ["evaluate/quality.py", "evaluate/spread.py"]
    house.run(EVALUATE_AND_REPORT, tiny_model)


FAMILY = '''
"""A toy: Llama whose last eight words are the codes of pictures of 3 x 3 tokens."""

import torch
from transformers import LlamaForCausalLM

from bozzetto.adapters.pictures import HostedPictures, PictureConfig
from bozzetto.adapters.prompted import words_target
from bozzetto.adapters.source import Hosted, prompts_of


def load(source, wanted):
    wanted.refuse(f"{source.name} has its own", "tokenizer", "vqgan")
    source.check(LlamaForCausalLM)
    tokenizer = source.tokenizer(wanted, "put it there")
    network = source.network(LlamaForCausalLM, wanted)
    words = len(network.lm_head.weight)
    target = words_target(network.model, network.lm_head.weight, range(words - 8, words), 3, 3)
    pictures = HostedPictures(PictureConfig(3, 3, 4), torch.zeros(0, 1))
    ask = prompts_of(lambda text: tokenizer.encode(f"a {text}"))
    return Hosted(target, pictures, ask, tokenizer=tokenizer)
'''
LOAD_AND_DRAW = """
import json
import sys
from pathlib import Path

from bozzetto.cli.main import main

model = sys.argv[1]
asked = ["a red tulip", "--model", model, "--seed", "1", "--dtype", "float32"]
for out, method in (("plain", ["--drafter", "none"]), ("fast", ["--drafter", "jacobi"])):
    assert main(["generate", *asked, *method, "--out", out]) == 0
plain, fast = (json.loads(Path(out, "manifest.json").read_text())["images"][0] for out in ("plain", "fast"))
assert plain["sha256"] == fast["sha256"]
"""


def test_a_model_family_is_an_adapter_file_and_a_row(house: House, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from published.generic import LlamaConfig, network, tokenizer, transformers

    folder, words = tmp_path / "toyline", tokenizer([])
    words.save_pretrained(folder)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    network(transformers.LlamaForCausalLM, LlamaConfig(**shape, vocab_size=len(words) + 8)).save_pretrained(folder)
    house.file("adapters/toyline.py", FAMILY)
    house.row("adapters/families.py", "MappingProxyType(\n    {\n", '        "llama": ("toyline", "load"),\n')
    assert house.touched() == ["adapters/families.py", "adapters/toyline.py"]
    house.run(LOAD_AND_DRAW, folder)


RULE = '''
"""A toy: what seed-exact keeps, one draft at most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from bozzetto.drafts import Draft, Verdict
from bozzetto.laws.categorical import gumbel_argmax
from bozzetto.rules.base import Noise, Rule, given, leading


@dataclass(frozen=True)
class AtMost(Rule):
    """most: drafts kept."""

    name: ClassVar[str] = "at-most"
    exact: ClassVar[bool] = True
    seed_exact: ClassVar[bool] = True
    needs_law: ClassVar[bool] = False
    needs_fixed: ClassVar[bool] = True
    fixed_noise: ClassVar[bool] = True
    needs_uniforms: ClassVar[bool] = False
    window: ClassVar[bool] = True
    trees: ClassVar[bool] = False

    most: int = 1

    def verify(self, draft: Draft, log_p, noise: Noise) -> Verdict:
        tokens = gumbel_argmax(log_p, given(noise.fixed, self, "the positions' Gumbel noise"))
        agreed = leading(tokens[:, : draft.length] == draft.tokens)
        return Verdict(tokens, agreed.clamp_max(self.most))
'''
GENERATE_SERVE_VERIFY = """
import json
import sys
from pathlib import Path

from bozzetto import load
from bozzetto.cli.main import main
from bozzetto.serve.methods import lossy, methods_of
from tabular import TabularTarget
from toys import EXACT_RULES, PLAIN, WINDOW_RULES, decode, p_value

model = sys.argv[1]
asked = ["rose", "--model", model, "--seed", "1"]
for out, method in (("plain", ["--drafter", "none"]), ("toy", ["--drafter", "jacobi", "--rule", "at-most:most=2"])):
    assert main(["generate", *asked, *method, "--out", out]) == 0
plain, toy = (json.loads(Path(out, "manifest.json").read_text()) for out in ("plain", "toy"))
assert toy["images"][0]["sha256"] == plain["images"][0]["sha256"]
methods = methods_of(load(model))
assert "at-most" in methods["jacobi"] and "at-most" not in lossy(methods)
assert "at-most" in EXACT_RULES and "at-most" in WINDOW_RULES  # so that the batteries take it
target = TabularTarget(4, 5)
assert p_value(decode(target, "at-most", index=range(20000)).tokens, target.joint(1, PLAIN)) > 1e-3
"""


def test_a_rule_is_a_file_and_a_row(house: House, tiny_model: Path) -> None:
    house.file("rules/at_most.py", RULE)
    behind = "            *(SeedExact(), Exact(), TreeRejection(), Traversal(), BlockVerification()),\n"
    house.row("methods/table.py", behind, "            AtMost(),\n", "from bozzetto.rules.at_most import AtMost\n")
    assert house.touched() == ["methods/table.py", "rules/at_most.py"]
    house.run(GENERATE_SERVE_VERIFY, tiny_model)
