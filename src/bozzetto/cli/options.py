"""What can be typed: one frozen dataclass per verb, whose docstrings are the help texts (unknown YAML keys are errors);
and the settings that are made of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import tyro
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass as checked

from bozzetto.common.options import BenchOptions, EngineOptions, LawOptions, LoadOptions, MethodOptions, ProfileOptions
from bozzetto.common.terminal import note
from bozzetto.errors import UsageError, require

STRICT = ConfigDict(extra="forbid")
OWN = "own"  # in a list: the model's own value


@checked(frozen=True, config=STRICT)
class Draw(LawOptions, LoadOptions):
    """What every verb that draws images can be told."""

    model: str = "flowers"
    """A shipped model by name, a model folder (see `bozzetto models`), or a checkpoint in the Hugging Face layout (a
    folder, or ORGANISATION/NAME)."""
    seed: int = 0
    """Image i of a seed is the same picture in any batch and with any number of images or processes around it."""
    batch: int = 8
    """Images decoded together."""
    progress: bool = False
    """Show progress bars even where no terminal is attached."""


@checked(frozen=True, config=STRICT)
class Generate(Draw, MethodOptions):
    """Generate images: one PNG each, a contact sheet and a manifest, all in one folder.

    Example: bozzetto generate tulip rose --count 4 --seed 7 --out flowers

    Example: bozzetto generate "a red tulip in a vase" --model deepseek-ai/Janus-Pro-1B --out janus
    """

    classes: tyro.conf.Positional[tuple[str | int, ...]] = ()
    """Class names or numbers, or prompts where the model takes them, in turn until --count is reached. None: all of the
    model's classes, or its example prompts."""
    count: int | None = None
    """How many images in all. Not given: one for each class."""
    batch: int = 4
    """Images decoded together."""
    out: Path = Path("out")
    """Folder for the results. It appears, or changes, only when everything is done."""
    config: Path | None = None
    """YAML file with any of these options (top_k: 100). Options on the command line win over it."""


@checked(frozen=True, config=STRICT)
class Bench(BenchOptions, LoadOptions):
    """Measure decoding methods against our own sequential engine: interleaved rounds, medians and ranges.

    Example: bozzetto bench --batch 1,4 --guidance 1,2 --json bench.json
    """

    model: str = "flowers"
    """As of `generate`."""
    methods: str = "auto"
    """none, or DRAFTER/RULE, separated by commas; @steps=, @last_steps=, @passes=, @window= or @compile= gives one a
    setting of its own (none@passes=64). auto: the model's usual ones. none and the bare loop of passes always take
    part."""
    suite: Literal["lantern", "continuous", "followers"] | None = None
    """A set of methods in place of --methods, measured in speed and in picture quality and bias too. followers: every
    rule, with the drafters that are shipped, on all models but the masked one."""
    images: int = 200
    """With --suite: images per method behind the figures of quality."""
    quality_batch: int = 8
    """With --suite: batch of those images."""
    data: Path | None = None
    """With --suite: photographs to compare with, as in `evaluate`."""
    extractor: str = "efficientnet-lite0"
    """With --suite: features, as in `evaluate`."""
    out: Path = Path("out/suite")
    """With --suite: folder of those images; the same command goes on where it stopped."""
    batch: str = "1"
    """Batch sizes, separated by commas."""
    guidance: str = "own"
    """Guidance scales, separated by commas. own: the model's."""
    window: str = "0"
    """Windows, separated by commas. 0: chosen for the batch."""
    top_k: str = "own"
    """Values of top-k, separated by commas. 0: all tokens; own: the model's."""
    json: Path | None = None
    """Also write {settings, results} to this file."""
    progress: bool = False
    """Show the progress bar even where no terminal is attached."""


@checked(frozen=True, config=STRICT)
class Profile(ProfileOptions, LoadOptions):
    """Show where a target pass spends its time, against the roofline of this machine, and what would help most.

    Example: bozzetto profile --model flowers --dtype bfloat16 --compile max
    """

    model: str = "flowers"
    """As of `generate`. Causal models of ours alone."""
    json: Path | None = None
    """Also write all figures to this file."""
    progress: bool = False
    """Show the progress bar even where no terminal is attached."""


@checked(frozen=True, config=STRICT)
class Sample(Draw):
    """Sample many images into a folder of shards: resumable, and by any number of processes under torchrun.

    Example: bozzetto sample --count 1000 --batch 8 --npz --out samples

    Example: torchrun --nproc-per-node 2 -m bozzetto sample --count 50000 --out samples
    """

    classes: tyro.conf.Positional[tuple[str | int, ...]] = ()
    """Class names or numbers, taken in turn. None: all classes of the model."""
    method: str = "auto"
    """none, DRAFTER/RULE, or auto: the model's default, without bias."""
    count: int = 1000
    """Images 0 to count - 1 of the seed. A larger count later adds to the folder."""
    batch: int = 8
    """Images decoded together, and images per shard."""
    ray: int = 0
    """Workers of Ray Data (extra `ray`), one processor each, in place of this process. 0: without Ray."""
    npz: bool = False
    """When all images are there, also write samples.npz (arr_0 uint8 [N, H, W, 3], arr_1 labels), the format of the
    usual ImageNet evaluators."""
    out: Path = Path("out/samples")
    """Folder of the samples. The same command goes on where it stopped."""


@checked(frozen=True, config=STRICT)
class Evaluate(Draw):
    """Measure picture quality and speed of methods in one run, or test whether two samplers draw from the same law.

    Example: bozzetto evaluate --methods none,jacobi/exact --count 500 --reference test --json quality.json

    Example: bozzetto evaluate --compare none jacobi/exact --count 500
    """

    methods: str = "auto"
    """none, or DRAFTER/RULE, separated by commas; auto: the model's usual ones. none always takes part."""
    count: int = 500
    """Images per method."""
    reference: str = "test"
    """Photographs to compare with: test, train, or both separated by a comma."""
    compare: tuple[str, str] | None = None
    """Instead of quality: the same-law test on two methods or folders of samples."""
    data: Path | None = None
    """Photographs: a parquet file or a folder, with splits train and test (docs/data.md). Not given: the data that the
    model's config.json names."""
    extractor: str = "efficientnet-lite0"
    """efficientnet-lite0, or a TorchScript file such as an Inception network."""
    bootstrap: int = 100
    """Resamples behind every interval."""
    out: Path = Path("out/evaluate")
    """Folder for samples and results: a run for `bozzetto report`. The same command goes on where it stopped."""
    json: Path | None = None
    """Also write the results to this file."""


@checked(frozen=True, config=STRICT)
class Report:
    """Put runs together on one HTML page: pictures, acceptance maps, speed and quality, where it all came from.

    Example: bozzetto report out/evaluate --out report.html
    """

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of generate, sample or evaluate; JSON files of evaluate or bench."""
    out: Path = Path("report.html")
    """The page: one file that needs nothing else."""
    progress: bool = False
    """Show the progress bar even where no terminal is attached."""


@checked(frozen=True, config=STRICT)
class Models:
    """List the models that are shipped, or those found in a folder."""

    folder: tyro.conf.Positional[Path | None] = None
    """A model folder, or a folder that holds model folders."""


@checked(frozen=True, config=STRICT)
class Convert:
    """Turn published checkpoints into a folder that the other verbs read.

    Janus (transformers' files or deepseek-ai's own), Emu3, Anole, Lumina-mGPT, GLM-Image and NextStep-1 need none of
    this: generate --model FOLDER, or ORGANISATION/NAME.

    Example: bozzetto convert llamagen --gpt c2i_B_256.pt --vq vq_ds16_c2i.pt --out llamagen-b

    Example: bozzetto convert llamagen --gpt t2i_XL_stage1_256.pt --vq vq_ds16_t2i.pt --out llamagen-t2i

    Example: bozzetto convert mar --checkpoint checkpoint-last.pth --vae kl16.ckpt --out mar-b

    Example: bozzetto convert eagle --drafter pytorch_model.bin --model llamagen-b --out llamagen-b/eagle
    """

    what: tyro.conf.Positional[Literal["llamagen", "mar", "eagle"]]
    """llamagen, mar: a target with its tokenizer (they need the extra of that name); eagle: a published drafter for a
    target that is there."""
    out: Path
    """The new folder: missing or empty. It appears only when everything fits."""
    gpt: Path | None = None
    """llamagen: the transformer (c2i_B_256.pt, t2i_XL_stage1_256.pt, ...), or a folder in Llama's layout
    (LlamaGen-T2I). Opened without running any code in it."""
    vq: Path | None = None
    """llamagen: its tokenizer, vq_ds16_c2i.pt, vq_ds8_c2i.pt or vq_ds16_t2i.pt."""
    image_size: Literal[256, 384, 512] | None = None
    """llamagen: side of the pictures. Not given: as the file or its name says, else 256 (it is printed)."""
    text_encoder: str = ""
    """llamagen, text-conditional: what captions are read with, folder or hub name. Not given: google/flan-t5-xl."""
    class_names: Path | None = None
    """llamagen, mar: text file with one name per class and line. Not given: the classes are called 0, 1, 2, ..."""
    checkpoint: Path | None = None
    """mar: the transformer, checkpoint-last.pth; its averaged weights, where it has them."""
    vae: Path | None = None
    """mar: its autoencoder, kl16.ckpt."""
    drafter: Path | None = None
    """eagle: the drafter's folder, or its weights, .bin, .pt or .safetensors."""
    model: Path | None = None
    """eagle: its target: a converted LlamaGen, or Anole's or Lumina-mGPT's folder or hub name."""
    store: Literal["own", "float16", "bfloat16", "float32"] = "own"
    """How weights are stored. own: every one in the type that it has in its file (float64: float32). Another type may
    round them; what it cannot hold is refused."""


@checked(frozen=True, config=STRICT)
class Train:
    """Train a tokenizer, a target, a drafter or a drift variant from a YAML recipe. Interrupt at will: the same
    command resumes."""

    what: tyro.conf.Positional[Literal["tokenizer", "target", "drafter", "drift"]]
    """What to train. A target needs a trained tokenizer, a drafter a trained target, a drift variant a trained flow
    model."""
    recipe: tyro.conf.Positional[Path]
    """YAML file; recipes/ has those of the shipped models."""
    restart: bool = False
    """Begin anew; an earlier run in the recipe's `out` is put aside as `out`.1. README says what a run may change."""


@checked(frozen=True, config=STRICT)
class Serve(LoadOptions, EngineOptions):
    """Serve models over HTTP as the OpenAI Images API does, with a page to look at.

    Example: bozzetto serve --model flowers --model emoji --port 8000
    """

    model: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A shipped model, a model folder or a checkpoint in the Hugging Face layout; may be given several times. None:
    flowers."""
    host: str = "127.0.0.1"
    """Address to listen at. Only this machine reaches the default one."""
    port: int = 8000
    """0: any free one, which is printed."""
    slots: int = 8
    """Images in passes at a time, of each model."""
    queue: int = 64
    """Images that may wait. More are answered with 429 and Retry-After."""
    limit: float = 120.0
    """Seconds that a request may take."""
    alias: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """NAME=MODEL: a further name of a model that is served, for clients that ask for one of their own, such as
    gpt-image-1=flowers; may be given several times."""
    resize: bool = False
    """Scale pictures to the size that a request asks for (a square), which is else refused where the model draws
    another."""
    api_keys: Path | None = None
    """A file of API keys, one a line. Not given: those of the environment variable BOZZETTO_API_KEYS; none there: open
    to all who reach the address."""
    allowed_host: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Names under which the server may be asked. None: those of this machine for a loopback address, else any."""
    ray: bool = False
    """Run replicas under Ray Serve (extra `ray`)."""
    replicas: int = 1
    """With --ray: how many."""
    max_replicas: int = 0
    """With --ray: as many as that when there is work, --replicas of them always. 0: no more than --replicas."""
    ongoing: int = 8
    """With --ray and --max-replicas: requests per replica that Ray aims at."""


@checked(frozen=True, config=STRICT)
class Doctor:
    """Check the installation and say what to fix. Exit code 1 where something does not work."""


@checked(frozen=True, config=STRICT)
class Completion:
    """Print a completion script for a shell.

    Example: bozzetto completion bash > ~/.local/share/bash-completion/completions/bozzetto
    """

    shell: tyro.conf.Positional[Literal["bash", "zsh", "fish"]]
    """Which one."""


def settings_from(options: Any, kind: Any, **own: Any) -> Any:
    """A dataclass of settings, with every option of its name, and `own` where they are not typed under that name."""
    names = [name for name in kind.__dataclass_fields__ if hasattr(options, name) and name not in own]
    return kind(**{name: getattr(options, name) for name in names}, **own)


def idle(options: Any, names: str, why: str) -> None:
    """Raise UsageError for an option that is typed, as far as it is not what it would be anyway, and does nothing here.
    names: of such options, with spaces between; why: they do nothing."""
    for field in dataclasses.fields(options):
        if field.name in names.split():
            value = getattr(options, field.name)
            shown = str(value) if isinstance(value, Path) else value
            require(value == field.default, f"--{field.name.replace('_', '-')}", shown, why)


def loading_of(options: LoadOptions, out: Path | None = None) -> Any:
    """LoadSettings of a verb's options; a GPU that nobody named is said in one line. out: a folder that may hold
    samples: where no type of numbers is asked for, they go on in theirs."""
    from bozzetto.checkpoints.load_settings import AUTO, LoadSettings
    from bozzetto.evaluate.shards import RUN, read_run

    begun = [path for place in ("", "samples/*/", "*/samples/*/") for path in (out.glob(place + RUN) if out else ())]
    known = read_run(begun[0].parent)["settings"].get("dtype", AUTO) if begun and options.dtype == AUTO else None
    settings = settings_from(options, LoadSettings, **({} if known is None else {"dtype": known}))
    if options.device == AUTO and settings.device != "cpu":
        note(f"device: {settings.device} (--device cpu for the processor)")
    return settings


def listed(name: str, text: str, kind: Callable[[str], Any], own: bool = False) -> tuple[Any, ...]:
    """Values separated by commas. own: `own`, or nothing, is None, for the model's own. Raises UsageError."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if own and not text.strip():
        parts = [OWN]
    try:
        return tuple(None if own and part == OWN else kind(part) for part in parts)
    except ValueError as error:
        wanted = ("whole numbers" if kind is int else "numbers") + f" or {OWN}" * own
        raise UsageError(f"{name} = {text!r} is not allowed: {wanted} separated by commas") from error
