"""From a transformers checkpoint (a folder, or a name on the hub) to a target, its prompts and its pictures.

Folders in the Hugging Face layout are read as they are. A family is a function from a Source to a Hosted, in a file of
its own; its model type stands in families.py.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path

from bozzetto.adapters import generic
from bozzetto.adapters.families import FAMILIES, NEXTSTEP, way_out
from bozzetto.adapters.prompted import PromptedCodes
from bozzetto.adapters.source import Hosted, Source, fitting, of_words
from bozzetto.adapters.spec import find_spec_file, known_by, read_spec
from bozzetto.checkpoints.folders import CONFIG, FIRST_STAGE, PIPELINE, read_config
from bozzetto.checkpoints.load_settings import LoadSettings, refuse_flow_options
from bozzetto.common.files import digest, read_json
from bozzetto.common.hub import described, fetched, local_folder, on_hub
from bozzetto.errors import UsageError, brief

Reader = Callable[[Source, LoadSettings], Hosted]
_COUNTED = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".json", ".model", ".txt", ".jinja", ".tiktoken")

_GLM_IMAGE = "GlmImagePipeline"  # of diffusers, whose parts lie in folders of their own


def load_hosted(model: str | Path, wanted: LoadSettings, folder: Path | None = None) -> Hosted:
    """Load a checkpoint in the Hugging Face layout. model: as it is called; folder: where its files are, where that is
    known.

    Raises UsageError for a checkpoint that is not an image generator of a known family, that is incomplete, or that
    lacks its tokenizer.
    """
    source = _source(str(model), described(model) if folder is None else folder)
    read = _reader(source, wanted)
    if on_hub(model):  # the weights too, now that they are known to be read
        source = _source(str(model), fetched(model))
    with fitting(f"{model}: its files do not fit together"):
        return _finished(read(source, wanted.for_weights(source.stored)), wanted)


def _reader(source: Source, wanted: LoadSettings) -> Reader:
    """What reads a checkpoint, of which no weights need be there. Raises UsageError where nothing does, and for options
    that are not for it."""
    kind, path = source.config.get("model_type"), find_spec_file(wanted.adapter, source.folder)
    path = path or known_by(source.config)
    if path or kind != NEXTSTEP:
        refuse_flow_options(wanted, source.name)
    if path:
        return partial(generic.load, spec=read_spec(path), path=path)
    if why := way_out(source.name, source.config):
        raise UsageError(f"{source.name}: {why}")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise UsageError(
            f"{source.name}: model type {kind!r} does not draw images by tokens here (allowed: {', '.join(FAMILIES)}; "
            "LlamaGen and MAR checkpoints: bozzetto convert; a language model whose image tokens are words: --adapter)"
        )
    module, name = FAMILIES[kind]
    found: Reader = getattr(import_module(f"bozzetto.adapters.{module}"), name)
    return found


def _source(name: str, folder: Path) -> Source:
    """The checkpoint in a folder; in that of a diffusers pipeline, the part that draws tokens. Raises UsageError for a
    pipeline without one."""
    if not (folder / PIPELINE).is_file():
        return Source(name, folder, read_config(folder))
    kind = read_json(folder / PIPELINE).get("_class_name")
    if kind != _GLM_IMAGE:
        raise UsageError(f"{name}: a diffusers pipeline {brief(kind)} has no image tokens to draft ({_GLM_IMAGE} has)")
    return Source(name, folder / FIRST_STAGE, read_config(folder / FIRST_STAGE), folder)


def _finished(hosted: Hosted, wanted: LoadSettings) -> Hosted:
    """In any size with prompts that are words, and with the files that were asked for besides the folder."""
    if wanted.device_map and isinstance(hosted.target, PromptedCodes):
        hosted.target.gather_here()
    made, besides = hosted.sized, list(hosted.besides)
    besides += [Path(wanted.vqgan)] if wanted.vqgan and Path(wanted.vqgan) not in besides else []
    besides += [fetched(wanted.tokenizer) / "tokenizer.json"] if wanted.tokenizer else []
    sized = None if made is None else lambda size: _finished(made(size), wanted)
    ask = of_words(hosted.ask, hosted.tokenizer, hosted.target)
    return replace(hosted, ask=ask, sized=sized, besides=tuple(path for path in besides if path.is_file()))


def checkpoint_digest(model: str | Path) -> str:
    """What tells one checkpoint from another: a digest of the names and bytes of the files in its folder that loading
    may read (weights, configurations, tokenizer), or of those in the hub's cache. Code and notes do not count, nor
    sub-folders but those of a diffusers pipeline; files of the cache that are called by the sha256 of their bytes are
    taken at their word. "unknown" without files."""
    folder = local_folder(model, CONFIG, PIPELINE)
    if folder is None:
        return "unknown"
    total = hashlib.sha256()
    parts = folder.glob("*/*") if (folder / PIPELINE).is_file() else ()
    for path in sorted(p for p in (*folder.iterdir(), *parts) if p.suffix in _COUNTED and not p.name.startswith(".")):
        blob = path.resolve().name  # in the cache, a link to its bytes
        named = path.is_symlink() and re.fullmatch("[0-9a-f]{64}", blob)
        total.update(f"{path.relative_to(folder).as_posix()} {blob if named else digest(path)}\n".encode())
    return total.hexdigest()[:16]
