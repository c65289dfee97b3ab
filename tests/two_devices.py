"""A second device that is the processor again, for machines without another one: a tensor of it takes no part in an
operation with one of the first, as on a GPU. Run as a script, in a process of its own (a backend is for all of it):
what this package does there, as JSON.

The device is made in Python, as torch 2.13's `_setup_privateuseone_for_python_backend` has it. Its tensors hold
ordinary ones; every operator without a kernel for it, which is every one, comes to `_run`.
"""

from __future__ import annotations

import contextlib
import functools
import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DEVICES = ("second:0", "second:1")
# What a GPU does with tensors of two devices, too: copies, and indices that lie on the processor.
_BETWEEN = ("copy_", "_to_copy", "_copy_from")
_INDEXED = ("index", "index_put_", "_index_put_impl_", "index_put")
_real_tensor, _real_as_tensor = torch.tensor, torch.as_tensor


class There(Tensor):
    """A tensor of the second device, of one number `where`."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor, where: str) -> There:
        strides = {"strides": inner.stride(), "storage_offset": inner.storage_offset()}
        made: Any = Tensor._make_wrapper_subclass(cls, inner.size(), dtype=inner.dtype, device=where, **strides)  # type: ignore[attr-defined]
        made.inner = inner
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    def tolist(self) -> Any:
        return self.inner.tolist()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(f"a tensor of {self.device} is no array: use cpu() first")

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(op, args, kwargs or {})


def _place(tensor: Tensor) -> str:
    return str(tensor.device)


@functools.cache
def _name(op: Any) -> str:
    return op._schema.name.partition("::")[2]


def _each(part: Any, change: Callable[[Tensor], Any]) -> Any:
    """With every tensor changed. (torch's own tree_map takes longer than most of the operators here.)"""
    if isinstance(part, Tensor):
        return change(part)
    if isinstance(part, (list, tuple)):
        return type(part)([_each(inner, change) for inner in part])
    return {key: _each(inner, change) for key, inner in part.items()} if isinstance(part, dict) else part


def _run(op: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """The operator on what the tensors hold; its result is where they are."""
    name, given = _name(op), list[Tensor]()

    def held(tensor: Tensor) -> Tensor:
        given.append(tensor)
        return tensor.inner if isinstance(tensor, There) else tensor

    inner_args, inner_kwargs = _each(args, held), _each(kwargs, held)
    known = {id(leaf.inner): leaf for leaf in given if isinstance(leaf, There)}
    _check(op, name, given)
    asked = kwargs.get("device")
    where = str(torch.device(asked)) if asked is not None else next(map(_place, known.values()), "second:0")
    where = {"second": "second:0"}.get(where, where)
    if name in _BETWEEN and asked is None:
        where = _place(args[0])
    if asked is not None:
        inner_kwargs["device"] = "cpu"
    with torch.no_grad():
        found = op(*inner_args, **inner_kwargs)
    if where == "cpu":
        return args[0] if name == "copy_" else found
    return _each(found, lambda part: known[id(part)] if id(part) in known else There(part, where))


def _check(op: Any, name: str, given: list[Tensor]) -> None:
    if name in _BETWEEN:
        return
    places = [_place(part) for part in given if part.dim() or isinstance(part, There)]
    if name in _INDEXED:
        places = [place for place in places if place != "cpu"] if places[0] != "cpu" else places
    if len({place for place in places if place}) > 1:
        raise RuntimeError(f"{op}: tensors of {', '.join(sorted(set(places)))}")


def prepare() -> Any:
    """Make the device known; returns what has to be kept alive."""
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend("second")
    library = torch.library.Library("_", "IMPL")
    library.fallback(lambda op, *args, **kwargs: _run(op, args, kwargs), "PrivateUse1")

    # What makes an empty tensor and then enlarges it, which one of these cannot be.
    direct = torch.library.Library("aten", "IMPL")
    for name in ("default", "start", "start_step"):
        op = getattr(torch.ops.aten.arange, name)
        called = functools.partial(lambda op, *args, **kwargs: _run(op, args, kwargs), op)
        direct.impl("arange" if name == "default" else f"arange.{name}", called, "PrivateUse1")

    # These two fail inside torch 2.13 for devices made in Python (an assertion of python_dispatch.cpp).
    def moved(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*args: Any, device: Any = None, **kwargs: Any) -> Tensor:
            found = make(*args, **kwargs)
            return found if device is None else found.to(device)

        return made

    torch.random.fork_rng = contextlib.nullcontext  # the device has no generator
    torch.tensor, torch.as_tensor = moved(_real_tensor), moved(_real_as_tensor)
    return library, direct


# What is done there: each draws on both devices, or only there, and compares.

CODES: dict[str, dict[str, Any]] = {
    "none": {"drafter": "none"},
    "jacobi": {"drafter": "jacobi"},
    "exact": {"drafter": "jacobi", "rule": "exact"},
    "lantern": {"drafter": "jacobi", "rule": "lantern:k=3"},
    "greedy": {"drafter": "jacobi", "temperature": 0.0},
    "filtered": {"drafter": "jacobi", "rule": "exact", "top_k": 9, "top_p": 0.9},
    "budget": {"drafter": "jacobi", "rule": "lantern:k=3", "tv_budget": 0.5},
    "eagle": {"drafter": "eagle"},
    "eagle tree": {"drafter": "eagle:tree=chain-3", "rule": "tree"},
    "traversal": {"drafter": "eagle", "rule": "traversal"},
    "lantern++": {"drafter": "eagle", "rule": "lantern++:k=3"},
    "grouped": {"drafter": "eagle", "rule": "grouped"},
    "annealed": {"drafter": "eagle", "rule": "annealed"},
    "cascade": {"drafter": "eagle", "rule": "cascade"},
    "plane": {"drafter": "plane"},
    "block": {"drafter": "block"},
    "glance": {"drafter": "glance"},
    "filled": {"drafter": "jacobi:fill=glance"},
    "second": {"drafter": "jacobi:second=eagle", "rule": "exact"},
    "smaller": {"drafter": "model:folder={codes}"},
}
FLOW: dict[str, dict[str, Any]] = {
    "plain": {"drafter": "none"},
    "annealed steps": {"drafter": "none", "steps": 5, "last_steps": 2},
    "reflection": {"drafter": "none", "rule": "reflection"},
    "coupled": {"drafter": "none", "rule": "coupled"},
    "chains": {"drafter": "jacobi", "rule": "chains"},
    "pathwise": {"drafter": "jacobi", "rule": "pathwise:epsilon=0.1"},
    "joint": {"drafter": "sketch", "rule": "joint"},
    "block": {"drafter": "sketch", "rule": "block"},
    "cspd": {"drafter": "sketch", "rule": "cspd"},
}
DRIFT: dict[str, dict[str, Any]] = {
    "plain": {"drafter": "none"},
    "pathwise": {"drafter": "jacobi", "rule": "pathwise:epsilon=0.1"},
}
MASKED: dict[str, dict[str, Any]] = {
    "plain": {"drafter": "none", "rule": "plain"},
    "coupled": {"drafter": "none", "rule": "coupled", "passes": 4},
    "other passes": {"drafter": "none", "passes": 5, "steps": 4, "last_steps": 2},
    "model": {"drafter": "model:folder={mar}", "rule": "cspd"},
}
TABLES = {"codes": CODES, "flow": FLOW, "drift": DRIFT, "mar": MASKED, "text": {"none": CODES["none"]}}
OTHERS = ("stream", "slots", "served", "bench", "profile", "sample", "device map", "hosted", "inside generate")
CASES = [f"{family}: {name}" for family, table in TABLES.items() for name in table] + list(OTHERS)


class Cases:
    """root: of the folders that `hostile_folders.write_families` wrote."""

    def __init__(self, root: Path):
        import bozzetto

        self.root, self.pipes = root, dict[tuple[str, str], Any]()
        self.load = bozzetto.load

    def pipe(self, family: str, device: str) -> Any:
        if (family, device) not in self.pipes:
            more = {"captions": self.root / "text" / "captions.safetensors"} if family == "text" else {}
            self.pipes[family, device] = self.load(self.root / family, device=device, dtype="float32", **more)
        return self.pipes[family, device]

    def run(self, case: str) -> None:
        family, _, name = case.partition(": ")
        if not name:
            getattr(self, case.replace(" ", "_"))()
            return
        options = dict(TABLES[family][name])
        options["drafter"] = options["drafter"].format(**{n: self.root / n for n in TABLES})
        ours, theirs = (
            self.pipe(family, device).generate(count=2, batch=2, seed=3, window=3, **options).images
            for device in ("second", "cpu")
        )
        for here, there in zip(ours, theirs, strict=True):
            assert here.tokens.device.type == "cpu"
            if family == "codes" or name in ("plain", "annealed steps"):  # elsewhere a rounding may turn a coin
                torch.testing.assert_close(here.tokens, there.tokens, atol=1e-2, rtol=0)

    def stream(self) -> None:
        pipe = self.pipe("codes", "second")
        for event in pipe.stream(["rose", "daisy"], batch=2):
            for tokens, count in zip(event.tokens, event.count.tolist(), strict=True):
                pipe.preview(tokens, count)

    def slots(self) -> None:
        from bozzetto.decoding.scheduler import Scheduler
        from bozzetto.settings import GenerateSettings

        found = []
        for device in ("second", "cpu"):
            loop = Scheduler(self.pipe("codes", device), slots=2)
            for index, guidance in enumerate((1.0, 2.0, 3.0)):
                loop.submit(index, seed=1, index=index, settings=GenerateSettings(guidance=guidance, window=3))
            found.append([ticket.result.tolist() for ticket in loop.drain()])
        assert found[0] == found[1]

    def served(self) -> None:
        from serving import live

        with live({"codes": self.pipe("codes", "second")}) as server:
            made = server.client().images.generate(model="codes", prompt="rose", n=2, extra_body={"seed": 0})
            assert len(made.data or []) == 2

    def bench(self) -> None:
        from bozzetto.evaluate.bench import BenchSettings, bench

        found = bench(self.pipe("codes", "second"), BenchSettings(("none", "jacobi/exact"), count=1, rounds=1))
        assert found["results"] and found["settings"]["device"].startswith("second")

    def profile(self) -> None:
        from bozzetto.evaluate.passes import BarePass
        from bozzetto.settings import GenerateSettings

        pipe = self.pipe("codes", "second")
        labels = torch.arange(1, device=pipe.target.device)
        BarePass(pipe, pipe.resolve(GenerateSettings("none")), labels, 2).run()

    def sample(self) -> None:
        from bozzetto.evaluate.sampling import SampleRun, sample
        from bozzetto.settings import GenerateSettings

        run = SampleRun(self.root / "samples", self.pipe("codes", "second"), GenerateSettings("none", batch=2))
        assert sample(run, 3) == 3

    def hosted(self) -> None:
        import hf_toys
        from bozzetto.decoding.loop import EagerBatch
        from bozzetto.laws.categorical import LawSettings
        from toys import make_drafter, make_rule

        ready, found = hf_toys._ready, dict[str, list[Any]]()
        for device in ("second", "cpu"):
            hf_toys._ready = lambda *given, device=device: ready(*given).to(device)
            for name in ("janus", "emu3", "chameleon", "lumina"):
                target = hf_toys.TARGETS[name]()
                labels = torch.tensor([0, 1, 2], device=target.device)
                made = EagerBatch(target, make_drafter("jacobi", 3), make_rule("exact"), LawSettings(guidance=2.0))
                found.setdefault(name, []).append(made.run(labels, 0, labels).tokens.tolist())
        hf_toys._ready = ready
        assert all(here == there for here, there in found.values())

    def inside_generate(self) -> None:
        import bozzetto
        import hf_toys

        found = []
        for device in ("second", "cpu"):
            model, loop = hf_toys.tiny_emu3().to(device), bozzetto.generate_fn(hf_toys.GRID, hf_toys.GRID)
            asked = torch.tensor([list(hf_toys.PROMPTS[0])]).to(device)
            found.append(loop(model, asked, generation_config=model.generation_config).tolist())
        assert found[0] == found[1]

    def device_map(self) -> None:
        """As accelerate does: layers on two devices, hooks that bring what a layer is called with."""
        import hf_toys
        from bozzetto.adapters import janus
        from bozzetto.decoding.loop import EagerBatch
        from bozzetto.laws.categorical import LawSettings
        from toys import make_drafter, make_rule

        found = []
        for spread in (True, False):
            model = hf_toys.tiny_janus()
            if spread:
                spread_over(
                    model, {"model.language_model.layers.1": DEVICES[1], "model.language_model.norm": DEVICES[1]}
                )
            target = janus.target(model)
            target.gather_here()
            for tokens in hf_toys.PROMPTS:
                target.add(janus.janus_prompt(tokens, hf_toys.BEGIN, hf_toys.IMAGE, hf_toys.PADDING))
            labels = torch.tensor([0, 1, 2], device=target.device)
            for drafter, rule in (("none", "seed-exact"), ("jacobi", "exact")):
                made = make_drafter(drafter, 3), make_rule(rule)
                result = EagerBatch(target, *made, LawSettings(guidance=2.0)).run(labels, 0, labels)
                found.append(result.tokens.tolist())
        assert found[:2] == found[2:]


def spread_over(model: Any, where: dict[str, str]) -> None:
    """Modules named in `where` on these devices, everything else on the first."""

    def brought(module: Any, args: Any, kwargs: Any) -> Any:
        device = next(module.parameters()).device
        return _each((args, kwargs), lambda x: x.to(device))

    model.to(DEVICES[0])
    for name, device in where.items():
        model.get_submodule(name).to(device)
    for module in model.modules():
        if not list(module.children()) and list(module.parameters()):
            module.register_forward_pre_hook(brought, with_kwargs=True)
    for name in where:
        module = model.get_submodule(name)
        if list(module.children()):
            module.register_forward_pre_hook(brought, with_kwargs=True)


def main(root: str, out: str) -> None:
    kept = prepare()
    cases, found = Cases(Path(root)), dict[str, str]()
    for case in CASES:
        try:
            cases.run(case)
            found[case] = ""
        except Exception:
            found[case] = traceback.format_exc()
    Path(out).write_text(json.dumps(found))
    del kept


if __name__ == "__main__":
    main(*sys.argv[1:])
