"""Plots of an evaluation."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from textwrap import fill

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font

from equiloss.errors import printable

# Names and counts of more classes would lie on each other.
MOST_CLASSES = 20


# A longer name leaves no room for the picture.
MOST_LETTERS = 200


def label(name: str, width: int = MOST_LETTERS) -> str:
    r"""A name as Matplotlib shows it, in lines of some width: as it is, though it had a formula.

    Letters that its font lacks are written out, where it would draw boxes.

    >>> label("naïve 猫")
    'naïve \\u732b'
    """
    known = get_font(findfont("DejaVu Sans")).get_charmap()
    text = "".join(
        letter if ord(letter) in known else letter.encode("ascii", "backslashreplace").decode()
        for letter in printable(name)
    )
    text = text if len(text) <= MOST_LETTERS else f"{text[:MOST_LETTERS]}…"
    return fill(text, width).replace("$", r"\$")


def draw_confusion(counts: Sequence[Sequence[int]], class_names: Sequence[str]) -> Figure:
    """Confusion matrix in a figure of its own: counts by (true class, predicted class) [K][K]."""
    side = min(3 + 0.4 * len(class_names), 14)
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.add_subplot()
    confusion(axes, counts, class_names)
    axes.set(xlabel="predicted class", ylabel="true class")
    return figure


def confusion(axes: Axes, counts: Sequence[Sequence[int]], names: Sequence[str]) -> None:
    """Draw counts by (true class, predicted class) [K][K]; the colour is the share of the row."""
    share = [[value / max(sum(row), 1) for value in row] for row in counts]
    axes.imshow(share, cmap="cividis", vmin=0, vmax=1)
    classes = range(len(names))
    if len(names) > MOST_CLASSES:
        return
    labels = [label(name, 24) for name in names]
    axes.set_xticks(classes, labels, rotation=90, fontsize=8)
    axes.set_yticks(classes, labels, fontsize=8)
    digits = max(len(str(value)) for row in counts for value in row)
    # A matrix is about 2.4 inches wide, and a digit two thirds as wide as it is high.
    size = min(8.0, 2.4 * 72 / len(names) / (0.67 * digits))
    for row, column in itertools.product(classes, classes):
        if counts[row][column]:
            # The colour map is dark below one half.
            colour = "white" if share[row][column] < 0.5 else "black"
            text = str(counts[row][column])
            axes.text(column, row, text, ha="center", va="center", fontsize=size, color=colour)
