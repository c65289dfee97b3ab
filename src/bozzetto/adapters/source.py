"""What families of transformers checkpoints share: the folder that they are read from, and what is loaded."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bozzetto.adapters.prompted import Prompt, PromptedTarget
from bozzetto.checkpoints.folders import CONFIG, read_config
from bozzetto.checkpoints.load_settings import LoadSettings, written
from bozzetto.checkpoints.own_sampling import OwnSampling
from bozzetto.checkpoints.published import family_of, sampling_of
from bozzetto.checkpoints.states import open_state
from bozzetto.checkpoints.weights import FLOATS, WEIGHT, TensorHeader, finite, read_header, usual_type, weight_files
from bozzetto.common.files import pointer_note
from bozzetto.common.hub import fetched
from bozzetto.errors import UsageError, brief, one_line, require

_COUNTS, _MOST = re.compile(r"(num|n)_\w*(layer|block|head)s?|depths?"), 1024

Ask = Callable[[str, str], Prompt]  # (prompt, negative prompt; "": none)


@dataclass
class Hosted:
    """What was loaded. target: PromptedCodes, or one of continuous tokens; pictures: what a pipeline calls its
    tokenizer; ask: from texts to tokens; own: how its authors sample it; tokenizer: of transformers, whose special
    tokens no prompt may hold; sizes: (width, height) that its authors draw; sized: the same model, and the same
    weights, for pictures of another size; besides: files outside the folder that say what is drawn."""

    target: Any
    pictures: Any
    ask: Ask
    own: OwnSampling = field(default_factory=OwnSampling)
    tokenizer: Any = None
    sizes: tuple[tuple[int, int], ...] = ()
    sized: Callable[[tuple[int, int]], Hosted] | None = None
    besides: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Source:
    """A checkpoint in the Hugging Face layout. name: as it was asked for; folder: where its files lie; config: what
    its config.json holds; whole: the folder of the diffusers pipeline that it is a part of, where that was asked
    for."""

    name: str
    folder: Path
    config: Mapping[str, Any]
    whole: Path | None = None

    def read(self, what: str, read: Callable[..., Any], place: str | Path | None = "", **options: Any) -> Any:
        """Call a from_pretrained, which never runs code of the checkpoint. place: another folder than its own, or None.
        Its many kinds of error all mean that a file is missing or does not fit: UsageError."""
        place = self.folder if place == "" else place
        try:
            return read(place if place is None else str(place), trust_remote_code=False, **options)
        except Exception as error:  # tokenizers raises no class of its own, safetensors one that is none of Python's
            raise UsageError(f"{self.name}: its {what} could not be read: {one_line(error)}") from error

    def sampling(self) -> OwnSampling:
        """How the authors of its family sample it: see `sampling_of`."""
        return sampling_of(family_of(self.config), self.folder)

    def stored(self) -> str:
        """The type of the weights: what config.json says of the whole or of its language model, else what most weights
        of the first file have."""
        parts = (self.config, self.config.get("text_config"), self.config.get("language_config"))
        said = [part.get(key) for part in parts if isinstance(part, Mapping) for key in ("dtype", "torch_dtype")]
        files = sorted(self.folder.glob("*.safetensors"))
        found = next((word for word in said if word), None) or (usual_type(files[0]) if files else "")
        return str(found).removeprefix("torch.")

    def check(self, kind: Any, config: Any = None) -> None:
        """Raise UsageError as `check_folder`. kind: the class of transformers whose network config.json describes;
        config: what it is made from where that is not the folder's own."""
        check_folder(self.folder, lambda: kind(config or kind.config_class.from_pretrained(str(self.folder))))

    def tensors(self) -> dict[str, Tensor]:
        """The weights in the folder's files under their names there, mapped and not copied. Raises UsageError as
        `read_state`."""
        return {key: value for path in weight_files(self.folder) for key, value in open_state(path)[0].items()}

    def network(
        self, kind: Any, wanted: LoadSettings, config: Any = None, state: Mapping[str, Tensor] | None = None
    ) -> Any:
        """A network of this class of transformers with the folder's weights, all there, of the right shape and finite.
        config, state: what it is made from and its weights, where they are not as the folder has them. Raises
        UsageError for weights that do not fit."""
        options: dict[str, Any] = {"dtype": wanted.torch_dtype, "output_loading_info": True}
        if wanted.device_map:
            options["device_map"] = wanted.device_map
        if wanted.device_map and find_spec("accelerate") is None:
            raise UsageError(f"device_map = {wanted.device_map!r} needs accelerate: pip install accelerate")
        if state is not None:
            options |= {"config": config, "state_dict": dict(state)}
        with bars_where_seen():
            network, notes = self.read("weights", kind.from_pretrained, None if state is not None else "", **options)
        check_weights(self.name, network, notes)
        network = network if wanted.device_map else network.to(wanted.device)
        return network.eval().requires_grad_(False)

    def processor(self) -> Any:
        """The folder's processor, which has a tokenizer. Raises UsageError without one."""
        from transformers import AutoProcessor

        processor = self.read("processor", AutoProcessor.from_pretrained)
        if getattr(processor, "tokenizer", None) is None:
            raise UsageError(
                f"{self.name}: no tokenizer: put its files (tokenizer.json or the like, tokenizer_config.json, "
                "processor_config.json, preprocessor_config.json) beside the weights"
            )
        return processor

    def tokenizer(self, wanted: LoadSettings, hint: str) -> Any:
        """The tokenizer alone, exactly as its tokenizer.json says, of the folder or of what `wanted` names. hint: what
        to do without one. Raises UsageError."""
        from transformers import PreTrainedTokenizerFast

        folder = fetched(wanted.tokenizer) if wanted.tokenizer else self.folder
        if not (folder / "tokenizer.json").is_file():
            raise UsageError(f"{wanted.tokenizer or self.name}: no tokenizer.json: {hint}")
        return self.read("tokenizer", PreTrainedTokenizerFast.from_pretrained, folder)


def without(kind: Any, *parts: str) -> Any:
    """A class of transformers less these parts of its `model`, which drawing does not need: a fifth of Janus-Pro-1B's
    weights, a billion of GLM-Image's."""

    class Drawing(kind):  # type: ignore[misc]
        # A list: transformers 5.0 adds another one to it.
        _keys_to_ignore_on_load_unexpected: ClassVar = [rf"^model\.({'|'.join(map(re.escape, parts))})\."]

        def __init__(self, config: Any):
            super().__init__(config)
            for part in parts:
                owner, _, name = part.rpartition(".")
                delattr(self.model.get_submodule(owner), name)

    return Drawing


def check_folder(folder: Path, make: Callable[[], nn.Module]) -> None:
    """Raise UsageError naming the file for a shard that is missing, cut, or a Git LFS pointer, for an index that names
    files elsewhere, for weights of a type that is no float's, and for a config.json that describes a larger network
    than the weights could be.

    make: builds the network that config.json describes; it is called on the meta device.
    """
    check_counts(read_config(folder), folder / CONFIG)
    files = weight_files(folder)
    for path in files:
        if path.suffix == ".safetensors":
            check_types(path, read_header(path))
        elif note := pointer_note(path):
            raise UsageError(f"{path}: {note}")
    try:
        with torch.device("meta"):
            wanted = sum(weight.numel() for weight in make().parameters())
    except Exception as error:  # the library's own code on values that it does not check
        raise UsageError(f"{folder / CONFIG}: not a network: {one_line(error, 200)}") from error
    held = sum(path.stat().st_size for path in files)
    if wanted > 2 * held:  # four bits are the fewest that a weight is stored in
        raise UsageError(f"{folder / CONFIG}: describes {wanted} weights, but its files hold {held} bytes")


def check_types(path: Path, held: Mapping[str, TensorHeader], allowed: Sequence[str] = FLOATS) -> None:
    """Raise UsageError for weights of types that mean nothing without scales (int8, float8), which transformers 5.24
    casts as they are."""
    for key, (kind, _) in held.items():
        if key.endswith(WEIGHT) and kind not in allowed:
            raise UsageError(f"{path}: weight {key!r} is of type {kind} (allowed: {', '.join(allowed)})")


def check_counts(content: dict[str, Any], source: Path) -> None:
    """A million layers without weights take gigabytes, too."""
    for key, value in content.items():
        if isinstance(value, dict):
            check_counts(value, source)
        elif _COUNTS.fullmatch(key):
            for count in value if isinstance(value, list) else [value]:
                fine = not isinstance(count, int) or 0 <= count <= _MOST
                require(fine, f"{source}: {key}", count, f"0 to {_MOST}")


def check_weights(name: str, network: Any, notes: Mapping[str, Any]) -> None:
    """Weights are all there, of the right shape, and finite. notes: transformers' loading info."""
    for key, what in (("missing_keys", "missing"), ("mismatched_keys", "misshapen")):
        refuse_keys(name, what, sorted(map(str, notes.get(key, ()))))
    for key, weight in network.named_parameters():
        if weight.is_meta:
            raise UsageError(f"{name}: the devices here are too small for it: {key} found no place on them")
        if not finite(weight):
            raise UsageError(f"{name}: {key} has non-finite values")


def refuse_keys(name: str, what: str, keys: Sequence[str]) -> None:
    """Raise UsageError where there are any keys of which this is wrong."""
    if keys:
        raise UsageError(f"{name}: {what} in its weights: {', '.join(keys[:4])} ({len(keys)} in all)")


def of_words(ask: Ask, tokenizer: Any, target: PromptedTarget) -> Ask:
    """`ask` for prompts that are words: to the model its special tokens (<image>, an end of text, padding, an image
    token) are no words, whoever wrote them."""
    special = {*tokenizer.all_special_ids, *target.numbers}
    special |= {number for number, word in tokenizer.added_tokens_decoder.items() if word.special}
    special -= {tokenizer.unk_token_id}

    def checked(text: str, negative: str) -> Prompt:
        with fitting(f"prompt {brief(text)} is not allowed"):
            for said in (text, negative):
                odd = next((i for i in tokenizer.encode(said, add_special_tokens=False) if i in special), None)
                if odd is not None:
                    what = f"{tokenizer.convert_ids_to_tokens(odd)!r} in it is a special token of the model"
                    raise UsageError(f"prompt {brief(said)} is not allowed: {what}")
            return ask(text, negative)

    return checked


@contextlib.contextmanager
def fitting(what: str) -> Iterator[None]:
    """What a library raises over values in files that it does not check becomes a UsageError; `what` is said first."""
    try:
        yield
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RuntimeError) as error:
        if isinstance(error, UsageError | torch.OutOfMemoryError):
            raise
        reason = " ".join(str(error).split())[:300]
        raise UsageError(f"{what}: {reason} ({type(error).__name__})") from error


def prompts_of(
    tokens: Callable[[str], Sequence[int]], without: Callable[[Sequence[int]], Sequence[int]] | None = None
) -> Ask:
    """Prompts by what makes tokens of a text. without: makes of a prompt's what stands for no negative prompt (None: an
    empty text does)."""

    def ask(text: str, negative: str) -> Prompt:
        given = tokens(text)
        other = tokens(negative) if negative or without is None else without(given)
        return Prompt(tuple(given), tuple(other))

    return ask


def word_number(tokenizer: Any, name: str, otherwise: str) -> int:
    """The number of a word that the tokenizer has to have. otherwise: what is said of one that it has not
    (UsageError)."""
    found = tokenizer.convert_tokens_to_ids(name)
    if found is None or (found == tokenizer.unk_token_id and name != tokenizer.unk_token):
        raise UsageError(otherwise)
    return int(found)


def check_word(name: str, number: object, words: float) -> int:
    """A token's number, below `words`. name: where it stands. Raises UsageError."""
    require(type(number) is int and 0 <= number < words, name, number, "a token's number")
    assert isinstance(number, int)
    return number


def in_sizes(
    wanted: LoadSettings, sizes: tuple[tuple[int, int], ...], made: Callable[[tuple[int, int]], Hosted], step: int = 1
) -> Hosted:
    """A model that draws pictures of any size: as wanted, else of the first of `sizes`. made: makes it for one (width,
    height); step: pixels that every side is a multiple of."""

    def sized(size: tuple[int, int]) -> Hosted:
        check_multiple(size, step)
        return replace(made(size), sizes=sizes, sized=sized)

    return sized(wanted.size or sizes[0])


def fixed_size(source: Source, wanted: LoadSettings, own: tuple[int, int]) -> None:
    """Raise UsageError where another size (width, height) is asked for than the only one."""
    if wanted.size not in (None, own):
        asked, only = written(wanted.size or own), written(own)
        raise UsageError(f"image_size = {asked} is not allowed: {source.name} draws {only} pixels")


def check_multiple(size: tuple[int, int], step: int) -> None:
    """Raise UsageError for a size (width, height) that is no multiple of `step` pixels."""
    if any(side % step or side < step for side in size):
        raise UsageError(f"image_size = {written(size)} is not allowed: multiples of {step}")


@contextlib.contextmanager
def bars_where_seen() -> Iterator[None]:
    """transformers' progress bars only where a terminal shows them."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def fits_context(source: Source, target: PromptedTarget, size: tuple[int, int]) -> None:
    """Raise UsageError for a picture that leaves no room for a prompt. size: width, height."""
    if target.length >= target.context:
        raise UsageError(
            f"{source.name}: image_size = {written(size)} is not allowed: {target.length} image tokens, the model's "
            f"context is {target.context}"
        )


def numbers(tokens: Any) -> list[int]:
    """The one row of a processor's result."""
    return torch.as_tensor(tokens["input_ids"]).view(-1).tolist()
