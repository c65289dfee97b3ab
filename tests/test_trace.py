"""A trace tells of every token which pass drew it and whether it was a draft."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import bozzetto
from bozzetto.decoding.images import ImageRequest, PassTrace
from bozzetto.decoding.loop import EagerBatch
from bozzetto.evaluate.report.figures import acceptance_by_offset, mean_progress
from bozzetto.laws.categorical import LawSettings
from bozzetto.targets.llamagen_cache import LlamaGenTarget
from toys import make_drafter, make_rule, tiny_llamagen


@pytest.fixture(scope="module", params=["seed-exact", "exact"])
def decoded(request):
    target = LlamaGenTarget(tiny_llamagen(), torch.float32)
    law = LawSettings(temperature=0.3)
    batch = EagerBatch(target, make_drafter("jacobi", 4), make_rule(request.param), law)
    images = [ImageRequest(i % 3, 0, i, law) for i in range(6)]
    batch.admit(images)
    while batch.active:
        batch.step()
    result = batch.run(torch.arange(6) % 3, 0, torch.arange(6))
    assert all(torch.equal(image.result, tokens) for image, tokens in zip(images, result.tokens, strict=True))
    return result, [image.trace for image in images]


def test_traces_add_up_to_the_result(decoded):
    result, traces = decoded
    assert [sum(t.committed) for t in traces] == [result.tokens.shape[1]] * 6
    for name in ("accepted", "drafted"):
        assert [sum(getattr(t, name)) for t in traces] == getattr(result, name).tolist()
    assert [len(t.committed) for t in traces] == result.passes.tolist()


def test_every_pass_commits_its_drafts_and_one_token_more_unless_the_image_ends(decoded):
    for trace in decoded[1]:
        own = np.array(trace.committed) - np.array(trace.accepted)
        assert (own[:-1] == 1).all() and own[-1] in (0, 1)
        assert all(a <= d for a, d in zip(trace.accepted, trace.drafted, strict=True))


def test_offsets_count_from_the_start_of_each_pass():
    trace = PassTrace([1, 3, 2], [0, 2, 2], [0, 3, 2])
    assert trace.offsets().tolist() == [0, 1, 2, 0, 1, 2]
    assert PassTrace().offsets().shape == (0,)


def test_offsets_hold_one_draft_for_each_accepted_one(decoded):
    for trace in decoded[1]:
        assert (trace.offsets() > 0).sum() == sum(trace.accepted)


def test_acceptance_by_offset_counts_passes():
    traces = [PassTrace([1, 3], [0, 2], [0, 3]), PassTrace([2], [1], [1])]
    offered, kept = acceptance_by_offset(traces)
    assert offered.tolist() == [2, 1, 1] and kept.tolist() == [2, 1, 0]
    assert [len(a) for a in acceptance_by_offset([])] == [0, 0]


def test_mean_progress_starts_at_nothing_and_ends_at_everything():
    assert mean_progress([PassTrace([1, 3]), PassTrace([2, 1, 1])]).tolist() == [0.0, 0.375, 0.875, 1.0]


def test_generated_images_carry_their_trace(tiny_model):
    for image in bozzetto.load(tiny_model).generate(count=3, batch=2, window=4).images:
        assert len(image.trace.committed) == image.target_passes
        assert sum(image.trace.accepted) == image.accepted
