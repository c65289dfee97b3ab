"""Models by their name on the hub: a cache of its layout, and no network."""

from __future__ import annotations

import ast
import json
import shutil
from collections.abc import Callable
from fnmatch import fnmatch
from importlib import import_module
from pathlib import Path
from typing import Any

import huggingface_hub
import huggingface_hub.constants
import pytest

import bozzetto
from bozzetto.adapters import families
from bozzetto.adapters.chameleon import trained_side
from bozzetto.adapters.families import way_out
from bozzetto.adapters.source import Source
from bozzetto.checkpoints.folders import save_drafter
from bozzetto.cli.main import main
from bozzetto.cli.options import Serve
from bozzetto.cli.serve import models_of
from bozzetto.common.hub import fetched, model_name, on_hub
from bozzetto.drafters.eagle import EagleNet, eagle_config
from bozzetto.errors import UsageError
from bozzetto.evaluate.suites import suite_models
from published import chameleon
from published.lumina import FAMILIES
from test_hosted import WRITERS

COMMIT = "5" * 40


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Puts folders into a cache as huggingface_hub 1.x and 2.x keep it: models--OWNER--NAME/{refs/REVISION,
    snapshots/COMMIT}. Nothing is asked of a network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)

    def put(name: str, folder: Path, revision: str = "main", commit: str = COMMIT) -> Path:
        root = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        (root / "refs").mkdir(parents=True, exist_ok=True)
        (root / "refs" / revision).write_text(commit)
        return Path(shutil.copytree(folder, root / "snapshots" / commit))

    return put


@pytest.fixture(scope="module")
def janus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "janus"
    WRITERS["janus"](folder)
    return folder


def test_a_model_is_read_by_its_name_and_by_a_revision(cache: Any, janus: Path, tmp_path: Path) -> None:
    cache("owner/Janus-Pro", janus)
    other = Path(shutil.copytree(janus, tmp_path / "other"))
    (other / "tokenizer_config.json").write_text((other / "tokenizer_config.json").read_text() + "\n")
    cache("owner/Janus-Pro", other, "v1.1", "6" * 40)
    names = ("owner/Janus-Pro", "owner/Janus-Pro@v1.1", f"owner/Janus-Pro@{'6' * 40}")
    pipes = [bozzetto.load(name) for name in names]
    here = bozzetto.load(janus)
    assert {pipe.name for pipe in pipes} == {"Janus-Pro"}
    assert pipes[0].fingerprint() == here.fingerprint() != pipes[1].fingerprint() == pipes[2].fingerprint()
    assert [p.generate(["a dog"]).images[0].sha256 for p in pipes] == [here.generate(["a dog"]).images[0].sha256] * 3


def test_our_own_folders_and_drafters_have_names_on_the_hub_too(
    cache: Any, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache("someone/tiny", tiny_model)
    pipe, here = bozzetto.load("someone/tiny"), bozzetto.load(tiny_model)
    assert pipe.fingerprint() == here.fingerprint() and pipe.name == here.name
    assert pipe.generate(seed=3).images[0].sha256 == here.generate(seed=3).images[0].sha256
    drawn = ["generate", "--model", "someone/tiny", "--offline", "--count", "1", "--out", str(tmp_path / "out")]
    assert main(drawn) == 0
    assert main([*drawn, "--drafter", "eagle:folder=someone/drafter", "--rule", "block"]) == 2
    assert "someone/drafter: could not be read from the hub" in capsys.readouterr().err


def test_a_drafter_is_read_by_its_name(cache: Any, tiny_model: Path, tmp_path: Path) -> None:
    pipe, drafter = bozzetto.load(tiny_model), tmp_path / "drafter"
    save_drafter(drafter, EagleNet(eagle_config(pipe.target.config)), tiny_model, {"target_name": "tiny"})
    cache("someone/drafter", drafter)
    asked: dict[str, Any] = {"seed": 2, "rule": "block"}
    named = pipe.generate(drafter="eagle:tree=chain-2:folder=someone/drafter@main", **asked)
    here = pipe.generate(drafter=f"eagle:tree=chain-2:folder={drafter}", **asked)
    assert [image.sha256 for image in named.images] == [image.sha256 for image in here.images]


def test_anole_and_lumina_are_read_by_their_names(cache: Any, tmp_path: Path) -> None:
    """Anole with the decoder among its weights; Lumina-mGPT with another one's tokenizer, for pictures of the size that
    its name says and not of its last folder (the tiny one has no word for that size)."""
    anole, lumina = tmp_path / "anole", tmp_path / "lumina"
    for folder in (anole, lumina):
        folder.mkdir()
    chameleon.FAMILIES["anole"].write(anole)
    cache("leloy/Anole-7b-v0.1-hf", anole)
    assert bozzetto.load("leloy/Anole-7b-v0.1-hf").size == bozzetto.load(anole).size == (6, 6)
    made = Path(FAMILIES["lumina-without-words"].write(lumina))
    cache("Alpha-VLLM/Lumina-mGPT-7B-512", made)
    cache("Alpha-VLLM/Lumina-mGPT-7B-768", lumina / "Lumina-mGPT-7B-768")
    name, beside = "Alpha-VLLM/Lumina-mGPT-7B-512", {"vqgan": lumina / "vqgan.ckpt"}
    words = {"tokenizer": "Alpha-VLLM/Lumina-mGPT-7B-768", **beside}
    assert bozzetto.load(name, image_size=32, **words).size == (4, 4)
    with pytest.raises(UsageError, match="no word '<reserved08816>'"):
        bozzetto.load(name, **words)
    with pytest.raises(UsageError, match="--tokenizer Alpha-VLLM/Lumina-mGPT-7B-768"):
        bozzetto.load(name, **beside)


@pytest.mark.parametrize("there", ["model.safetensors", "pytorch_model.bin"])
def test_pickles_are_fetched_only_where_there_is_nothing_else(
    there: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    asked: list[tuple[str, str | None, bool]] = []

    def fetch(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((name, revision, "*.bin" in allow_patterns))
        (tmp_path / there).touch()
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert fetched("a/b@v2") == tmp_path
    assert asked == [("a/b", "v2", False)] + [("a/b", "v2", True)] * (there == "pytorch_model.bin")


def test_offline_asks_nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(UsageError, match=r"nobody/nothing@v1: could not be read from the hub \(there is no such"):
        bozzetto.load("nobody/nothing@v1", offline=True)
    assert huggingface_hub.constants.HF_HUB_OFFLINE


@pytest.mark.parametrize(
    "name", ["a/b@", "a/b@../../c", "a/b@x y", "@a/b", "a@b/c@d@e", "a/b@~", "runs/a@b", "out/x@main"]
)
def test_what_is_no_name_with_a_revision(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert not on_hub(name) and fetched(name) == Path(name)


def test_a_model_is_called_what_it_is_wherever_it_lies(cache: Any, tiny_model: Path) -> None:
    served = models_of(Serve(model=(str(cache("owner/tiny-model", tiny_model)), "owner/tiny-model@main")))
    assert list(served) == ["tiny-model", "owner/tiny-model@main"]
    hub = "hub/models--Alpha-VLLM--Lumina-mGPT-7B-512/snapshots/590c1c5"
    names = {"a/b": "b", "a/b@main": "b", "folder/b": "b", hub: "Lumina-mGPT-7B-512", "x/models--y": "models--y"}
    assert {name: model_name(Path(name) if "@" not in name else name) for name in names} == names


@pytest.mark.parametrize(
    ("name", "side"),
    [
        ("hub/models--Alpha-VLLM--Lumina-mGPT-7B-512/snapshots/768", 512),
        ("Alpha-VLLM/Lumina-mGPT-7B-768-Omni", 768),
        ("Alpha-VLLM/Lumina-mGPT-7B-1024@main", 1024),
        ("folder/mine", 0),
        ("folder/15120", 0),
    ],
)
def test_a_luminas_size_is_that_of_its_name_and_not_of_its_last_folder(name: str, side: int) -> None:
    assert trained_side(Source(name, Path(name), {})) == side


# ---- code of others, and ways out ------------------------------------------------------------------------------------


def refused(folder: Path, match: str, **config: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=match):
        bozzetto.load(folder)


def test_code_that_comes_with_a_checkpoint_is_neither_run_nor_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers 5.24 asks the person whether to run what auto_map names, unless trust_remote_code is False."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked"))
    (tmp_path / "Emu3-Gen").mkdir()
    (tmp_path / "Emu3-Gen" / "modeling_emu3.py").write_text("raise SystemExit('run')")
    code = {"AutoConfig": "modeling_emu3.Emu3Config", "AutoModelForCausalLM": "modeling_emu3.Emu3ForCausalLM"}
    refused(tmp_path / "Emu3-Gen", "take BAAI/Emu3-Gen-hf", model_type="Emu3", auto_map=code)
    refused(tmp_path / "other", "model type 'mine' does not draw images", model_type="mine", auto_map=code)


@pytest.mark.parametrize("family", WRITERS)
def test_code_named_in_any_file_of_a_known_family_is_not_run(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked"))
    WRITERS[family](tmp_path / "m")
    (tmp_path / "m" / "evil.py").write_text("raise SystemExit('run')")
    for path in (tmp_path / "m").glob("*config.json"):
        content = json.loads(path.read_text())
        names = ("AutoConfig", "AutoProcessor", "AutoTokenizer", "AutoImageProcessor", "AutoModelForCausalLM")
        content["auto_map"] = {name: [None, "evil.Mine"] if name == "AutoTokenizer" else "evil.Mine" for name in names}
        path.write_text(json.dumps(content))
    try:
        bozzetto.load(tmp_path / "m", image_size={"emu3": 24, "lumina": 32}.get(family, 0))
    except UsageError as error:
        assert "could not be read" in str(error)


def test_every_reader_that_could_run_code_says_that_it_must_not() -> None:
    """transformers' Auto classes follow auto_map; the other classes are code of its own."""
    found = 0
    for path in Path(bozzetto.__file__).parent.rglob("*.py"):
        for call in (node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Call)):
            read = call.func
            if isinstance(read, ast.Attribute) and read.attr == "from_pretrained" and "Auto" in ast.unparse(read.value):
                found += 1
                assert "trust_remote_code=False" in ast.unparse(call), f"{path}:{call.lineno}"
    assert found


@pytest.mark.parametrize(
    ("name", "config", "said"),
    [
        ("BAAI/Emu3-Gen", {"model_type": "Emu3"}, "BAAI/Emu3-Gen-hf"),
        ("BAAI/Emu3.5-Image", {"model_type": "Emu3"}, "Emu3.5 is not read"),
        ("deepseek-ai/JanusFlow-1.3B", {"model_type": "multi_modality"}, "diffusion"),
        ("tencent/HunyuanImage-3.0", {"model_type": "hunyuan_image_3_moe"}, "diffusion"),
        ("ByteDance-Seed/BAGEL-7B-MoT", {}, "diffusion"),
        ("showlab/show-o2-7B", {"model_type": "showo2"}, "diffusion"),
        ("FoundationVision/Infinity", {}, "whole scales"),
        ("FoundationVision/var", {}, "whole scales"),
        ("GAIR/Anole-7b-v0.1", {}, "leloy/Anole-7b-v0.1-hf"),
        ("/hub/models--GAIR--Anole-7b-v0.1/snapshots/5", {}, "leloy/Anole-7b-v0.1-hf"),
        ("/data/me/LlamaGen-T2I", {"model_type": "llama"}, "bozzetto convert llamagen"),
    ],
)
def test_what_is_known_and_not_read_says_why_and_what_to_take(name: str, config: dict[str, str], said: str) -> None:
    assert said in way_out(name, config)


def test_published_files_that_are_no_folder_yet_are_told_to_be_converted(tmp_path: Path) -> None:
    (tmp_path / "c2i_B_256.pt").touch()
    for model in (tmp_path, tmp_path / "c2i_B_256.pt"):
        with pytest.raises(UsageError, match=r"not a .*\(checkpoints of LlamaGen and MAR are converted first"):
            bozzetto.load(model)
    with pytest.raises(UsageError, match=r"unknown model 'Janus-Pro-7B' .* or ORGANISATION/NAME\)$"):
        bozzetto.load("Janus-Pro-7B")


def test_a_suite_is_for_models_of_ours(janus: Path) -> None:
    with pytest.raises(UsageError, match=r"suite 'lantern' is not allowed with .*: its methods are for models of ours"):
        suite_models("lantern", str(janus))


def test_no_kind_that_is_read_is_refused_by_its_name() -> None:
    for kind, (module, name) in families.FAMILIES.items():
        assert not way_out("mine", {"model_type": kind, "gen_head_config": {}})
        assert callable(getattr(import_module(f"bozzetto.adapters.{module}"), name))


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("deepseek-ai/Janus-Pro-7B", {"model_type": "multi_modality", "gen_head_config": {}}),
        ("BAAI/Emu3-Gen-hf", {"model_type": "emu3"}),
        ("leloy/Anole-7b-v0.1-hf", {"model_type": "chameleon"}),
        ("Alpha-VLLM/Lumina-mGPT-7B-512", {"model_type": "chameleon"}),
        ("mine/variant", {"model_type": "janus"}),
        ("mine/BAGEL-or-llamagen", {"model_type": "janus"}),
        ("/data/llamagen/BAGEL/mine", {"model_type": "mine"}),
        ("/hub/models--mine--Janus/snapshots/llamagen", {}),
        ("mine/unknown", {}),
    ],
)
def test_nothing_is_said_of_what_is_read_or_unknown(name: str, config: dict[str, Any]) -> None:
    assert way_out(name, config) == ""


@pytest.mark.parametrize(
    ("name", "config", "said"),
    [
        ("tencent/HunyuanImage-3.0", {"model_type": "hunyuan_image_3_moe"}, "come from a diffusion process"),
        ("someone/words", {"model_type": "llama"}, "model type 'llama' does not draw images by tokens"),
        ("someone/pictures", None, "there is no config.json"),
        ("ByteDance-Seed/BAGEL-7B-MoT", None, "diffusion process"),
    ],
)
def test_what_is_not_read_is_refused_before_its_weights_are_fetched(
    name: str, config: dict[str, str] | None, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetch(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        assert not any(fnmatch("model-00001-of-00002.safetensors", pattern) for pattern in allow_patterns)
        if config is not None:
            (tmp_path / "config.json").write_text(json.dumps(config))
        return str(tmp_path)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    with pytest.raises(UsageError, match=f"{name}: .*{said}"):
        bozzetto.load(name)


def test_what_cannot_be_fetched_says_the_way_out_of_its_name(cache: Any) -> None:
    with pytest.raises(UsageError, match=r"could not be read from the hub .*by its name: .* take BAAI/Emu3-Gen-hf"):
        bozzetto.load("BAAI/Emu3-Gen")


def test_a_hub_checkpoint_without_a_config_says_the_way_out(cache: Any, tmp_path: Path) -> None:
    (tmp_path / "var").mkdir()
    (tmp_path / "var" / "README.md").write_text("weights")
    cache("FoundationVision/var", tmp_path / "var")
    with pytest.raises(UsageError, match="FoundationVision/var: it draws whole scales"):
        bozzetto.load("FoundationVision/var")
    with pytest.raises(UsageError, match=r"not a model folder: .* \(bozzetto models lists"):
        bozzetto.load(tmp_path / "var")


# ---- what comes without a tokenizer, or a decoder --------------------------------------------------------------------


def test_options_that_mean_nothing_to_a_model_are_refused(janus: Path, tiny_model: Path) -> None:
    for model in (janus, tiny_model):
        for options in ({"tokenizer": "a/b"}, {"vqgan": "x.ckpt"}):
            with pytest.raises(UsageError, match=rf"{next(iter(options))} = .* is not allowed: .* has its own"):
                bozzetto.load(model, **options)
