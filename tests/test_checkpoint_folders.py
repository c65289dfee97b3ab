"""Folders in the Hugging Face layout that are not whole, and names that are paths or the hub's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import hf_toys
from bozzetto import UsageError
from bozzetto.adapters.load import load_hosted
from bozzetto.checkpoints.load_settings import LoadSettings
from bozzetto.checkpoints.states import read_state
from bozzetto.pipeline.loading import load
from bozzetto.pipeline.pipeline import is_hosted

SHARDS = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
INDEX, CONFIG, WEIGHTS = "model.safetensors.index.json", "config.json", "model.safetensors"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Emu3 without its processor: what is wrong is found before that is missed."""
    folder = tmp_path_factory.mktemp("hosted") / "tiny"
    hf_toys.tiny_emu3().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "tiny")


def sharded(folder: Path, names: list[str]) -> None:
    """An index of shards, the first of which is there."""
    (folder / WEIGHTS).rename(folder / SHARDS[0])
    (folder / INDEX).write_text(json.dumps({"weight_map": {f"w{i}": name for i, name in enumerate(names)}}))


def config(folder: Path, **changes: object) -> None:
    content = json.loads((folder / CONFIG).read_text())
    content["text_config"].update(changes)
    (folder / CONFIG).write_text(json.dumps(content))


def retyped(folder: Path, kind: torch.dtype) -> None:
    """transformers 5.24 casts such weights without a word, and what is drawn then is noise."""
    state = load_file(folder / WEIGHTS)
    last = [key for key in state if key.endswith(".weight")][-1]
    save_file({**state, last: state[last].to(kind)}, folder / WEIGHTS)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 999\n"
WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "an interrupted download": (lambda at: cut(at / WEIGHTS), r"tiny/model\.safetensors: not a readable"),
    "a pointer": (lambda at: (at / WEIGHTS).write_text(POINTER), r"tiny/model\.safetensors.*Git LFS pointer"),
    "a pickled pointer": (
        lambda at: ((at / WEIGHTS).unlink(), (at / "pytorch_model.bin").write_text(POINTER)),
        r"tiny/pytorch_model\.bin: a Git LFS pointer",
    ),
    "no weights": (lambda at: (at / WEIGHTS).unlink(), "tiny: no weights"),
    "a missing shard": (lambda at: sharded(at, SHARDS), r"tiny: model-00002-of-00002\.safetensors missing .1 of 2"),
    "a shard elsewhere": (lambda at: sharded(at, ["../secret.safetensors"]), r"index\.json: '../secret.* not allowed"),
    "an absolute shard": (lambda at: sharded(at, ["/etc/passwd"]), r"index\.json: '/etc/passwd' is not allowed"),
    "a number as shard": (lambda at: sharded(at, [7]), r"index\.json: 7 is not allowed"),  # type: ignore[list-item]
    "an empty index": (lambda at: sharded(at, []), r"index\.json: weight_map is \{\}"),
    "a broken index": (lambda at: (sharded(at, []), (at / INDEX).write_text("[" * 10**5)), r"index\.json: .*nested"),
    "int8 without scales": (lambda at: retyped(at, torch.int8), r"tiny/model\.safetensors: weight '.*' is of type I8"),
    "float8": (lambda at: retyped(at, torch.float8_e4m3fn), r"is of type F8_E4M3 \(allowed: F16, BF16, F32, F64\)"),
    "a million layers": (lambda at: config(at, num_hidden_layers=10**6), r"config\.json: num_hidden_layers = 1000000"),
    "fewer heads than none": (lambda at: config(at, num_attention_heads=-1), r"config\.json: num_attention_heads = -1"),
    "a deep tower": (lambda at: config(at, depth=10**9), r"config\.json: depth = 1000000000"),
    "a large vocabulary": (lambda at: config(at, vocab_size=10**9), r"config\.json: describes \d+ weights"),
    "text for a number": (lambda at: config(at, hidden_size="512"), r"tiny.*config\.json"),
    "no heads": (lambda at: config(at, num_attention_heads=0), r"tiny.*config\.json"),
    "deep JSON": (lambda at: (at / CONFIG).write_text('{"model_type":' + "[" * 10**5), r"config\.json: .*nested"),
}


@pytest.mark.parametrize(("spoil", "said"), WRONG.values(), ids=WRONG)
def test_a_folder_that_is_not_whole_says_which_file(folder: Path, spoil: Callable, said: str) -> None:
    """transformers 5.24 asks for the memory of a large vocabulary before it looks at the weights, opens shards that an
    index names outside of the folder, and lets SafetensorError (safetensors 0.8) through for a file that was cut."""
    spoil(folder)
    with pytest.raises(UsageError, match=said):
        load(folder)


def test_a_whole_folder_lacks_its_processor_only(folder: Path) -> None:
    with pytest.raises(UsageError, match="its processor could not be read"):
        load_hosted(folder, LoadSettings())


@pytest.mark.parametrize(
    "name",
    [
        "a/b c",
        "a/b\0",
        f"a/{'b' * 300}",
        *[
            "./a/b",
            "../b",
            "a/b/c",
            "/a/b",
            "~/b",
            "~a/b",
            "a\\b",
            "a/b/",
            ".a/b",
            "here/nothing",
            "runs/nothing",
            "out/x",
            "flowers",
            "a//b",
        ],
    ],
)
def test_what_looks_like_a_path_is_no_name_on_the_hub(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    assert not is_hosted(name)
    if name != "flowers":
        with pytest.raises(UsageError, match=r"unknown model .*shipped"):
            load(name)


def test_names_of_the_hub_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_hosted("BAAI/Emu3-Gen-hf") and is_hosted("deepseek-community/Janus-Pro-1B")
    assert not is_hosted(Path("BAAI/Emu3-Gen-hf"))
    (tmp_path / "BAAI").mkdir()
    assert not is_hosted("BAAI/Emu3-Gen-hf")


def test_a_file_is_no_folder(folder: Path) -> None:
    with pytest.raises(UsageError, match=r"not a folder but a file: .*config\.json"):
        load(folder / CONFIG)


def test_a_pointer_given_to_convert_is_called_one(tmp_path: Path) -> None:
    for name in ("c2i_B_256.pt", "drafter.safetensors"):
        (tmp_path / name).write_text(POINTER)
        with pytest.raises(UsageError, match=rf"{name}: .*Git LFS pointer"):
            read_state(tmp_path / name)
