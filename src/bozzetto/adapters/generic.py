"""Any language model of transformers whose image tokens are words, as an adapter file (adapters/spec.py) says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from bozzetto.adapters.chameleon import ChameleonLanguage, chameleon_files
from bozzetto.adapters.pictures import HostedPictures, PictureConfig, read_decoder, scale_of
from bozzetto.adapters.prompted import Prompt, PromptedCodes, words_target
from bozzetto.adapters.source import Hosted, Source, fits_context, in_sizes, prompts_of, word_number
from bozzetto.adapters.spec import TOKENIZER, AdapterSpec, filled
from bozzetto.checkpoints.load_settings import LoadSettings
from bozzetto.common.checks import naming
from bozzetto.common.hub import fetched, fetched_file
from bozzetto.errors import UsageError, brief, require

_SAME = 0.1  # of the spread of logits: what rounding in two bytes may turn


def load(source: Source, wanted: LoadSettings, spec: AdapterSpec, path: Path) -> Hosted:
    """The model in a folder, as the adapter file at `path` says."""
    spec.grid(wanted.size or spec.every_size[0])  # before weights are read
    tokenizer, network = _tokenizer(source, wanted), _network(source, wanted, spec)
    body, head = network.get_decoder(), network.get_output_embeddings().weight
    codes = _codes(spec, tokenizer, len(head), path)
    end = _word(tokenizer, spec.line_end, path) if spec.line_end else None
    found = _decoder_file(spec, source, wanted, path)
    decoder = None if found is None else _decoder(spec, found, path).to(network.device)
    besides = (path, *([found] if found is not None and found.parent != source.folder else ()))
    missing = "" if found else spec.decoder.why or "its adapter names no decoder"
    bos = tokenizer.bos_token or tokenizer.eos_token or ""

    def made(size: tuple[int, int]) -> Hosted:
        rows, columns = spec.grid(size)
        target = words_target(body, head, codes, rows, columns, end)
        fits_context(source, target, size)

        def tokens(template: str, prompt: str = "") -> tuple[int, ...]:
            return tuple(tokenizer.encode(spec.said(template, size, bos, prompt), add_special_tokens=False))

        ask = prompts_of(lambda text: tokens(spec.prompt, text), lambda given: tokens(spec.no_prompt))
        config, codebook = PictureConfig(rows, columns, spec.pixels), torch.zeros(0, 1)
        if decoder is not None:
            codebook = decoder.codebook
        pictures = HostedPictures(config, codebook, decoder, end is not None, missing=missing)
        with naming(path):  # of a template that comes to nothing
            without = ask("a", "").without
        _check_law(network, target, without, path)
        return Hosted(target, pictures, ask, spec.sampling, tokenizer, besides=besides)

    return in_sizes(wanted, spec.every_size, made)


def _tokenizer(source: Source, wanted: LoadSettings) -> Any:
    from transformers import AutoTokenizer

    place = fetched(wanted.tokenizer) if wanted.tokenizer else source.folder
    require(place.is_dir(), "tokenizer", wanted.tokenizer, "a folder, or a name on the hub")
    tokenizer = source.read("tokenizer", AutoTokenizer.from_pretrained, place)
    if not tokenizer.encode("a", add_special_tokens=False):  # transformers 5.24 makes one out of its class alone
        raise UsageError(f"{place}: its tokenizer has no words: tokenizer.json is missing or empty")
    return tokenizer


def _network(source: Source, wanted: LoadSettings, spec: AdapterSpec) -> Any:
    """The network that config.json, or the adapter, names. Raises UsageError for one that transformers does not have,
    or whose layers do not all see everything before them."""
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    kind = spec.body or str(source.config.get("model_type"))
    if kind == "chameleon":
        config, language, _ = chameleon_files(source, mapped=False)
        return source.network(ChameleonLanguage, wanted, config, language)
    if kind not in CONFIG_MAPPING or CONFIG_MAPPING[kind] not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UsageError(f"{source.name}: model type {brief(kind)} is no language model of transformers")
    config = source.read("config.json", CONFIG_MAPPING[kind].from_pretrained)
    odd = sorted(set(getattr(config, "layer_types", None) or ()) - {"full_attention"})
    if odd:
        raise UsageError(f"{source.name}: layers of type {', '.join(odd)} are not allowed: full_attention")
    model = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[kind]]
    source.check(model)
    return source.network(model, wanted)


def _codes(spec: AdapterSpec, tokenizer: Any, held: int, path: Path) -> list[int]:
    """Words of the codes, in their order. held: words that the network has. Raises UsageError for one that is not."""
    if spec.pattern:
        found = [_word(tokenizer, filled(spec.pattern, code), path) for code in range(spec.codes)]
    elif spec.words:
        found = list(spec.words)
    else:
        first = len(tokenizer) if spec.offset == TOKENIZER else int(spec.offset or 0)
        found = [*range(first, first + spec.codes)]
    if max(found) >= held:
        raise UsageError(f"{path}: word {max(found)} of code {found.index(max(found))} is not there: {held} words are")
    return found


def _word(tokenizer: Any, name: str, path: Path) -> int:
    """The number of a word that the tokenizer has to have."""
    return word_number(tokenizer, name, f"{path}: the model's tokenizer has no word {brief(name)}")


def _decoder(spec: AdapterSpec, found: Path, path: Path) -> Any:
    """The decoder in a file, of the kind, and of as many codes and pixels, as the adapter says."""
    decoder = read_decoder(spec.decoder.kind, found)
    for name, have, want in (("codes", len(decoder.codebook), spec.codes), ("pixels", scale_of(decoder), spec.pixels)):
        if have != want:
            raise UsageError(f"{path}: {name} = {want}, but the decoder in {found} has {have}")
    return decoder


def _decoder_file(spec: AdapterSpec, source: Source, wanted: LoadSettings, path: Path) -> Path | None:
    """Where the decoder is: as asked for, beside the adapter, in the model's folder, on the hub; None without one."""
    if spec.decoder.kind == "none":
        wanted.refuse(f"{source.name} has its own", "vqgan")
        return None
    if wanted.vqgan:
        return Path(wanted.vqgan)
    name, hub = spec.decoder.file, spec.decoder.hub
    if found := next((p for p in (path.parent / name, source.folder / name) if p.is_file()), None):
        return found
    if not hub:
        raise UsageError(f"{path}: its decoder {name} is neither beside it nor in {source.folder} (or --vqgan)")
    return fetched_file(hub, name, f"give it with --vqgan, or put it into {source.folder}")


@torch.no_grad()
def _check_law(network: Any, target: PromptedCodes, prompt: tuple[int, ...], path: Path) -> None:
    """Raise UsageError where the laws that are read here are not those of the network's own forward: of a head with a
    scale or a cap behind it, of positions that are not 0, 1, 2, ... Asked of two tokens after a prompt."""
    if network.config.model_type == "chameleon":  # whose forward hides image tokens
        return
    target.gather_here()
    some = torch.tensor([*prompt, *target.numbers[:2]], device=network.device)[None]
    theirs = network(input_ids=some, use_cache=False).logits[0, -3:, target.numbers].float()
    label = target.add(Prompt(prompt, prompt), len(target.prompts))
    session = target.begin(torch.tensor([label], device=network.device), False, 3)
    start = torch.zeros(1, dtype=torch.int64, device=network.device)
    ours = session.score(torch.tensor([[0, 0, 1]], device=network.device), start).logits
    del target.prompts[label]
    assert ours is not None
    codes = len(target.head)  # the end of a line is the grid's
    free = [at for at in range(3) if not target.line or at % (target.line + 1) != target.line]
    wrong = (ours[0, free, :codes] - theirs[free, :codes]).abs().max()
    if float(wrong) > _SAME * float(theirs.std()):
        raise UsageError(f"{path}: the model's logits are not its last hidden states times its head: not allowed here")
