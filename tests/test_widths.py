"""The width of the next pass: most tokens per second by what was measured, and never a loss that is known of."""

from __future__ import annotations

from pathlib import Path

import pytest

from bozzetto.decoding import widths
from bozzetto.decoding.widths import MeasuredWidth, candidates, committed, kept_seconds, share_kept


def paced(cost: dict[int, float], share: float, passes: int = 400, images: int = 2) -> list[int]:
    """Widths chosen in turn on a machine where a pass costs `cost` and each draft is kept with chance `share`."""
    pace = MeasuredWidth(kept_seconds(None, lambda n, w: cost[w]), 16, 1)
    chosen = []
    for _ in range(passes):
        width = pace(images)
        pace.note(width, [committed(share, width)] * images, [True] * images)
        chosen.append(width)
    return chosen


@pytest.fixture(autouse=True)
def many_cheap_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(widths, "cheap_rows", lambda: 32)


FLAT = {1: 1.0, 2: 1.0, 4: 1.0, 8: 1.05, 16: 1.1}
STEEP = {1: 1.0, 2: 1.9, 4: 3.8, 8: 7.5, 16: 15.0}


@pytest.mark.parametrize(("cost", "share", "wanted"), [(FLAT, 0.9, 16), (STEEP, 0.9, 1), (FLAT, 0.0, 1)])
def test_the_width_settles_where_it_brings_most(cost: dict[int, float], share: float, wanted: int) -> None:
    settled = paced(cost, share)[100:]
    assert settled.count(wanted) >= 0.9 * len(settled)


def test_a_width_that_began_badly_is_tried_again() -> None:
    pace = MeasuredWidth(kept_seconds(None, lambda n, w: {1: 1.0, 8: 1.5, 16: 3.0}[w]), 16, 1)
    chosen = []
    for number in range(1000):
        chosen.append(pace(1))
        pace.note(chosen[-1], [1.3 if number < 60 else 2.0], [True])
    assert chosen[60:120].count(1) > 30 and chosen[-200:].count(8) > 180


def test_a_cost_that_was_measured_while_the_machine_was_busy_is_found_out() -> None:
    """Once a width of 8 seemed to cost forty passes, and was never chosen again."""
    real, measured = {1: 1.0, 8: 1.5, 16: 3.0}, {1: 1.0, 8: 40.0, 16: 3.0}
    pace, chosen = MeasuredWidth(kept_seconds(None, lambda n, w: measured[w]), 16, 1), []
    for _ in range(1000):
        chosen.append(pace(1))
        pace.note(chosen[-1], [{1: 1.0, 8: 2.5, 16: 2.6}[chosen[-1]]], [True], real[chosen[-1]])
    assert chosen[-300:].count(8) > 270
    slower, kept = {w: 8 * seconds for w, seconds in real.items()}, chosen[-1]
    for width in (*[kept] * 3, 1):  # an interruption is soon forgotten
        pace.note(width, [1.0], [True], slower[width])
    assert pace.cost(1, 8) < 2.5 and pace.cost(1, 1) < 1.2


def test_drafts_that_are_never_kept_cost_a_few_passes_only() -> None:
    chosen = paced(FLAT, 0.0)
    assert sum(w > 1 for w in chosen) <= 100


def test_empty_slots_and_passes_without_drafts_say_nothing() -> None:
    pace = MeasuredWidth(kept_seconds(None, lambda n, w: 1.0), 16, 1)
    pace.note(4, [3.0, 0.0], [True, False])
    pace.note(1, [1.0], [True])
    assert pace.mean == {4: 3.0}


def test_a_width_not_seen_yet_is_judged_by_the_nearest_one() -> None:
    pace = MeasuredWidth(kept_seconds(None, lambda n, w: 1.0), 16, 1)
    pace.note(8, [committed(0.6, 8)], [True])
    assert pace.expected(16) == pytest.approx(committed(0.6, 16), rel=1e-6)
    assert pace.expected(1) == 1.0


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_share_kept_is_the_inverse_of_tokens_committed(share: float) -> None:
    assert share_kept(committed(share, 8), 8) == pytest.approx(share, abs=1e-9)


@pytest.mark.parametrize(
    ("sequences", "widest", "wanted"),
    [(1, 16, [1, 8, 16]), (2, 5, [1, 3, 5]), (8, 16, [1, 4, 8]), (16, 16, [1, 2, 4]), (256, 16, [1])],
)
def test_few_widths_are_tried_and_none_of_more_rows_than_pay(sequences: int, widest: int, wanted: list[int]) -> None:
    assert candidates(sequences, widest) == wanted


@pytest.mark.parametrize(
    ("cheap", "sequences", "wanted"),
    [
        (8, 1, [1, 4, 8]),
        (8, 2, [1, 2, 4]),
        (8, 4, [1, 2]),
        (8, 8, [1]),
        (16, 1, [1, 8, 16]),
        (16, 8, [1, 2]),
        (16, 16, [1]),
    ],
)
def test_where_rows_cost_widths_are_narrow(
    cheap: int, sequences: int, wanted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(widths, "cheap_rows", lambda: cheap)
    assert candidates(sequences, 16) == wanted


def test_each_number_of_images_has_a_width_of_its_own() -> None:
    """Once an image alone went by what pays for a full batch: a server of eight drew it without drafts."""
    cost = {(n, w): max(1.0, n * w / 4) for n in (1, 2, 4, 8) for w in (1, 2, 4)}
    pace = MeasuredWidth(kept_seconds(None, lambda n, w: cost[n, w]), 4, 1)
    chosen: dict[int, list[int]] = {1: [], 8: []}
    for images in [1] * 100 + [8] * 200 + [1] * 100:
        width = pace(images)
        pace.note(width, [committed(0.6, width)] * images, [True] * images, cost[images, width])
        chosen[images].append(width)
    assert chosen[1].count(4) > 150 and chosen[8].count(1) > 150


def test_times_are_measured_once_and_kept(tmp_path: Path) -> None:
    path, asked = tmp_path / "times.json", []

    def measure(images: int, width: int) -> float:
        asked.append((images, width))
        return images + width / 10

    first = kept_seconds(path, measure)
    assert first(2, 4) == first(2, 4) == 2.4
    other = kept_seconds(path, measure)
    assert other(2, 4) == 2.4 and other(1, 1) == 1.1
    assert asked == [(2, 4), (1, 1)]


@pytest.mark.parametrize(
    "content",
    ["", "[]", '{"2x4": "fast"}', '{"2x4": -1}', '{"2": 1.0}', "\xff", "[" * 99999, '{"2x4": ' + "9" * 999 + "}"],
)
def test_a_damaged_file_of_times_counts_for_nothing(tmp_path: Path, content: str) -> None:
    path = tmp_path / "times.json"
    path.write_text(content, encoding="latin-1")
    assert kept_seconds(path, lambda n, w: 3.0)(2, 4) == 3.0


def test_times_that_cannot_be_kept_are_measured_and_used(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    times = kept_seconds(tmp_path / "file" / "times.json", lambda n, w: 3.0)  # no folder can be there, whoever asks
    assert times(2, 4) == times(2, 4) == 3.0
