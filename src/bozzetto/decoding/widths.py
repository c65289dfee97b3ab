"""How wide a pass should be: as wide as it brings most tokens per second, by what passes of this machine cost and by
what they have committed so far.

Only for rules whose tokens do not depend on the width (seed-exact).
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from bozzetto.common.files import write_text
from bozzetto.runtime.native import cheap_rows

_PERIOD = 24  # passes between decisions
_MEMORY = 400.0  # passes (times images) that an estimate remembers
_MARGIN = 1.02  # a change has to promise this factor
# Every so many decisions a width that promises this share of the best is tried for a few passes: the first rows of an
# image keep fewer drafts than the others. One whose passes have not been seen yet is tried at the next decision: what
# it costs may have been measured while the machine was busy.
_AGAIN, _NEAR, _TRIAL = 4, 0.8, 6
_RATE, _SPIKE = 0.1, 2.0  # how fast the seconds of passes are followed, and what counts of one that was interrupted
_FIRST_GUESS = 0.7  # share of drafts kept, before anything is known
_MOST_ROWS = {32: 64}  # of a pass, beyond which none has paid, by the rows that are cheap; else as many as are cheap


Seconds = Callable[[int, int], float]  # of a pass by images and places


def kept_seconds(path: Path | None, measure: Seconds) -> Seconds:
    """What `measure` gives, asked once and kept in a file where that can be written: it saves measuring again, no more.
    path: JSON, or None: nothing is kept."""
    known = read_seconds(path)

    def seconds(images: int, width: int) -> float:
        if (images, width) not in known:
            known[images, width] = measure(images, width)
            if path is not None:
                kept = {f"{n}x{w}": value for (n, w), value in sorted({**read_seconds(path), **known}.items())}
                with contextlib.suppress(OSError):
                    write_text(path, json.dumps(kept, indent=1) + "\n")
        return known[images, width]

    return seconds


def read_seconds(path: Path | None) -> dict[tuple[int, int], float]:
    """What was measured before; a file that is damaged counts for nothing."""
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path is not None else {}
        pairs = {tuple(map(int, key.split("x"))): float(value) for key, value in content.items()}
    except (OSError, ValueError, AttributeError, TypeError, OverflowError, RecursionError):
        return {}
    return {(k[0], k[1]): v for k, v in pairs.items() if len(k) == 2 and 0 < v < math.inf}


def candidates(sequences: int, widest: int) -> list[int]:
    """Widths worth trying for this many sequences in a pass: 1, the widest that may pay, and half of it."""
    cheap = cheap_rows()
    most = min(widest, max(1, _MOST_ROWS.get(cheap, cheap) // sequences))
    return sorted({1, (most + 1) // 2, most})


class MeasuredWidth:
    """Chooses the places of the next pass, for each number of images (rounded up to a power of two) by itself. seconds:
    of a pass; widest: at most; copies: sequences per image (2 under guidance)."""

    def __init__(self, seconds: Seconds, widest: int, copies: int):
        self.seconds, self.widest, self.copies = seconds, widest, copies
        self.weight: dict[int, float] = {}
        self.mean: dict[int, float] = {}  # tokens per pass and image, by width
        self.taken: dict[tuple[int, int], float] = {}  # seconds of the batch's own passes
        self.now, self.size, self.left = 0, 0, 0
        self.decisions = 0

    def __call__(self, images: int) -> int:
        size = 1 << max(0, images - 1).bit_length()
        if size != self.size or not self.left:
            best = self._best(size)
            tried = self._once_more(size, best)
            self.now, self.size, self.left = tried or best, size, _TRIAL if tried else _PERIOD
        self.left -= 1
        return self.now

    def _best(self, size: int) -> int:
        widths = candidates(size * self.copies, self.widest)
        speed = {w: self.expected(w) / self.cost(size, w) for w in widths}
        best = max(widths, key=lambda w: speed[w])
        stay = self.now in speed and size == self.size and speed[best] < _MARGIN * speed[self.now]
        return self.now if stay else best

    def _once_more(self, size: int, best: int) -> int:
        """A width that may have been judged too early, 0 where there is none or it is not time."""
        self.decisions += 1
        speed = {w: self.expected(w) / self.cost(size, w) for w in candidates(size * self.copies, self.widest)}
        new = [w for w in speed if w != best and (size, w) not in self.taken] if (size, best) in self.taken else []
        near = [w for w in speed if w not in (1, best) and speed[w] >= _NEAR * speed[best]]
        return max(new or ([] if self.decisions % _AGAIN else near), key=lambda w: speed[w], default=0)

    def cost(self, size: int, width: int) -> float:
        """Seconds of a pass: of those that were run, else as measured."""
        return self.taken[size, width] if (size, width) in self.taken else self.seconds(size, width)

    def expected(self, width: int) -> float:
        """Tokens per pass and image: as observed, or as the share of drafts kept at the nearest observed width says."""
        if width == 1 or width in self.mean:
            return self.mean.get(width, 1.0)
        known = min((w for w in self.mean if w > 1), key=lambda w: abs(math.log(w / width)), default=None)
        share = _FIRST_GUESS if known is None else share_kept(self.mean[known], known)
        return committed(share, width)

    def note(self, width: int, report: Sequence[float], real: Sequence[bool], seconds: float | None = None) -> None:
        """Tokens that each row of a pass committed; real: which rows hold an image; seconds: what the pass took."""
        if seconds is not None:
            before = self.taken.get((self.size, width), seconds)
            self.taken[self.size, width] = before + _RATE * (min(seconds, _SPIKE * before) - before)
        found = [tokens for tokens, one in zip(report, real, strict=True) if one]
        if width == 1 or not found:
            return
        before, new = self.weight.get(width, 0.0), float(len(found))
        self.mean[width] = (self.mean.get(width, 0.0) * before + sum(found)) / (before + new)
        self.weight[width] = min(before + new, _MEMORY)


def committed(share: float, width: int) -> float:
    """Tokens per pass where every draft is kept with this chance: sum of share^j for j < width."""
    return float(width) if share >= 1 else (1 - share**width) / (1 - share)


def share_kept(tokens: float, width: int) -> float:
    """The inverse of `committed`."""
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if committed(middle, width) < tokens else (low, middle)
    return (low + high) / 2
