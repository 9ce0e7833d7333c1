"""Panels of a picture: styles of curves, legends and logarithmic axes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from equiloss.records.plots import label as shown
from equiloss.report.runs import Series

# Okabe & Ito, "Color universal design", 2008: told apart by the colour-blind.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")
DASHES = ("-", "--", ":", "-.")
# Shown 800 pixels wide, as a README does, letters of 9 points are 10 pixels high.
WIDTH = 9.6  # inches
DPI = 150
# Of a curve in points, and of those that are below one, two, … equal ones.
WIDTHS = (1.4, 3.6, 5.8, 8.0)


def styles(labels: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Colour, dashes and width of each label's curve."""
    looks = zip(labels, itertools.cycle(itertools.product(DASHES, COLOURS)), strict=False)
    return {
        label: {"color": colour, "linestyle": dash, "linewidth": WIDTHS[0]}
        for label, (dash, colour) in looks
    }


def with_widths(
    looks: Mapping[str, dict[str, Any]], curves: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """Styles of a panel: of equal curves, which would hide each other, each is wider below.

    >>> looks = with_widths({"a": {}, "b": {}, "c": {}}, {"a": [1], "b": [2], "c": [1]})
    >>> [(label, look["linewidth"]) for label, look in looks.items()]
    [('a', 3.6), ('b', 1.4), ('c', 1.4)]
    """
    equal: dict[str, list[str]] = {}
    for label, curve in curves.items():
        equal.setdefault(repr(curve), []).append(label)
    above = {
        label: len(labels) - 1 - place
        for labels in equal.values()
        for place, label in enumerate(labels)
    }
    return {
        label: {**looks[label], "linewidth": WIDTHS[min(above[label], len(WIDTHS) - 1)]}
        for label in curves
    }


def in_rows(count: int, columns: int, height: float) -> tuple[Figure, list[Axes]]:
    """A figure with panels in rows, each row so many inches high."""
    columns = min(count, columns)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(WIDTH, height * rows), layout="constrained")
    return figure, [figure.add_subplot(rows, columns, number + 1) for number in range(count)]


def legend_below(figure: Figure, panels: Iterable[Axes]) -> None:
    """One legend for all panels, on ground of its own, where it hides no curve."""
    entries: dict[str, Any] = {}
    for axes in panels:
        handles, labels = axes.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    if not entries:
        return
    if "bound" in entries:
        entries["bound"] = entries.pop("bound")  # comes last
    columns = max(1, min(len(entries), 4, 110 // (max(map(len, entries)) + 8)))
    figure.set_figheight(figure.get_figheight() + 0.2 * math.ceil(len(entries) / columns) + 0.2)
    figure.legend(
        entries.values(),
        [shown(label, 110) for label in entries],
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
        axes: The panel.
        curves: One or several of each label.
        looks: Style of each label.
        bound: Drawn as a line.
    """
    values = [v for several in curves.values() for series in several for _, v in series]
    positive = [value for value in (*values, bound or 0) if 0 < value < math.inf]
    lowest = math.floor(math.log10(min(positive, default=1e-16)))
    highest = math.ceil(math.log10(max(positive, default=1e-16)))
    zero = 10.0 ** (lowest - 1)  # where 0 is drawn
    for label, several in curves.items():
        style = looks[label]
        # The points too: one between two zeros has no line to be seen by.
        line = {"marker": ".", "markersize": style["linewidth"] + 2, **style}
        marks = {"color": style["color"], "linestyle": "", "markersize": style["linewidth"] + 1.5}
        for number, series in enumerate(several):
            heights = [v if 0 < v < math.inf else math.nan for _, v in series]
            axes.plot([s for s, _ in series], heights, label=label if number == 0 else None, **line)
            zeros = [step for step, value in series if value == 0]
            axes.plot(zeros, [zero] * len(zeros), marker="o", **marks)
            broken = [step for step, value in series if not math.isfinite(value)]
            transform = axes.get_xaxis_transform()
            axes.plot(broken, [0.97] * len(broken), marker="x", transform=transform, **marks)
    if bound is not None:
        axes.axhline(bound, color="black", linewidth=1, linestyle=":", label="bound")
    if positive or 0 in values:
        axes.set_yscale("log")
    if 0 in values:
        powers = range(lowest, highest + 1, (highest - lowest) // 7 + 1)
        names = ["0", *(f"$10^{{{power}}}$" for power in powers)]
        axes.set_yticks([zero, *(10.0**power for power in powers)], names)
        axes.minorticks_off()
