"""The proof's data: figures with their bounds, the parts that hold them, and the report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from equiloss.records.atomic import write_atomically


@dataclass(frozen=True)
class Cell:
    """One figure: the difference between a quantity and what it must equal.

    Args:
        row: Name of the quantity.
        column: Name of the split of the work, or of the interruption.
        figure: The difference found.
        bound: The largest difference that rounding explains.
        control: The same figure for the usual mean of local means, where that was tried.
        control_differs: Whether the control must fail here: its local masses differ.
    """

    row: str
    column: str
    figure: float
    bound: float
    control: float | None = None
    control_differs: bool = False

    @property
    def holds(self) -> bool:
        """Whether the figure is within its bound, and a control that must fail does."""
        # Negated, so that a control that is NaN counts as failed.
        detected = not self.control_differs or not (self.control or 0.0) <= CONTROL_AT_LEAST
        return self.figure <= self.bound and detected


CONTROL_AT_LEAST = 1e-3
"""A mean of local means whose masses differ by over 10 % is further off than this."""


@dataclass
class Part:
    """One subject of the proof: a table of cells."""

    title: str
    text: str
    """The experiment, and the meaning of its figures."""
    cells: list[Cell] = field(default_factory=list)
    series: dict[str, list[float]] = field(default_factory=dict)
    """Figures per step, for the picture."""

    @property
    def holds(self) -> bool:
        """Whether every cell holds; a part without cells proves nothing."""
        return bool(self.cells) and all(cell.holds for cell in self.cells)

    @property
    def worst(self) -> float:
        """The largest figure."""
        return max(cell.figure for cell in self.cells)


@dataclass
class Report:
    """The whole proof: its parts, and the environment that they were measured in."""

    parts: dict[str, Part]
    environment: dict[str, Any]

    @property
    def holds(self) -> bool:
        """Whether every part holds."""
        return all(part.holds for part in self.parts.values())

    def write(self, directory: Path) -> None:
        """Write `invariance.json` and `invariance.md`."""
        directory.mkdir(parents=True, exist_ok=True)
        data = {
            "holds": self.holds,
            "environment": self.environment,
            "parts": {
                name: {
                    "title": part.title,
                    "holds": part.holds,
                    "worst": part.worst,
                    "cells": [asdict(cell) | {"holds": cell.holds} for cell in part.cells],
                    # Three digits are enough for a picture.
                    "series": {
                        name: [float(f"{value:.3g}") for value in values]
                        for name, values in part.series.items()
                    },
                }
                for name, part in self.parts.items()
            },
        }
        write_atomically(directory / "invariance.json", json.dumps(data, indent=1) + "\n")
        write_atomically(directory / "invariance.md", self.markdown())

    def markdown(self) -> str:
        """The report as a page with a table for each part."""
        versions = self.environment["versions"]
        lines = [
            "# The same numbers: measured",
            "",
            "Written by `equiloss verify invariance`; do not edit.",
            "",
            f"Verdict: **{'every figure is within its bound' if self.holds else 'BROKEN'}**.",
            f"{self.environment['cpu']}, {self.environment['device']}, gloo, torch "
            f"{versions['torch']}, lightning {versions['lightning']}, a thread per process.",
            "A figure of 0 means the same bits. A cell in bold is beyond its bound.",
            "",
            "![Errors of one step's gradient, and of 100 steps](invariance.png)",
        ]
        for part in self.parts.values():
            lines += ["", f"## {part.title}", "", part.text, "", *_table(part.cells)]
        return "\n".join(lines) + "\n"


def _table(cells: Sequence[Cell]) -> list[str]:
    columns = list(dict.fromkeys(cell.column for cell in cells))
    table = {(cell.row, cell.column): cell for cell in cells}
    lines = [f"| | {' | '.join(columns)} |", f"|---|{'---:|' * len(columns)}"]
    for row in dict.fromkeys(cell.row for cell in cells):
        figures = [_markdown_cell(table.get((row, column))) for column in columns]
        lines.append(f"| {row} | {' | '.join(figures)} |")
    return lines


def _markdown_cell(cell: Cell | None) -> str:
    if cell is None:
        return ""
    figure = "0" if cell.figure == 0 else f"{cell.figure:.1e}"
    return figure if cell.holds else f"**{figure}**"
