"""A variant against its base model: figures of one run, paired, and never called exact."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from bozzetto.evaluate import suites as variants
from bozzetto.evaluate.metrics import Comparison
from bozzetto.evaluate.suites import compare_with_base, frechet_over


class Means:
    """Mean colours of a 2 x 2 grid."""

    name, dim = "mean colours", 12

    def __call__(self, images: np.ndarray) -> torch.Tensor:
        x = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 255
        return torch.nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)


def pictures(shift: int, count: int = 24) -> np.ndarray:
    """Noise, brighter by `shift`; the same noise for every shift."""
    return (np.random.default_rng(0).integers(0, 100, (count, 8, 8, 3)) + shift).astype(np.uint8)


class Drawn(SimpleNamespace):
    """As much of samples as is asked for."""

    def __len__(self) -> int:
        return len(self.pixels)


def drawn(shift: int) -> Any:
    return Drawn(pixels=pictures(shift))


REFERENCE = Means()(pictures(0, 40)).double()


def test_equal_pictures_change_nothing_and_have_no_spread() -> None:
    assert frechet_over(drawn(30), drawn(30), REFERENCE, Means(), 8) == {"value": 0.0, "low": 0.0, "high": 0.0}


def test_the_change_is_the_difference_of_the_two_distances() -> None:
    found = frechet_over(drawn(30), drawn(90), REFERENCE, Means(), 16)
    far, near = (Comparison(Means()(pictures(shift)), REFERENCE).frechet() for shift in (90, 30))
    assert found["value"] == pytest.approx(far - near) and 0 < found["low"] <= found["value"] <= found["high"]


def test_rows_of_the_variant_alone_are_marked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[Path] = []

    def samples(folder: Path) -> Any:
        asked.append(folder.relative_to(tmp_path))
        return drawn(90 if "variant" in asked[-1].parts else 30)

    monkeypatch.setattr(variants, "read_samples", samples)
    read: list[tuple[Path, str]] = []
    monkeypatch.setattr(
        variants,
        "photographs",
        lambda pipe, path, split: read.append((path, split)) or SimpleNamespace(images=pictures(0)),
    )
    rows = [
        {"model": model, "method": method, "images_per_second": rate, "exact": True}
        for model, method, rate in (("base", "none", 2.0), ("variant", "none", 5.0), ("variant", "a/b:c=1", 9.0))
    ]
    variant: Any = SimpleNamespace(name="variant")
    compare_with_base({"results": rows}, variant, "base", Means(), tmp_path, 8, tmp_path)
    assert read == [(tmp_path, "test")]  # the data that were asked for
    assert [row.get("over_base") for row in rows] == [None, 2.5, 4.5]
    assert [row["exact"] for row in rows] == [True, False, False] and rows[1]["base"] == "base"
    assert rows[2]["frechet_over_base"]["value"] > 0
    assert [str(path) for path in asked] == [
        "base/samples/none",
        "variant/samples/none",
        "variant/samples/a-b-c-1",
    ]


def test_without_the_base_model_in_the_run_nothing_is_claimed(tmp_path: Path) -> None:
    rows = [{"model": "variant", "method": "none", "images_per_second": 5.0, "exact": True}]
    compare_with_base({"results": rows}, SimpleNamespace(name="variant"), "base", Means(), tmp_path, 8)  # type: ignore[arg-type]
    assert rows[0].keys() == {"model", "method", "images_per_second", "exact"}
