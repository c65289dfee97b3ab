"""Text-conditional models from the command line: captions stand for classes; drafters and rules do not notice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bozzetto.autoencoders.vq import VQConfig, VQTokenizer
from bozzetto.checkpoints.folders import save_llamagen
from bozzetto.cli.main import main
from bozzetto.errors import UsageError
from bozzetto.targets.llamagen import LlamaGen, LlamaGenConfig
from bozzetto.targets.llamagen_cache import LlamaGenTarget
from bozzetto.targets.sentence import SentenceEncoder
from bozzetto.train.pictures import DataSource, conditions_of
from toys import tiny_llamagen

T, C = 5, 6


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny text-conditional model with random weights."""
    folder = tmp_path_factory.mktemp("text") / "model"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaGenConfig(32, 2, 2, vocab=16, grid=4, classes=0, condition_tokens=T, caption_dim=C)
        network = LlamaGen(config)
        torch.nn.init.normal_(network.output.weight, std=0.5)
        tokenizer = VQTokenizer(VQConfig(codes=16, width=16, pre_blocks=1, post_blocks=1, image_size=32))
    save_llamagen(folder, network, tokenizer, {"name": "text", "class_names": []})
    return folder


def captions(path: Path, features: torch.Tensor | None = None, names: object = ("a rose", "a tulip, red")) -> Path:
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(2, T, C, generator=generator) if features is None else features
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    save_file({"features": features, "mask": mask}, path, {"captions": json.dumps(names)})
    return path


def run(*arguments: object) -> int:
    return main([str(a) for a in arguments])


def test_captions_are_drawn_and_seed_exact_equals_sequential(model: Path, tmp_path: Path) -> None:
    given = ("generate", "a tulip, red", "a rose", "--model", model, "--captions", captions(tmp_path / "c.safetensors"))
    found = {}
    for drafter in ("none", "jacobi"):
        assert run(*given, "--count", 4, "--drafter", drafter, "--out", tmp_path / drafter) == 0
        found[drafter] = json.loads((tmp_path / drafter / "manifest.json").read_text())["images"]
    assert [i["class"] for i in found["none"]] == ["a tulip, red", "a rose"] * 2
    assert [i["sha256"] for i in found["none"]] == [i["sha256"] for i in found["jacobi"]]
    assert len({i["sha256"] for i in found["none"]}) > 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": torch.randn(2, T, C + 1)}, "do not fit this target: [K, 5, 6]"),
        ({"features": torch.full((2, T, C), float("nan"))}, "non-finite"),
        ({"names": ["one"]}, "captions that are not 2 texts"),
    ],
)
def test_captions_that_do_not_fit_are_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict, message: str
) -> None:
    path = captions(tmp_path / "c.safetensors", **change)
    assert run("generate", "--model", model, "--captions", path, "--out", tmp_path / "out") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_text_model_wants_captions_and_a_class_model_none(
    model: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("generate", "0", "--model", model, "--out", tmp_path / "out") == 2
    assert "--captions" in capsys.readouterr().err
    path = captions(tmp_path / "c.safetensors")
    assert run("generate", "--model", tiny_model, "--captions", path, "--out", tmp_path / "out") == 2
    assert "draws classes" in capsys.readouterr().err
    assert run("generate", "--model", model, "--captions", tmp_path / "none", "--out", tmp_path / "out") == 2
    assert "captions not found" in capsys.readouterr().err
    (tmp_path / "broken").write_bytes(b"nothing")
    assert run("generate", "--model", model, "--captions", tmp_path / "broken", "--out", tmp_path / "out") == 2
    assert "not a readable safetensors file" in capsys.readouterr().err


def test_convert_names_the_options_that_are_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("convert", "llamagen", "--out", tmp_path / "m") == 2
    assert "convert llamagen needs --gpt" in capsys.readouterr().err
    assert run("convert", "eagle", "--drafter", tmp_path / "x.bin", "--out", tmp_path / "m") == 2
    assert "convert eagle needs --model" in capsys.readouterr().err
    assert (
        run("convert", "llamagen", "--gpt", tmp_path / "x.pt", "--vq", tmp_path / "y.pt", "--out", tmp_path / "m") == 2
    )
    assert "checkpoint not found" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_target_that_does_not_say_its_prompts_gets_no_drafter() -> None:
    with pytest.raises(UsageError, match=r"recipe\.prompts of its config\.json"):
        conditions_of(SentenceEncoder(T), DataSource("nowhere"), torch.zeros(1), ())


def captioned_target(compiled: bool) -> LlamaGenTarget:
    """A tiny target of four captions of different lengths."""
    network = tiny_llamagen(classes=0, condition_tokens=T, caption_dim=C)
    target = LlamaGenTarget(network)
    target = target.owned(network) if compiled else target
    features = torch.randn(4, T, C, generator=torch.Generator().manual_seed(2))
    mask = torch.arange(T) >= torch.tensor([[2], [0], [4], [1]])  # padded on the left
    return target.with_captions(features, mask)


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_admitted_captions_are_those_of_a_fresh_session(compiled: bool, guided: bool) -> None:
    target, made = captioned_target(compiled), torch.Generator().manual_seed(3)
    used = target.begin(torch.tensor([0, 1, 2, 3]), guided, 3)
    start = torch.zeros(4, dtype=torch.int64)
    for _ in range(2):
        used.score(torch.randint(11, (4, 3), generator=made), start, int(start.max()))
        start = start + 3
    used.admit(torch.tensor([2, 0]), torch.tensor([1, 2]))
    start[[2, 0]] = 0
    fresh, behind = target.begin(torch.tensor([2, 1]), guided, 3), torch.zeros(2, dtype=torch.int64)
    for _ in range(3):
        inputs = torch.randint(11, (4, 3), generator=made)
        ours = used.score(inputs, start, int(start.max())).logits
        theirs = fresh.score(inputs[[0, 2]], behind, int(behind.max())).logits
        assert ours is not None and theirs is not None
        assert torch.allclose(ours.unflatten(0, (-1, 4))[:, [0, 2]].flatten(0, 1), theirs, atol=1e-5)
        start, behind = start + 3, behind + 3


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_admitting_a_caption_leaves_the_other_rows_alone(compiled: bool, guided: bool) -> None:
    target, found = captioned_target(compiled), []
    for admit in (False, True):
        made = torch.Generator().manual_seed(4)
        session = target.begin(torch.tensor([0, 1, 2, 3]), guided, 3)
        session.score(torch.randint(11, (4, 3), generator=made), torch.zeros(4, dtype=torch.int64), 0)
        start = torch.full((4,), 3)
        if admit:
            session.admit(torch.tensor([1]), torch.tensor([0]))
            start[1] = 0
        logits = session.score(torch.randint(11, (4, 3), generator=made), start, 3).logits
        assert logits is not None
        found.append(logits.unflatten(0, (-1, 4)))
    rest = [0, 2, 3]
    assert torch.allclose(found[0][:, rest], found[1][:, rest], atol=1e-6)
    assert not torch.allclose(found[0][:, 1], found[1][:, 1], atol=1e-2)
