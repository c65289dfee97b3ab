"""Adapter files: what a few lines of YAML or JSON say of a language model whose image tokens are words.

An adapter is given as `--adapter FILE`, or lies in the model's folder under one of NAMES, or is one of the shipped ones
(adapters/files), by name. It says which words stand for which codes, how the grid is written, the prompts, the decoder
and how its authors sample it; docs/models.md explains the keys.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from bozzetto.checkpoints.load_settings import size_of, written
from bozzetto.checkpoints.own_sampling import HEAD, OwnSampling
from bozzetto.common.checks import Count, Size, config_from, read_mapping
from bozzetto.errors import UsageError, brief, require

NAMES = ("bozzetto.yaml", "bozzetto.yml", "bozzetto.json")
SHIPPED = Path(__file__).parent / "files"
TOKENIZER = "tokenizer"  # as an offset: after all words of the tokenizer
_LUMINA_2 = 155_000  # Chameleon's own vocabulary ends before Lumina-mGPT 2.0's image words begin
_ON_HUB = re.compile(r"\w[\w.-]{0,95}/\w[\w.-]{0,95}", re.ASCII)
_HELD = re.compile(r"\{([^{}]*)\}")
_FORMAT = re.compile(r"(0?[0-9]{1,2})?[dxX]?", re.ASCII)  # others may write a gigabyte
_IN_PROMPTS = ("prompt", "width", "height", "columns", "rows", "wide", "high", "bos")
_Text = Annotated[str, Field(max_length=10_000)]


@dataclass(frozen=True)
class DecoderSpec:
    """kind: what makes pixels of codes; file: its checkpoint, beside the adapter or the weights; hub: ORGANISATION/NAME
    that has it; why: what is said where there is none."""

    kind: Literal["llamagen", "vqgan", "movqgan", "none"]
    file: _Text = ""
    hub: _Text = ""
    why: _Text = ""

    def __post_init__(self) -> None:
        if (self.kind == "none") == bool(self.file):
            raise UsageError(f"file = {self.file!r} is not allowed with kind {self.kind!r}")
        inside = not Path(self.file).is_absolute() and ".." not in Path(self.file).parts
        require(inside, "file", self.file, "a file beside the adapter or the weights")  # adapters come with checkpoints
        require(not self.hub or _ON_HUB.fullmatch(self.hub), "hub", self.hub, "ORGANISATION/NAME")


@dataclass(frozen=True)
class AdapterSpec:
    """codes: how many there are. Their words are offset + code (`tokenizer`: after all words of the tokenizer), or are
    called `pattern` with {code}, or stand one by one in `words`. line_end: the word after each row; pixels: per code
    and side; sizes: WIDTHxHEIGHT, the usual one first; multiple: other sizes are multiples of so many pixels (0: there
    are none); prompt, no_prompt: texts that may hold {prompt}, {width}, {height} (pixels), {columns}, {rows} (codes),
    {bos} (the tokenizer's first word, else its last one), {wide} and {high}: size_word with {number} = size_first +
    pixels // size_pixels; body: a model type of transformers, where config.json says another one.
    """

    codes: Size
    pixels: Size
    sizes: Annotated[tuple[str, ...], Field(max_length=256)]
    prompt: _Text
    no_prompt: _Text
    offset: Count | Literal["tokenizer"] | None = None
    pattern: _Text = ""
    words: tuple[Count, ...] = ()
    line_end: _Text = ""
    multiple: Count = 0
    size_word: _Text = ""
    size_first: Count = 0
    size_pixels: Size = 1
    body: _Text = ""
    decoder: DecoderSpec = field(default_factory=lambda: DecoderSpec("none"))
    sampling: OwnSampling = field(default_factory=OwnSampling)

    def __post_init__(self) -> None:
        if sum((self.offset is not None, bool(self.pattern), bool(self.words))) != 1:
            raise UsageError("one of offset, pattern and words has to say which words stand for codes")
        fine = not self.words or len(self.words) == len(set(self.words)) == self.codes
        require(fine, "words", list(self.words), f"{self.codes} different numbers")
        allowed = {"pattern": ("code",), "size_word": ("number",), "prompt": _IN_PROMPTS, "no_prompt": _IN_PROMPTS[1:]}
        for name, names in allowed.items():
            counted = name in ("pattern", "size_word")  # their number may have a format: {code:06d}
            held = [part.partition(":")[0] if counted else part for part in _HELD.findall(getattr(self, name))]
            if odd := [part for part in held if part not in names]:
                raise UsageError(f"{name}: {{{odd[0]}}} is not allowed ({', '.join(f'{{{n}}}' for n in names)})")
        filled(self.pattern, 0), filled(self.size_word, 0)
        if "{prompt}" not in self.prompt:
            raise UsageError("prompt has to hold {prompt}")
        if not self.sizes:
            raise UsageError("sizes has to list one WIDTHxHEIGHT or more")
        for size in self.every_size:
            self.grid(size)

    @property
    def every_size(self) -> tuple[tuple[int, int], ...]:
        """Width and height of the listed sizes."""
        found = tuple(size_of(size) for size in self.sizes)
        require(None not in found, "sizes", list(self.sizes), "WIDTHxHEIGHT each")
        return tuple(size for size in found if size is not None)

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of codes of a picture of this width and height. Raises UsageError for another size than the
        adapter allows."""
        listed, step = size in self.every_size, self.multiple
        if not listed and not (step and size[0] % step == size[1] % step == 0):
            wide = ", ".join(self.sizes) + (f", or multiples of {step}" if step else "")
            raise UsageError(f"image_size = {written(size)} is not allowed: {wide}")
        if size[0] % self.pixels or size[1] % self.pixels or not min(size):
            raise UsageError(f"size {written(size)} is not allowed: multiples of {self.pixels}, the pixels per code")
        return size[1] // self.pixels, size[0] // self.pixels

    def said(self, text: str, size: tuple[int, int], bos: str, prompt: str = "") -> str:
        """A template with what stands in braces replaced, once: a prompt with braces stays as it is."""
        rows, columns = self.grid(size)
        words = {"prompt": prompt, "width": size[0], "height": size[1], "columns": columns, "rows": rows, "bos": bos}
        words |= {"wide": self._size_word(size[0]), "high": self._size_word(size[1])}
        return _HELD.sub(lambda found: str(words[found[1]]), text)

    def _size_word(self, pixels: int) -> str:
        return filled(self.size_word, self.size_first + pixels // self.size_pixels)


def filled(pattern: str, number: int) -> str:
    """A pattern with its number, {code} or {code:06d}. Raises UsageError for another format."""
    formats = [part.partition(":")[2] for part in _HELD.findall(pattern)]
    if odd := next((said for said in formats if not _FORMAT.fullmatch(said)), ""):
        raise UsageError(f"{brief(pattern)} is not allowed: format {brief(odd)} (a whole number's: 6d, 06d, x)")
    return _HELD.sub(lambda found: format(number, found[1].partition(":")[2]), pattern)


def shipped() -> list[str]:
    """Names of the adapters inside the package."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def known_by(config: Mapping[str, Any]) -> Path | None:
    """The shipped adapter that a config.json is known to be for."""
    names = config.get("architectures")
    if isinstance(names, list) and "SimpARForCausalLM" in names:
        return SHIPPED / "simplear.yaml"
    words = config.get("vocab_size")
    is_lumina = config.get("model_type") == "chameleon" and isinstance(words, int) and words > _LUMINA_2
    return SHIPPED / "lumina-mgpt-2.yaml" if is_lumina else None


def find_spec_file(asked: str | Path, folder: Path) -> Path | None:
    """The adapter that is asked for by file or by name, else the folder's own; None where there is neither. Raises
    UsageError for a name that is not shipped."""
    if not asked:
        return next((folder / name for name in NAMES if (folder / name).is_file()), None)
    if str(asked) in shipped():
        return SHIPPED / f"{asked}.yaml"
    if not Path(asked).is_file():
        raise UsageError(f"adapter {brief(str(asked))} is not allowed: a file, or one of {', '.join(shipped())}")
    return Path(asked)


def _check_flat(path: Path, key: str, value: object) -> None:
    """Raise UsageError for what YAML has and adapters do not: dates, bytes, sets, lists in lists (which aliases make
    endless)."""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
    if odd := next((part for part in parts if not isinstance(part, str | int | float | None)), None):
        raise UsageError(f"{path}: {key}: a {type(odd).__name__} is not allowed: texts and numbers")


def read_spec(path: Path) -> AdapterSpec:
    """An adapter file. Raises UsageError naming the file, the key, the value and what is allowed."""
    content: dict[str, Any] = dict(read_mapping(path, "adapter"))
    for key, value in content.items():
        _check_flat(path, key, value)
    parts: Mapping[str, type] = {"decoder": DecoderSpec, "sampling": OwnSampling}
    made = {key: config_from(kind, content.pop(key), f"{path}: {key}") for key, kind in parts.items() if key in content}
    if "sampling" in made and made["sampling"].source == OwnSampling().source:
        made["sampling"] = config_from(OwnSampling, {**vars(made["sampling"]), "source": path.name}, path)
    if odd := next((name for name in HEAD if getattr(made.get("sampling"), name, 0)), ""):
        raise UsageError(f"{path}: sampling: {odd} is not allowed: it is of continuous tokens")
    plain = config_from(AdapterSpec, content, path)
    return AdapterSpec(**{**vars(plain), **made})
