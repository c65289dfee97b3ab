"""Models of Chameleon's architecture (arXiv 2405.09818) as transformers holds them, such as Anole (arXiv 2407.06135),
and Lumina-mGPT (arXiv 2408.02657): pictures of any size, which has words for it, and an end of each line.

Image tokens are words of the one vocabulary. transformers hides them (its forward masks their logits), so the decoder
and the rows of the head are called here.

Three things differ in published files from what transformers 5 writes: norms of queries and keys may have one row per
shard that the model was trained on (config.json: model_parallel_size) in place of one per head; the VQ model may be
missing (Lumina-mGPT) or come with its decoder (Anole), which transformers does not have. It is not needed in the
network. Its decoder is from the published tokenizer checkpoint, or from the model's own files: a VQGAN (Esser et al.,
arXiv 2012.09841).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import ChameleonForConditionalGeneration

from bozzetto.adapters.pictures import FIRST, HostedPictures, PictureConfig, vqgan_decoder
from bozzetto.adapters.prompted import PromptedCodes, codes_of, words_target
from bozzetto.adapters.source import (
    Ask,
    Hosted,
    Source,
    check_multiple,
    fits_context,
    fixed_size,
    in_sizes,
    numbers,
    prompts_of,
    without,
    word_number,
)
from bozzetto.autoencoders.kl16 import infer_config
from bozzetto.autoencoders.movqgan import CODEBOOK
from bozzetto.checkpoints.load_settings import LoadSettings, written
from bozzetto.checkpoints.published import family_of
from bozzetto.checkpoints.states import check_finite, read_state
from bozzetto.common.hub import model_name
from bozzetto.errors import UsageError

_VQGANS = ("vqgan.safetensors", "vqgan.ckpt", "tokenizer/vqgan.ckpt")
_VQ = "model.vqmodel."
_NORM = re.compile(r"model\.layers\.\d+\.self_attn\.([qk])_norm\.(weight|bias)")
_PIXELS, _CODES = 32, 2  # of one of Lumina-mGPT's cells, per side: its pixels and its codes
_MOST_RATIO = 4  # of the sides of a picture
_SIZES = (512, 768, 1024)  # what checkpoints are called by and trained for
ChameleonLanguage = without(ChameleonForConditionalGeneration, "vqmodel")
_ELSEWHERE = (
    "give that of another Lumina-mGPT, which all have the same, with --tokenizer Alpha-VLLM/Lumina-mGPT-7B-768 "
    "(a folder or a name on the hub)"
)


def target(model: Any, rows: int, columns: int, end: int | None = None) -> PromptedCodes:
    """model: ChameleonForConditionalGeneration; rows, columns: of the picture in tokens; end: the word that ends a line
    of Lumina-mGPT's."""
    return words_target(model.model, model.lm_head.weight, codes_of(model), rows, columns, end)


def load(source: Source, wanted: LoadSettings) -> Hosted:
    """Chameleon's architecture as transformers' conversion lays it out; Lumina-mGPT says what it is."""
    if family_of(source.config) == "lumina-mgpt":
        return load_lumina(source, wanted)
    wanted.refuse(f"{source.name} has its own", "tokenizer")
    processor, (config, language, vq) = source.processor(), chameleon_files(source)
    pictured = vqgan_pictures(source, wanted, vq, image_words(config))
    network = source.network(ChameleonLanguage, wanted, config, language)
    grid = math.isqrt(processor.image_seq_length)
    drawn = target(network, grid, grid)
    pictures = pictured(grid, grid, network.device)
    fixed_size(source, wanted, pictures.config.size)
    begin, first = processor.image_start_token_id, processor.tokenizer.bos_token_id

    def tokens(text: str) -> tuple[int, ...]:
        return (*numbers(processor(text=text, return_tensors="pt")), begin)

    ask = prompts_of(tokens, lambda given: (first, begin))
    return Hosted(drawn, pictures, ask, source.sampling(), processor.tokenizer)


def image_words(config: Any) -> int:
    """How many words config.json says are image tokens."""
    return sum(str(word).startswith("IMGIMG") for word in config.vocabulary_map or ())


def chameleon_files(source: Source, mapped: bool = True) -> tuple[Any, dict[str, Tensor], dict[str, Tensor]]:
    """What a folder holds: the config of transformers; the language model's weights under transformers' names and in
    its shapes; the VQ model's under those of its own checkpoint (empty: there is none). Weights are mapped from their
    files. mapped: whether config.json has to say which words are image tokens. Raises UsageError."""
    config = source.read("config.json", ChameleonForConditionalGeneration.config_class.from_pretrained)
    if not mapped and not config.vocabulary_map:
        config.vocabulary_map = {}
    source.check(ChameleonLanguage, config)
    if mapped and not image_words(config):
        raise UsageError(f"{source.folder / 'config.json'}: vocabulary_map has no words for image tokens (IMGIMG...)")
    language, vq = {}, {}
    for key, value in source.tensors().items():
        if key.startswith(_VQ):
            vq[key.removeprefix(_VQ)] = value
        else:
            language[key] = _per_head(source, config, key, value)
    return config, language, vq


def _per_head(source: Source, config: Any, key: str, value: Tensor) -> Tensor:
    """A norm's row for every head, [heads, head_dim], from one per shard."""
    found = _NORM.fullmatch(key)
    if found is None or value.ndim != 2:
        return value
    heads = config.num_attention_heads if found[1] == "q" else config.num_key_value_heads
    if not len(value) or heads % len(value):
        raise UsageError(f"{source.name}: {key} has {len(value)} rows, which do not divide its {heads} heads")
    return value.repeat_interleave(heads // len(value), 0)


def vqgan_pictures(
    source: Source, wanted: LoadSettings, vq: Mapping[str, Tensor], codes: int, lined: bool = False
) -> Callable[[int, int, torch.device], HostedPictures]:
    """What makes pictures of so many rows and columns of codes on a device. The decoder is that of `wanted`, else that
    of a file in the model's folder under one of _VQGANS, else that of the model's own VQ model, `vq`; codes: of the
    model; lined: whether each row of tokens has an end.

    Raises UsageError where it is missing, of another family, or of other codes than the model's.
    """
    state, where = _vqgan(source, wanted, vq)
    codebook, own = state[CODEBOOK].float(), vq.get(CODEBOOK)
    same = own is None or (own.shape == codebook.shape and torch.allclose(codebook, own.float(), rtol=1e-2, atol=1e-2))
    if not same or len(codebook) != codes:
        raise UsageError(f"{where}: its codes are not those of {source.name}")
    scale, decoder = infer_config(state).downsample, vqgan_decoder(state, where).eval().requires_grad_(False)

    def made(rows: int, columns: int, device: torch.device) -> HostedPictures:
        return HostedPictures(PictureConfig(rows, columns, scale), codebook.to(device), decoder.to(device), lined)

    return made


def _vqgan(source: Source, wanted: LoadSettings, inside: Mapping[str, Tensor]) -> tuple[Mapping[str, Tensor], Path]:
    """The state of a VQGAN, and where it is from."""
    found = (source.folder / name for name in _VQGANS)
    path = Path(wanted.vqgan) if wanted.vqgan else next((file for file in found if file.is_file()), None)
    if path is None and FIRST not in inside:
        raise UsageError(
            f"{source.name}: no decoder for its image tokens: transformers holds none, so give the published tokenizer "
            "checkpoint (of Meta's Chameleon) with --vqgan, or put it into the model's folder as "
            f"{' or '.join(_VQGANS)}"
        )
    where = source.folder if path is None else path
    state = inside if path is None else read_state(path)
    if path is None:
        check_finite(where, {key: value for key, value in inside.items() if not key.startswith("encoder.")})
    if CODEBOOK not in state or FIRST not in state:
        raise UsageError(f"{where}: not a VQGAN tokenizer (wanted {CODEBOOK}, {FIRST}, ...)")
    return state, where


def load_lumina(source: Source, wanted: LoadSettings) -> Hosted:
    """Lumina-mGPT."""
    side = trained_side(source)
    if not (side or wanted.size):
        allowed = ", ".join(map(str, _SIZES))
        raise UsageError(
            f"{source.name}: its name does not say for which pictures it was trained: give --image-size "
            f"(Lumina-mGPT's are {allowed})"
        )
    tokenizer = source.tokenizer(wanted, _ELSEWHERE)
    sizes = lumina_sizes(side) if side else ()
    lumina_prompts(tokenizer, wanted.size or sizes[0])  # what it refuses is refused before weights are read
    config, language, vq = chameleon_files(source)
    pictured = vqgan_pictures(source, wanted, vq, image_words(config), lined=True)
    network, own = source.network(ChameleonLanguage, wanted, config, language), source.sampling()

    def made(size: tuple[int, int]) -> Hosted:
        ask, end = lumina_prompts(tokenizer, size)
        columns, rows = (pixels // _PIXELS * _CODES for pixels in size)
        drawn = target(network, rows, columns, end)
        fits_context(source, drawn, size)
        return Hosted(drawn, pictured(rows, columns, network.device), ask, own, tokenizer)

    return in_sizes(wanted, sizes, made)


def lumina_prompts(tokenizer: Any, size: tuple[int, int]) -> tuple[Ask, int]:
    """Lumina-mGPT's own grammar, and the word that ends a line: the task in words, a separator, begin of image, and the
    picture's height and width in a word each. Without a prompt it begins at the begin of image. size: (width, height)
    of the picture in pixels. Raises UsageError."""
    check_multiple(size, _PIXELS)

    def word(name: str) -> int:
        what = f"the tokenizer has no word {name!r}: Lumina-mGPT's own tokenizer files are needed"
        return word_number(tokenizer, name, what)

    width, height = (word(f"<reserved{8800 + side // _PIXELS:05d}>") for side in size)
    begin, end, separator = (word("<racm3:break>"), height, width), word("<reserved08799>"), word("<reserved08706>")

    def tokens(text: str) -> tuple[int, ...]:
        task = f"Generate an image of {written(size)} according to the following prompt:\n{text}"
        return (tokenizer.bos_token_id, *tokenizer.encode(task, add_special_tokens=False), separator, *begin)

    return prompts_of(tokens, lambda given: begin), end


def lumina_sizes(side: int) -> tuple[tuple[int, int], ...]:
    """(width, height) of the pictures that a checkpoint for squares of `side` pixels is trained on, the square first:
    those of no more cells than the square that have more when both sides grow by one, sides up to 4 to 1."""
    cells = (side // _PIXELS) ** 2
    pairs = ((w, h) for w in range(1, cells + 1) for h in range(max(1, cells // (w + 1)), cells // w + 1))
    allowed = [pair for pair in pairs if max(pair) <= _MOST_RATIO * min(pair)]
    allowed.sort(key=lambda pair: (abs(pair[0] - pair[1]), -pair[0] * pair[1]))
    return tuple((width * _PIXELS, height * _PIXELS) for width, height in allowed)


def trained_side(source: Source) -> int:
    """The side of the squares that the checkpoint is trained for, which only its name says. 0: unknown."""
    words = re.split(r"[-_.]", model_name(source.name))
    return next((side for side in _SIZES if str(side) in words), 0)
