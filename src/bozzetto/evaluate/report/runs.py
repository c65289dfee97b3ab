"""Reading runs: what `generate`, `sample`, `evaluate` and `bench` left behind, in one form for the report."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bozzetto.common.files import parse_json
from bozzetto.decoding.images import PassTrace
from bozzetto.errors import UsageError, brief
from bozzetto.evaluate.columns import EVALUATION
from bozzetto.evaluate.metrics import Interval
from bozzetto.evaluate.output import MANIFEST
from bozzetto.evaluate.sampling import slug
from bozzetto.evaluate.shards import RUN, held, read_run, read_samples

GENERATE, SAMPLES, BENCH = "generate", "samples", "bench"
# Pixels of a run are held in memory together: very large runs are represented by their first images.
MOST_READ = 2048
_MOST_TOKENS, _MOST_PIXELS, _LARGEST = 2**20, 2**26, 1e15  # of an image; of any figure
_LONGEST = 500  # characters of a method
# What reading, and drawing, a file of another shape than ours raises.
BROKEN = (KeyError, IndexError, TypeError, AttributeError, ValueError, ArithmeticError, RuntimeError, OSError)
_PROVENANCE = ("command", "commit", "versions", "machine", "time")
_ALLOWED = (
    f"a folder of generate ({MANIFEST}), sample ({RUN}) or evaluate ({EVALUATION}), or a JSON file of evaluate or bench"
)


@dataclass
class Drawn:
    """Images of one method of one run, in index order. load(i): pixels of the i-th, uint8 [H, W, 3]; traces: one per
    image, or None where the run kept none; length: tokens of an image, those of a grid line by line, which may hold an
    end each; total: images in the run, of which `index` lists those read; draft_share: share of the decoding time that
    went into drafting and verifying; budget: most bias that an image could spend; scattered: tokens are drawn in an
    order of their own, as masked models do; grid: rows and columns of its codes."""

    method: str
    index: list[int]
    class_names: list[str]
    load: Callable[[int], np.ndarray]
    traces: list[PassTrace] | None
    length: int
    total: int
    grid: tuple[int, int]
    draft_share: float | None = None
    budget: float | None = None
    scattered: bool = False

    @property
    def tokens_per_pass(self) -> float | None:
        """Tokens per target pass, averaged over images."""
        if self.traces is None:
            return None
        return len(self.traces) * self.length / max(1, sum(len(t.committed) for t in self.traces))


@dataclass
class Run:
    """One run. results, memorisation: rows of an evaluation; bench: rows of a benchmark; provenance: command, commit,
    versions, machine, time; notes: what the reader of the page should know about it."""

    name: str
    kind: str
    settings: dict[str, Any]
    provenance: dict[str, Any]
    drawn: list[Drawn] = field(default_factory=list)
    results: list[dict[str, Any]] = field(default_factory=list)
    memorisation: list[dict[str, Any]] = field(default_factory=list)
    bench: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def model(self) -> str:
        """The model's name."""
        return str(self.settings.get("model", "unknown model"))


def read_runs(paths: Sequence[str | Path], tick: Callable[[], object] = lambda: None) -> list[Run]:
    """Read every run, with a `tick` after each; their names are made unique. Raises UsageError naming the first that is
    not a run."""
    if not paths:
        raise UsageError(f"no run given (allowed: {_ALLOWED})")
    runs = []
    for path in paths:
        runs += read_any(path)
        tick()
    seen: Counter[str] = Counter()
    for run in runs:
        seen[run.name] += 1
        if seen[run.name] > 1:
            run.name = f"{run.name} #{seen[run.name]}"
    return runs


def read_any(path: str | Path) -> list[Run]:
    """A run of any kind, told by its content; of a suite's file one run per model. Raises UsageError naming the path
    and what is allowed."""
    path = Path(path)
    if not path.exists():
        raise UsageError(f"run {str(path)!r} not found (allowed: {_ALLOWED})")
    name = path.resolve().name
    try:
        if path.is_file():
            content = _json(path)
            if content.get("kind") == "suite":
                return _of_suite(name, path, content)
            return [_of_json(name, path, content)]
        for marker, read in ((EVALUATION, _evaluation_folder), (RUN, _samples_folder), (MANIFEST, _manifest_folder)):
            if (path / marker).is_file():
                return [read(name, path)]
    except BROKEN as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(
            f"run {str(path)!r} cannot be read: {type(error).__name__}: {error} (allowed: {_ALLOWED})"
        ) from error
    raise UsageError(f"{str(path)!r} is not a run: none of the known files is in it (allowed: {_ALLOWED})")


def _json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = parse_json(path.read_bytes(), path)  # manifests of many images are large
    except UsageError as error:
        raise UsageError(f"{str(path)!r} is not a run: {error} (allowed: {_ALLOWED})") from error
    return content


def _of_suite(name: str, path: Path, content: dict[str, Any]) -> list[Run]:
    """The benchmarks of a suite, one per model; its quality is in the folders of its samples."""
    timed = content.get("bench")
    timed = timed if isinstance(timed, list) else [timed]  # in one model's file of an earlier version, not a list
    if not timed or not all(isinstance(part, dict) for part in timed):
        raise UsageError(f"{str(path)!r} is not a run: a suite without benchmarks (allowed: {_ALLOWED})")
    runs = [_of_json(name, path, part) for part in timed]
    if len(runs) > 1:
        for run in runs:
            run.name = f"{name}, {run.model}"
    return runs


def _of_json(name: str, path: Path, content: dict[str, Any]) -> Run:
    """An evaluation or a benchmark without pictures."""
    kind, settings, rows = content.get("kind"), content.get("settings"), content.get("results")
    if isinstance(settings, dict) and isinstance(rows, list):
        if kind == "evaluation":
            return _evaluation(name, content)
        if rows and kind in (None, BENCH) and all("batch" in row for row in _rows(rows)):
            return Run(name, BENCH, *_split(settings), bench=[_ranged(row) for row in rows])
    raise UsageError(f"{str(path)!r} is not a run: its JSON is of kind {kind!r} (allowed: {_ALLOWED})")


def _evaluation(name: str, content: dict[str, Any]) -> Run:
    rows, recited = _rows(content["results"]), _rows(content.get("memorisation") or [])
    for row in rows:
        figure_of(row, "frechet")  # a malformed file is refused here, not half-way through the page
    run = Run(name, "evaluation", *_split(content["settings"]), results=rows, memorisation=recited)
    run.notes = [f"{name}: {note}" for note in content.get("notes") or []]
    return run


def _evaluation_folder(name: str, folder: Path) -> Run:
    run = _evaluation(name, _json(folder / EVALUATION))
    methods = [str(m) for m in run.settings.get("methods") or dict.fromkeys(r["method"] for r in run.results)]
    made = []
    for method in methods:
        samples = folder / "samples" / slug(method)
        if (samples / RUN).is_file():
            drawn, content = _drawn(samples, run.settings.get("count"))
            run.drawn.append(drawn)
            provenance = dict(content.get("provenance") or {})
            commit = str(provenance.get("commit") or "unknown")
            made.append(f"{method}: commit {commit}, {provenance.get('time', 'time unknown')}")
    if made:
        run.provenance["samples"] = "; ".join(made)
    else:
        run.notes.append(f"{name}: its samples are not in the folder, so it has figures only.")
    return run


def _samples_folder(name: str, folder: Path) -> Run:
    drawn, content = _drawn(folder, None)
    settings, _ = _split(content["settings"])
    return Run(name, SAMPLES, settings, dict(content.get("provenance") or {}), drawn=[drawn])


def _drawn(folder: Path, count: int | None) -> tuple[Drawn, dict[str, Any]]:
    """The samples of a folder (its images 0..count-1), and its run.json."""
    content = read_run(folder)
    if count is None:
        found = held(folder)
        total, there = len(found), next(i for i in range(len(found) + 1) if i not in found)  # without a gap
    else:
        total = there = int(count)
    samples = read_samples(folder, min(there, MOST_READ) or None)
    names = samples.settings.get("class_names") or []
    drawn = Drawn(
        method=_method(samples.settings["method"]),
        index=samples.index.tolist(),
        class_names=[str(names[i]) if i < len(names) else str(i) for i in samples.label.tolist()],
        load=lambda i: samples.pixels[i],
        traces=samples.traces,
        total=total,
        grid=_grid(samples.settings, samples.tokens.shape[1]),
        **_about(samples.settings, samples.tokens.shape[1], samples.tokens.ndim == 3, samples.batches),
    )
    return drawn, content


def _about(
    settings: Mapping[str, Any], length: int, vectors: bool, batches: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """What settings, tokens of an image, their kind and the seconds of batches say of drawn images."""
    spent = [batch.get("seconds") or {} for batch in batches]
    drafting, target = (sum(seconds.get(part, 0.0) for seconds in spent) for part in ("draft", "target"))
    # Drafts of continuous tokens by a smaller model are of a masked model.
    scattered = vectors and str(settings.get("drafter")).partition(":")[0] == "model"
    share = drafting / (drafting + target) if drafting + target else None
    budget = figure_of({"setting": settings.get("tv_budget")}, "setting")
    known = {"draft_share": share, "budget": None if budget is None else budget.value, "scattered": scattered}
    return {"length": length, **known}


def _manifest_folder(name: str, folder: Path) -> Run:
    content = _json(folder / MANIFEST)
    images = sorted(content["images"], key=lambda entry: int(entry["index"]))
    if not images:
        raise UsageError(f"{str(folder)!r} holds no images")
    settings, provenance = _split({**content["settings"], **{k: content[k] for k in _PROVENANCE if k in content}})
    traced = all("trace" in entry for entry in images)
    vectors = isinstance(images[0]["tokens"], str)  # their numbers lie in a file of their own
    length = sum(map(_count, images[0]["trace"]["committed"])) if vectors and traced else len(images[0]["tokens"])
    drafter, rule = _method(settings.get("drafter", "none")), settings.get("rule")
    alone = drafter == "none" and rule in (None, "seed-exact", "plain")
    drawn = Drawn(
        method=drafter if alone else _method(f"{drafter}/{rule}"),
        index=[int(entry["index"]) for entry in images],
        class_names=[str(entry["class"]) for entry in images],
        # Only the name counts: a manifest must not point outside its folder.
        load=partial(_png, [folder / Path(str(entry["file"])).name for entry in images]),
        traces=[_trace(entry, length) for entry in images] if traced else None,
        total=len(images),
        grid=_grid(settings, length) if traced else (0, 0),
        **_about(settings, length, vectors, [content]),
    )
    run = Run(name, GENERATE, settings, provenance, drawn=[drawn])
    if not traced:
        run.notes.append(
            f"{name}: its {MANIFEST} holds no traces of the target passes (an older version wrote it), so acceptance "
            "maps, acceptance by offset and passes are left out for it."
        )
    return run


def _png(files: Sequence[Path], i: int) -> np.ndarray:
    """Pixels of the i-th file, uint8 [H, W, 3]. Raises UsageError for one that is missing or damaged."""
    try:
        with Image.open(files[i]) as picture:
            if picture.width * picture.height > _MOST_PIXELS:
                raise ValueError(f"{picture.width} x {picture.height} pixels are too many")
            return np.asarray(picture.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UsageError(f"{str(files[i])!r} cannot be read as a picture: {error}") from error


def _trace(entry: Mapping[str, Any], length: int) -> PassTrace:
    committed, accepted, drafted = (list(map(_count, entry["trace"][k])) for k in ("committed", "accepted", "drafted"))
    trace = PassTrace(committed, accepted, drafted)
    trace.spent = [float(x) for x in entry["trace"].get("spent") or [0.0] * len(trace.committed)]
    fits = len(trace.committed) == len(trace.accepted) == len(trace.drafted) == len(trace.spent)
    if not fits or sum(trace.committed) != length or any(k > c for k, c in zip(accepted, committed, strict=True)):
        raise ValueError(f"the trace of image {entry['index']} does not add up to its {length} tokens")
    return trace


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= _MOST_TOKENS:
        raise ValueError(f"{brief(value)} is no number of tokens")
    return value


def _grid(settings: Mapping[str, Any], tokens: int) -> tuple[int, int]:
    """Rows and columns: what a run says, else those of a square, whose rows may hold an end of line more."""
    said = settings.get("grid")
    side = math.isqrt(tokens) if said is None else said
    rows, columns = map(_count, said if isinstance(said, list) and len(said) == 2 else (side, side))
    fits = tokens in (rows * columns, rows * (columns + 1)) if said is None else tokens >= rows * columns
    if not (rows and columns and fits):
        raise ValueError(f"{tokens} tokens do not make a grid of {rows} by {columns}")
    return rows, columns


def _split(content: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings, and where they come from."""
    settings = {k: v for k, v in content.items() if k not in _PROVENANCE}
    return settings, {k: content[k] for k in _PROVENANCE if k in content}


def _rows(rows: Any) -> list[dict[str, Any]]:
    if not isinstance(rows, list) or not all(isinstance(row, dict) and "method" in row for row in rows):
        raise ValueError("its results are not a list of rows with a method each")
    for row in rows:
        _method(row["method"])
    return rows


def _method(value: Any) -> str:
    """A method's name, which stands in figures."""
    if not isinstance(value, str) or not 0 < len(value) <= _LONGEST or not value.isprintable():
        raise ValueError(f"{brief(value)} is no name of a method")
    return value


def _ranged(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of the benchmark with `x`, `x_low`, `x_high` put together as intervals are in an evaluation."""
    found = dict(row)
    for name in [k for k in row if f"{k}_low" in row and f"{k}_high" in row]:
        found[name] = {"value": row[name], "low": found.pop(f"{name}_low"), "high": found.pop(f"{name}_high")}
    return found


def figure_of(row: Mapping[str, Any], name: str) -> Interval | None:
    """The figure of that name in a row: a number, or one with its interval; None where it is missing, null or not
    finite. Raises ValueError for anything else."""
    content = row.get(name)
    if content is None:
        return None
    parts = [content.get(k) for k in ("value", "low", "high")] if isinstance(content, dict) else [content, None, None]
    if any(isinstance(p, bool) or not isinstance(p, int | float | None) for p in parts):
        said = brief(content)
        raise ValueError(f"{name} of {row.get('method')} is neither a number nor one with an interval: {said}")
    if any(p is not None and abs(p) > _LARGEST for p in parts):
        raise ValueError(f"{name} of {row.get('method')} is beyond what a figure can be: {brief(content)}")
    value, low, high = (float(p) if p is not None and math.isfinite(p) else None for p in parts)
    return None if value is None else Interval(value, low, high)
