"""Panels and what is drawn into them: styles, legends, logarithmic axes, matrices."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from textwrap import fill
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from equiloss.report.runs import Series

# Okabe & Ito, "Color universal design", 2008: told apart by the colour-blind.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")
DASHES = ("-", "--", ":", "-.")
# Shown 800 pixels wide, as a README does, letters of 9 points are 10 pixels high.
WIDTH = 9.6  # inches
DPI = 150


def styles(labels: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each label with the look of its curve."""
    for number, label in enumerate(labels):
        dash = DASHES[number // len(COLOURS) % len(DASHES)]
        colour = COLOURS[number % len(COLOURS)]
        yield label, {"color": colour, "linestyle": dash, "linewidth": width(number)}


def width(number: int) -> float:
    """Of a panel's curves, in points: those that should be the same lie on each other.

    >>> [round(width(number), 1) for number in range(4)]
    [3.6, 2.4, 1.2, 1.0]
    """
    return max(3.6 - 1.2 * number, 1.0)


def panels_in_rows(count: int, columns: int, height: float) -> tuple[Figure, list[Axes]]:
    """Panels in rows, each row so many inches high."""
    columns = min(count, columns)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(WIDTH, height * rows), layout="constrained")
    return figure, [figure.add_subplot(rows, columns, number + 1) for number in range(count)]


def legend_below(figure: Figure, places: Iterable[Axes]) -> None:
    """One legend for all panels, on ground of its own, where it hides no curve."""
    entries: dict[str, Any] = {}
    for axes in places:
        handles, labels = axes.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    if not entries:
        return
    entries |= {label: entries.pop(label) for label in ("bound",) if label in entries}  # comes last
    columns = max(1, min(len(entries), 4, 110 // (max(map(len, entries)) + 8)))
    figure.set_figheight(figure.get_figheight() + 0.2 * math.ceil(len(entries) / columns) + 0.2)
    figure.legend(
        entries.values(),
        [fill(label, 110) for label in entries],
        loc="outside lower center",
        ncols=columns,
        fontsize=9,
    )


def logarithmic(
    axes: Axes,
    curves: Mapping[str, Sequence[Series]],
    looks: Mapping[str, dict[str, Any]],
    bound: float | None = None,
) -> None:
    """Draw curves on a logarithmic axis that has a place for 0 too, and one for "not finite".

    Args:
        axes: Where to.
        curves: One or several of each label.
        looks: Of each label.
        bound: Drawn as a line.
    """
    values = [v for several in curves.values() for series in several for _, v in series]
    positive = [value for value in (*values, bound or 0) if 0 < value < math.inf]
    lowest = math.floor(math.log10(min(positive, default=1e-16)))
    highest = math.ceil(math.log10(max(positive, default=1e-16)))
    for label, several in curves.items():
        style = looks[label]
        marks = {"color": style["color"], "linestyle": "", "markersize": style["linewidth"] + 1.5}
        for number, series in enumerate(several):
            told = label if number == 0 else None
            heights = [v if 0 < v < math.inf else math.nan for _, v in series]
            # The points too: one between two zeros has no line to be seen by.
            drawn = {"marker": ".", "markersize": style["linewidth"] + 2, **style}
            axes.plot([step for step, _ in series], heights, label=told, **drawn)
            same = [step for step, value in series if value == 0]
            axes.plot(same, [10.0 ** (lowest - 1)] * len(same), marker="o", **marks)
            broken = [step for step, value in series if not math.isfinite(value)]
            marks_on_top = {**marks, "marker": "x", "transform": axes.get_xaxis_transform()}
            axes.plot(broken, [0.97] * len(broken), **marks_on_top)
    if bound is not None:
        axes.axhline(bound, color="black", linewidth=1, linestyle=":", label="bound")
    if positive or 0 in values:
        axes.set_yscale("log")
    if 0 in values:
        powers = range(lowest, highest + 1, (highest - lowest) // 7 + 1)
        names = ["0", *(f"$10^{{{power}}}$" for power in powers)]
        axes.set_yticks([10.0 ** (lowest - 1), *(10.0**power for power in powers)], names)
        axes.minorticks_off()


def matrix(axes: Axes, counts: Sequence[Sequence[int]], names: Sequence[str]) -> None:
    """Draw counts by (true class, predicted class) [K][K]; the colour is the share of the row."""
    share = [[value / max(sum(row), 1) for value in row] for row in counts]
    axes.imshow(share, cmap="cividis", vmin=0, vmax=1)
    classes = range(len(names))
    if len(names) > 20:
        return
    axes.set_xticks(classes, names, rotation=90, fontsize=8)
    axes.set_yticks(classes, names, fontsize=8)
    digits = max(len(str(value)) for row in counts for value in row)
    # A matrix is about 2.4 inches wide, and a digit two thirds as wide as it is high.
    size = min(8.0, 2.4 * 72 / len(names) / (0.67 * digits))
    for row, column in itertools.product(classes, classes):
        if counts[row][column]:
            # The colour map is dark below one half.
            colour = "white" if share[row][column] < 0.5 else "black"
            text = str(counts[row][column])
            axes.text(column, row, text, ha="center", va="center", fontsize=size, color=colour)
