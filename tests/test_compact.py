"""Compact weight files: matrices come back within half a step of their row, everything else as in float16."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bozzetto.checkpoints.weights import read_weights, save_state
from bozzetto.errors import UsageError


def test_matrices_come_back_within_half_a_step_and_the_file_is_half_as_large(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    state = {
        "matrix": torch.randn(64, 300, generator=generator) * torch.rand(64, 1, generator=generator),
        "vector": torch.randn(300, generator=generator),
        "grid": torch.randn(1, 4, 8, generator=generator),
        "zeros": torch.zeros(8, 16),
        "count": torch.tensor(7),
    }
    save_state(tmp_path / "compact.safetensors", state, compact=True)
    save_state(tmp_path / "plain.safetensors", state)
    found = read_weights(tmp_path / "compact.safetensors")
    assert found.keys() == state.keys()
    step = state["matrix"].abs().amax(1, keepdim=True) / 127
    assert bool(((found["matrix"] - state["matrix"]).abs() <= 0.5001 * step).all())
    for name in ("vector", "grid"):
        assert torch.equal(found[name], state[name].half().float())
    assert torch.equal(found["zeros"], state["zeros"]) and int(found["count"]) == 7
    sizes = [(tmp_path / f"{name}.safetensors").stat().st_size for name in ("compact", "plain")]
    assert sizes[0] < 0.6 * sizes[1]


def test_reading_and_writing_again_changes_nothing(tmp_path: Path) -> None:
    state = {"matrix": torch.randn(16, 40, generator=torch.Generator().manual_seed(1))}
    save_state(tmp_path / "a.safetensors", state, compact=True)
    once = read_weights(tmp_path / "a.safetensors")
    save_state(tmp_path / "b.safetensors", once, compact=True)
    torch.testing.assert_close(read_weights(tmp_path / "b.safetensors")["matrix"], once["matrix"], rtol=1e-6, atol=0)


def test_a_matrix_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="'matrix'"):
        save_state(tmp_path / "a.safetensors", {"matrix": torch.full((4, 4), torch.nan)}, compact=True)
    assert not (tmp_path / "a.safetensors").exists()
