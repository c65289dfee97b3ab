"""Captions as features of flan-t5-xl, as LlamaGen's text-to-image models were trained on them (arXiv 2406.06525).

A caption is cleaned (targets/caption_text.py), cut to T = 120 tokens with their end, and padded on the right; only the
encoder of T5 is loaded. Features are kept on disk by the encoder's files and the cleaned text, so that a caption costs
the encoder (1.2 billion weights) once.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from bozzetto.adapters.load import checkpoint_digest
from bozzetto.adapters.source import refuse_keys
from bozzetto.checkpoints.folders import CONFIG
from bozzetto.common.files import digest
from bozzetto.common.hub import local_folder, split_name
from bozzetto.errors import UsageError, one_line
from bozzetto.runtime.kept import cache_folder, find, keep, thin_out
from bozzetto.targets.caption_text import clean_caption

PUBLISHED, DIM = "google/flan-t5-xl", 2048
_SMALL = 16 << 20  # bytes of a file that is read to tell encoders apart; of larger ones size and time are looked at
MOST_BYTES = 1 << 30  # of features on disk; those not used for longest go first


class T5Encoder:
    """Texts -> features [K, T, C], padded on the right.

    source: a folder, or a name on the hub; tokens: T; dim: C, which has to be the encoder's; dtype: bfloat16 for
    anything but float32, for T5 overflows in float16. The network is loaded for the first caption whose features are
    not kept. keeps: whether new features are written to disk. Raises UsageError where config.json cannot be read or is
    not that of such a T5.
    """

    keeps = True

    def __init__(self, source: str | Path, tokens: int, dim: int, dtype: torch.dtype, device: str):
        from transformers import AutoConfig

        self.source, self.tokens, self.dim, self.device = str(source), tokens, dim, device
        self.dtype = dtype if dtype == torch.float32 else torch.bfloat16
        config = self._read(CONFIG, AutoConfig)
        kind, have = getattr(config, "model_type", None), getattr(config, "d_model", None)
        if kind not in ("t5", "mt5", "umt5") or have != dim:
            raise UsageError(
                f"text_encoder = {self.source!r} is not allowed: {kind} with features of {have} numbers, this model "
                f"takes t5 with {dim}"
            )
        self._tokenizer: Any = None
        self._network: Any = None

    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Features float32 [K, T, C], zero where there is none, and their mask, bool [K, T]. One text at a time, so
        that features do not depend on their neighbours."""
        features = torch.zeros(len(texts), self.tokens, self.dim)
        mask = torch.zeros(len(texts), self.tokens, dtype=torch.bool)
        for row, text in enumerate(texts):
            found = self._kept(clean_caption(text))
            features[row, : len(found)], mask[row, : len(found)] = found.float(), True
        return features, mask

    def release(self) -> None:
        """Let go of the network until it is needed again."""
        self._network = None

    def fingerprint(self) -> str:
        return checkpoint_digest(self.source)

    def _kept(self, text: str) -> Tensor:
        """Features [n, C] of a cleaned caption of n <= T tokens."""
        folder = cache_folder()
        parts = (encoder_digest(self.source), text, self.tokens, str(self.dtype), torch.device(self.device).type)
        name = f"caption-{hashlib.sha256(repr(parts).encode()).hexdigest()[:24]}.safetensors"
        if path := find(name, folder):
            with contextlib.suppress(OSError, SafetensorError):  # another process threw it away
                os.utime(path)
                return load_file(path)["features"].clone()  # what is loaded is mapped, and the file may change
        made = self._encoded(text)
        if not self.keeps:
            return made
        # safetensors 0.8 reports a full disk as a SafetensorError, not as an OSError.
        with contextlib.suppress(OSError, SafetensorError):
            path = keep(name, lambda at: save_file({"features": made}, at), folder)
            thin_out(path.parent, "caption-*.safetensors", MOST_BYTES, path)
        return made

    @torch.no_grad()
    def _encoded(self, text: str) -> Tensor:
        if self._network is None:
            self._load()
        given = self._tokenizer(
            [text], max_length=self.tokens, padding="max_length", truncation=True, return_tensors="pt"
        ).to(self.device)
        count = int(given["attention_mask"].sum())
        if count == self.tokens and len(self._tokenizer(text)["input_ids"]) > count:
            logging.getLogger("bozzetto").warning("a prompt is cut to %d tokens", count)  # a client's words: not shown
        states = self._network(input_ids=given["input_ids"], attention_mask=given["attention_mask"]).last_hidden_state
        made = states[0, :count].cpu().contiguous()
        if not bool(torch.isfinite(made).all()):
            raise UsageError(f"text_encoder = {self.source!r} gives non-finite features")
        return made

    def _load(self) -> None:
        from transformers import AutoTokenizer, T5EncoderModel
        from transformers.utils import logging as said

        self._tokenizer = self._read("tokenizer", AutoTokenizer)
        said.disable_progress_bar()
        try:
            network, notes = self._read("weights", T5EncoderModel, dtype=self.dtype, output_loading_info=True)
        finally:
            said.enable_progress_bar()
        refuse_keys(self.source, "missing", sorted(map(str, notes["missing_keys"])))
        self._network = network.to(self.device).eval().requires_grad_(False)

    def _read(self, what: str, kind: Any, **options: Any) -> Any:
        """A from_pretrained. Its many kinds of error all mean that a file is missing or does not fit."""
        name, revision = split_name(self.source)
        if revision is not None:
            options["revision"] = revision
        try:
            return kind.from_pretrained(name, trust_remote_code=False, **options)
        except Exception as error:  # tokenizers raises no class of its own, safetensors one that is none of Python's
            raise UsageError(
                f"the {what} of the text encoder {self.source} could not be read (give its folder with --text-encoder, "
                f"or features with --captions): {one_line(error)}"
            ) from error


def encoder_digest(source: str) -> str:
    """What tells one encoder from another on this machine. Of large files their name, size and time; a snapshot of the
    hub's is called by its commit."""
    folder, total = local_folder(source, CONFIG), hashlib.sha256()
    if folder is None or not Path(source).is_dir():
        return f"{source} {folder and folder.name}"
    for path in sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith(".")):
        about = path.stat()
        known = digest(path) if about.st_size <= _SMALL else f"{about.st_size} {about.st_mtime_ns}"
        total.update(f"{path.name} {known}\n".encode())
    return total.hexdigest()
