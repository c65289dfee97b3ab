"""Models by their name on the hub: fetched by huggingface_hub, which keeps to its cache and HF_HUB_OFFLINE."""

from __future__ import annotations

import re
from pathlib import Path

from bozzetto.errors import UsageError

_WANTED = ["*.json", "*.safetensors", "*.bin", "*.model", "*.txt", "*.jinja", "*.tiktoken", "*.ckpt", "*checkpoint.pt"]


def fetched(model: str | Path) -> Path:
    """The folder itself, or the one that a name on the hub was fetched into. Raises UsageError where it cannot be."""
    if Path(model).is_dir():
        return Path(model)
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(str(model), allow_patterns=_WANTED))
    except Exception as error:  # of the name, the network, the disk; each library has classes of its own
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UsageError(f"{model}: could not be read from the hub (there is no such folder here): {reason}") from error


def fetched_file(repository: str, name: str, otherwise: str) -> Path:
    """One file of a repository on the hub. otherwise: what is said to do where it cannot be fetched (UsageError)."""
    import huggingface_hub

    try:
        return Path(huggingface_hub.hf_hub_download(repository, name))
    except Exception as error:  # as in `fetched`
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UsageError(f"{name} of {repository} could not be read from the hub ({otherwise}): {reason}") from error


def model_name(model: str | Path) -> str:
    """What a model is called: NAME of ORGANISATION/NAME@REVISION, of a folder, or of one in the hub's cache
    (models--ORGANISATION--NAME/snapshots/REVISION)."""
    parts = Path(str(model)).parts or ("",)
    cached = [part.split("--")[-1] for part in parts if re.fullmatch(r"models--.+", part)]
    return cached[-1] if cached else parts[-1].partition("@")[0]
