"""Model folders of every family, spoilt in hundreds of ways, loaded one after the other in little memory. Run as a
program (see test_hostile_folders.py): arguments are a folder to work in; it prints JSON, [what, how it ended, said]."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import resource
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from bozzetto import UsageError
from bozzetto.autoencoders.vq import VQConfig, VQTokenizer
from bozzetto.checkpoints.folders import (
    load_drafter,
    load_latents,
    load_target,
    load_tokenizer,
    read_config,
    save_drafter,
    save_drift,
    save_llamagen,
    target_digest,
)
from bozzetto.cli.main import main
from bozzetto.drafters.eagle import EagleNet, eagle_config
from bozzetto.drafters.gaussian import GaussianNet, gaussian_config
from bozzetto.drafters.glance import GlanceConfig, GlanceNet
from bozzetto.drafters.parallel import BlockConfig, BlockNet, PlaneConfig, PlaneNet
from bozzetto.pipeline.loading import load
from bozzetto.targets.drift import DriftConfig, DriftModel
from bozzetto.targets.flow import FlowConfig
from bozzetto.targets.llamagen import LlamaGen, LlamaGenConfig
from conftest import write_tiny_model, write_tiny_vectors
from test_files import BAD_JSON

ROOM = 1 << 30  # bytes that all of it may take beyond what the imports took
DRAFTERS = ("eagle", "plane", "block", "glance")
ODD: tuple[Any, ...] = ("512", 0, -1, 2.5, None, True, [1], {}, 10**9, 2**40, 1e300, "x" * 10_000)
LARGE = (1, 60_000)
Write = Callable[[Path], object]


def write_families(root: Path) -> dict[str, Path]:
    """What is loaded by which name; drafters lie inside the model that they are for."""
    codes, flow = write_tiny_model(root / "codes"), write_tiny_vectors(root / "flow", "flow")
    write_tiny_vectors(root / "mar", "mar")
    c = load_target(codes, "llamagen").config
    nets = (
        EagleNet(eagle_config(c)),
        PlaneNet(PlaneConfig(c.dim, c.vocab, c.grid, 2, ffn=8)),
        BlockNet(BlockConfig(c.dim, c.heads, c.ffn, c.vocab, c.grid, 2, layers=1, rank=4)),
        GlanceNet(GlanceConfig(c.dim, c.vocab, c.grid, 2, narrow=4, ffn=8, rank=4)),
    )
    for name, net in zip(DRAFTERS, nets, strict=True):
        save_drafter(codes / name, net, codes, {})
    network = load_target(flow, "flow", "mar")
    save_drafter(flow / "sketch", GaussianNet(gaussian_config(network.config)), flow, {}, compact=True)
    (root / "drift").mkdir()
    model = DriftModel(network, DriftConfig(width=16, depth=1))
    save_drift(root / "drift", model, str(flow), flow, {"name": "tiny-drift"})
    text = LlamaGen(LlamaGenConfig(32, 1, 2, vocab=16, grid=4, classes=0, condition_tokens=5, caption_dim=6))
    pixels = VQTokenizer(VQConfig(codes=16, width=16, pre_blocks=1, post_blocks=1, image_size=32))
    save_llamagen(root / "text", text, pixels, {"class_names": []})
    write_captions(root / "text" / "captions.safetensors")
    return {name: root / name for name in ("codes", "flow", "mar", "drift", "text")}


def write_captions(path: Path, names: str = '["a", "b"]', **changes: torch.Tensor) -> None:
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]])
    save_file({"features": torch.ones(2, 5, 6), "mask": mask, **changes}, path, {"captions": names})


def loaded(model: Path, path: Path) -> None:
    """Load what a file belongs to: a drafter, a tokenizer, or the whole model."""
    captions = model / "captions.safetensors" if model.name == "text" else None
    if path.parent != model:
        target = read_config(model)["config"]
        if path.parent.name == "sketch":
            load_drafter(path.parent, "sketch", FlowConfig(**target), target_digest(model))
        else:
            load_drafter(path.parent, path.parent.name, LlamaGenConfig(**target), target_digest(model))
    elif path.name.startswith("tokenizer"):
        (load_tokenizer if captions or model.name == "codes" else load_latents)(model)
    else:
        load(model, captions=captions)


def by_command(folder: Path) -> None:
    """The same, and the first image, from the command line."""
    said = io.StringIO()
    given = ["generate", "--model", str(folder), "--out", str(folder.parent / "out"), "--count", "1"]
    given += ["--captions", str(folder / "captions.safetensors")] if folder.name == "text" else []
    given += ["--drafter", "none", "--rule", "plain"] if folder.name in ("flow", "drift") else []
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        code = main(given)
    if code:
        assert code == 2 and said.getvalue().count("\n") == 1, said.getvalue()
        assert not (folder.parent / "out").exists()
        raise UsageError(said.getvalue())


def json_mutations(path: Path) -> Iterator[tuple[str, Write]]:
    """Every field of the config set to odd values or missing; texts that are no JSON; notes of the wrong type."""
    content = json.loads(path.read_text())

    def put(key: str, value: object, inner: bool = True) -> Write:
        fresh = json.loads(json.dumps(content))
        (fresh["config"] if inner else fresh)[key] = value
        return lambda at: at.write_text(json.dumps(fresh))

    def without(key: str) -> Write:
        fresh = {**content, "config": {k: v for k, v in content["config"].items() if k != key}}
        return lambda at: at.write_text(json.dumps(fresh))

    for key in content["config"]:
        for value in ODD:
            yield f"{key} = {str(value)[:20]!r}", put(key, value)
        yield f"without {key}", without(key)
    for key in ("family", "kind", "class_names", "name", "sampler", "base", "base_weights", "same_as"):
        if key in content or (key == "same_as" and "vq" not in content.get("kind", "vq")):
            for value in (7, None, [], {"steps": 10**9}, "../flow", ["a", {}, None]):
                yield f"{key} = {value!r}", put(key, value, inner=False)
    for key in content.get("sampler", ()):
        for value in ODD:
            yield f"sampler {key} = {str(value)[:20]!r}", put("sampler", {key: value}, inner=False)
    for name, (data, _) in BAD_JSON.items():
        yield name, lambda at, data=data: at.write_bytes(data)
    yield "no file", Path.unlink
    yield "a folder in its place", lambda at: (at.unlink(), at.mkdir())


def with_header(header: dict, body: bytes = b"") -> Write:
    text = json.dumps(header).encode()
    return lambda path: path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def weight_mutations(path: Path) -> Iterator[tuple[str, Write]]:
    """Cut, claimed, retyped, reshaped, not finite, or large only once it is multiplied out."""
    data, state = path.read_bytes(), load_file(path)
    matrices = sorted(
        (value.ndim != 2, key + ".scale" in state, key)
        for key, value in state.items()
        if value.ndim > 1 and ".scale" not in key
    )
    flat, compact_too, matrix = not matrices[0][0], matrices[0][1], matrices[0][2]
    plain = next(key for key in sorted(state) if ".scale" not in key and key + ".scale" not in state)

    def put(**changes: torch.Tensor | None) -> Write:
        fresh = {k: v for k, v in {**state, **changes}.items() if v is not None}
        return lambda at: save_file(fresh, at)

    for size in (0, 4, 100, len(data) // 2, len(data) - 1):
        yield f"cut at {size}", lambda at, size=size: at.write_bytes(data[:size])
    yield "more bytes", lambda at: at.write_bytes(data + b"\0" * 64)
    yield "a pointer", lambda at: at.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    yield "a page", lambda at: at.write_text("<!doctype html><title>404</title>")
    yield "a header of 2^60 bytes", lambda at: at.write_bytes(struct.pack("<Q", 2**60) + data[8:])
    yield "a deep header", lambda at: at.write_bytes(struct.pack("<Q", 200_000) + b"[" * 200_000)
    for shape in ([2**31, 2**31], [0, 2**63], [2**40]):
        yield f"shape {shape}", with_header({matrix: {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}})
    for kind, size in (
        ("F8_E4M3", 1),
        ("U8" if compact_too else "I8", 1),
        ("BOOL", 1),
        ("I64", 8),
        ("C64", 8),
        ("U16", 2),
        ("F4", 0.5),
    ):
        value, others = state[matrix], {k: v for k, v in state.items() if k != matrix}
        header, body = {}, b""
        for key, part in others.items():
            raw = part.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            known = {torch.float16: "F16", torch.float32: "F32", torch.bfloat16: "BF16", torch.int8: "I8"}[part.dtype]
            header[key] = {"dtype": known, "shape": list(part.shape), "data_offsets": [len(body), len(body) + len(raw)]}
            body += raw
        end = len(body) + int(value.numel() * size)
        header[matrix] = {"dtype": kind, "shape": list(value.shape), "data_offsets": [len(body), end]}
        yield f"weights of type {kind}", with_header(header, body + b"\0" * (end - len(body)))
    yield "no file", Path.unlink
    yield "a folder in its place", lambda at: (at.unlink(), at.mkdir())
    yield "not finite", put(**{plain: torch.full_like(state[plain], torch.nan)})
    yield "infinite", put(**{plain: torch.full_like(state[plain], torch.inf)})
    yield "beyond float32", put(**{plain: torch.full(state[plain].shape, 1e300, dtype=torch.float64)})
    yield "another shape", put(**{matrix: state[matrix][:-1].clone()})
    yield "turned", put(**{matrix: state[matrix].flatten().clone()})
    yield "one missing", put(**{matrix: None})
    yield "one more", put(more=torch.zeros(3))
    if not flat:
        return
    rows = state[matrix].to(torch.int8)
    for name, compact, scale in (
        ("scales that multiply out to 14 GB", torch.ones(LARGE, dtype=torch.int8), torch.ones(LARGE[::-1])),
        ("scales that overflow", rows + 100, torch.full((len(rows), 1), 3e38)),
        ("scales that are not finite", rows, torch.full((len(rows), 1), torch.nan)),
        ("scales of columns", rows, torch.ones(1, rows.shape[1])),
        ("one scale", rows, torch.ones(())),
        ("scales of whole numbers", rows, torch.ones(len(rows), 1, dtype=torch.int64)),
        ("scales of floats", state[matrix].float(), torch.ones(len(rows), 1)),
    ):
        yield name, put(**{matrix: compact, matrix + ".scale": scale})


def caption_mutations(path: Path) -> Iterator[tuple[str, Write]]:
    features, mask = torch.ones(2, 5, 6), torch.ones(2, 5)
    for name, changes in {
        "not finite": {"features": features * torch.nan},
        "another width": {"features": torch.ones(2, 5, 7)},
        "none": {"features": torch.ones(0, 5, 6), "mask": torch.ones(0, 5)},
        "a number": {"features": torch.ones(())},
        "features of type int8": {"features": features.to(torch.int8)},
        "features of type float8": {"features": features.to(torch.float8_e4m3fn)},
        "a mask of type float8": {"mask": mask.to(torch.float8_e4m3fn)},
        "padded on the left": {"mask": mask.triu(2)},
        "padded in between": {"mask": torch.tensor([[1, 0, 1, 0, 0]] * 2)},
    }.items():
        yield name, lambda at, changes=changes: write_captions(at, **changes)
    for names in ("[", '"ab"', '["a"]', '["a", 2]', "[" * 100_000, '["a", "\\ud800"]'):
        yield f"captions {names[:20]}", lambda at, names=names: write_captions(at, names)
    data = path.read_bytes()
    for size in (0, 50, len(data) - 1):
        yield f"cut at {size}", lambda at, size=size: at.write_bytes(data[:size])


def mutations(model: Path) -> Iterator[tuple[Path, str, Write]]:
    """(file, what, how to spoil it) of a model folder and of the drafters in it."""
    for path in sorted(model.rglob("*.json")):
        yield from ((path, what, write) for what, write in json_mutations(path))
    for path in sorted(model.rglob("*.safetensors")):
        kind = caption_mutations if path.name == "captions.safetensors" else weight_mutations
        yield from ((path, what, write) for what, write in kind(path))


@dataclasses.dataclass
class Outcome:
    """what: folder, file and how it was spoilt; end: `loaded`, `refused`, or an error that no user can act on."""

    what: str
    end: str
    said: str = ""


def attempt(root: Path, model: Path, path: Path, what: str, write: Write, command: bool) -> Outcome:
    name, whole = f"{path.relative_to(root)}: {what}", path.read_bytes()
    try:
        write(path)
        if command:
            by_command(model)
        else:
            loaded(model, path)
    except UsageError as error:
        return Outcome(name, "refused", str(error)[:600])
    except BaseException as error:
        return Outcome(name, type(error).__name__, str(error)[:300])
    finally:
        if path.is_dir():
            path.rmdir()
        path.write_bytes(whole)
    return Outcome(name, "loaded")


def run(root: Path) -> list[Outcome]:
    """Spoil, load, mend; now and then by the command line."""
    torch.set_num_threads(1)
    models = write_families(root)
    for model in models.values():  # while they are whole
        for path in (*model.rglob("*.json"), *model.rglob("*.safetensors")):
            loaded(model, path)
        by_command(model)
        (root / "out").rename(root / f"out-{model.name}")
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + ROOM, -1))
    for name in ("kaiming_uniform_", "uniform_", "normal_", "trunc_normal_", "ones_", "zeros_"):
        setattr(torch.nn.init, name, lambda tensor, *given, **more: tensor)  # numbers that no loaded module keeps
    found = []
    for model in models.values():
        for number, (path, what, write) in enumerate(mutations(model)):
            command = number % 20 == 0 and path.parent == model
            found.append(attempt(root, model, path, what, write, command))
    return found


if __name__ == "__main__":
    print(json.dumps([dataclasses.astuple(outcome) for outcome in run(Path(sys.argv[1]))]))
