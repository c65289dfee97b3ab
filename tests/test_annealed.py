"""Annealed head schedules: counts, the stages' laws, what decoding makes of them, what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bozzetto import load
from bozzetto.errors import UsageError
from bozzetto.laws.chain import sample_trajectory
from bozzetto.targets.annealed import annealed_steps
from bozzetto.targets.flow_cache import FlowSampler, FlowTarget
from test_flow_model import CONFIG, N, random_flow


def test_steps_fall_evenly_from_the_first_to_the_last() -> None:
    counts = [annealed_steps(16, 4, done, 256) for done in range(256)]
    assert counts[0] == 16 and counts[-1] == 4 and counts == sorted(counts, reverse=True)
    assert sum(counts) == pytest.approx(256 * 10, rel=0.01)
    assert annealed_steps(16, 4, 400, 256) == 4 and annealed_steps(8, 2, 0, 1) == 8


def test_a_stage_is_the_sampler_of_that_many_steps() -> None:
    model = random_flow()
    annealed = FlowTarget(model, FlowSampler(steps=6, last_std=0.1, last_steps=2))
    features, noise = torch.randn(2, 3, CONFIG.dim), torch.randn(6, 7, 3)
    for done, steps in ((0, 6), (N - 1, 2), (N // 2, annealed_steps(6, 2, N // 2, N))):
        plain = FlowTarget(model, FlowSampler(steps=steps, last_std=0.1))
        one, two = (sample_trajectory(t.law(features, 1.0, 1.0, done), None, noise).token for t in (annealed, plain))
        torch.testing.assert_close(one, two)


def test_fewer_calls_of_the_head_are_made_and_the_first_token_is_the_same(tiny_flow: Path) -> None:
    pipe = load(tiny_flow)
    length, steps = pipe.target.length, pipe.target.sampler.steps
    given = {"count": 2, "seed": 3, "drafter": "none", "guidance": 2.0, "batch": 2}
    whole, fewer = (pipe.generate(last_steps=last, **given) for last in (0, 1))
    assert whole.head_calls == steps * length
    assert fewer.head_calls == sum(annealed_steps(steps, 1, done, length) for done in range(length))
    for one, two in zip(whole.images, fewer.images, strict=True):
        assert torch.equal(one.tokens[0], two.tokens[0]) and not torch.equal(one.tokens[-1], two.tokens[-1])
    alone = pipe.generate(last_steps=1, **{**given, "batch": 1})
    assert [image.sha256 for image in alone.images] == [image.sha256 for image in fewer.images]


def test_a_masked_model_anneals_by_the_tokens_that_are_known(tiny_mar: Path) -> None:
    pipe = load(tiny_mar)
    whole, fewer = (pipe.generate(count=2, seed=3, passes=4, last_steps=last, batch=2) for last in (0, 2))
    assert fewer.head_calls < whole.head_calls


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"last_steps": 99, "drafter": "none"}, "last_steps = 99 is not allowed: a whole number from 1 to steps ="),
        ({"last_steps": -1}, "last_steps = -1 is not allowed"),
        ({"last_steps": 2, "drafter": "jacobi"}, "last_steps is not allowed with drafts"),
    ],
)
def test_what_does_not_go_together_is_refused(tiny_flow: Path, options: dict, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        load(tiny_flow).generate(count=1, **options)


def test_codes_have_no_steps(tiny_model: Path) -> None:
    with pytest.raises(UsageError, match="last_steps is not allowed here"):
        load(tiny_model).generate(count=1, last_steps=2)
