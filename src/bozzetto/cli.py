"""The command line: thin verbs over the Python API. Bad input is one line on stderr and exit code 2."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass as checked

from bozzetto import __version__
from bozzetto.errors import UsageError

_STRICT = ConfigDict(extra="forbid")
BAD_INPUT, CANCELLED = 2, 130


@checked(frozen=True, config=_STRICT)
class Generate:
    """Generate images: one PNG each, a contact sheet and a manifest, all in one folder.

    Example: bozzetto generate tulip rose --count 4 --seed 7 --out flowers
    """

    classes: tyro.conf.Positional[tuple[str | int, ...]] = ()
    """Class names or numbers, taken in turn until --count is reached. None: all classes of the model."""
    model: str = "flowers"
    """A shipped model by name, or a model folder (see `bozzetto models`)."""
    count: int | None = None
    """How many images in all. Not given: one for each class."""
    seed: int = 0
    """Image i of a seed is the same picture in any batch and with any number of images around it."""
    drafter: str = "jacobi"
    """jacobi: guess several tokens ahead and check them in one pass; none: plain sequential decoding."""
    rule: str = "seed-exact"
    """seed-exact: the very tokens that sequential decoding of the seed gives; exact: the same law, other tokens."""
    window: int = 0
    """Positions scored in one pass. 0: chosen for the batch."""
    guidance: float = 2.0
    """Classifier-free guidance, 1 or more. 1: off, which halves the work."""
    temperature: float = 1.0
    """Above 0; 0 always takes the likeliest token."""
    top_k: int = 0
    """Keep only the K likeliest tokens. 0: all."""
    top_p: float = 1.0
    """Keep the likeliest tokens that make up this probability, above 0 and up to 1. 1: all."""
    batch: int = 4
    """Images decoded together."""
    dtype: str = "float32"
    """float32 or bfloat16, for the target's passes. The byte-for-byte promise holds in float32."""
    out: Path = Path("out")
    """Folder for the results. It appears, or changes, only when everything is done."""
    config: Path | None = None
    """YAML file with any of these options (top_k: 100). Options on the command line win over it."""
    progress: bool = False
    """Show the progress bar even where no terminal is attached."""


@checked(frozen=True, config=_STRICT)
class Bench:
    """Measure decoding methods against our own sequential engine: interleaved rounds, medians and ranges.

    Example: bozzetto bench --batch 1,4 --guidance 1,2 --json bench.json
    """

    model: str = "flowers"
    """A shipped model by name, or a model folder."""
    methods: str = "none,jacobi/seed-exact,jacobi/exact"
    """none, or DRAFTER/RULE, separated by commas. none and the bare loop of passes always take part."""
    count: int = 4
    """Images per method and setting, rounded up to whole batches."""
    rounds: int = 3
    """At least this many rounds, a batch each."""
    batch: str = "1"
    """Batch sizes, separated by commas."""
    guidance: str = "2"
    """Guidance scales, separated by commas."""
    window: str = "0"
    """Windows, separated by commas. 0: chosen for the batch."""
    top_k: str = "0"
    """Values of top-k, separated by commas. 0: all tokens."""
    temperature: float = 1.0
    """Shared by all methods."""
    top_p: float = 1.0
    """Shared by all methods."""
    seed: int = 0
    """Seed of the images."""
    dtype: str = "float32"
    """float32 or bfloat16."""
    threads: int = 0
    """CPU threads. 0: as torch chooses."""
    json: Path | None = None
    """Also write {settings, results} to this file."""
    progress: bool = False
    """Show the progress bar even where no terminal is attached."""


@checked(frozen=True, config=_STRICT)
class Models:
    """List the models that are shipped, or those found in a folder."""

    folder: tyro.conf.Positional[Path | None] = None
    """A model folder, or a folder that holds model folders."""


@checked(frozen=True, config=_STRICT)
class Train:
    """Train a tokenizer or a target from a YAML recipe. Interrupt at will: the same command resumes."""

    what: tyro.conf.Positional[Literal["tokenizer", "target"]]
    """What to train. A target needs a trained tokenizer."""
    recipe: tyro.conf.Positional[Path]
    """YAML file; recipes/ has those of the shipped models."""


COMMANDS: Any = (
    Annotated[Generate, tyro.conf.subcommand("generate")]
    | Annotated[Bench, tyro.conf.subcommand("bench")]
    | Annotated[Models, tyro.conf.subcommand("models")]
    | Annotated[Train, tyro.conf.subcommand("train")]
)
_ABOUT = "Speculative decoding for autoregressive image generators. --version prints the version."


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 2 bad input, 130 cancelled."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["--version"]:
        print(f"bozzetto {__version__}")
        return 0
    try:
        with _terminable():
            command = _parse(arguments)
            HANDLERS[type(command)](command)
    except (UsageError, OSError, UnicodeDecodeError) as error:
        print(f"bozzetto: error: {_one_line(error)}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt as stop:
        print(f"bozzetto: cancelled: {stop}" if str(stop) else "bozzetto: cancelled: nothing written", file=sys.stderr)
        return CANCELLED
    return 0


def _parse(arguments: list[str]) -> Any:
    """Options of the command line over those of --config over the defaults. tyro exits with code 2 on bad flags."""
    command = tyro.cli(COMMANDS, args=arguments, prog="bozzetto", description=_ABOUT)
    if not isinstance(command, Generate) or command.config is None:
        return command
    from bozzetto.train.recipes import read_recipe

    if not command.config.is_file():
        raise UsageError(f"config = {str(command.config)!r} is not allowed: no such file")
    base = read_recipe(command.config, Generate)
    if base.config is not None:
        raise UsageError(f"{command.config}: key 'config' is not allowed inside a config file")
    return tyro.cli(COMMANDS, args=arguments, prog="bozzetto", description=_ABOUT, default=base)


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM cancels as Ctrl-C does, so that cleaning up happens either way."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def cancel(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, cancel)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return " ".join(str(error).split())


def _wants_progress(asked: bool) -> bool:
    return asked or sys.stderr.isatty()


def _generate(options: Generate) -> None:
    from bozzetto.output import SHEET, staged_folder, write_run
    from bozzetto.pipeline import GenerateSettings, load

    law = {name: getattr(options, name) for name in GenerateSettings.__dataclass_fields__}
    settings = GenerateSettings(**law)
    _check_request(options, settings)
    request: dict[str, Any] = {"classes": options.classes, "seed": options.seed, "count": options.count}
    with staged_folder(options.out) as folder:
        pipe = load(options.model, dtype=options.dtype)
        result = pipe.generate(**request, settings=settings, progress=_wants_progress(options.progress))
        asked = {"model": options.model, "dtype": options.dtype, "seed": options.seed, "count": len(result.images)}
        write_run(folder, result, {**asked, "classes": list(options.classes)})
    print(f"{len(result.images)} images, {result.tokens_per_pass:.2f} tokens per pass, {result.seconds['total']:.1f} s")
    print(f"contact sheet: {options.out / SHEET}")
    close = [str(image.index) for image in result.images if image.near_tie]
    if close:
        print(
            f"note: images {', '.join(close)} hold a token whose runner-up was within float rounding; "
            "another batch or window may swap the two"
        )


def _check_request(options: Generate, settings: Any) -> None:
    """Refuse a bad class, count, seed or dtype from config.json alone, before any weights are read."""
    from bozzetto.models.store import read_config
    from bozzetto.pipeline import DTYPES, model_folder, plan_batches

    if options.dtype not in DTYPES:
        raise UsageError(f"unknown dtype {options.dtype!r} (allowed: {', '.join(DTYPES)})")
    names = read_config(model_folder(options.model)).get("class_names")
    if isinstance(names, list):  # if not, loading explains what is wrong with the folder
        known = [str(n).lower() for n in names]
        plan_batches(known, options.classes, options.count, options.seed, 0, settings.batch)


def _bench(options: Bench) -> None:
    from bozzetto.evaluate.bench import BenchSettings, bench, bench_table, write_report
    from bozzetto.output import check_writable
    from bozzetto.pipeline import load

    settings = BenchSettings(
        methods=_listed("methods", options.methods, str),
        batches=_listed("batch", options.batch, int),
        guidances=_listed("guidance", options.guidance, float),
        windows=_listed("window", options.window, int),
        top_ks=_listed("top_k", options.top_k, int),
        **{n: getattr(options, n) for n in ("count", "rounds", "temperature", "top_p", "seed", "threads")},
    )
    if options.json is not None:
        check_writable(options.json)
    pipe = load(options.model, dtype=options.dtype)
    report = bench(pipe, settings, progress=_wants_progress(options.progress))
    print(bench_table(report))
    if options.json is not None:
        write_report(options.json, report)


N = TypeVar("N", str, int, float)


def _listed(name: str, text: str, kind: Callable[[str], N]) -> tuple[N, ...]:
    """Values separated by commas."""
    try:
        return tuple(kind(part.strip()) for part in text.split(",") if part.strip())
    except ValueError as error:
        wanted = "whole numbers" if kind is int else "numbers"
        raise UsageError(f"{name} = {text!r} is not allowed: {wanted} separated by commas") from error


def _models(options: Models) -> None:
    from bozzetto.output import list_models

    print(list_models(options.folder))


def _train(options: Train) -> None:
    from bozzetto.train import recipes

    kind: Any = {"tokenizer": recipes.TokenizerRecipe, "target": recipes.TargetRecipe}[options.what]
    recipe = recipes.read_recipe(options.recipe, kind)
    try:
        if options.what == "tokenizer":
            from bozzetto.train.tokenizer import train_tokenizer as train
        else:
            from bozzetto.train.target import train_target as train  # type: ignore[assignment]
        print(f"written: {train(recipe)}")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "pyarrow":
            raise
        raise UsageError("training needs pyarrow, which is not installed: pip install 'bozzetto[train]'") from error
    except KeyboardInterrupt:
        saved = Path(recipe.out) / "checkpoint.pt"
        how = f"the same command resumes from {saved}" if saved.exists() else "nothing saved yet, it starts afresh"
        raise KeyboardInterrupt(how) from None


HANDLERS: dict[type, Callable[[Any], None]] = {Generate: _generate, Bench: _bench, Models: _models, Train: _train}
