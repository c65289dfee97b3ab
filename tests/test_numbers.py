"""Numbers out of bounds, wherever one can be given: one error that names the value, before anything is allocated."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import bozzetto
from bozzetto.cli.main import main
from bozzetto.errors import UsageError, brief
from bozzetto.evaluate.profile import ProfileSettings
from bozzetto.laws.categorical import LawSettings
from bozzetto.methods.table import DRAFTERS, RULES, read_drafter
from bozzetto.settings import GenerateSettings
from toys import make_rule

NAN, INF, DIGITS = float("nan"), float("inf"), 10**5000  # Python writes no whole number of more than 4,300 digits
NUMBERS = ("window", "guidance", "temperature", "top_k", "top_p", "batch", "tv_budget", "steps", "last_steps", "passes")


def named(error: pytest.ExceptionInfo[UsageError], name: str) -> None:
    assert name in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize("value", [NAN, INF, -INF, -1, -DIGITS, DIGITS, 1e300, "3", [1]], ids=lambda v: brief(v)[:8])
@pytest.mark.parametrize("name", NUMBERS)
def test_settings_have_bounds(name: str, value: Any) -> None:
    if name == "tv_budget" and value in (1e300, DIGITS):
        return  # a budget that nobody spends
    with pytest.raises(UsageError) as error:
        GenerateSettings(**{name: value})
    named(error, f"{name} = ")


@pytest.mark.parametrize("name", ["window", "batch", "top_k", "steps", "last_steps", "passes"])
def test_what_is_counted_is_whole(name: str) -> None:
    with pytest.raises(UsageError, match=f"{name} = 1.5 is not allowed: a whole number"):
        GenerateSettings(**{name: 1.5})


@pytest.mark.parametrize(
    "law", [LawSettings(1000.0, 1e-4), LawSettings(1000.0, 1e4, 2**31 - 1), LawSettings(top_p=1e-300)]
)
def test_the_widest_laws_are_drawn(law: LawSettings, tiny_model: Path) -> None:
    options = dataclasses.asdict(law)
    image = bozzetto.load(tiny_model).generate("rose", **options).images[0]
    assert image.tokens.min() >= 0 and (image.margin is None or image.margin >= 0)


@pytest.mark.parametrize(
    ("name", "value"), [("threads", 10**12), ("threads", -1), ("seconds", NAN), ("seconds", 1e300)]
)
def test_a_profile_has_bounds(name: str, value: float) -> None:
    with pytest.raises(UsageError) as error:
        ProfileSettings(**{name: value})
    named(error, f"{name} = ")


METHODS: list[tuple[Callable[[str], object], str, str]] = [
    (partial(make, tokens=tokens), name, field.name)
    for table, make in ((RULES, make_rule), (DRAFTERS, read_drafter))
    for (tokens, name), kind in table.items()
    for field in dataclasses.fields(kind)
    if field.name != "folder"
]


@pytest.mark.parametrize(("make", "name", "option"), METHODS, ids=[f"{n}:{o}" for _, n, o in METHODS])
def test_options_of_methods_have_bounds(make: Callable[[str], object], name: str, option: str) -> None:
    """What is refused is refused in a line; what is not makes an object."""
    for value in ("nan", "-inf", "-1", "1e300", "1" * 5000, "x", "1.5", "1x" * 3000, "chain-" + "9" * 5000):
        try:
            make(f"{name}:{option}={value}")
        except UsageError as error:
            assert len(str(error)) < 10_000 and "\n" not in str(error)
    with pytest.raises(UsageError):
        make(f"{name}:{option}=nan")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--guidance", "1e300"], "guidance = 1e+300 is not allowed"),
        (["--guidance", "9" * 5000], "guidance = inf is not allowed"),
        (["--temperature", "nan"], "temperature = nan"),
        (["--temperature", "1e-300"], "temperature = 1e-300"),
        (["--top-p", "inf"], "top_p = inf"),
        (["--tv-budget", "-inf"], "tv_budget = -inf"),
        (["--batch", "1000000000000"], "batch = 1000000000000"),
        (["--count", "1" + "0" * 30], "count = 1000000"),
        (["--seed", str(2**63)], "seed = 9223372036854775808"),
        (["9" * 5000], "unknown class"),
        (["--drafter", f"eagle:tree=chain-{'9' * 5000}"], "tree = "),
        (["--rule", f"lantern:k={'9' * 5000}"], "k = "),
    ],
    ids=lambda v: v[0][:9] if isinstance(v, list) else "",
)
def test_the_command_line_says_so_in_a_line(
    arguments: list[str], said: str, tiny_model: Path, tmp_path: Path, capsys
) -> None:
    assert main(["generate", *arguments, "--model", str(tiny_model), "--out", str(tmp_path / "out")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and said in lines[0] and len(lines[0]) < 2200 and not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", ["--count", "--seed", "--top-k", "--batch", "--window"])
def test_flags_of_thousands_of_digits_are_no_numbers(option: str, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["generate", option, "9" * 5000])
    assert stop.value.code == 2 and "Traceback" not in capsys.readouterr().err


def bomb(levels: int) -> str:
    """Ten aliases of ten aliases of ...: 10^levels values."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, levels)]
    return "\n".join(lines)


BROKEN = {
    "a bomb": (bomb(12), "unknown key 'a0'"),
    "a bomb in a key that is known": (f"{bomb(9)}\nclasses: *a8\n", "is not allowed"),
    "a circle": ("classes: &a [*a]\n", "is not allowed"),
    "a deep list": ("classes: " + "[" * 5000 + "]" * 5000, "nested too deep"),
    "a deep mapping": ("classes: " + "{a: " * 3000 + "1" + "}" * 3000, "nested too deep"),
    "many digits": ("count: " + "9" * 5000, "not valid YAML"),
    "a number too large": ("count: " + "9" * 4000, "count = "),
    "not a number": ("guidance: .nan\n", "guidance = nan is not allowed"),
    "a scale": ("guidance: 1e+300\n", "guidance = 1e+300 is not allowed"),
    "a scale as text": ("guidance: 1.0e300x\n", "guidance = '1.0e300x'"),
    "another type": ("count: [1]\n", "count = [1] is not allowed"),
    "a key twice": ("seed: 1\nseed: 2\n", "key 'seed' stands there twice"),
    "a key that is none": ("? [a]\n: 1\n", "not valid YAML"),
    "an odd key": ("3: 4\n", "keys are words"),
    "a list": ("[1, 2]\n", "is a mapping of keys to values"),
    "a text": ("hello\n", "is a mapping of keys to values"),
    "nothing": ("", "is a mapping of keys to values"),
    "several": ("seed: 1\n---\nseed: 2\n", "not valid YAML"),
    "an object": ("seed: !!python/object/apply:os.getpid []\n", "not valid YAML"),
    "a date that is none": ("seed: 2024-99-99\n", "not valid YAML"),
    "other bytes": (b"\xff\xfe\x00seed", "not valid YAML"),
    "too many": ("#" * (2**20 + 1), "bytes are no recipe"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_config_file_that_would_hurt_is_refused(name: str, tiny_model: Path, tmp_path: Path, capsys) -> None:
    text, said = BROKEN[name]
    config = tmp_path / "c.yaml"
    config.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert main(["generate", "--model", str(tiny_model), "--config", str(config), "--out", str(tmp_path / "out")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and said in lines[0] and len(lines[0]) < 2200 and not (tmp_path / "out").exists()
