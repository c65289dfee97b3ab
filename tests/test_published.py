"""Every published family, from its files as they are laid out to pictures, figures and a server."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

import bozzetto
from bozzetto.checkpoints.own_sampling import sampling_line
from bozzetto.cli.main import main
from published import Published, families
from serving import live

ALL = families()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What --model is given, by family; written when it is first asked for."""
    return {}


@pytest.fixture(params=ALL)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def model(name: str, written: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    if name not in written:
        folder = tmp_path_factory.mktemp("published") / name
        folder.mkdir()
        written[name] = ALL[name].write(folder)
    return written[name]


@pytest.fixture
def family(name: str, model: Any) -> Published:
    """With options that name what lies in or beside the model's folder."""
    placed = {k: v.format(model=model) if isinstance(v, str) else v for k, v in ALL[name].options.items()}
    return replace(ALL[name], options=placed)


def split(method: str) -> dict[str, str]:
    drafter, _, rule = method.partition("/")
    return {"drafter": drafter, "rule": rule or "auto"}


def agree(one: Any, other: Any) -> None:
    """Two images: codes to the byte, vectors up to rounding, which depends on the shape of a batch."""
    torch.testing.assert_close(one.tokens, other.tokens, atol=1e-4, rtol=0)
    assert one.tokens.is_floating_point() or one.sha256 == other.sha256


def test_it_draws_with_every_method_in_batches_of_one_and_three(family: Published, model: Any) -> None:
    pipe = bozzetto.load(model, **family.options)
    alone = pipe.generate(family.asked, drafter="none", batch=1).images
    for method in family.methods:
        many = pipe.generate(family.asked, batch=3, **split(method))
        assert len(many.images) == 3 and min(i.target_passes for i in many.images) >= 1
        if method in ("none", "jacobi/seed-exact"):
            single = pipe.generate(family.asked[:1], batch=1, **split(method)).images
            for one, other in zip([*many.images, *single], [*alone, alone[0]], strict=True):
                agree(one, other)


def test_greedy_decoding_is_the_reference_implementations(family: Published, model: Any) -> None:
    pipe = bozzetto.load(model, **family.options)
    asked = family.asked[0]
    law = {"guidance": family.own.get("guidance", 1.0), "temperature": family.temperature, "top_k": 0, "top_p": 1.0}
    law |= {"rule": family.rule, "negative_prompt": family.own.get("negative_prompt", "")}
    made = pipe.generate([asked], drafter="none", **law)
    wanted = torch.as_tensor(family.reference(Path(model), asked))
    torch.testing.assert_close(made.images[0].tokens, wanted, atol=3e-4, rtol=0)  # our kernels sum in another order


def typed(family: Published) -> list[str]:
    return [w for k, v in family.options.items() for w in (f"--{k.replace('_', '-')}", str(v))]


def test_what_is_not_asked_for_is_as_its_authors_sample(
    family: Published, model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["generate", str(family.asked[0]), "--model", str(model), *typed(family), "--out", str(out)]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("sampling: "))
    manifest = json.loads((out / "manifest.json").read_text())
    pipe = bozzetto.load(model, **family.options)
    told = pipe.sampling()
    assert {name: getattr(pipe.own, name) for name in family.own} == family.own
    assert manifest["sampling"] == told and told["asked"] == [] and line == sampling_line(told)
    assert f"guidance {pipe.own.guidance:g}" in line and pipe.own.source in line
    for name in ("guidance", "temperature", "top_k", "top_p"):
        assert manifest["settings"][name] == told[name] == getattr(pipe.own, name)


def test_it_is_benched(family: Published, model: Any, tmp_path: Path) -> None:
    arguments = ["bench", "--model", str(model), *typed(family), "--methods", "none", "--count", "1", "--rounds", "1"]
    assert main([*arguments, "--json", str(tmp_path / "bench.json")]) == 0


def test_it_is_served(family: Published, model: Any) -> None:
    pipe = bozzetto.load(model, **family.options)
    with live({"it": pipe}, slots=2) as server:
        text = str(family.asked[0])
        if not family.pictures:
            with pytest.raises(openai.BadRequestError, match="draws tokens and no pictures here"):
                server.client().images.generate(model="it", prompt=text)
            return
        served = server.client().images.generate(model="it", prompt=text, extra_body={"seed": 0})
        drawn = bozzetto.load(model, **family.options).generate([family.asked[0]], batch=1)
        assert served.data and served.data[0].b64_json
        assert served.model_dump()["data"][0]["bozzetto"]["sha256"] == drawn.images[0].sha256
