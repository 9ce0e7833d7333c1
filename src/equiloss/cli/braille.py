"""Curves in the terminal, drawn with braille characters: 2 × 4 dots in each."""

from __future__ import annotations

import math
from collections.abc import Sequence

# Bit of the dot in (row, column) of a character, counted from U+2800.
DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
LABEL = 9


def curve(title: str, values: Sequence[float], *, height: int = 8) -> list[str]:
    """Lines of text with a title, an axis from the lowest to the highest value, and the curve.

    Args:
        title: Stands above.
        values: Two for each column of text, from left to right; what is not finite is left out.
        height: Lines of the curve.

    >>> for line in curve("x²", [x * x for x in (-3, -2, -1, 0, 1, 2, 3, 4)], height=2):
    ...     print(line)
               x²
           16 ┤⡀⠀⠀⡸
            0 ┤⠘⣄⡰⠁
    """
    finite = [value for value in values if math.isfinite(value)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    # A constant is a line through the middle, not a division by 0.
    span = high - low or 1.0
    rows = 4 * height
    middle = 0.0 if high > low else 0.5
    dots = [[0] * math.ceil(len(values) / 2) for _ in range(height)]
    previous: int | None = None
    for x, value in enumerate(values):
        if not math.isfinite(value):
            previous = None
            continue
        y = round(((high - value) / span + middle) * (rows - 1))
        # Steep parts are joined: from the row after the last dot's to this one.
        start = y if previous is None or previous == y else previous + (1 if y > previous else -1)
        for row in range(min(start, y), max(start, y) + 1):
            dots[row // 4][x // 2] |= DOTS[row % 4][x % 2]
        previous = y
    labels = [""] * height
    labels[0], labels[-1] = f"{high:.3g}", f"{low:.3g}"
    lines = (
        f"{label:>{LABEL}} ┤{''.join(chr(0x2800 + bits) for bits in line)}"
        for label, line in zip(labels, dots, strict=True)
    )
    return [" " * (LABEL + 2) + title, *lines]
