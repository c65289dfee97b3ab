"""Models by their name on the hub: ORGANISATION/NAME, or ORGANISATION/NAME@REVISION. huggingface_hub fetches them and
keeps to its cache and to HF_HUB_OFFLINE."""

from __future__ import annotations

import os
import re
from pathlib import Path

from bozzetto.errors import UsageError, one_line

_PART = r"\w[\w.-]{0,95}"
_NAME = re.compile(rf"({_PART}/{_PART})(?:@((?!.*\.\.)[\w./-]{{1,100}}))?", re.ASCII)
_OURS = ("runs", "out", "checkpoints")  # folders, here or not
# What loading may read; pickles of weights only where there are no others.
_WANTED = (
    "*.json",
    "*.safetensors",
    "*.model",
    "*.txt",
    "*.jinja",
    "vqgan.ckpt",
    "tokenizer/vqgan.ckpt",
    "bozzetto.y*ml",
    "*checkpoint.pt",
)
_PICKLES = ("*.bin",)
_SAID = ("config.json", "model_index.json", "vision_language_encoder/config.json", "bozzetto.y*ml", "bozzetto.json")


def on_hub(model: str | Path) -> bool:
    """Whether this is a name as the hub writes it, where neither that nor a folder called ORGANISATION is here."""
    if not isinstance(model, str) or not _NAME.fullmatch(model):
        return False
    organisation = model.partition("/")[0]
    return not (os.path.exists(model) or os.path.isdir(organisation) or organisation in _OURS)


def split_name(model: str) -> tuple[str, str | None]:
    """ORGANISATION/NAME and REVISION of a name on the hub; anything else as it is, without one."""
    found = _NAME.fullmatch(model) if on_hub(model) else None
    return (found[1], found[2]) if found else (model, None)


def fetched(model: str | Path) -> Path:
    """A folder itself, or the one that a name on the hub was fetched into. Raises UsageError where it cannot be."""
    if not on_hub(model):
        return Path(model)
    folder = _snapshot(str(model), *_WANTED)
    return folder if any(folder.rglob("*.safetensors")) else _snapshot(str(model), *_WANTED, *_PICKLES)


def described(model: str | Path) -> Path:
    """As `fetched`, of the files alone that say what it is, for what is not read here may hold a hundred gigabytes."""
    return _snapshot(str(model), *_SAID) if on_hub(model) else Path(model)


def _snapshot(model: str, *patterns: str) -> Path:
    import huggingface_hub

    name, revision = split_name(model)
    try:
        return Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=list(patterns)))
    except Exception as error:  # of the name, the network, the disk; each library has classes of its own
        why = f"could not be read from the hub (there is no such folder here): {one_line(error)}"
        raise UsageError(f"{model}: {why}") from error


def local_folder(model: str | Path, *names: str) -> Path | None:
    """A folder itself, or that of the hub's cache which holds one of these files of a name; None where neither is."""
    if Path(model).is_dir():
        return Path(model)
    import huggingface_hub

    where, revision = split_name(str(model))
    known = (huggingface_hub.try_to_load_from_cache(where, name, revision=revision) for name in names)
    found = next((path for path in known if isinstance(path, str)), None)
    return None if found is None else Path(found).parent


def fetched_file(repository: str, name: str, otherwise: str) -> Path:
    """One file of a repository on the hub. otherwise: what is said to do where it cannot be fetched (UsageError)."""
    import huggingface_hub

    try:
        return Path(huggingface_hub.hf_hub_download(repository, name))
    except Exception as error:  # as in `fetched`
        why = f"could not be read from the hub ({otherwise}): {one_line(error, 200)}"
        raise UsageError(f"{name} of {repository} {why}") from error


def go_offline() -> None:
    """Ask no network from here on: as HF_HUB_OFFLINE=1, which huggingface_hub reads when it is first imported."""
    import huggingface_hub.constants

    huggingface_hub.constants.HF_HUB_OFFLINE = True


def model_name(model: str | Path) -> str:
    """What a model is called: NAME of ORGANISATION/NAME@REVISION, of a folder, or of one in the hub's cache
    (models--ORGANISATION--NAME/snapshots/REVISION)."""
    if isinstance(model, str) and (found := _NAME.fullmatch(model)):
        return found[1].partition("/")[2]
    parts = Path(model).parts or ("",)
    cached = [part.split("--")[-1] for part in parts if re.fullmatch(r"models--.+--.+", part)]
    return cached[-1] if cached else parts[-1]
