"""The command line: thin verbs over the Python API. Bad input is one line on stderr and exit code 2."""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Union

import tyro

from bozzetto import __version__
from bozzetto.cli import options as verb
from bozzetto.cli.options import idle, listed, loading_of, settings_from
from bozzetto.cli.signals import signals
from bozzetto.common.checks import checked_as, read_mapping
from bozzetto.common.extras import needed
from bozzetto.common.terminal import note
from bozzetto.errors import UsageError

BAD_INPUT, CANCELLED, PIPE_CLOSED = 2, 130, 141
_needs = partial(needed, "this needs")
AUTO, _LONGEST = "auto", 2000  # characters of an error
_ABOUT = "Speculative decoding for autoregressive image generators. --version prints the version."


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 1 the doctor found something, 2 bad input, 130 cancelled."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["--version"]:
        print(f"bozzetto {__version__}")
        return 0
    try:
        with signals(_cancel, signal.SIGTERM):
            command = _parse(arguments)
            return HANDLERS[type(command)](command) or 0
    except BrokenPipeError:  # who reads our output has gone; what is left in the buffer has nowhere to go
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except (UsageError, OSError, UnicodeDecodeError) as error:
        print(f"bozzetto: error: {_one_line(error)}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt as stop:
        print(f"bozzetto: cancelled: {stop}" if str(stop) else "bozzetto: cancelled: nothing written", file=sys.stderr)
        return CANCELLED


def _parse(arguments: list[str]) -> Any:
    """Options of the command line over those of --config over the defaults. tyro exits with code 2 on bad flags."""
    command = _typed(arguments)
    if not isinstance(command, verb.Generate) or command.config is None:
        return command
    if not command.config.is_file():
        raise UsageError(f"config = {str(command.config)!r} is not allowed: no such file")
    base = checked_as(verb.Generate, read_mapping(command.config), command.config)
    if base.config is not None:
        raise UsageError(f"{command.config}: key 'config' is not allowed inside a config file")
    return _typed(arguments, default=base)


def _typed(arguments: list[str], **default: Any) -> Any:
    verbs: Any = Union[tuple(Annotated[kind, tyro.conf.subcommand(kind.__name__.lower())] for kind in HANDLERS)]  # noqa: UP007
    return tyro.cli(verbs, args=arguments, prog="bozzetto", description=_ABOUT, **default)


def _cancel(number: int, frame: object) -> None:
    """SIGTERM cancels as Ctrl-C does, so that cleaning up happens either way."""
    raise KeyboardInterrupt


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    text = " ".join(str(error).split())
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _wants_progress(asked: bool) -> bool:
    return asked or sys.stderr.isatty()


def _generate(options: verb.Generate) -> None:
    from bozzetto.checkpoints.own_sampling import sampling_line
    from bozzetto.common.staging import staged_folder
    from bozzetto.evaluate.output import RunWriter, check_free, written_before
    from bozzetto.pipeline.loading import load
    from bozzetto.pipeline.pipeline import GenerateSettings

    settings, loading = settings_from(options, GenerateSettings), loading_of(options)
    _check_request(options, settings)
    out, show = options.out, _wants_progress(options.progress)
    with staged_folder(out, written_before(out)) as folder:
        pipe = load(options.model, loading, note)
        labels = pipe.labels(options.classes, settings)
        count = options.count or len(labels)
        check_free(out, count, [pipe.classes[label] for label in labels])
        sampling = pipe.sampling(settings)
        print(sampling_line(sampling), flush=True)
        codes = pipe.tokenizer.codes if pipe.undecoded else None
        with RunWriter(folder, count, pipe.size, pipe.undecoded, codes) as writer:
            request: dict[str, Any] = {"classes": list(options.classes), "seed": options.seed, "count": count}
            result = pipe.generate(**request, settings=settings, progress=show, take=writer.add)
            about = {"model": options.model, "dtype": pipe.dtype, "device": loading.device, "grid": list(pipe.grid)}
            about |= {"undecoded": pipe.undecoded} if pipe.undecoded else {}
            writer.finish(result, {**about, **request}, sampling)
    print(writer.summary(result, out))


def _check_request(options: verb.Generate, settings: Any) -> None:
    """Refuse a bad class, count, seed or dtype from config.json alone, before any weights are read."""
    from bozzetto.checkpoints.folders import read_config
    from bozzetto.common.classes import distinct, labels_of
    from bozzetto.pipeline.pipeline import is_hosted, model_folder, plan_batches

    plan_batches([0], options.count, options.seed, 0, settings.batch)
    if is_hosted(options.model):
        return
    names = read_config(model_folder(options.model)).get("class_names")
    if isinstance(names, list) and names and options.captions is None:  # if not, loading explains what is wrong
        known = distinct([str(n) for n in names])
        plan_batches(labels_of(known, options.classes), options.count, options.seed, 0, settings.batch)


def _measured(
    options: verb.Bench | verb.Profile | verb.Evaluate,
    measure: Callable[[], Any],
    shown: Callable[[Any], str],
    indent: int = 2,
) -> None:
    """Measure, print a table, and write the figures where --json says, which is looked at before."""
    from bozzetto.evaluate.output import check_writable, write_report

    if options.json is not None:
        check_writable(options.json)
    report = measure()
    print(shown(report))
    if options.json is not None:
        write_report(options.json, report, indent)


def _bench(options: verb.Bench) -> None:
    from bozzetto.evaluate.bench import BenchSettings, bench, bench_table
    from bozzetto.evaluate.suites import suite_table
    from bozzetto.pipeline.loading import load

    if options.suite is None:
        idle(options, "images quality_batch data extractor out", "it belongs to --suite")
    else:
        idle(options, "methods", "--suite has methods of its own")
    settings = settings_from(
        options,
        BenchSettings,
        methods=("none",) if options.methods == AUTO else listed("methods", options.methods, str),
        batches=listed("batch", options.batch, int),
        guidances=listed("guidance", options.guidance, float, own=True),
        windows=listed("window", options.window, int),
        top_ks=listed("top_k", options.top_k, int, own=True),
    )

    def measure() -> dict[str, Any]:
        pipe = load(options.model, loading_of(options), note)
        methods = pipe.default_methods if options.methods == AUTO else settings.methods
        return bench(pipe, replace(settings, methods=methods), progress=_wants_progress(options.progress))

    if options.suite is None:
        _measured(options, measure, bench_table)
    else:
        _measured(options, lambda: _suite(options, settings), suite_table)


def _suite(options: verb.Bench, settings: Any) -> dict[str, Any]:
    from bozzetto.evaluate.evaluation import EvaluateSettings
    from bozzetto.evaluate.features import make_extractor
    from bozzetto.evaluate.suites import run_suite, suite_models
    from bozzetto.pipeline.loading import load
    from bozzetto.pipeline.pipeline import GenerateSettings

    if any(len(values) != 1 for values in (settings.batches, settings.guidances, settings.windows, settings.top_ks)):
        raise UsageError("a suite is one cell: give one value each for batch, guidance, window and top_k")
    law = {"guidance": settings.guidances[0], "top_k": settings.top_ks[0], "window": settings.windows[0]}
    law |= {"drafter": "none", "rule": "seed-exact", "batch": options.quality_batch}
    own = {"methods": ("none",), "count": options.images, "recitation": False}  # the methods are the suite's
    quality = settings_from(options, EvaluateSettings, base=settings_from(options, GenerateSettings, **law), **own)
    assert options.suite is not None
    loading = loading_of(options, options.out)
    with _resumable(options.out), _needs("evaluate"):
        extractor = make_extractor(options.extractor)
        chosen = suite_models(options.suite, options.model)
        parts = [(load(model, loading, note), part.methods) for model, part in chosen]
        show = _wants_progress(options.progress)
        return run_suite(parts, options.suite, settings, quality, extractor, options.out, progress=show)


def _profile(options: verb.Profile) -> None:
    from bozzetto.evaluate.profile import ProfileSettings, profile, profile_table
    from bozzetto.pipeline.loading import load

    settings, show = settings_from(options, ProfileSettings), _wants_progress(options.progress)
    _measured(
        options, lambda: profile(load(options.model, loading_of(options), note), settings, progress=show), profile_table
    )


def _base(options: verb.Draw) -> Any:
    """The law, batch and window of the options, as settings of sequential decoding."""
    from bozzetto.pipeline.pipeline import GenerateSettings

    return settings_from(options, GenerateSettings, drafter="none", rule="seed-exact")


def _sample(options: verb.Sample) -> None:
    from bozzetto.checkpoints.own_sampling import sampling_line
    from bozzetto.evaluate.sampling import SampleRun, gathered, method_settings, sample, world_of
    from bozzetto.evaluate.shards import write_adm
    from bozzetto.pipeline.loading import load

    settings = method_settings(options.method, _base(options))
    rank, world = world_of()
    if options.ray and world > 1:
        raise UsageError(f"ray = {options.ray} is not allowed with WORLD_SIZE = {world} in the environment")
    show = _wants_progress(options.progress) and rank == 0
    loading = loading_of(options, options.out)
    with _resumable(options.out), gathered(world):
        pipe = load(options.model, loading, note)
        named = None if options.method == "auto" else options.method
        run = SampleRun(options.out, pipe, settings, seed=options.seed, classes=options.classes, method=named)
        if rank == 0:
            print(sampling_line(run.sampling), flush=True)
        if options.ray:
            with _needs("ray"):
                from bozzetto.evaluate.sampling_ray import sample_by_ray
            sample_by_ray(run, options.count, options.model, loading, options.ray)
        else:
            sample(run, options.count, rank=rank, world=world, progress=show)
    if rank == 0:
        print(f"{options.count} images: {options.out}")
        if options.npz:
            print(f"for evaluators: {write_adm(options.out, options.count)}")


def _evaluate(options: verb.Evaluate) -> None:
    from bozzetto.evaluate.compare import CompareSettings, compare, comparison_table
    from bozzetto.evaluate.evaluation import EvaluateSettings, evaluate, evaluation_table
    from bozzetto.evaluate.features import make_extractor
    from bozzetto.pipeline.loading import load

    if options.compare is not None:
        idle(options, "methods reference data bootstrap", "--compare has no use for it")
    base, auto = _base(options), options.methods == AUTO
    methods, references = (listed(n, getattr(options, n), str) for n in ("methods", "reference"))
    # What the model's usual methods are is known when it is loaded.
    wanted = settings_from(
        options, EvaluateSettings, methods=("none",) if auto else methods, references=references, base=base
    )
    if options.compare is not None:
        first, second = options.compare
        wanted = settings_from(options, CompareSettings, a=first, b=second, base=base)

    def measure() -> dict[str, Any]:
        loading = loading_of(options, options.out)
        with _resumable(options.out), _needs("evaluate"):
            extractor = make_extractor(options.extractor)
            pipe, work = load(options.model, loading, note), compare if options.compare is not None else evaluate
            own = {"methods": pipe.default_methods} if auto and options.compare is None else {}
            show = _wants_progress(options.progress)
            return work(pipe, replace(wanted, **own), extractor, options.out, progress=show)

    _measured(options, measure, evaluation_table if options.compare is None else comparison_table, indent=1)


def _report(options: verb.Report) -> None:
    from bozzetto.evaluate.report import build_report

    print(f"report: {build_report(options.runs, options.out, progress=_wants_progress(options.progress))}")


@contextlib.contextmanager
def _resumable(out: Path) -> Iterator[None]:
    """A cancelled run says where it stands and how it goes on."""
    try:
        yield
    except KeyboardInterrupt:
        kept = out.is_dir() and any(out.rglob("shard-*.npz"))
        how = (
            f"the same command goes on from {out}" if kept else "no batch was finished, the same command starts afresh"
        )
        raise KeyboardInterrupt(how) from None


def _models(options: verb.Models) -> None:
    from bozzetto.cli.listing import list_models

    print(list_models(options.folder))


# By what is converted: where its function is, the two files that it needs, and what else it is told.
_CONVERTERS = {
    "llamagen": ("bozzetto.checkpoints.convert", "gpt vq", "image_size class_names store text_encoder"),
    "mar": ("bozzetto.checkpoints.convert_mar", "checkpoint vae", "class_names store"),
    "eagle": ("bozzetto.checkpoints.convert_drafter", "drafter model", "store"),
}


def _convert(options: verb.Convert) -> None:
    from bozzetto.pipeline.pipeline import is_hosted

    (module, wanted, more), what = _CONVERTERS[options.what], str(options.what)
    others = {name for _, *own in _CONVERTERS.values() for name in " ".join(own).split()}
    idle(options, " ".join(sorted(others - {*wanted.split(), *more.split()})), f"convert {what} has no use for it")
    for name in wanted.split():
        if getattr(options, name) is None:
            raise UsageError(f"convert {what} needs --{name}")
    if what == "eagle" and is_hosted(str(options.model)):
        what = "lantern"
    convert = getattr(importlib.import_module(module), f"convert_{what}")
    print(convert(*(getattr(options, name) for name in [*wanted.split(), "out", *more.split()])))


def _train(options: verb.Train) -> None:
    from bozzetto.train import families

    recipe = families.read_recipe(options.recipe, options.what)
    try:
        with _needs("train"):
            print(f"written: {families.train(recipe, options.restart)}")
    except KeyboardInterrupt:
        saved = Path(recipe.out) / "checkpoint.pt"
        same = "without --restart the same command" if options.restart else "the same command"
        how = f"{same} resumes from {saved}" if saved.exists() else "nothing saved yet, it starts afresh"
        raise KeyboardInterrupt(how) from None


def _serve(options: verb.Serve) -> None:
    with _needs("ray" if options.ray else "serve"):
        from bozzetto.cli.serve import check, serve
        from bozzetto.serve.guard import read_keys

        keys = read_keys(options.api_keys)
        check(options)
        if options.ray:
            from bozzetto.cli.serve_ray import serve_on_ray

            serve_on_ray(options, keys)
        else:
            serve(options, keys)


def _doctor(options: verb.Doctor) -> int:
    from bozzetto.cli.doctor import examine, shown

    findings = examine()
    print(shown(findings))
    return int(any(finding.verdict == "fail" for finding in findings))


def _completion(options: verb.Completion) -> None:
    _typed(["--tyro-print-completion", options.shell])


HANDLERS: dict[type, Callable[[Any], int | None]] = {
    verb.Generate: _generate,
    verb.Bench: _bench,
    verb.Profile: _profile,
    verb.Sample: _sample,
    verb.Evaluate: _evaluate,
    verb.Report: _report,
    verb.Models: _models,
    verb.Convert: _convert,
    verb.Train: _train,
    verb.Serve: _serve,
    verb.Doctor: _doctor,
    verb.Completion: _completion,
}
