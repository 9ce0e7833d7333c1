"""The tables of docs/performance.md as one picture: ratios, their quartiles, what was wanted."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.paired import CONTROL

COLUMNS = 2
# Inches of a bar, and of what a table has above and below its bars.
BAR, AROUND = 0.26, 0.75
TICKS = (1, 2, 5, 10, 20)


def draw(figures: Mapping[str, Any], path: Path) -> None:
    """Draw each table of performance.json as bars on axes of their own, and write the picture."""
    tables = [(title, own["measured"]) for title, own in figures.items()]
    # Neighbours are of one height: what is left of the shorter is empty.
    pairs = [tables[place : place + COLUMNS] for place in range(0, len(tables), COLUMNS)]
    heights = [AROUND + BAR * max(len(rows) for _, rows in pair) for pair in pairs]
    figure = Figure(figsize=(14, sum(heights)), layout="constrained")
    grid = figure.add_gridspec(len(pairs), COLUMNS, height_ratios=heights)
    for line, pair in enumerate(pairs):
        for column, (title, rows) in enumerate(pair):
            axes = figure.add_subplot(grid[line, column])
            places = range(len(rows))
            ratios = [row["ratio"] for row in rows]
            colours = ["tab:blue" for _ in rows]
            if rows[-1]["name"] == CONTROL:
                colours[0] = colours[-1] = "0.7"
            axes.barh(places, ratios, color=colours, height=0.7)
            # A median of quotients lies between their quartiles.
            spread = [
                [row["ratio"] - row["low"] for row in rows],
                [row["high"] - row["ratio"] for row in rows],
            ]
            axes.errorbar(ratios, places, xerr=spread, fmt="none", ecolor="black", capsize=2)
            for place, row in enumerate(rows):
                if row["wanted"] is not None:
                    axes.plot([row["wanted"]] * 2, [place - 0.45, place + 0.45], color="tab:red")
            axes.set_yticks(places, [row["name"] for row in rows], fontsize=8)
            axes.invert_yaxis()
            axes.set_title(title, fontsize=8, loc="left")
            axes.tick_params(axis="x", labelsize=8)
            if max(ratios) > 5:  # one that is far slower hides the others
                axes.set_xscale("log")
                axes.set_xticks(TICKS, [str(tick) for tick in TICKS])
                axes.minorticks_off()
            else:
                axes.set_xlim(left=0)
    figure.supxlabel(
        "times the first of each table, or what its title names (logarithmic: one is above 5); "
        "lines: quartiles; red: wanted",
        fontsize=9,
    )
    figure.savefig(path, dpi=100)
